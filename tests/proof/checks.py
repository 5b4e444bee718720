"""What the kernels of an op must do, in little time: run for every mutant until one check fails.

A check runs on the backend "emulator", with its own order of threads and blocks. Expected answers are kept, so that the
process that runs the checks may be forked from one that has made them.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cases
import hostile
import torch
from errors import assert_within_rule
from proof import emulator
from torch import Tensor

import fastlm
import fastlm.functional as F
from fastlm.ops.compiled import Launchers
from fastlm.ops.cross_entropy import launch, reference
from fastlm.ops.cross_entropy.kernels import Kernels, Options
from fastlm.ops.philox import keep_mask

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
ORDERS = (
    {"schedule": "adversarial", "landing": "lazy"},
    {"schedule": "round_robin", "landing": "eager", "blocks": "random"},
)


class Check(NamedTuple):
    """Something that a kernel must do; `run` raises where it does not."""

    name: str
    run: Callable[[], None]
    settings: dict[str, str]  # of the emulator
    builds: tuple[str, ...] = ("plain",)


def ragged(x: Tensor) -> Tensor:
    """Rows that begin at odd places after the first, which is aligned."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1), torch.nan)
    wide[..., :-1] = x
    return wide[..., :-1] if x.dim() > 1 else x


def far_rows(x: Tensor) -> Tensor:
    """Rows 66 elements apart: not aligned to 16 bytes, while a quarter of 66 rounds to a multiple of 16."""
    wide = x.new_full((*x.shape[:-1], 66), torch.nan)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]] if x.dim() > 1 else x


def outer_reversed(x: Tensor) -> Tensor:
    """The outer dimensions in reverse order in memory, so that no two of them fold."""
    order = [*reversed(range(x.dim() - 1)), x.dim() - 1]
    return x.permute(order).contiguous().permute(order)


def shifted(x: Tensor, by: int = 1) -> Tensor:
    """The second element of its storage is the first."""
    return torch.cat([x.new_zeros(by), x.flatten()])[by:].view(x.shape)


def shifted_by_two(x: Tensor) -> Tensor:
    return shifted(x, 2)


def values(
    case: cases.Case,
    dtype: torch.dtype,
    order: dict[str, str],
    builds: Sequence[str] = ("plain",),
    place: Callable[[Tensor], Tensor] | None = None,
    placed: Sequence[str] = (),
) -> Check | None:
    """Outputs and gradients within the error rule; None for what the kernels do not serve.

    Args:
        place: another layout of `placed`: arguments, or `grad_<n>` for upstream gradients.
    """
    expected, function = cases.Call(case, dtype, "cpu"), getattr(F, case.op)
    with fastlm.use_backend("emulator"):
        if fastlm.explain(function, **expected.arguments, **case.options).backend is None:
            return None
    if case.options.get("dropout_p") and case.options.get("training", True):  # torch has none with this mask
        with fastlm.use_backend("reference"):
            doubles = {name: x.double() for name, x in expected.arguments.items()}
            torch.manual_seed(0)
            expected.torch_outputs, expected.torch_gradients = expected.run(function, expected.arguments)
            torch.manual_seed(0)
            expected.outputs, expected.gradients = expected.run(function, doubles)
    for name in placed:
        if name.startswith("grad_"):
            upstream = expected.upstream[int(name[5:])]
            expected.upstream[int(name[5:])] = None if upstream is None else place(upstream)
        else:
            expected.arguments[name] = place(expected.arguments[name])

    def run() -> None:
        torch.manual_seed(0)
        with fastlm.use_backend("emulator"):
            outputs, gradients = expected.ours()
        for n, answers in enumerate(zip(outputs, expected.torch_outputs, expected.outputs, strict=True)):
            assert_within_rule(*answers, f"output {n}")
        for name, gradient in gradients.items():
            assert_within_rule(gradient, expected.torch_gradients[name], expected.gradients[name], name)

    name = " ".join([str(case), str(dtype).removeprefix("torch."), *placed, order["schedule"]])
    return Check(name, run, order, tuple(builds))


