"""The other kernel libraries: how each is called for a case, and why one that is here cannot serve it.

Each is used if it is installed. An adapter gets the problem and gives what runs it; a reason why it cannot is raised as
`Unfit`. Sources: the public signatures of liger-kernel 0.8, flash-attn 2.8, xformers 0.0.3x, apex and
transformer-engine 2.x.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlm.bench.cases import ATTENTION, VARLEN, Problem

__all__ = ["PEERS", "Peer", "Side", "Unfit"]

SERVED = ("cuda",)  # types of device


class Unfit(Exception):
    """Why a side cannot serve a case."""


@dataclass(frozen=True)
class Side:
    """A function that is timed, and the inputs it takes: the problem's own if None."""

    function: Callable[..., Any]
    inputs: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Peer:
    """A library: its name, the module that shows it is there, and its adapters by op."""

    name: str
    module: str
    adapters: dict[str, Callable[[Problem], Side]]

    def side(self, problem: Problem) -> Side:
        """What runs this problem. Raises `Unfit` with the reason if nothing does."""
        op, device = problem.case.op, problem.inputs[0].device
        if op not in self.adapters:
            raise Unfit(f"has no {op}")
        if importlib.util.find_spec(self.module) is None:
            raise Unfit("not installed")
        if device.type not in SERVED:
            raise Unfit(f"serves GPUs, not {device.type}")
        return self.adapters[op](problem)


def _only(problem: Problem, *served: str) -> None:
    """Raises unless all options of the case are among those served."""
    names = [option.partition("=")[0] for option in problem.case.options]
    if beyond := [name for name in names if name not in (*served, "forward")]:
        raise Unfit(f"does not serve {', '.join(beyond)}")


def _rms_eps() -> float:
    return torch.finfo(torch.float32).eps  # that of torch's arithmetic, which takes None for it


# liger-kernel ---------------------------------------------------------------------------------------------------


def _liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _liger_layer_norm(problem: Problem) -> Side:
    function = _liger("layer_norm", "LigerLayerNormFunction")
    return Side(lambda x, weight, bias: function.apply(x, weight, bias, 1e-5))


# By default Liger's RMS norms write the gradient over the upstream one, which the next run needs: the False.
def _liger_rms_norm(problem: Problem) -> Side:
    function = _liger("rms_norm", "LigerRMSNormFunction")
    return Side(lambda x, weight: function.apply(x, weight, _rms_eps(), 0.0, "llama", False))


def _liger_add_rms_norm(problem: Problem) -> Side:
    _only(problem)
    function = _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    return Side(lambda x, residual, weight: function.apply(x, residual, weight, _rms_eps(), 0.0, "llama", False))


def _liger_cross_entropy(problem: Problem) -> Side:
    function, target = _liger("cross_entropy", "LigerCrossEntropyFunction"), problem.fixed["target"]
    # It writes the gradient over the logits.
    return Side(lambda x: function.apply(x, target, None)[0], problem.copies())


def _liger_linear_cross_entropy(problem: Problem) -> Side:
    function = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    target = problem.fixed["target"]
    return Side(lambda x, weight: function.apply(x, weight, target)[0])


# flash-attn and xformers ----------------------------------------------------------------------------------------


