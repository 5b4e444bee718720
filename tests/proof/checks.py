"""What the kernels of an op must do, in little time: run for every mutant until one check fails.

A check runs on the backend "emulator", with its own order of threads and blocks. Expected answers are kept, so that the
process that runs the checks may be forked from one that has made them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cases
import torch
from errors import assert_within_rule
from proof import emulator
from torch import Tensor

import fastlm
import fastlm.functional as F
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