def norm_checks() -> list[Check]:
    """Of the norms: each path through the kernels at its limits, then what the shared tests call."""
    orders, checks = itertools.cycle(ORDERS), []

    def limit(
        shape: tuple[int, ...],
        dtype: torch.dtype,
        op: str = "layer_norm",
        *,
        parameters: tuple[str, ...] = ("weight", "bias"),
        residual: torch.dtype | None = None,
        dropout_p: float = 0.0,
        shift: float = 0.0,
        unused: tuple[int, ...] = (),
        fixed: tuple[str, ...] = (),
        place: Callable[[Tensor], Tensor] | None = None,
        placed: Sequence[str] = (),
    ) -> None:
        options: dict[str, Any] = {"normalized_shape": shape[-1:]} | ({"dropout_p": dropout_p} if dropout_p else {})
        name = "x".join(map(str, shape)) + f" dropout {dropout_p:.1f}" * bool(dropout_p) + " far from 0" * bool(shift)
        name += "".join(f" without gradient of {each}" for each in (*unused, *fixed))
        dtypes = {} if residual is None else {"residual": residual}
        make = cases._norm_tensors(op, shape, 1, parameters)

        def tensors(generator: torch.Generator) -> dict[str, Tensor]:
            made = make(generator)
            return made | {"input": made["input"] + shift}

        case = cases.Case(op, name, tensors, options, dtypes=dtypes, unused=unused, fixed=fixed)
        small = torch.Size(shape).numel() < 9000
        builds = ("plain", "trace") if small else ("plain",)
        checks.append(values(case, dtype, next(orders), builds, place, placed))

    for op in NORMS:
        limit((33, 16), FP32, op)  # four blocks of eight rows in backward, one with a row more
        limit((9, 33), BF16, op)  # element by element; the second block is nearly empty
    limit((150, 16), FP32)  # more partial rows than are summed at a time
    limit((17, 64), BF16, "add_layer_norm", residual=FP32, dropout_p=0.4)
    limit((9, 64), BF16, "add_layer_norm", dropout_p=0.4)
    limit((9, 40), FP32, "add_rms_norm", dropout_p=0.4)
    limit((9, 101), FP32, "add_layer_norm", dropout_p=0.4)
    limit((3, 512), FP32, "add_layer_norm", dropout_p=0.4)  # several vectors of a thread
    limit((3, 512), BF16, "add_layer_norm", dropout_p=0.4)
    limit((5, 512), FP32)  # all that a warp holds
    limit((5, 513), BF16, "rms_norm")  # a second warp for one element
    limit((9, 768), FP32, "add_layer_norm")
    limit((9, 768), FP32, "add_layer_norm")
    limit((3, 2048), FP32)  # the most threads of rows that share a block
    limit((2, 4100), FP32)  # nine warps, not a power of two
    limit((2, 4100), FP32)
    limit((17, 4100), BF16, "rms_norm")
    limit((2, 8192), BF16, "add_rms_norm")  # the widest row that is held in registers
    limit((17, 8200), FP32)  # read again and again; two blocks in backward
    limit((1, 8200), BF16, "rms_norm")
    limit((1, 8200), FP32, "add_rms_norm")
    limit((1, 8200), FP32, "add_layer_norm", unused=(0,))
    limit((2, 8200), BF16, "add_layer_norm", residual=FP32, dropout_p=0.4)
    limit((2, 12000), FP32)
    limit((2, 12000), FP32, "rms_norm")
    limit((1, 17000), FP32)
    limit((9, 16), FP16, "add_layer_norm", residual=FP32)
    limit((5, 24), FP16, parameters=("weight",))
    for argument in ("input", "residual", "weight", "bias", "grad_0", "grad_1"):
        limit((9, 16), FP32, "add_layer_norm", place=shifted, placed=[argument])
    for argument in ("input", "residual", "grad_0", "grad_1"):
        limit((9, 16), FP32, "add_layer_norm", place=ragged, placed=[argument])
    for argument in ("input", "grad_0"):
        for place in (shifted, shifted_by_two, ragged):
            limit((9, 16), BF16, "add_layer_norm", residual=FP32, place=place, placed=[argument])
        limit((9, 16), FP32, place=shifted, placed=[argument])
    for fixed in (("weight",), ("bias",), ("weight", "bias"), ("input",), ("residual",), ("input", "residual")):
        for columns in (16, 8200):
            limit((3, columns), FP32, "add_layer_norm", fixed=fixed)
    limit((9, 16), FP32, place=far_rows, placed=["input"])
    limit((9, 16), FP32, place=far_rows, placed=["grad_0"])
    for columns in (16, 8200):  # rstd is infinite, and times no gradient at all still nothing
        tensors = {name: torch.ones(3, columns, dtype=torch.float64) for name in ("input", "residual")}
        options = {"normalized_shape": (columns,), "eps": 0.0}
        case = cases.Case("add_layer_norm", f"constant 3x{columns}", lambda _, t=tensors: t, options, unused=(0,))
        checks.append(values(case, FP32, next(orders)))
    limit((3, 96), FP32, shift=1000.0)  # the variance is that of the deviations
    limit((1, 8200), FP32, shift=1000.0)
    for shape in ((3, 2, 16), (2, 3, 4, 3, 16), (2, 3, 3, 16), (2, 2, 3, 6, 16), (2, 2, 1, 3, 16)):
        limit(shape, FP32, place=outer_reversed, placed=["input", "grad_0"])
    limit((9, 64), FP32, "add_layer_norm", dropout_p=word_of_dropout())  # that of an element, which is kept
    checks += [
        norm_traffic(8192),
        norm_traffic(512),
        norm_traffic(516),
        Check("launchers", refused_launches, ORDERS[0]),
    ]

    slow = ("many rows", "wider than every tile", "last stride past 2^30")
    for case in cases.CASES:
        if case.op in NORMS and case.name not in slow and (not case.far or case.op == "layer_norm"):
            for dtype in (FP32,) if case.far else (FP32, BF16):
                checks.append(values(case, dtype, next(orders)))
    return [check for check in checks if check is not None]