def _heads_inside(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A function of (B, T, H, D) as one of (B, H, T, D), which copies nothing."""
    return lambda *qkv: function(*(x.transpose(1, 2) for x in qkv), **options).transpose(1, 2)


def _flash_options(problem: Problem) -> dict[str, Any]:
    case, fixed = problem.case, problem.fixed
    capability = torch.cuda.get_device_capability(problem.inputs[0].device)
    if case.dtype.itemsize != 2 or capability < (8, 0):
        raise Unfit("serves bf16 and fp16, on GPUs from Ampere on")
    causal, window = bool(case.option("causal")), int(case.option("window"))
    options: dict[str, Any] = {"causal": causal}
    if window:
        options["window_size"] = (window, 0 if causal else window)
    return options | {name: fixed[name] for name in ("softcap", "alibi_slopes", "dropout_p") if name in fixed}


def _aligned(problem: Problem) -> None:
    """Raises where causal masks would be aligned in two ways: at the first keys, as torch's, or at the last."""
    if problem.case.sizes[2] != problem.case.sizes[-2]:
        raise Unfit("aligns queries with the last keys")


def _flash_attention(problem: Problem) -> Side:
    library = importlib.import_module("flash_attn")
    options = _flash_options(problem)
    if problem.case.option("cached"):
        _only(problem, "causal", "window", "softcap", "alibi", "gqa", "cached")
        if problem.case.backward:
            raise Unfit("has no backward with a cache")
        options["cache_seqlens"] = problem.fixed["key_lengths"]
        return Side(_heads_inside(library.flash_attn_with_kvcache, **options))
    _only(problem, "causal", "window", "softcap", "alibi", "gqa", "dropout")
    _aligned(problem)
    return Side(_heads_inside(library.flash_attn_func, **options))


def _flash_varlen(problem: Problem) -> Side:
    library = importlib.import_module("flash_attn")
    options, cu, longest = _flash_options(problem), problem.fixed["cu_seqlens"], problem.case.sizes[2]
    return Side(lambda q, k, v: library.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options))


def _xformers_attention(problem: Problem) -> Side:
    _only(problem, "causal", "dropout")
    _aligned(problem)
    library = importlib.import_module("xformers.ops")
    bias = library.LowerTriangularMask() if problem.case.option("causal") else None
    return Side(_heads_inside(library.memory_efficient_attention, attn_bias=bias, p=problem.case.option("dropout")))


# apex and transformer-engine ------------------------------------------------------------------------------------


def _apex_layer_norm(problem: Problem) -> Side:
    function = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    columns = problem.case.sizes[1:]
    return Side(lambda x, weight, bias: function(x, weight, bias, columns, 1e-5))


def _apex_rms_norm(problem: Problem) -> Side:
    function = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine
    columns = problem.case.sizes[1:]
    return Side(lambda x, weight: function(x, weight, columns, _rms_eps()))


def _engine_norm(problem: Problem) -> Side:
    library, rms = importlib.import_module("transformer_engine.pytorch"), problem.case.op == "rms_norm"
    x, *parameters = problem.inputs
    kind, eps = (library.RMSNorm, _rms_eps()) if rms else (library.LayerNorm, 1e-5)
    module = kind(problem.case.sizes[1], eps=eps, device=x.device, dtype=x.dtype)
    own = [module.weight] if rms else [module.weight, module.bias]
    with torch.no_grad():
        for parameter, value in zip(own, parameters, strict=True):
            parameter.copy_(value)
    return Side(lambda x, *_: module(x), [x, *own])


def _engine_attention(problem: Problem) -> Side:
    _only(problem, "causal", "gqa", "dropout")
    _aligned(problem)
    library, (q, k, _) = importlib.import_module("transformer_engine.pytorch"), problem.inputs
    module = library.DotProductAttention(
        q.shape[1],
        q.shape[3],
        num_gqa_groups=k.shape[1],
        attention_dropout=problem.case.option("dropout"),
        qkv_format="bshd",
        attn_mask_type="causal" if problem.case.option("causal") else "no_mask",
    )
    shape = q.transpose(1, 2).shape
    return Side(_heads_inside(lambda *qkv: module(*qkv).reshape(shape)))


PEERS = (
    Peer(
        "liger-kernel",
        "liger_kernel",
        {
            "layer_norm": _liger_layer_norm,
            "rms_norm": _liger_rms_norm,
            "add_rms_norm": _liger_add_rms_norm,
            "cross_entropy": _liger_cross_entropy,
            "linear_cross_entropy": _liger_linear_cross_entropy,
        },
    ),
    Peer("flash-attn", "flash_attn", {ATTENTION: _flash_attention, VARLEN: _flash_varlen}),
    Peer("xformers", "xformers", {ATTENTION: _xformers_attention}),
    Peer("apex", "apex", {"layer_norm": _apex_layer_norm, "rms_norm": _apex_rms_norm}),
    Peer(
        "transformer-engine",
        "transformer_engine",
        {"layer_norm": _engine_norm, "rms_norm": _engine_norm, ATTENTION: _engine_attention},
    ),
)
