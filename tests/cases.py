"""The calls that the shared op tests make: hostile shapes, layouts, options and upstream gradients for every op.

A case is one call. Its tensors are made in float64 and cast, so that the same values reach FastLM, torch (the same
dtypes) and the formula (float64). To cover a new op, add its cases, its formula and what torch has for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import formulas
import hostile
import pytest
import torch
import torch.nn.functional as T
from torch import Tensor

import fastlm
import fastlm.functional as F
from fastlm.ops.registry import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Args:
        op: its name.
        name: what is hostile about it.
        tensors: from a generator, its tensor arguments by name; floating ones in float64.
        options: its other arguments.
        layouts: from argument (or `grad_<n>`, the upstream gradient of output n) to a layout of `hostile`.
        dtypes: arguments that keep a dtype of their own whatever the case runs in, if it is float32 or narrower.
        fixed: arguments without gradient, besides slopes, class weights and targets.
        unused: outputs that get no upstream gradient.
        far: arguments whose strides reach past 2^31 elements, and along which dimension.
    """

    op: str
    name: str
    tensors: Callable[[torch.Generator], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    unused: tuple[int, ...] = ()
    far: dict[str, int] = field(default_factory=dict)
    only: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


class Call:
    """A case in one dtype: the arguments, and the three answers (outputs, then gradients by argument)."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(0)
        self.arguments = {
            name: self._placed(name, x, case.dtypes.get(name, dtype), device)
            for name, x in case.tensors(generator).items()
        }
        fixed = (*case.fixed, "weight", "target") if "entropy" in case.op else (*case.fixed, "alibi_slopes")
        self.wanted = [name for name, x in self.arguments.items() if x.is_floating_point() and name not in fixed]
        doubles = {name: x.double() if x.is_floating_point() else x for name, x in self.arguments.items()}
        self.upstream: list[Tensor | None] = []
        self.torch_outputs, self.torch_gradients = self.run(TORCH[case.op], self.arguments, generator)
        formula = getattr(formulas, case.op)
        if "rms" in case.op and case.options.get("eps") is None:  # the epsilon of the arithmetic, not of the formula
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            formula = functools.partial(formula, eps=torch.finfo(wide).eps)
        self.outputs, self.gradients = self.run(formula, doubles)

    def _placed(self, name: str, x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
        if x.is_floating_point():
            x = x.to(dtype if self.dtype != torch.float64 else torch.float64)
        x = hostile.LAYOUTS[self.case.layouts.get(name, "contiguous")](x.to(device))
        return hostile.far_apart(x, dim=self.case.far[name]) if name in self.case.far else x

    def leaves(self, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach().requires_grad_(name in self.wanted) for name, x in arguments.items()}

    def run(
        self, function: Callable[..., Any], arguments: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs of `function`, and gradients of everything that has one; None where torch says None."""
        leaves = self.leaves(arguments)
        outputs = function(**leaves, **self.case.options)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if generator is not None:
            self.upstream = [self._upstream(n, output, generator) for n, output in enumerate(outputs)]
        used = [n for n, output in enumerate(outputs) if output.requires_grad and self.upstream[n] is not None]
        gradients = torch.autograd.grad(
            [outputs[n] for n in used],
            [leaves[name] for name in self.wanted],
            [self.upstream[n].to(outputs[n].dtype) for n in used],
            allow_unused=True,
        ) if used else [None] * len(self.wanted)  # fmt: skip
        filled = (
            torch.zeros_like(leaves[name]) if gradient is None else gradient
            for name, gradient in zip(self.wanted, gradients, strict=True)
        )
        return outputs, dict(zip(self.wanted, filled, strict=True))

    def _upstream(self, n: int, output: Tensor, generator: torch.Generator) -> Tensor | None:
        if n in self.case.unused or not output.requires_grad:
            return None
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        return hostile.LAYOUTS[self.case.layouts.get(f"grad_{n}", "contiguous")](grad)

    def ours(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        return self.run(getattr(F, self.case.op), self.arguments)


@functools.lru_cache(maxsize=4)
def call(case_name: str, dtype: torch.dtype, device: str) -> Call:
    """The call and its expected answers, kept while the backends take their turns."""
    return Call(BY_NAME[case_name], dtype, device)


def function_of(name: str, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """FastLM's function of a case as one of the tensors that have gradients, and these tensors."""
    expected = call(name, dtype, "cpu")
    arguments, wanted, options = expected.arguments, expected.wanted, expected.case.options
    public = getattr(F, expected.case.op)

    def function(*tensors: Tensor) -> Any:
        return public(**(arguments | dict(zip(wanted, tensors, strict=True))), **options)

    return function, [arguments[name].detach().clone() for name in wanted]


def device_of(op: str, backend: str) -> str:
    """Where to put the tensors for a backend: on a CPU if it serves that, else on its own device if there is one."""
    record = OPS[op].backends.get(backend)
    if record is None or record.devices is None or "cpu" in record.devices or not torch.cuda.is_available():
        return "cpu"
    return sorted(record.devices)[0]


def serves_here(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether the backend asked for serves this call on this machine. Where it does not, the call must say why."""
    found = fastlm.explain(function, *args, **kwargs)
    if found.backend is not None:
        return True
    with pytest.raises(fastlm.BackendError) as raised:
        function(*args, **kwargs)
    for name in found.preference:
        assert found.reasons[name], name
        assert all(reason in str(raised.value) for reason in found.reasons[name]), name
    return False


def backends_of(op: str) -> list[str]:
    """Every backend that the registry knows for an op, and "auto"."""
    return ["auto", *OPS[op].backends]


# What torch has ---------------------------------------------------------------------------------------------------


def _torch_add_layer_norm(input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, **_):
    new_residual = (residual + input).to(residual.dtype)
    parameters = (None if p is None else p.to(residual.dtype) for p in (weight, bias))
    return T.layer_norm(new_residual, normalized_shape, *parameters, eps).to(input.dtype), new_residual


def _torch_add_rms_norm(input, residual, normalized_shape, weight=None, eps=None, **_):
    new_residual = (residual + input).to(residual.dtype)
    weight = None if weight is None else weight.to(residual.dtype)
    return T.rms_norm(new_residual, normalized_shape, weight, eps).to(input.dtype), new_residual


def _torch_rms_norm(input, normalized_shape, weight=None, eps=None):
    return T.rms_norm(input, normalized_shape, weight, eps)


def _torch_cross_entropy(input, target, weight=None, *, z_loss=0.0, softcap=0.0, **options):
    x = softcap * torch.tanh(input / softcap) if softcap else input
    loss = T.cross_entropy(x, target, weight, **options)
    if not z_loss:
        return loss
    dim = min(1, input.dim() - 1)
    lse = torch.logsumexp(x, dim)
    valid = torch.ones_like(lse, dtype=torch.bool)
    if not target.is_floating_point():
        valid = target != options.get("ignore_index", -100)
    z = torch.where(valid, z_loss * lse.square(), 0.0)
    reduction = options.get("reduction", "mean")
    return loss + (z if reduction == "none" else z.sum() if reduction == "sum" else z.sum() / valid.sum())


def _torch_linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, **options):
    if options.get("ignore_index", 0) is None:
        del options["ignore_index"]
    if hasattr(T, "linear_cross_entropy") and not (options.get("z_loss") or options.get("softcap")):  # torch 2.13
        plain = {name: x for name, x in options.items() if name not in ("z_loss", "softcap")}
        return T.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, weight=weight, **plain)
    shape = linear_weight.shape[:-1]
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = T.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, shape)
    return _torch_cross_entropy(logits, target, weight, **options)


def _torch_linear(input, weight, bias=None, *, weight_scale=None):
    if weight_scale is not None:
        weight = (weight * weight_scale[:, None]).to(input.dtype)
    return T.linear(input, weight, bias)


def _bias(queries, keys, batch, offsets, is_causal, window, slopes, filled, dtype):
    """Everything torch takes only as a mask, as one, by the same element-wise definition as the formula."""
    bias = torch.zeros(batch, 1 if slopes is None else slopes.shape[-1], queries, keys, dtype=torch.float64)
    for b in range(batch):
        for i in range(queries):
            for j in range(keys):
                if j >= filled[b] or not formulas.visible(i, j, offsets[b], is_causal, window):
                    bias[b, :, i, j] = -math.inf
                elif slopes is not None:
                    bias[b, :, i, j] = -slopes.double().expand(batch, -1)[b].cpu() * abs(i + offsets[b] - j)
    return bias.to(dtype)


def _torch_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, window=None,
    alibi_slopes=None, softcap=0.0, key_lengths=None, return_lse=False,
):  # fmt: skip
    extra = window is not None or alibi_slopes is not None or key_lengths is not None
    mask = attn_mask
    if extra or (is_causal and (mask is not None or softcap or return_lse)):
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        filled = [keys] * batch if key_lengths is None else key_lengths.tolist()
        offsets = [0] * batch if key_lengths is None else [n - queries for n in filled]
        wide = query.dtype if alibi_slopes is None else max(query.dtype, torch.float32, key=lambda d: d.itemsize)
        bias = _bias(queries, keys, batch, offsets, is_causal, window, alibi_slopes, filled, wide).to(query.device)
        if mask is not None:
            bias = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
        mask, is_causal = bias, False
    if not (softcap or return_lse):
        return T.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    group = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    s = query @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    dead = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    p = torch.softmax(s, -1).masked_fill(dead, 0.0).to(query.dtype)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.logsumexp(s.to(wide), -1).masked_fill(dead[..., 0], -math.inf).detach()
    return (p @ v, lse) if return_lse else p @ v


def _torch_varlen_attention(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, is_causal=False,
    scale=None, *, alibi_slopes=None, return_lse=False, **options,
):  # fmt: skip
    outputs, lses = [query[:0, :, :1] * value.new_zeros(value.shape[2])], []
    for n, (q, k) in enumerate(zip(cu_seqlens_q.diff(), cu_seqlens_k.diff(), strict=True)):
        q_at, k_at = cu_seqlens_q[n], cu_seqlens_k[n]
        result = _torch_attention(
            query[q_at : q_at + q].transpose(0, 1)[None],
            *(x[k_at : k_at + k].transpose(0, 1)[None] for x in (key, value)),
            None, dropout_p, is_causal, scale, query.shape[1] != key.shape[1],
            alibi_slopes=alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[n],
            key_lengths=k[None], return_lse=return_lse, **options,
        )  # fmt: skip
        output, lse = result if return_lse else (result, None)
        outputs.append(output[0].transpose(0, 1))
        lses.append(lse)
    output = torch.cat(outputs)
    return (output, torch.cat([lse[0] for lse in lses], 1)) if return_lse else output


TORCH: dict[str, Callable[..., Any]] = {
    "linear": _torch_linear,
    "layer_norm": T.layer_norm,
    "rms_norm": _torch_rms_norm,
    "add_layer_norm": _torch_add_layer_norm,
    "add_rms_norm": _torch_add_rms_norm,
    "cross_entropy": _torch_cross_entropy,
    "linear_cross_entropy": _torch_linear_cross_entropy,
    "scaled_dot_product_attention": _torch_attention,
    "varlen_attention": _torch_varlen_attention,
}


# Cases ------------------------------------------------------------------------------------------------------------


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _norm_tensors(
    op: str, shape: tuple[int, ...], dims: int, parameters: tuple[str, ...], residual=None, salt=(), mean=0.5
):
    def make(generator: torch.Generator) -> dict[str, Tensor]:
        x = _normal(generator, *shape) * 2 + mean
        tensors = {"input": hostile.salted(x, *salt) if salt else x}
        if op.startswith("add"):
            tensors["residual"] = _normal(generator, *(shape if residual is None else residual))
        for name in parameters:
            if not (name == "bias" and "rms" in op):
                tensors[name] = _normal(generator, *shape[len(shape) - dims :]) + (name == "weight")
        return tensors

    return make


def _norm_cases(op: str) -> list[Case]:
    def case(name, shape, *, dims=1, parameters=("weight", "bias"), residual=None, salt=(), mean=0.5, options=None,
             **kwargs):  # fmt: skip
        fields = {"normalized_shape": tuple(shape[len(shape) - dims :]), **(options or {})}
        return Case(op, name, _norm_tensors(op, shape, dims, parameters, residual, salt, mean), fields, **kwargs)

    added = op.startswith("add")
    cases = [
        case("plain", (4, 6, 32)),
        case("no parameters", (3, 16), parameters=()),
        case("weight only", (3, 17), parameters=("weight",)),
        case("zero rows", (0, 8)),
        case("zero columns", (3, 0)),
        case("one row", (1, 33)),
        case("one column", (5, 1)),
        case("one element of one dimension", (1,)),
        case("one dimension", (7,)),
        case("odd sizes", (3, 5, 7)),
        case("wider than a tile", (3, 1025)),
        case("wider than every tile", (2, 5000)),
        case("many rows", (517, 3)),
        case("all dimensions normalised", (3, 4, 5), dims=3),
        case("two dimensions normalised", (2, 3, 4, 5), dims=2),
        case("transposed", (6, 10), layouts={"input": "transposed", "residual": "transposed", "grad_0": "transposed"}),
        case(
            "outer swapped",
            (3, 4, 5, 6),
            layouts={"input": "outer_swapped", "residual": "contiguous", "grad_0": "outer_swapped"},
        ),
        case("transposed normalised dimensions", (4, 5, 6), dims=2, layouts={"input": "transposed"}),
        case(
            "misaligned",
            (5, 12),
            layouts=dict.fromkeys(("input", "residual", "weight", "bias", "grad_0", "grad_1"), "misaligned"),
        ),
        case(
            "shifted",
            (5, 64),
            layouts=dict.fromkeys(("input", "residual", "weight", "bias", "grad_0", "grad_1"), "shifted"),
        ),
        case(
            "strided",
            (5, 12),
            layouts=dict.fromkeys(("input", "residual", "weight", "bias", "grad_0", "grad_1"), "strided"),
        ),
        case("rows sliced", (2, 5, 12), layouts={"input": "sliced_rows", "grad_0": "sliced_rows"}),
        case("rows expanded", (5, 12), layouts={"input": "expanded", "residual": "expanded", "grad_0": "expanded"}),
        case("constant rows", (4, 8), layouts={"input": "expanded_last", "grad_0": "expanded_last"}),
        case("expanded parameters", (4, 8), layouts={"weight": "expanded_last", "bias": "expanded_last"}),
        case("upstream gradient of a sum", (4, 9), layouts={"grad_0": "from_sum", "grad_1": "from_sum"}),
        case("inf and nan", (6, 8), salt=(math.inf, math.nan), options={"eps": 1e-6}),
        case("mean far from zero", (3, 40), mean=300.0),
        case("large eps", (4, 8), options={"eps": 0.5}),
        case("zero eps", (4, 8), options={"eps": 0.0}),
        case("fp32 parameters", (4, 24), dtypes={"weight": torch.float32, "bias": torch.float32}),
        case("strides past 2^31", (3, 8), far={"input": 0}),
        case("last stride past 2^30", (4, 3), far={"input": 1}),
    ]
    if added:
        cases += [
            case("fp32 residual", (5, 40), dtypes={"residual": torch.float32}),
            case("bf16 residual", (5, 40), dtypes={"residual": torch.bfloat16}),
            case(
                "fp32 residual and parameters",
                (5, 40),
                dtypes=dict.fromkeys(("residual", "weight", "bias"), torch.float32),
            ),
            case("residual broadcasts", (3, 4, 6), residual=(4, 6)),
            case("residual broadcasts in columns", (3, 4, 6), residual=(3, 4, 1)),
            case("only output used", (4, 8), unused=(1,)),
            case("only new_residual used", (4, 8), unused=(0,)),
            case("far residual", (3, 8), far={"residual": 0}),
            case("not training", (3, 8), options={"dropout_p": 0.5, "training": False}),
        ]
    return cases


def _indices(shape, classes, ignored=0.0, ignore_index=-100, dtype=torch.int64):
    def make(generator: torch.Generator) -> Tensor:
        target = torch.randint(0, max(1, classes), shape, generator=generator)
        hidden = torch.rand(shape, generator=generator) < ignored
        return torch.where(hidden, ignore_index, target).to(dtype)

    return make


def _cross_entropy_cases() -> list[Case]:
    def case(name, shape, *, target=None, weight=False, probabilities=False, salt=(), scale=2.0, options=None,
             **kwargs):  # fmt: skip
        dim = min(1, len(shape) - 1)
        rows, classes = (*shape[:dim], *shape[dim + 1 :]), shape[dim]

        def make(generator: torch.Generator) -> dict[str, Tensor]:
            x = _normal(generator, *shape) * scale
            x = hostile.salted(x, *salt) if salt else x
            labels = (target or _indices(rows, classes))(generator)
            if probabilities:
                labels = _normal(generator, *shape).softmax(dim)
            tensors = {"input": x, "target": labels}
            if weight:
                tensors["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1
            return tensors

        return Case("cross_entropy", name, make, options or {}, **kwargs)

    some = _indices((9,), 7, ignored=0.4)
    cases = [
        case(f"plain {reduction}", (5, 7), options={"reduction": reduction}) for reduction in ("none", "mean", "sum")
    ]
    for reduction in ("none", "mean", "sum"):
        everything = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
        cases += [
            case(f"everything {reduction}", (9, 7), target=some, weight=True, options=everything),
            case(f"all ignored {reduction}", (3, 7), target=_indices((3,), 7, 2.0), options={"reduction": reduction}),
            case(f"probabilities {reduction}", (4, 7), probabilities=True, options={"reduction": reduction}),
            case(f"everything with probabilities {reduction}", (4, 7), probabilities=True, weight=True,
                 options=everything),
            case(f"N C d1 d2 {reduction}", (2, 5, 3, 4), weight=True,
                 options={"reduction": reduction, "label_smoothing": 0.2}),
            case(f"zero rows {reduction}", (0, 7), options={"reduction": reduction}),
        ]  # fmt: skip
    cases += [
        case("one row", (1, 11)),
        case("one class", (4, 1)),
        case("one dimension", (6,)),
        case("one dimension none", (6,), options={"reduction": "none", "label_smoothing": 0.1}),
        case("one dimension probabilities", (6,), probabilities=True),
        case("wider than a tile", (3, 1025)),
        case("wider than every tile", (2, 5000), options={"label_smoothing": 0.1}),
        case("ignored", (9, 7), target=some),
        case("ignored with weight", (9, 7), target=some, weight=True),
        case("ignore_index is a class", (9, 7), options={"ignore_index": 3}),
        case("ignore_index is a class, weight and smoothing", (9, 7), weight=True,
             options={"ignore_index": 3, "label_smoothing": 0.3, "reduction": "sum"}),
        case("ignore_index beyond the classes", (9, 7), target=_indices((9,), 7, 0.4, 255),
             options={"ignore_index": 255}),
        case("bytes", (9, 7), target=_indices((9,), 7, dtype=torch.uint8)),
        case("label smoothing 1", (5, 7), options={"label_smoothing": 1.0}),
        case("label smoothing and weight", (5, 7), weight=True, options={"label_smoothing": 0.3}),
        case("z_loss", (9, 7), target=some, options={"z_loss": 0.1}),
        case("z_loss with weight", (9, 7), target=some, weight=True, options={"z_loss": 0.1}),
        case("z_loss sum", (9, 7), target=some, weight=True, options={"z_loss": 0.1, "reduction": "sum"}),
        case("softcap", (5, 7), scale=20.0, options={"softcap": 10.0}),
        case("probabilities N C d1", (2, 5, 3), probabilities=True, weight=True, options={"label_smoothing": 0.1}),
        case("no positions", (2, 5, 0)),
        case("transposed", (6, 10), layouts={"input": "transposed", "target": "strided"}),
        case("classes last in memory", (2, 5, 7), layouts={"input": "transposed", "target": "transposed"}),
        case("misaligned", (6, 10), layouts={"input": "misaligned", "target": "shifted"}, weight=True),
        case("strided", (6, 10), layouts={"input": "strided", "target": "strided", "weight": "strided"}, weight=True),
        case("expanded rows", (6, 10), layouts={"input": "expanded", "target": "expanded"}),
        case("expanded classes", (6, 10), layouts={"input": "expanded_last"}),
        case("probabilities strided", (6, 10), probabilities=True,
             layouts={"input": "sliced_rows", "target": "strided"}),
        case("upstream of a sum", (6, 10), options={"reduction": "none"}, layouts={"grad_0": "from_sum"}),
        case("upstream strided", (6, 10), options={"reduction": "none"}, layouts={"grad_0": "strided"}),
        case("upstream transposed", (3, 10, 4), options={"reduction": "none"}, layouts={"grad_0": "transposed"}),
        case("upstream expanded", (3, 10, 4), options={"reduction": "none"}, layouts={"grad_0": "expanded"}),
        case("inf and nan", (6, 9), salt=(math.inf, math.nan, -math.inf), options={"reduction": "none"}),
        case("minus inf", (6, 9), target=lambda _: torch.zeros(6).long(), salt=(-math.inf,),
             options={"reduction": "none"}),
        case("huge logits", (6, 9), scale=1e30, only=(torch.float32, torch.float64)),
        case("huge logits with z_loss off and sum", (6, 9), scale=1e25, only=(torch.float32,),
             options={"reduction": "sum"}),
        case("strides past 2^31", (3, 8), far={"input": 0}),
        case("strides past 2^31 in the classes", (4, 3), far={"input": 1}),
        case("strides past 2^31 in positions", (2, 4, 3), far={"input": 2}),
        case("upstream past 2^31 rows", (3, 8), far={"target": 0}, options={"reduction": "none"}),
    ]  # fmt: skip
    return cases


def _linear_entropy_cases() -> list[Case]:
    def case(name, rows, features, classes, *, target=None, bias=False, weight=False, probabilities=False,
             options=None, **kwargs):  # fmt: skip
        classes = classes if isinstance(classes, tuple) else (classes,)

        def make(generator: torch.Generator) -> dict[str, Tensor]:
            tensors = {
                "input": _normal(generator, *rows, features),
                "linear_weight": _normal(generator, *classes, features) / max(1, features) ** 0.5,
                "target": (target or _indices((*rows, *classes[1:]), classes[0]))(generator),
            }
            if probabilities:
                tensors["target"] = _normal(generator, *rows, *classes).softmax(len(rows))
            if bias:
                tensors["linear_bias"] = _normal(generator, *classes)
            if weight:
                tensors["weight"] = torch.rand(classes[0], generator=generator, dtype=torch.float64) + 0.1
            return tensors

        return Case("linear_cross_entropy", name, make, options or {}, **kwargs)

    some = _indices((9,), 11, ignored=0.4)
    cases = []
    for reduction in ("none", "mean", "sum"):
        everything = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
        cases += [
            case(f"plain {reduction}", (9,), 5, 11, options={"reduction": reduction}),
            case(f"everything {reduction}", (9,), 5, 11, target=some, bias=True, weight=True, options=everything),
            case(f"probabilities {reduction}", (4,), 5, 7, probabilities=True, bias=True,
                 options={"reduction": reduction, "label_smoothing": 0.1}),
            case(f"zero rows {reduction}", (0,), 5, 7, bias=True, options={"reduction": reduction}),
            case(f"all ignored {reduction}", (3,), 5, 7, target=_indices((3,), 7, 2.0), bias=True,
                 options={"reduction": reduction}),
            case(f"one dimension {reduction}", (), 5, 7, bias=True, options={"reduction": reduction}),
        ]  # fmt: skip
    cases += [
        case("one row", (1,), 3, 13),
        case("one class", (4,), 3, 1),
        case("one feature", (4,), 1, 7),
        case("no features", (4,), 0, 7, bias=True),
        case("odd and wide", (7,), 33, 1025),
        case("ignored", (9,), 5, 11, target=some),
        case("ignore_index None", (9,), 5, 11, target=some, options={"ignore_index": None}),
        case("ignore_index is a class", (9,), 5, 11, options={"ignore_index": 3}, weight=True),
        case("z_loss with weight", (9,), 5, 11, target=some, weight=True, options={"z_loss": 0.1}),
        case("softcap", (9,), 5, 11, options={"softcap": 1.0}),
        case("more dimensions", (4,), 5, (6, 3), bias=True, weight=True),
        case("transposed", (6,), 5, 11, layouts={"input": "transposed", "linear_weight": "transposed"}),
        case("misaligned", (6,), 5, 11, bias=True,
             layouts={"input": "misaligned", "linear_weight": "misaligned", "linear_bias": "misaligned"}),
        case("strided", (6,), 5, 11, bias=True,
             layouts={"input": "strided", "linear_weight": "strided", "linear_bias": "strided", "target": "strided"}),
        case("expanded", (6,), 5, 11, bias=True,
             layouts={"input": "expanded", "linear_bias": "expanded_last"}),
        case("upstream of a sum", (6,), 5, 11, options={"reduction": "none"}, layouts={"grad_0": "from_sum"}),
        case("upstream strided", (6,), 5, 11, options={"reduction": "none"}, layouts={"grad_0": "strided"}),
        case("upstream past the first rows only", (6,), 5, 11, target=_indices((6,), 11, 0.5),
             options={"reduction": "none"}),
    ]  # fmt: skip
    return cases


def _linear_cases() -> list[Case]:
    def case(name, rows, features=20, outputs=11, *, bias=True, int8=False, salt=(), zeros=False, **kwargs):
        def make(generator: torch.Generator) -> dict[str, Tensor]:
            x = _normal(generator, *rows, features)
            tensors = {
                "input": hostile.salted(x, *salt) if salt else x * (not zeros),
                "weight": _normal(generator, outputs, features) / max(1, features) ** 0.5,
            }
            if int8:
                tensors["weight"] = torch.randint(-128, 128, (outputs, features), generator=generator).to(torch.int8)
                tensors["weight_scale"] = torch.rand(outputs, generator=generator, dtype=torch.float64) / 127
            if bias:
                tensors["bias"] = _normal(generator, outputs)
            return tensors

        kept = {"weight_scale": torch.float32}
        return Case("linear", f"int8, {name}" if int8 else name, make, dtypes=kept, fixed=("weight_scale",), **kwargs)

    inf, nan = math.inf, math.nan
    both = [
        *((f"{rows} rows", (rows,)) for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20)),
        ("one dimension", ()),
        ("three dimensions", (2, 3)),
        ("no batch", (0, 3)),
    ]
    hard = [
        ("one feature", {"features": 1}),
        ("no features", {"features": 0}),
        ("one output", {"outputs": 1}),
        ("no outputs", {"outputs": 0}),
        ("odd sizes", {"features": 131, "outputs": 29}),
        ("whole steps", {"features": 256, "outputs": 12}),
        ("many features", {"features": 3001, "outputs": 5}),
        ("many outputs", {"outputs": 517}),
        ("no bias", {"bias": False}),
        ("infinite and NaN", {"salt": (inf, nan, -inf)}),
        ("only zeros", {"zeros": True}),
        ("misaligned", {"layouts": dict.fromkeys(("input", "weight", "bias", "weight_scale", "grad_0"), "misaligned")}),
        ("strided", {"layouts": dict.fromkeys(("input", "bias", "weight_scale", "grad_0"), "strided")}),
        ("rows sliced", {"layouts": dict.fromkeys(("input", "weight", "grad_0"), "sliced_rows")}),
        ("transposed", {"layouts": dict.fromkeys(("input", "weight", "grad_0"), "transposed")}),
        ("expanded", {"layouts": {"input": "expanded", "weight": "expanded", "bias": "expanded_last"}}),
        ("upstream of a sum", {"layouts": {"grad_0": "from_sum"}}),
        ("strides past 2^31", {"far": {"input": 0, "weight": 0}, "only": (torch.bfloat16,)}),
    ]
    return [
        *(case(name, rows, int8=int8) for name, rows in both for int8 in (False, True)),
        *(case(name, (5,), int8=int8, **kwargs) for name, kwargs in hard for int8 in (False, True)),
    ]


def _attention_cases() -> list[Case]:
    def case(name, queries=5, keys=7, *, batch=2, heads=2, kv_heads=None, dim=8, value_dim=None, mask=None,
             slopes=None, lengths=None, scale_by=1.0, options=None, **kwargs):  # fmt: skip
        kv_heads = heads if kv_heads is None else kv_heads

        def make(generator: torch.Generator) -> dict[str, Tensor]:
            tensors = {
                "query": _normal(generator, batch, heads, queries, dim) * scale_by,
                "key": _normal(generator, batch, kv_heads, keys, dim),
                "value": _normal(generator, batch, kv_heads, keys, dim if value_dim is None else value_dim),
            }
            if mask is not None:
                tensors["attn_mask"] = mask(generator)
            if slopes is not None:
                tensors["alibi_slopes"] = torch.rand(slopes, generator=generator, dtype=torch.float64)
            if lengths is not None:
                tensors["key_lengths"] = torch.tensor(lengths, dtype=torch.int32)
            return tensors

        return Case("scaled_dot_product_attention", name, make, options or {}, **kwargs)

    def boolean(*shape):
        return lambda generator: torch.rand(shape, generator=generator) < 0.6

    def additive(*shape):
        return lambda generator: _normal(generator, *shape)

    def dead_rows(generator):
        mask = torch.rand(2, 1, 5, 7, generator=generator) < 0.6
        mask[:, :, 1] = mask[1, :, 3] = False
        return mask

    def dead_additive(generator):
        return _normal(generator, 2, 2, 5, 7).masked_fill(~dead_rows(generator), -math.inf)

    everything = {"is_causal": True, "window": (3, 0), "softcap": 2.0, "scale": 0.3, "return_lse": True}
    cases = [
        case("plain"),
        case("causal", 6, 6, options={"is_causal": True}),
        case("causal, more keys", 3, 7, options={"is_causal": True}),
        case("causal, more queries", 7, 3, options={"is_causal": True}),
        case("scale", options={"scale": 0.7}),
        case("negative scale", options={"scale": -0.7}),
        case("zero scale", options={"scale": 0.0}),
        case("one query", 1, 9),
        case("one key", 4, 1),
        case("one query, causal", 1, 9, options={"is_causal": True}),
        case("one of everything", 1, 1, batch=1, heads=1, dim=1),
        case("no queries", 0, 5),
        case("no keys", 5, 0),
        case("no batch", batch=0),
        case("longer than a tile", 67, 131, batch=1, heads=1, options={"is_causal": True}),
        case("many keys", 2, 1025, batch=1, heads=1),
        case("wide head", 3, 5, dim=80),
        case("odd head", 3, 5, dim=7, value_dim=3),
        case("value head of 1", dim=4, value_dim=1),
        case("value head larger", dim=4, value_dim=20),
        case("groups of query heads", heads=4, kv_heads=2, options={"enable_gqa": True}),
        case("one key head", heads=3, kv_heads=1, options={"enable_gqa": True, "is_causal": True}),
        case("boolean mask", mask=boolean(5, 7)),
        case("boolean mask by batch", mask=boolean(2, 1, 5, 7)),
        case("boolean mask of keys", mask=boolean(2, 1, 1, 7)),
        case("additive mask", mask=additive(5, 7)),
        case("additive mask by head", mask=additive(1, 2, 5, 7)),
        case("additive mask of three dimensions", mask=additive(2, 5, 7)),
        case("additive mask of keys", mask=additive(2, 1, 1, 7)),
        case("additive mask of queries", mask=additive(2, 1, 5, 1), fixed=("attn_mask",)),  # its gradient is 0
        case("additive mask in full", mask=additive(2, 2, 5, 7)),
        case("fp32 additive mask", mask=additive(5, 7), dtypes={"attn_mask": torch.float32}),
        case("strided additive mask", mask=additive(2, 2, 5, 7), layouts={"attn_mask": "strided"}),
        case("expanded additive mask", mask=additive(2, 2, 5, 7), layouts={"attn_mask": "expanded"}),
        case("mask and causal", mask=boolean(5, 7), options={"is_causal": True}),
        case("additive mask and causal", mask=additive(5, 7), options={"is_causal": True}),
        case("rows that see no key", mask=dead_rows),
        case("rows that see no key, additive", mask=dead_additive),
        case("rows that see no key, lse", mask=dead_rows, options={"return_lse": True}),
        case("nothing seen at all", mask=lambda _: torch.zeros(5, 7, dtype=torch.bool)),
        case("groups and additive mask", heads=4, kv_heads=2, mask=additive(2, 4, 5, 7), options={"enable_gqa": True}),
        case("window", 9, 9, options={"window": (2, 1)}),
        case("window left", 9, 9, options={"window": (2, -1)}),
        case("window right", 9, 9, options={"window": (-1, 1)}),
        case("window of itself", 6, 6, options={"window": (0, 0)}),
        case("window open", 6, 6, options={"window": (-1, -1)}),
        case("window and causal", 9, 9, options={"window": (3, 2), "is_causal": True}),
        case("window past the keys", 9, 3, options={"window": (1, 1)}),
        case("ALiBi", 6, 6, slopes=(2,)),
        case("ALiBi causal, more keys", 3, 7, slopes=(2,), options={"is_causal": True}),
        case("ALiBi by batch", slopes=(2, 2)),
        case("ALiBi fp32 slopes", slopes=(2,), dtypes={"alibi_slopes": torch.float32}),
        case("ALiBi and groups", heads=4, kv_heads=2, slopes=(4,), options={"enable_gqa": True}),
        case("ALiBi and mask", slopes=(2,), mask=additive(5, 7)),
        case("soft cap", scale_by=4.0, options={"softcap": 2.0}),
        case("soft cap and ALiBi", scale_by=4.0, slopes=(2,), options={"softcap": 2.0, "is_causal": True}),
        case("soft cap and additive mask", scale_by=4.0, mask=additive(5, 7), options={"softcap": 2.0}),
        case("lse", options={"return_lse": True}),
        case("lse causal", options={"return_lse": True, "is_causal": True}),
        case("key lengths", 3, 9, lengths=(4, 9)),
        case("key lengths causal", 3, 9, lengths=(4, 9), options={"is_causal": True}),
        case("key lengths shorter than the queries", 5, 9, lengths=(2, 0), options={"is_causal": True}),
        case("key lengths of 0", 3, 9, lengths=(0, 5)),
        case("key lengths with window", 3, 9, lengths=(5, 9), options={"window": (2, 0)}),
        case("key lengths with ALiBi", 3, 9, lengths=(5, 9), slopes=(2,)),
        case("one query of a cache", 1, 9, lengths=(5, 9), options={"is_causal": True}),
        case("everything", 5, 9, heads=4, kv_heads=2, lengths=(4, 9), slopes=(2, 4), mask=additive(2, 1, 5, 9),
             options=everything | {"enable_gqa": True}),
        case("outer swapped", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "outer_swapped")),
        case("transposed", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "transposed")),
        case("misaligned", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "misaligned")),
        case("shifted", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "shifted")),
        case("strided", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "strided")),
        case("rows sliced", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "sliced_rows")),
        case("expanded", layouts=dict.fromkeys(("query", "key", "value", "grad_0"), "expanded")),
        case("expanded in the head", layouts=dict.fromkeys(("query", "value", "grad_0"), "expanded_last")),
        case("upstream of a sum", layouts={"grad_0": "from_sum"}, options={"is_causal": True}),
        case("upstream of a sum, soft cap", layouts={"grad_0": "from_sum"}, options={"softcap": 2.0}),
        case("large scores", scale_by=200.0),
        case("strides past 2^31", 3, 4, batch=1, far={"key": 2}),
    ]  # fmt: skip
    # Kernels give no gradient of a mask: each case that has one runs without it too.
    floating = ("additive", "everything", "ALiBi and mask")
    twins = [c for c in cases if any(word in c.name for word in floating) and not c.fixed]
    return cases + [dataclasses.replace(c, name=f"{c.name}, fixed", fixed=("attn_mask",)) for c in twins]


def _varlen_cases() -> list[Case]:
    def case(name, queries, keys=None, *, heads=2, kv_heads=None, dim=8, value_dim=None, slopes=None, slack=0,
             options=None, **kwargs):  # fmt: skip
        keys = queries if keys is None else keys
        kv_heads = heads if kv_heads is None else kv_heads

        def make(generator: torch.Generator) -> dict[str, Tensor]:
            tensors = {
                "query": _normal(generator, sum(queries), heads, dim),
                "key": _normal(generator, sum(keys), kv_heads, dim),
                "value": _normal(generator, sum(keys), kv_heads, value_dim or dim),
                "cu_seqlens_q": torch.tensor([0, *queries]).cumsum(0).int(),
                "cu_seqlens_k": torch.tensor([0, *keys]).cumsum(0).int(),
            }
            if slopes is not None:
                tensors["alibi_slopes"] = torch.rand(slopes, generator=generator, dtype=torch.float64)
            return tensors

        longest = {
            "max_seqlen_q": max(queries, default=0) + slack,
            "max_seqlen_k": max(keys, default=0) + slack,
        }
        return Case("varlen_attention", name, make, longest | (options or {}), **kwargs)

    everything = {"is_causal": True, "window": (3, 0), "softcap": 2.0, "scale": 0.3, "return_lse": True}
    layouts = ("query", "key", "value", "grad_0")
    return [
        case("plain", (3, 5)),
        case("causal", (3, 1, 6), options={"is_causal": True}),
        case("one sequence", (6,), options={"is_causal": True}),
        case("more keys, causal", (3, 2), (7, 5), options={"is_causal": True}),
        case("more queries, causal", (7, 5), (3, 2), options={"is_causal": True}),
        case("one query each", (1, 1, 1), (4, 9, 1), options={"is_causal": True}),
        case("empty sequences", (3, 0, 5, 0), (3, 0, 5, 0), options={"is_causal": True}),
        case("empty queries", (3, 0, 5), (3, 4, 5)),
        case("empty keys", (3, 4, 5), (3, 0, 5)),
        case("empty keys, lse", (3, 4, 5), (3, 0, 5), options={"return_lse": True}),
        case("only empty", (0, 0), (0, 0)),
        case("no sequences", (), ()),
        case("slack in max_seqlen", (3, 5), (2, 6), slack=3, options={"is_causal": True}),
        case("longer than a tile", (67, 3), (131, 3), heads=1, options={"is_causal": True}),
        case("groups of query heads", (3, 5), heads=4, kv_heads=2, options={"is_causal": True}),
        case("value head", (3, 5), dim=7, value_dim=3),
        case("window", (9, 4), options={"window": (2, 1)}),
        case("window and causal, more keys", (4, 2), (9, 2), options={"window": (2, 3), "is_causal": True}),
        case("ALiBi", (6, 3), slopes=(2,)),
        case("ALiBi by sequence, more keys", (3, 2), (7, 4), slopes=(2, 2), options={"is_causal": True}),
        case("soft cap", (5, 3), options={"softcap": 0.5}),
        case("lse", (5, 3), (4, 6), options={"return_lse": True}),
        case("everything", (5, 0, 3), (9, 2, 3), heads=4, kv_heads=2, slopes=(3, 4), options=everything),
        case("outer swapped", (3, 5), layouts=dict.fromkeys(layouts, "outer_swapped")),
        case("misaligned", (3, 5), layouts=dict.fromkeys(layouts, "misaligned")),
        case("strided", (3, 5), layouts=dict.fromkeys((*layouts, "cu_seqlens_q", "cu_seqlens_k"), "strided")),
        case("expanded", (3, 5), layouts={"query": "expanded", "value": "expanded_last", "grad_0": "expanded"}),
        case("upstream of a sum", (3, 5), layouts={"grad_0": "from_sum"}, options={"is_causal": True}),
    ]  # fmt: skip


CASES = [
    *(case for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm") for case in _norm_cases(op)),
    *_cross_entropy_cases(),
    *_linear_entropy_cases(),
    *_linear_cases(),
    *_attention_cases(),
    *_varlen_cases(),
]
BY_NAME = {str(case): case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases have one name"