def word_of_dropout() -> float:
    """The probability at which an element is just kept, under the seed of the checks."""
    torch.manual_seed(0)
    state, row = torch.ops.fastlm.new_rng_state(torch.empty(0)), torch.tensor(0)
    word = 0
    for bit in reversed(range(32)):
        if keep_mask(state, row, 1, (word + 2**bit) / 2**32)[0]:
            word += 2**bit
    return word / 2**32


def norm_traffic(columns: int) -> Check:
    """All but the statistics, which each thread reads, in accesses of 16 bytes, each element once."""
    x, residual = torch.randn(2, columns), torch.randn(2, columns)
    weight, bias = torch.randn(columns), torch.randn(columns)

    def run() -> None:
        leaves = [each.clone().requires_grad_() for each in (x, residual, weight, bias)]

        def step() -> None:
            with fastlm.use_backend("emulator"):
                output, stream = F.add_layer_norm(*leaves[:2], (columns,), *leaves[2:])
                torch.autograd.grad([output, stream], leaves, [x, residual])

        lines = [line for line in emulator.trace(step).lines if line.space == "global"]
        for kernel, tensors, parameters in (("fwd", 4, 4), ("bwd", 4, 2 + 2)):
            own = [line for line in lines if re.match(rf"\w*{kernel}(?!_sum)", line.kernel)]
            wide, narrow = (
                sum(line.bytes for line in own if (line.width == 16) == is_wide) for is_wide in (True, False)
            )
            assert own, f"no kernel {kernel}"
            assert narrow <= 2 * columns, f"{kernel}: {narrow} bytes not in accesses of 16 bytes"
            assert wide <= 4 * columns * (2 * tensors + parameters), f"{kernel}: {wide} bytes"

    return Check(f"add_layer_norm-{columns} traffic", run, ORDERS[0], ("trace",))


