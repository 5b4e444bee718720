"""The calls that are measured: an op, its sizes, a dtype and options, and what PyTorch has for them.

As text, `attention:1x12x1024x64,causal` or `attention 1x12x1024x64 causal bf16`: `parse` reads what `str` writes.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlm.functional as F
from fastlm.config import nearest

__all__ = ["DEVICE_DTYPES", "DTYPES", "NAMES", "STANDARD", "Case", "Problem", "dtypes_of", "parse", "standard"]

ATTENTION, VARLEN = "scaled_dot_product_attention", "varlen_attention"
NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
SHORT = {"attention": ATTENTION, "varlen": VARLEN}
# Op -> the forms that its sizes may have.
SIZES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(NORMS, ("ROWSxCOLUMNS",)),
    "cross_entropy": ("ROWSxCLASSES",),
    "linear_cross_entropy": ("ROWSxFEATURESxCLASSES",),
    ATTENTION: ("BxHxTxD", "BxHxTqxTkxD"),
    VARLEN: ("SEQUENCESxHxLONGESTxD",),
    "linear": ("ROWSxINxOUT",),
}
# Option -> (its value where none is given, the ops that take it).
OPTIONS: dict[str, tuple[float, tuple[str, ...]]] = {
    "causal": (1, (ATTENTION, VARLEN)),
    "masked": (1, (ATTENTION,)),  # the keys of shorter sequences are padding, by a boolean mask
    "cached": (1, (ATTENTION,)),  # key_lengths: the keys are a cache that is filled in part
    "window": (256, (ATTENTION, VARLEN)),  # so many keys to the left, and without causal to the right
    "alibi": (1, (ATTENTION, VARLEN)),
    "softcap": (30, (ATTENTION, VARLEN)),
    "gqa": (4, (ATTENTION, VARLEN)),  # query heads for each head of the keys
    "dropout": (0.1, (ATTENTION, VARLEN, "add_layer_norm", "add_rms_norm")),
    "in_place": (1, ("cross_entropy",)),  # inplace_backward
    "forward": (1, tuple(SIZES)),  # no backward
}
# In tables and on the command line.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
DEVICE_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp16", "fp32")}
DTYPE_LAG = 6
# Type of device -> its standard cases, the most important first; small ones too, where a call costs more than its work.
STANDARD: dict[str, tuple[str, ...]] = {
    "cpu": (
        "attention 1x12x1024x64 causal",
        "layer_norm 4096x768",
        "cross_entropy 512x50304",
        "add_layer_norm 4096x768",
        "rms_norm 4096x768",
        "add_rms_norm 4096x768",
        "varlen 8x12x512x64",
        "attention 8x12x128x64 masked",
        "attention 8x12x1x1024x64 causal cached forward",
        "linear_cross_entropy 1024x768x50304",
        "linear 1x768x3072 forward",
        "attention 96x8x16x64",
        "attention 4x12x512x64",
        "cross_entropy 512x50304 in_place",
        "cross_entropy 8192x1000",
        "cross_entropy 1024x50304",
        "layer_norm 2048x4096",
        "layer_norm 4096x768 forward",
        "linear 512x768x3072",
        "attention 1x12x1024x64 causal alibi",
        "attention 1x12x1024x64 causal window=256",
        "attention 1x12x1024x64 causal gqa=4",
        "attention 1x12x1024x64 causal softcap=30",
        "add_layer_norm 4096x768 dropout=0.1",
        "rms_norm 2048x4096",
        "layer_norm 8192x1024",
        "varlen 8x12x512x64 causal",
        "layer_norm 16x768",
        "add_layer_norm 128x768",
        "cross_entropy 64x1000",
        "attention 1x12x16x64 causal",
    ),
    "cuda": (
        "attention 4x16x2048x64 causal",
        "layer_norm 16384x1024",
        "cross_entropy 4096x50304",
        "linear_cross_entropy 4096x768x50304",
        "add_layer_norm 16384x1024",
        "attention 1x16x4096x128 causal",
        "rms_norm 16384x1024",
        "add_rms_norm 16384x1024",
        "varlen 16x12x1024x64",
        "attention 16x12x512x64 masked",
        "attention 8x12x1x1024x64 causal cached forward",
        "layer_norm 4096x768",
        "attention 1x12x1024x64 causal",
        "cross_entropy 1024x50304",
        "cross_entropy 4096x50304 in_place",
        "attention 4x12x512x64",
        "attention 4x16x2048x64 causal gqa=4",
        "layer_norm 8192x4096",
        "rms_norm 8192x4096",
        "attention 4x16x2048x64 causal alibi",
        "attention 4x16x2048x64 causal window=256",
        "attention 4x16x2048x64 causal softcap=30",
        "add_layer_norm 16384x1024 dropout=0.1",
        "layer_norm 16384x1024 forward",
        "cross_entropy 8192x1000",
        "varlen 16x12x1024x64 causal",
        "linear 1x768x3072 forward",
        "linear 4096x768x3072",
        "attention 96x8x16x64",
        "layer_norm 16x768",
        "add_layer_norm 128x768",
        "cross_entropy 64x1000",
        "attention 1x12x16x64 causal",
    ),
}


@dataclass(frozen=True)
class Case:
    """One call of a public function, forward and backward unless it has the option `forward`.

    Args:
        op: its name in `fastlm.functional`, or "attention" or "varlen" for short.
        sizes: see `SIZES`.
        dtype: of its floating-point tensors.
        options: names of `OPTIONS`, those with a value as "window=256".

    Raises:
        ValueError: names what is wrong, and the nearest known name.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", SHORT.get(self.op, self.op))
        if self.op not in SIZES:
            raise ValueError(f"unknown op {self.op!r}{nearest(self.op, [*SIZES, *SHORT])}")
        forms = SIZES[self.op]
        if len(self.sizes) not in [form.count("x") + 1 for form in forms] or min(self.sizes) < 1:
            raise ValueError(f"{self._short}: sizes must be {' or '.join(forms)}, got {_by(self.sizes)}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"{self._short}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        values: dict[str, float] = {}
        for option in self.options:
            name, _, value = option.partition("=")
            if name not in OPTIONS:
                raise ValueError(f"{self._short}: unknown option {name!r}{nearest(name, [*OPTIONS, *DTYPES])}")
            default, ops = OPTIONS[name]
            if self.op not in ops:
                raise ValueError(f"{self._short} has no option {name}")
            try:
                values[name] = float(value or default)
            except ValueError:
                raise ValueError(f"{self._short}: {name} must be a number, got {value!r}") from None
            if not values[name] > 0:
                raise ValueError(f"{self._short}: {name} must be above 0, got {value}")
        ordered = [_written(name, values[name]) for name in OPTIONS if name in values]
        object.__setattr__(self, "options", tuple(ordered))
        self._check()

    def _check(self) -> None:
        gqa, dropout = int(self.option("gqa")), self.option("dropout")
        if gqa and self.sizes[1] % gqa:
            raise ValueError(f"{self._short}: gqa must divide the {self.sizes[1]} heads, got {gqa}")
        if dropout >= 1:
            raise ValueError(f"{self._short}: dropout must be below 1, got {dropout:g}")
        if self.option("masked") and (self.option("window") or self.option("cached")):
            raise ValueError(f"{self._short}: masked goes with neither window, which would leave no key, nor cached")
        if self.op == ATTENTION and self.option("cached") and self.sizes[2] > self.sizes[-2]:
            queries, keys = self.sizes[2], self.sizes[-2]
            raise ValueError(f"{self._short}: a cache of {keys} keys must hold the {queries} queries' own")

    def option(self, name: str) -> float:
        """The option's value, 0 where it was not given."""
        for option in self.options:
            given, _, value = option.partition("=")
            if given == name:
                return float(value or OPTIONS[name][0])
        return 0.0

    @property
    def backward(self) -> bool:
        return "forward" not in self.options

    @property
    def _short(self) -> str:
        return next((short for short, op in SHORT.items() if op == self.op), self.op)

    def __str__(self) -> str:
        return " ".join([self._short, _by(self.sizes), *self.options, NAMES[self.dtype]])

    def build(self, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
        """Its tensors and functions. The same seed gives the same tensors on the same type of device."""
        device = torch.device(device)
        return _BUILDERS[self.op](self, _Maker(self.dtype, device, torch.Generator(device).manual_seed(seed)))


@dataclass
class Problem:
    """What a case measures, with data.

    Args:
        case: the case.
        inputs: leaves that get gradients; all functions take these.
        ours: FastLM's function of them.
        plain: what one writes in PyTorch; where it has no such function, a composition of its functions.
        reference: the same of float64 inputs.
        bytes: what must be read and written at least.
        flops: of the products of matrices those of elements that count; of other arithmetic about.
        fixed: what else the functions go by, under the names of FastLM's arguments.
        overwrites: `ours` may write into its inputs.
    """

    case: Case
    inputs: list[Tensor]
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    reference: Callable[..., Any]
    bytes: int
    flops: int
    fixed: dict[str, Any] = field(default_factory=dict)
    overwrites: bool = False
    _upstream: list[Tensor] = field(default_factory=list)

    def copies(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Leaves with the values of the inputs."""
        return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in self.inputs]

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that backward starts with, the same for every side; made for these outputs at first."""
        if not self._upstream:
            generator = torch.Generator(outputs[0].device).manual_seed(1)
            options: dict[str, Any] = {"dtype": self.case.dtype, "device": outputs[0].device, "generator": generator}
            self._upstream = [torch.randn(output.shape, **options) for output in outputs]
        return self._upstream

    def run(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and gradients of the inputs unless the case has no backward."""
        if not self.case.backward:
            with torch.no_grad():
                return _outputs(function(*inputs)), []
        outputs = _outputs(function(*inputs))
        grads = [grad.to(out.dtype) for grad, out in zip(self.upstream(outputs), outputs, strict=True)]
        return outputs, list(torch.autograd.grad(outputs, inputs, grads))

    def step(self, function: Callable[..., Any], inputs: Sequence[Tensor] | None = None) -> Callable[[], None]:
        """Forward, and backward from fixed upstream gradients, of the problem's own inputs or of others."""
        given = self.inputs if inputs is None else inputs
        if not self.case.backward:

            def forward() -> None:
                with torch.no_grad():
                    function(*given)

            return forward

        def both() -> None:
            outputs = _outputs(function(*given))
            torch.autograd.grad(outputs, given, self.upstream(outputs))

        return both


def dtypes_of(device: torch.device | str) -> tuple[torch.dtype, ...]:
    """The dtypes in which a device is measured: no bf16 where a GPU only imitates it."""
    device = torch.device(device)
    names = DEVICE_DTYPES[device.type]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        names = tuple(name for name in names if name != "bf16")
    return tuple(DTYPES[name] for name in names)


def standard(device: torch.device | str, dtypes: Sequence[torch.dtype] | None = None) -> list[Case]:
    """The standard cases of a device in all dtypes, by importance: each dtype lags a little behind the one before."""
    device = torch.device(device)
    dtypes = dtypes_of(device) if dtypes is None else dtypes
    texts = STANDARD[device.type]
    order = sorted((rank + DTYPE_LAG * n, n, rank) for rank in range(len(texts)) for n in range(len(dtypes)))
    return [case for _, n, rank in order for case in parse(texts[rank], device, [dtypes[n]])]


def parse(text: str, device: torch.device | str = "cpu", dtypes: Sequence[torch.dtype] | None = None) -> list[Case]:
    """The cases that a text means, one for each dtype; an op alone means its standard cases.

    Args:
        text: OP, or OP:SIZES[,OPTION ...], in which spaces are as good, and a dtype may be among the options.
        device: whose standard cases and dtypes are meant.
        dtypes: of a text that names none; None for those in which the device is measured.

    Raises:
        ValueError: names what is wrong.
    """
    op, *words = [word for word in re.split(r"[:,\s]+", text) if word] or [""]
    if not words and SHORT.get(op, op) in SIZES:
        return [case for case in standard(device, dtypes) if case.op == SHORT.get(op, op)]
    given = [DTYPES[word] for word in words if word in DTYPES]
    sizes, *options = [word for word in words if word not in DTYPES] or [""]
    if SHORT.get(op, op) in SIZES and not re.fullmatch(r"\d+(x\d+)*", sizes):
        raise ValueError(f"{text!r}: sizes must be {' or '.join(SIZES[SHORT.get(op, op)])}, got {sizes!r}")
    shape = tuple(int(size) for size in re.findall(r"\d+", sizes))
    dtypes = given or (dtypes_of(device) if dtypes is None else dtypes)
    return [Case(op, shape, dtype, tuple(options)) for dtype in dtypes]


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _written(name: str, value: float) -> str:
    return name if OPTIONS[name][0] == value == 1 else f"{name}={value:g}"


def _outputs(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


# Building -------------------------------------------------------------------------------------------------------


@dataclass
class _Maker:
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, device=self.device, generator=self.generator)
        return (x * scale).to(self.dtype).requires_grad_()

    def classes(self, rows: int, classes: int) -> Tensor:
        return torch.randint(classes, (rows,), device=self.device, generator=self.generator)


def plain_add_norm(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """FastLM's `add_<norm>` in functions of PyTorch."""

    def add_norm(x: Tensor, residual: Tensor, *args: Any, dropout_p: float = 0.0, training: bool = True) -> Any:
        residual = residual + plain.dropout(x, dropout_p, training)
        return norm(residual, *args), residual

    return add_norm


def plain_linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    return plain.cross_entropy(plain.linear(x, weight, linear_bias), target, **options)


def _norm(case: Case, make: _Maker) -> Problem:
    (rows, columns), added = case.sizes, case.op.startswith("add")
    name = case.op.removeprefix("add_")
    parameters = [make.leaf(columns) for _ in range(2 if name == "layer_norm" else 1)]
    inputs = [*(make.leaf(rows, columns) for _ in range(1 + added)), *parameters]
    norm = getattr(plain, name)
    options = {"dropout_p": case.option("dropout")} if case.option("dropout") else {}

    def bound(function: Callable[..., Any], **options: float) -> Callable[..., Any]:
        return lambda *x: function(*x[: 1 + added], (columns,), *x[1 + added :], **options)

    passes = 2 * (1 + added) + (3 + added) * case.backward
    torchs = plain_add_norm(norm) if added else norm
    return Problem(
        case,
        inputs,
        bound(getattr(F, case.op), **options),
        bound(torchs, **options),
        bound(torchs),
        passes * inputs[0].nbytes,
        rows * columns * (added + (4 if name == "rms_norm" else 7) + (added + 10) * case.backward),
    )


def _cross_entropy(case: Case, make: _Maker) -> Problem:
    rows, classes = case.sizes
    logits, target = make.leaf(rows, classes), make.classes(rows, classes)
    in_place = bool(case.option("in_place"))

    def torchs(x: Tensor) -> Tensor:
        return plain.cross_entropy(x, target)

    def ours(x: Tensor) -> Tensor:
        # In place it wants logits that were computed: a view passes for them.
        return F.cross_entropy(x.view_as(x), target, inplace_backward=True) if in_place else F.cross_entropy(x, target)

    passes = 1 + (1 if in_place else 2) * case.backward
    flops = logits.numel() * (4 + 3 * case.backward)
    return Problem(case, [logits], ours, torchs, torchs, passes * logits.nbytes, flops, {"target": target}, in_place)


def _linear_cross_entropy(case: Case, make: _Maker) -> Problem:
    rows, features, classes = case.sizes
    inputs = [make.leaf(rows, features), make.leaf(classes, features, scale=features**-0.5)]
    target = make.classes(rows, classes)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        return plain_linear_cross_entropy(x, weight, target)

    flops = 2 * rows * features * classes * (3 if case.backward else 1)
    bytes = (1 + 2 * case.backward) * sum(x.nbytes for x in inputs)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, target)

    return Problem(case, inputs, ours, torchs, torchs, bytes, flops, {"target": target})


def _linear(case: Case, make: _Maker) -> Problem:
    rows, features, outputs = case.sizes
    inputs = [make.leaf(rows, features), make.leaf(outputs, features, scale=features**-0.5), make.leaf(outputs)]
    flops = 2 * rows * features * outputs * (3 if case.backward else 1)
    # Backward reads the input, the weight and the output's gradient, and writes two gradients.
    moved = sum(x.nbytes for x in inputs) + rows * outputs * case.dtype.itemsize
    bytes = moved + (moved + sum(x.nbytes for x in inputs)) * case.backward
    return Problem(case, inputs, F.linear, plain.linear, plain.linear, bytes, flops)


@dataclass(frozen=True, eq=False)
class _Scores:
    """Attention on a batch (B, H, T, D) whose scores have a mask, a bias and a bound: torch's, and in float64."""

    case: Case
    queries: int
    keys: int
    lengths: Tensor | None  # (B,): keys that are there
    slopes: Tensor | None  # (H,): ALiBi's
    device: torch.device

    @functools.cached_property
    def distance(self) -> Tensor:
        """(B or 1, 1, T_q, T_k): how far a query is behind a key. With a cache the last sits at its last key."""
        i, j = torch.arange(self.queries, device=self.device), torch.arange(self.keys, device=self.device)
        distance = (i[:, None] - j)[None, None]
        if self.lengths is None or not self.case.option("cached"):
            return distance
        return distance + (self.lengths - self.queries)[:, None, None, None]

    @functools.cached_property
    def seen(self) -> Tensor | None:
        """(B or 1, 1, T_q or 1, T_k), None if all are."""
        window, seen = int(self.case.option("window")), None
        if self.case.option("causal"):
            seen = self.distance >= 0
        if window:
            near = (self.distance <= window) & (self.distance >= -window)
            seen = near if seen is None else seen & near
        if self.lengths is not None:
            filled = (torch.arange(self.keys, device=self.device) < self.lengths[:, None])[:, None, None]
            seen = filled if seen is None else seen & filled
        return seen

    def pairs(self, batch: int) -> int:
        """Of query and key that see each other, in one head."""
        if self.seen is None:
            return batch * self.queries * self.keys
        return int(self.seen.expand(-1, -1, self.queries, -1).sum()) * (batch // self.seen.shape[0])

    def bias(self, slopes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, (B or 1, H, T_q, T_k): ALiBi in `dtype`; without slopes a boolean mask."""
        if slopes is None:
            return self.seen
        bias = -slopes[:, None, None] * self.distance.abs()
        return (bias if self.seen is None else bias.masked_fill(~self.seen, -math.inf)).to(dtype)

    def compose(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, dropout: float = 0.0) -> Tensor:
        """Two products of matrices and a softmax."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if softcap := self.case.option("softcap"):
            scores = softcap * torch.tanh(scores / softcap)
        bias = self.bias(slopes, q.dtype)
        if bias is not None:
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        return plain.dropout(scores.softmax(-1), dropout) @ v

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Head by head, of which no scores are kept: in float64 they are large."""
        group, heads = q.shape[1] // k.shape[1], []
        for h in range(q.shape[1]):
            kv = slice(h // group, h // group + 1)
            slopes = None if self.slopes is None else self.slopes[h : h + 1].double()
            heads.append(checkpoint(self.compose, q[:, h : h + 1], k[:, kv], v[:, kv], slopes, use_reentrant=False))
        return torch.cat(heads, 1)

    @functools.cached_property
    def causal_alone(self) -> bool:
        """Whether a flag says it all."""
        return "causal" in self.case.options and not (
            self.case.option("window") or self.lengths is not None or self.slopes is not None
        )

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """What a model prepares once for all its layers: it is not timed."""
        return None if self.causal_alone else self.bias(self.slopes, self.case.dtype)

    def torchs(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout, group = self.case.option("dropout"), q.shape[1] // k.shape[1]
        if self.case.option("softcap"):
            k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
            return self.compose(q, k, v, self.slopes, dropout)
        return plain.scaled_dot_product_attention(q, k, v, self.mask, dropout, self.causal_alone, enable_gqa=group > 1)


def _attention(case: Case, make: _Maker) -> Problem:
    batch, heads, queries = case.sizes[:3]
    keys, width, gqa = case.sizes[-2], case.sizes[-1], int(case.option("gqa")) or 1
    inputs = [make.leaf(batch, heads, queries, width)]
    inputs += [make.leaf(batch, heads // gqa, keys, width) for _ in range(2)]
    lengths, slopes, filled = None, _slopes(case, heads, make.device), 1.0
    options = _options(case, slopes) | ({"enable_gqa": True} if gqa > 1 else {})
    if case.option("masked"):
        lengths = _lengths(batch, keys, 1, make.device)
        options["attn_mask"] = (torch.arange(keys, device=make.device) < lengths[:, None])[:, None, None]
    if case.option("cached"):
        lengths = options["key_lengths"] = _lengths(batch, keys, queries, make.device)
        filled = int(lengths.sum()) / (batch * keys)
    scores = _Scores(case, queries, keys, lengths, slopes, make.device)
    kv = int(2 * inputs[1].nbytes * filled)
    return Problem(
        case,
        inputs,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        scores.torchs,
        scores.exact,
        # Forward reads q, k and v and writes the output; backward reads all four and a gradient, and writes three.
        2 * inputs[0].nbytes + kv + (4 * inputs[0].nbytes + 2 * kv) * case.backward,
        (14 if case.backward else 4) * heads * width * scores.pairs(batch),
        options,
    )


def _varlen(case: Case, make: _Maker) -> Problem:
    sequences, heads, longest, width = case.sizes
    gqa, window = int(case.option("gqa")) or 1, int(case.option("window"))
    lengths = _lengths(sequences, longest, 1, torch.device("cpu")).tolist()
    bounds = [0, *itertools.accumulate(lengths)]
    cu = torch.tensor(bounds, dtype=torch.int32, device=make.device)
    inputs = [make.leaf(bounds[-1], heads, width), *(make.leaf(bounds[-1], heads // gqa, width) for _ in range(2))]
    slopes = _slopes(case, heads, make.device)
    options = _options(case, slopes)
    each = [_Scores(case, length, length, None, slopes, make.device) for length in lengths]

    def by_sequence(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """One sequence after the other: packed attention in functions of PyTorch."""

        def packed(*qkv: Tensor) -> Tensor:
            parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in qkv), strict=True)
            outputs = [attend(scores, *part) for scores, part in zip(each, parts, strict=True)]
            return torch.cat(outputs, 2)[0].transpose(0, 1)

        return packed

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Any:
        """PyTorch's own packed attention, which is for GPUs."""
        sides = (window or -1, 0 if case.option("causal") else window or -1)
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=sides, enable_gqa=gqa > 1)

    varlen_attn = _varlen_attn()
    beyond_flash = any(case.option(name) for name in ("alibi", "softcap", "dropout"))
    served = make.device.type == "cuda" and torch.cuda.get_device_capability(make.device) >= (8, 0)
    use_flash = varlen_attn is not None and served and case.dtype.itemsize == 2 and not beyond_flash
    moved = 2 * inputs[0].nbytes + 2 * inputs[1].nbytes
    return Problem(
        case,
        inputs,
        lambda q, k, v: F.varlen_attention(q, k, v, cu, cu, longest, longest, **options),
        flash if use_flash else by_sequence(_Scores.torchs),
        by_sequence(_Scores.exact),
        moved + 2 * moved * case.backward,
        (14 if case.backward else 4) * heads * width * sum(scores.pairs(1) for scores in each),
        options | {"cu_seqlens": cu},
    )


def _varlen_attn() -> Any:
    """torch's function, None where this torch has none with windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _lengths(batch: int, longest: int, least: int, device: torch.device) -> Tensor:
    """(B,) int32, from the longest down to a tenth of it, each shorter than the one before by the same factor."""
    spread = longest * 10 ** -torch.linspace(0, 1, batch, dtype=torch.float64)
    return spread.round().clamp(min=least).to(device, torch.int32)


def _slopes(case: Case, heads: int, device: torch.device) -> Tensor | None:
    """ALiBi's slopes, (H,): a geometric sequence down to 2^-8."""
    if not case.option("alibi"):
        return None
    return 2.0 ** (-8 * torch.arange(1, heads + 1, device=device, dtype=torch.float32) / heads)


def _options(case: Case, slopes: Tensor | None) -> dict[str, Any]:
    """What both attentions of FastLM are given."""
    causal, window = bool(case.option("causal")), int(case.option("window"))
    options: dict[str, Any] = {"is_causal": causal} if causal else {}
    if window:
        options["window"] = (window, -1 if causal else window)
    if slopes is not None:
        options["alibi_slopes"] = slopes
    for name, argument in (("softcap", "softcap"), ("dropout", "dropout_p")):
        if case.option(name):
            options[argument] = case.option(name)
    return options


_BUILDERS: dict[str, Callable[[Case, _Maker], Problem]] = {
    **dict.fromkeys(NORMS, _norm),
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    ATTENTION: _attention,
    VARLEN: _varlen,
    "linear": _linear,
}