def refused_launches() -> None:
    """Pairs of dtypes that are none, and a grid of no blocks in backward, are told of."""
    module = emulator._configured()
    allowed = {("float32", "float32"), *itertools.product(("bfloat16", "float16"), ("float32",))}
    allowed |= {("bfloat16", "bfloat16"), ("float16", "float16")}
    codes = module.DTYPES

    gradient = torch.zeros(16)

    def launch(direction: str, t: str, r: str, partial_rows: int) -> str:
        types = (codes[t], codes[r], codes["float32"])
        try:
            if direction == "fwd":
                module.layer_norm_fwd(*[0] * 8, 1, 16, 16, 16, 1e-5, 0.0, False, *types, 0, 0)
            else:
                pointers = [0] * 8 + [gradient.data_ptr(), 0, 0]
                module.layer_norm_bwd(*pointers, 1, 16, 16, 16, 16, 0.0, False, *types, partial_rows, 0, 0)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    for direction in ("fwd", "bwd"):
        for t, r in itertools.product(codes, codes):
            if (t, r) not in allowed:
                assert "do not go together" in launch(direction, t, r, 1), f"{direction} of {t} and {r}"
    assert launch("bwd", "float32", "float32", 0) != "nothing", "a launch that failed is not told of"


# The losses -------------------------------------------------------------------------------------------------------


def classes_last(x: Tensor) -> Tensor:
    """(N, C, d1, ...) that lies as (N, d1, ..., C)."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def positions_reversed(x: Tensor) -> Tensor:
    """The same, with all dimensions before C in reverse order in memory, so that no two of them fold."""
    return outer_reversed(x.movedim(1, -1)).movedim(-1, 1)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def cross_entropy_checks() -> list[Check]:
    """Of the losses: each path through the kernels at its limits, then what the shared tests call."""
    orders, checks = itertools.cycle(ORDERS), []

    def limit(
        shape: tuple[int, ...],
        dtype: torch.dtype = FP32,
        op: str = "cross_entropy",
        *,
        ignored: Sequence[int] = (),
        weight: bool = False,
        probabilities: torch.dtype | None = None,
        change: Callable[[dict[str, Tensor]], object] | None = None,
        place: Callable[[Tensor], Tensor] | None = None,
        placed: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Logits of this shape, of which some rows are ignored; `change` may set some of them."""
        classes, rows = shape[1], (shape[0], *shape[2:])
        name = "x".join(map(str, shape)) + " weight" * weight + f" ignored {ignored}" * bool(ignored)
        name += "".join(f" {each} {value}" for each, value in options.items())
        name += f" {probabilities} probabilities" * bool(probabilities)
        name += "".join(f" {each.__name__}" for each in (change, place) if each)

        def tensors(generator: torch.Generator) -> dict[str, Tensor]:
            random = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
            made = {"input": 2 * random(shape)}
            if op == "linear_cross_entropy":
                made = {"input": random(shape[0], 3), "linear_weight": random(classes, 3)}
            made["target"] = torch.randint(0, classes, rows, generator=generator)
            made["target"].view(-1)[list(ignored)] = options.get("ignore_index", -100)
            if probabilities:
                made["target"] = random(shape).softmax(1)
            if weight:
                made["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
            if change:
                change(made)
            return made

        own = {"target": probabilities} if probabilities else {}
        case = cases.Case(op, name, tensors, options, dtypes=own)
        builds = ("plain", "trace") if torch.Size(shape).numel() < 1500 else ("plain",)
        checks.append(values(case, dtype, next(orders), builds, place, placed))

    everything: dict[str, Any] = {"weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0}
    for classes in (1, 2, 3, 7, 31, 33):  # a warp to a row, eight to a block; nearly all rows begin out of place
        limit((9, classes))
        limit((9, classes), BF16, **everything)
        limit((9, classes), FP16, "linear_cross_entropy", ignored=[8], **everything)
    for classes, dtype in ((512, FP32), (513, BF16), (515, FP16), (1000, FP32), (1000, BF16)):
        limit((5, classes), dtype, ignored=[1])
        limit((5, classes), dtype, "linear_cross_entropy", ignored=[1], z_loss=0.1)
    for classes, dtype in ((4100, FP32), (8191, BF16), (8192, FP16), (8200, FP32), (10007, BF16), (17000, BF16)):
        limit((1, classes), dtype)
        limit((1, classes), dtype, "linear_cross_entropy", **everything)
    limit((3, 513), **everything)
    limit((9, 20), weight=True, z_loss=1.0)
    limit((2, 8193), probabilities=FP32, reduction="none", label_smoothing=0.1)
    for ignored in ([0], [8], [0, 3, 8], range(8), range(9)):
        for reduction in ("none", "sum", "mean"):
            limit((9, 20), ignored=ignored, reduction=reduction, weight=True, z_loss=0.1, label_smoothing=0.1)
        limit((9, 20), ignored=ignored)
        limit((9, 20), FP16, "linear_cross_entropy", ignored=ignored, weight=True, z_loss=0.1)
    limit((9, 20), ignored=[2, 3], ignore_index=4, weight=True, z_loss=0.1)
    limit((9, 20), ignored=[2, 3], ignore_index=0, label_smoothing=0.3)
    limit((1100, 3), ignored=[5, 700], weight=True, z_loss=0.1)  # more rows than the threads that sum them
    for softcap in (0.0, 3.0):  # what is general, one after another
        limit((9, 20), softcap=softcap)
        limit((9, 20), softcap=softcap, weight=True)
        limit((9, 20), softcap=softcap, label_smoothing=0.2)
        limit((9, 20), softcap=softcap, label_smoothing=0.2, weight=True)
        for dtype, probabilities in itertools.product((FP32, BF16), (FP32, BF16, FP16)):
            limit((9, 20), dtype, probabilities=probabilities, softcap=softcap)
            limit((9, 20), dtype, probabilities=probabilities, softcap=softcap, label_smoothing=0.2, weight=True)
    for dtype in (FP32, BF16, FP16):
        for place in (shifted, shifted_by_two, ragged):
            for options in ({}, {"probabilities": BF16, "weight": True, "z_loss": 0.1}):
                limit((9, 40), dtype, place=place, placed=["input"], **options)
        limit((9, 40), dtype, place=ragged, placed=["target"], probabilities=FP32)
    for classes in (1, 2, 3):
        limit((5, classes), BF16, place=shifted, placed=["input"])
    for shape in ((3, 12, 2), (2, 12, 3, 4, 3), (2, 12, 3, 3), (2, 8, 2, 3, 6), (2, 8, 2, 1, 3), (2, 8, 3, 2, 2, 3)):
        limit(shape, place=positions_reversed, placed=["input"], weight=True, z_loss=0.1)
        limit(shape, place=positions_reversed, placed=["input", "grad_0"], reduction="none")
        limit(shape, place=positions_reversed, placed=["target"], probabilities=FP32)

    def huge(made: dict[str, Tensor]) -> None:
        made["input"] *= 1e30

    def nearly_all_excluded(made: dict[str, Tensor]) -> None:
        made["input"].fill_(-torch.inf)[:, 3] = 1.0
        made["target"].fill_(3)

    def excluded(made: dict[str, Tensor]) -> None:
        made["input"][:, ::3] = -torch.inf
        made["target"].fill_(1)

    def all_excluded(made: dict[str, Tensor]) -> None:
        made["input"][1] = -torch.inf

    def infinite(made: dict[str, Tensor]) -> None:
        made["input"][1, 5] = torch.inf

    def not_a_number(made: dict[str, Tensor]) -> None:
        made["input"][1, 5] = torch.nan

    def infinite_weight(made: dict[str, Tensor]) -> None:
        made["target"].fill_(1)
        made["weight"][2] = torch.inf

    def last_class(made: dict[str, Tensor]) -> None:
        made["target"].fill_(made["input"].shape[1] - 1)

    def first_class(made: dict[str, Tensor]) -> None:
        made["target"].fill_(0)

    def weightless_targets(made: dict[str, Tensor]) -> None:
        made["target"].fill_(1)
        made["weight"][1] = 0.0

    for classes in (20, 600):
        for change in (huge, excluded, nearly_all_excluded, all_excluded, infinite, not_a_number):
            limit((3, classes), change=change, reduction="none")
            limit((3, classes), change=change, softcap=2.0)
    for change in (first_class, last_class):
        limit((9, 20), change=change, weight=True)
    limit((3, 20), change=infinite_weight, weight=True, softcap=3.0)
    limit((3, 20), change=weightless_targets, weight=True, label_smoothing=0.2, reduction="sum")
    checks += [
        Check("loss of targets without weight", loss_without_weight, ORDERS[0]),
        Check("probabilities are not ignored", probabilities_are_not_ignored, ORDERS[0]),
        Check("targets out of range", targets_out_of_range, ORDERS[0]),
        Check("loss launchers", refused_losses, ORDERS[0]),
        *(logits_traffic(9, classes, dtype) for classes in (40, 515) for dtype in (FP32, BF16)),
        *(logits_traffic(2, 8200, dtype) for dtype in (FP32, BF16)),
    ]
    places = (hostile.contiguous, shifted, shifted_by_two, ragged, far_rows, outer_reversed)
    for logits_place, grad_place in itertools.product(places, places):
        for dtype in (FP32, BF16) if hostile.contiguous in (logits_place, grad_place) else (FP32,):
            checks.append(gradient_placed(logits_place, grad_place, dtype, next(orders)))
    checks.append(gradient_placed(hostile.far_apart, hostile.far_apart, BF16, next(orders)))
    for place in (classes_last, positions_reversed, hostile.contiguous):
        checks += [gradient_over_logits(place, reduction, next(orders)) for reduction in ("none", "mean")]

    slow = ("odd and wide", "wider than every tile")
    for case in cases.CASES:
        if "cross_entropy" in case.op and case.name not in slow and (not case.far or case.name == "strides past 2^31"):
            for dtype in (BF16,) if case.far else (FP32, BF16):
                checks.append(values(case, dtype, next(orders)))
    return [check for check in checks if check is not None]


def row_functions() -> Kernels:
    """Those of rows of logits that the launchers of the emulator are behind."""
    return launch.kernels(Launchers("", lambda _: (0, 0), emulator.missing, emulator._Module))


def gradient_placed(
    logits_place: Callable[[Tensor], Tensor],
    grad_place: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    order: dict[str, str],
) -> Check:
    """A gradient that lies otherwise than its logits."""
    target, grad_loss = torch.tensor([0, 11, -100, 3, 5, 5, -100, 1, 2, 3, 4, 0]), normal(12)
    x, options, divisors = normal(3, 2, 2, 12).to(dtype), Options(-100, 0.0, 0.1, 0.0), torch.tensor([7.0, 9.0])

    def expected(wide: torch.dtype) -> tuple[Tensor, Tensor]:
        flat, losses, stats = x.view(12, 12).to(wide), torch.empty(12, dtype=wide), torch.empty(3, 12, dtype=wide)
        reference.KERNELS.fwd(flat, target, None, options, losses, stats, None)
        grad = torch.empty_like(flat)
        reference.KERNELS.bwd(grad_loss.to(wide), flat, target, None, options, stats, divisors.to(wide), grad)
        return grad, stats

    (rounded, stats), (exact, _) = expected(FP32), expected(torch.float64)
    logits, grad = logits_place(x), grad_place(x)

    def run() -> None:
        grad.fill_(torch.nan)
        row_functions().bwd(grad_loss, logits, target, None, options, stats, divisors, grad)
        assert_within_rule(grad.reshape(12, 12), rounded.to(dtype), exact)

    return Check(f"gradient {grad_place.__name__}, logits {logits_place.__name__} {dtype}", run, order)


def gradient_over_logits(place: Callable[[Tensor], Tensor], reduction: str, order: dict[str, str]) -> Check:
    """inplace_backward, through whatever layout."""
    x, target = normal(2, 12, 3, 2), torch.arange(12).view(2, 3, 2)
    target[0, 0, 0] = target[-1, -1, -1] = -100
    upstream = normal(*target.shape) if reduction == "none" else torch.tensor(3.0)

    def gradient(leaf: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        logits = place(leaf)
        loss = F.cross_entropy(logits, target, reduction=reduction, z_loss=0.1, **options)
        return torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0], logits

    with fastlm.use_backend("reference"):
        expected, exact = (gradient(x.to(dtype).requires_grad_())[0] for dtype in (FP32, torch.float64))

    def run() -> None:
        with fastlm.use_backend("emulator"):
            ours, logits = gradient(x.clone().requires_grad_(), inplace_backward=True)
        assert_within_rule(ours, expected, exact)
        assert torch.equal(logits, ours), "the gradient is not where the logits were"

    return Check(f"gradient over logits, {place.__name__} {reduction}", run, order, ("plain", "trace"))


def loss_without_weight() -> None:
    """Where no target that counts has a weight, or none counts, there is no gradient but the z part's."""
    x, weight = normal(3, 20), torch.ones(20)
    weight[1] = 0.0
    for target, z_loss in itertools.product((torch.full((3,), 1), torch.full((3,), -100)), (0.0, 0.1)):
        grads = []
        for backend, dtype in (("emulator", FP32), ("reference", FP32), ("reference", torch.float64)):
            leaf = x.to(dtype).requires_grad_()
            with fastlm.use_backend(backend):
                loss = F.cross_entropy(leaf, target, weight.to(dtype), z_loss=z_loss)
                grads.append(torch.autograd.grad(loss, leaf)[0])
            assert loss.isnan()
        assert_within_rule(*grads)
    weight[2] = 2.0
    leaf = x.clone().requires_grad_()
    with fastlm.use_backend("emulator"):
        loss = F.cross_entropy(leaf, torch.full((3,), 1), weight, label_smoothing=0.5)
    assert loss == torch.inf, f"the smoothed part, over no weight, is {loss}"


def probabilities_are_not_ignored() -> None:
    """Whatever ignore_index says, for they are no indices."""
    divisors, losses, options = torch.zeros(2), torch.tensor([1.0, 2.0, 3.0]), Options(0, 0.0, 0.0, 0.0)
    loss = row_functions().sum(normal(3, 5), None, options, losses, torch.zeros(3, 3), divisors)
    assert loss == 2.0, f"the mean is {loss}"
    assert divisors.tolist() == [3.0, 3.0]


def targets_out_of_range() -> None:
    """The first class that is none, on either side: told of by each kernel."""
    x, weight, options = normal(2, 5), torch.ones(5), Options(-100, 0.0, 0.0, 0.0)
    rows, losses, stats, divisors = row_functions(), torch.zeros(2), torch.zeros(3, 2), torch.zeros(2)

    def message(error: type[Exception], function: Callable[..., Any], *args: Any) -> str:
        try:
            function(*args)
        except error as raised:
            return str(raised)
        return "nothing"

    for target, told in ((0, False), (4, False), (-100, False), (-1, True), (5, True), (2**32, True)):
        target = torch.tensor([2, target])
        for weighted in (None, weight):
            for divided in (None, divisors):
                given = (target, weighted, options, losses, stats, divided)
                fwd = message(IndexError, rows.fwd, x.clone(), *given)
                assert ("target must be in [0, 5)" in fwd) == told, f"forward of {target}: {fwd}"
            bwd = (torch.ones(1), x, target, weighted, options, torch.zeros(3, 2), None, torch.zeros(2, 5))
            bwd = message(RuntimeError, rows.bwd, *bwd)
            assert ("target must be a class" in bwd) == told, f"backward of {target}: {bwd}"
        total = message(IndexError, rows.sum, target, weight, options, None, None, divisors)
        assert ("target must be in [0, 5)" in total) == told, f"sum of {target}: {total}"


def logits_traffic(rows: int, classes: int, dtype: torch.dtype) -> Check:
    """Logits that are not ignored are read once in each direction and their gradients written once, 16 bytes at a time
    but for the ends of rows; by one warp for 512 classes, at most 16, in blocks of eight or of one row's."""
    x, target = normal(rows, classes).to(dtype), torch.arange(rows)
    target[1] = -100
    counted, aligned = (rows - 1) * classes * x.itemsize, classes * x.itemsize % 16 == 0
    ends = 0 if aligned else rows * 2 * (16 - x.itemsize)
    warps = min(16, -(-classes // 512))
    threads = -(-rows // (8 // warps or 1)) * (8 // warps or 1) * warps * 32

    def run() -> None:
        leaf = x.clone().requires_grad_()
        with fastlm.use_backend("emulator"):
            fwd = emulator.trace(lambda: F.cross_entropy(leaf, target, reduction="sum"))
            bwd = emulator.trace(lambda: torch.autograd.grad(fwd.result, leaf)[0])
        assert fwd.bytes_read(leaf) == counted + (rows - 1) * x.itemsize, "logits, and once more those of the targets"
        assert bwd.bytes_read(leaf) == counted
        assert bwd.bytes_written(bwd.result) == x.nbytes
        for trace, most, between in ((fwd, counted, ends), (bwd, counted + x.nbytes, 2 * ends)):
            lines = [line for line in trace.lines if "_sum" not in line.kernel]
            wide = sum(line.bytes for line in lines if line.width == 16)
            assert most - between <= wide <= most, f"{wide} of {most} bytes in vectors"
            assert all("indices" in line.kernel for line in lines)
        targets = sum(line.bytes for line in fwd.lines if line.width == 8 and "_fwd" in line.kernel)
        assert targets == 8 * threads, f"{targets // 8} threads read a target where {threads} have one"

    return Check(f"cross_entropy-{rows}x{classes} {dtype} traffic", run, ORDERS[0], ("trace",))


def refused_losses() -> None:
    """Logits in a dtype that is not served, and more classes than an int counts, are told of."""
    module = emulator._configured()
    codes, ignored, zeros = module.DTYPES, torch.tensor([-100]), torch.zeros(8)

    def launch(direction: str, dtype: str, classes: int) -> str:
        x, target, losses, stats = (each.data_ptr() for each in (zeros, ignored, zeros[4:], zeros[5:]))
        options = (-100, 0.0, 0.0, 0.0, False, codes[dtype], 0, 0, 0, 0)
        try:
            if direction == "fwd":
                module.cross_entropy_fwd(x, target, 0, 0, losses, stats, 1, classes, 0, classes, 1, *options)
            else:
                strides = (classes, 0, classes)
                module.cross_entropy_bwd(losses, x, target, 0, 0, stats, x, 1, *strides, classes, 1, False, *options)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    most = 2**31 - 2**16
    for direction in ("fwd", "bwd"):
        assert "dtype" in launch(direction, "float64", 4), direction
        assert "too many classes" in launch(direction, "float32", most + 1), direction
    assert launch("fwd", "float32", most) == "nothing"
