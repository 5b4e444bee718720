"""Scaled dot-product attention on batches and on packed sequences: contract, torch ops, backends."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops.attention import kernels, launch, reference
from fastlm.ops.checks import (
    TENSORS,
    autocast_dtype,
    check_bool,
    check_integer,
    check_not_negative,
    check_number,
    check_probability,
    check_tensor,
)
from fastlm.ops.compiled import CPU, CUDA, Launchers, triton_devices, triton_missing
from fastlm.ops.measured import Sizes, entries, fastest, tuned
from fastlm.ops.registry import FLOATS, Backend, Op

MAX_HEAD = 256  # dimension, of kernels
MAX_HEAD_CUDA = 128
FEW_QUERIES = 48  # in fp32 on a CPU torch's own op is as fast as ours below it, and with a mask (`fastlm bench`)
CUDA_DTYPES = frozenset({torch.bfloat16, torch.float16})


class ScaledDotProductAttentionInputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    alibi_slopes: Tensor | None
    softcap: float
    key_lengths: Tensor | None
    return_lse: bool
    dropout_p: float
    rng_state: Tensor | None


class VarlenAttentionInputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    alibi_slopes: Tensor | None
    softcap: float
    return_lse: bool
    dropout_p: float
    rng_state: Tensor | None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Attention: softmax over the keys of the scaled products with the query, times the values.

        s_ij   = scale * query_i . key_j,  soft-capped,  - slope * |i + offset - j|,  + attn_mask_ij
        output = dropout(softmax_j(s)) value

    Query i sits at key position i + offset for causal masks, windows and ALiBi alike: offset is 0 (torch's top-left
    alignment), or key_lengths - T_q where `key_lengths` is given (the last query at the last filled key). A query that
    sees no key gives 0, lse -inf and zero gradients.

    Args:
        query, key, value: (B, H, T_q, D), (B, H_kv, T_k, D), (B, H_kv, T_k, D_v); fp32, bf16, fp16 or fp64, any
            strides; other ranks and broadcasting batch dimensions as torch takes them.
        attn_mask: broadcasts to (B, H, T_q, T_k); bool (True takes part) or float (added to the scores). A mask that
            requires a gradient gets one. May be combined with `is_causal`.
        dropout_p: probability of dropping a probability, in [0, 1]. Applied whenever it is not 0, as torch does.
        is_causal: query i sees keys j <= i + offset.
        scale: None is 1 / sqrt(D).
        enable_gqa: H may be a multiple of H_kv; each key head serves H / H_kv query heads in a row.
        window: (left, right): query i sees keys in [i + offset - left, i + offset + right]; -1 is open.
        alibi_slopes: (H,) or (B, H), in any floating dtype.
        softcap: c bounds the scaled scores by c * tanh(s / c); 0 for none.
        key_lengths: (B,) int32, how many keys of a static cache are filled; T_k is the size of the cache.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        (B, H, T_q, D_v) in the dtype of `query`; with `return_lse` (output, lse), lse (B, H, T_q) in fp32 (fp64 for
        fp64), natural logarithm, not differentiable.

    Raises:
        RuntimeError: as torch, shapes and dtypes that do not fit. ValueError: the arguments that torch does not have.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); Dao 2023 (arXiv 2307.08691); Press et al. 2021 (arXiv 2108.12409).
    """
    op = "scaled_dot_product_attention"
    shape = None
    extra = attn_mask is not None or window is not None or alibi_slopes is not None or key_lengths is not None
    if not (extra or softcap != 0.0 or return_lse) and _usual(
        query, key, value, dropout_p, is_causal, scale, enable_gqa
    ):
        left = right = -1
        scale = query.shape[3] ** -0.5 if scale is None else scale
        auto = query.is_cpu and SCALED_DOT_PRODUCT_ATTENTION.auto_alone()
        if auto and native_is_fastest(query, key, is_causal, dropout_p):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, None, dropout_p, is_causal, scale=scale
            )
    else:
        left, right, dropout_p, scale, softcap = _check_options(
            op, (query, key, value), dropout_p, is_causal, scale, window, softcap
        )
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
        _check_dense(op, query, key, value, attn_mask, enable_gqa)
        _check_batch(op, query, key, alibi_slopes, key_lengths, return_lse)
        if not query.dim() == key.dim() == value.dim() == 4 or not _same_batch(query, key, value, enable_gqa):
            query, key, value, attn_mask, shape = _four_dimensions(op, query, key, value, attn_mask, enable_gqa)
    inputs = ScaledDotProductAttentionInputs(
        query, key, value, attn_mask, is_causal, scale, left, right, alibi_slopes, softcap,
        key_lengths, return_lse, dropout_p, None,
    )  # fmt: skip
    result = SCALED_DOT_PRODUCT_ATTENTION.choose(inputs)(*inputs)
    return result if shape is None or return_lse else result.reshape(shape)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int, int] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Any:
    r"""Attention over sequences of different lengths, packed one after the other without padding.

    As `scaled_dot_product_attention` on each sequence, but aligned at the end: query i of a sequence sits at key
    position i + T_k - T_q for causal masks, windows and ALiBi alike. Grouped-query attention follows from the shapes.

    Args:
        query, key, value: (total_q, H, D), (total_k, H_kv, D), (total_k, H_kv, D_v).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence starts; the first is 0, the last the total.
        max_seqlen_q, max_seqlen_k: at least the longest sequence of each. Checked on a CPU; on a GPU, where that would
            need a sync, smaller values give wrong results.
        dropout_p, is_causal, scale, window, softcap, return_lse: as in `scaled_dot_product_attention`.
        alibi_slopes: (H,) or (B, H).

    Returns:
        (total_q, H, D_v) in the dtype of `query`; with `return_lse` (output, lse), lse (H, total_q).

    Raises:
        ValueError: shapes, dtypes, lengths or options that do not fit. TypeError: an argument of the wrong type.

    Source: Dao 2023 (arXiv 2307.08691).
    """
    op = "varlen_attention"
    left, right, dropout_p, scale, softcap = _check_options(
        op, (query, key, value), dropout_p, is_causal, scale, window, softcap
    )
    query, key, value, _ = _autocast(query, key, value, None)
    _check_packed(op, query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    max_seqlen_q = check_integer(op, "max_seqlen_q", max_seqlen_q)
    max_seqlen_k = check_integer(op, "max_seqlen_k", max_seqlen_k)
    inputs = VarlenAttentionInputs(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, scale,
        left, right, alibi_slopes, softcap, return_lse, dropout_p, None,
    )  # fmt: skip
    return VARLEN_ATTENTION.choose(inputs)(*inputs)


# Checks and shapes ------------------------------------------------------------------------------------------------


def _usual(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool
) -> bool:
    """Whether a call without further options is of the kind that needs no closer look: nearly all are."""
    return (
        type(query) in TENSORS
        and type(key) in TENSORS
        and type(value) in TENSORS
        and query.dim() == 4
        and key.shape == value.shape
        and query.shape[:2] == key.shape[:2]
        and 0 < query.shape[3] == key.shape[3]
        and query.is_floating_point()
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and type(is_causal) is bool
        and type(enable_gqa) is bool
        and type(dropout_p) is float
        and 0.0 <= dropout_p <= 1.0
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and autocast_dtype(query) is None
    )


def _autocast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Any]:
    """As torch's own op under autocast: everything of floating point in autocast's dtype."""
    dtype = autocast_dtype(query)
    if dtype is not None and query.dtype != torch.float64:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    return query, key, value, mask


def _check_options(
    op: str,
    tensors: tuple[Tensor, ...],
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
) -> tuple[int, int, float, float, float]:
    """-> window left and right, dropout_p, scale, softcap."""
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        check_tensor(op, name, x)
    dropout_p = check_probability(op, "dropout_p", dropout_p, RuntimeError if op.startswith("scaled") else ValueError)
    check_bool(op, "is_causal", is_causal)
    softcap = check_not_negative(op, "softcap", softcap)
    scale = tensors[0].shape[-1:].numel() ** -0.5 if scale is None and tensors[0].shape[-1:] != (0,) else scale
    scale = 1.0 if scale is None else check_number(op, "scale", scale)
    if window is None:
        return -1, -1, dropout_p, scale, softcap
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"{op}: window must be (left, right), got {type(window).__name__}")
    sizes = [check_integer(op, "window's elements", size) for size in window]
    if len(sizes) != 2 or min(sizes) < -1:
        raise ValueError(f"{op}: window must be (left, right), each -1 or more, got {window}")
    return sizes[0], sizes[1], dropout_p, scale, softcap


def _check_types(op: str, error: type[Exception], query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise error(f"{op}: {name} must be {query.dtype} as query is, got {x.dtype}")
        if x.device != query.device:
            raise error(f"{op}: {name} must be on {query.device} as query is, got {x.device}")
    if not query.is_floating_point():
        raise error(f"{op}: query, key and value must be floating point, got {query.dtype}")


def _check_dense(
    op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> None:
    _check_types(op, RuntimeError, query, key, value)
    check_bool(op, "enable_gqa", enable_gqa)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise RuntimeError(f"{op}: {name} must have at least 2 dimensions (T, D), got shape {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise RuntimeError(f"{op}: key must have head dimension {query.shape[-1]} as query has, got {key.shape[-1]}")
    if value.shape[-2] != key.shape[-2]:
        raise RuntimeError(f"{op}: value must have {key.shape[-2]} rows as key has, got {value.shape[-2]}")
    if enable_gqa:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.dim() < 3:
                raise IndexError(f"{op}: {name} must have a dimension of heads for enable_gqa, got {tuple(x.shape)}")
            if query.shape[-3] % max(1, x.shape[-3]) or (query.shape[-3] and not x.shape[-3]):
                need = f"a number of heads that divides query's, {query.shape[-3]}"
                raise RuntimeError(f"{op}: {name} must have {need}, got {x.shape[-3]}")
    if attn_mask is not None:
        _check_mask(op, query, key, attn_mask, enable_gqa)


def _check_mask(op: str, query: Tensor, key: Tensor, attn_mask: Tensor, enable_gqa: bool) -> None:
    check_tensor(op, "attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"{op}: attn_mask must be bool, float32 or {query.dtype}, got {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise RuntimeError(f"{op}: attn_mask must be on {query.device} as query is, got {attn_mask.device}")
    if attn_mask.dim() < 2:
        raise IndexError(f"{op}: attn_mask must have at least 2 dimensions (T_q, T_k), got {tuple(attn_mask.shape)}")
    heads = (1,) if enable_gqa else key.shape[-3:-2]
    full = (*_broadcast(op, query.shape[:-2], (*key.shape[:-3], *heads)), query.shape[-2], key.shape[-2])
    sizes = tuple(attn_mask.shape)
    if len(sizes) > len(full) or any(
        size not in (1, need) for size, need in zip(sizes[::-1], full[::-1], strict=False)
    ):
        raise RuntimeError(f"{op}: attn_mask must broadcast to {full}, got {sizes}")


def _broadcast(op: str, *batches: tuple[int, ...]) -> torch.Size:
    try:
        return torch.broadcast_shapes(*batches)
    except RuntimeError:
        got = " and ".join(str(tuple(batch)) for batch in dict.fromkeys(batches))
        raise RuntimeError(f"{op}: query must broadcast with key and value before (T, D), got {got} there") from None


def _check_batch(
    op: str, query: Tensor, key: Tensor, alibi_slopes: Tensor | None, key_lengths: Tensor | None, return_lse: bool
) -> None:
    """Checks what only (B, H, T, D) has."""
    given = {"alibi_slopes": alibi_slopes is not None, "key_lengths": key_lengths is not None, "return_lse": return_lse}
    if any(given.values()) and query.dim() != 4:
        name = next(name for name, present in given.items() if present)
        raise ValueError(f"{op}: {name} needs query of shape (B, H, T, D), got {tuple(query.shape)}")
    if alibi_slopes is not None:
        _check_slopes(op, alibi_slopes, query, query.shape[0], query.shape[1])
    if key_lengths is None:
        return
    check_tensor(op, "key_lengths", key_lengths)
    if key_lengths.dtype not in (torch.int32, torch.int64) or tuple(key_lengths.shape) != (query.shape[0],):
        got = f"{key_lengths.dtype} of shape {tuple(key_lengths.shape)}"
        raise ValueError(f"{op}: key_lengths must be int32 of shape ({query.shape[0]},), got {got}")
    if key_lengths.device != query.device:
        raise ValueError(f"{op}: key_lengths must be on {query.device} as query is, got {key_lengths.device}")


def _check_slopes(op: str, slopes: Tensor, query: Tensor, batch: int, heads: int) -> None:
    check_tensor(op, "alibi_slopes", slopes)
    if tuple(slopes.shape) not in ((heads,), (batch, heads)) or not slopes.is_floating_point():
        got = f"{slopes.dtype} of shape {tuple(slopes.shape)}"
        raise ValueError(
            f"{op}: alibi_slopes must be floating point of shape ({heads},) or ({batch}, {heads}), got {got}"
        )
    if slopes.device != query.device:
        raise ValueError(f"{op}: alibi_slopes must be on {query.device} as query is, got {slopes.device}")


def _check_packed(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
) -> None:
    _check_types(op, ValueError, query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 3:
            raise ValueError(f"{op}: {name} must have shape (total, H, D), got {tuple(x.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"{op}: key must have head dimension {query.shape[-1]} as query has, got {key.shape[-1]}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{op}: value must have shape {tuple(key.shape[:2])} before D as key, got {tuple(value.shape[:2])}"
        )
    if query.shape[1] % max(1, key.shape[1]) or (query.shape[1] and not key.shape[1]):
        need = "query's number of heads must be a multiple of key's"
        raise ValueError(f"{op}: {need}, got {query.shape[1]} and {key.shape[1]}")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(op, name, cu)
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(f"{op}: {name} must be int32 of shape (B + 1,), got {cu.dtype} of shape {tuple(cu.shape)}")
        if cu.device != query.device:
            raise ValueError(f"{op}: {name} must be on {query.device} as query is, got {cu.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        got = f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must have one length, got {got}")
    if alibi_slopes is not None:
        _check_slopes(op, alibi_slopes, query, cu_seqlens_q.shape[0] - 1, query.shape[1])


def _check_lengths(inputs: VarlenAttentionInputs) -> None:
    """Checks the values of cu_seqlens on a CPU, where looking at them costs no sync."""
    for side, x, longest in (("q", inputs.query, inputs.max_seqlen_q), ("k", inputs.key, inputs.max_seqlen_k)):
        cu = inputs.cu_seqlens_q if side == "q" else inputs.cu_seqlens_k
        if cu.device.type != "cpu":
            return
        ends = cu.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(ends)]
        if ends[0] != 0 or ends[-1] != x.shape[0] or min(lengths, default=0) < 0:
            need = (
                f"cu_seqlens_{side} must rise from 0 to {x.shape[0]}, the rows of {'query' if side == 'q' else 'key'}"
            )
            raise ValueError(f"varlen_attention: {need}, got {ends if len(ends) < 9 else [*ends[:4], '...', ends[-1]]}")
        if max(lengths, default=0) > longest:
            need = f"max_seqlen_{side} must be at least the longest sequence, {max(lengths)}"
            raise ValueError(f"varlen_attention: {need}, got {longest}")


def _check_key_lengths(inputs: ScaledDotProductAttentionInputs) -> None:
    """As `_check_lengths`."""
    lengths, keys = inputs.key_lengths, inputs.key.shape[2]
    if lengths is None or lengths.device.type != "cpu" or not lengths.numel() or _only_traced():
        return
    low, high = (int(bound) for bound in lengths.aminmax())
    if low < 0 or high > keys:
        need = f"key_lengths must be from 0 to {keys}, the rows of key"
        raise ValueError(f"scaled_dot_product_attention: {need}, got {low if low < 0 else high}")


def _same_batch(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    return (
        query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (enable_gqa or query.shape[1] == key.shape[1])
    )


def _four_dimensions(
    op: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, torch.Size]:
    """Any ranks and broadcasting batch dimensions as (B, H, T, D), and the shape that the output is to have."""
    queries, keys = query.shape[-2], key.shape[-2]
    heads = 1 if enable_gqa else 0  # dimensions before (T, D) that need not broadcast
    lead = _broadcast(op, *(x.shape[: x.dim() - 2 - heads] for x in (query, key, value)))
    full = lead + query.shape[query.dim() - 2 - heads : query.dim() - 2]

    def merged(x: Tensor, own: torch.Size) -> Tensor:
        x = x.expand(lead + own + x.shape[-2:])
        while x.dim() < 4:
            x = x.unsqueeze(0)
        return x.flatten(0, x.dim() - 4)

    if enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    four = [merged(x, x.shape[x.dim() - 2 - heads : x.dim() - 2]) for x in (query, key, value)]
    if attn_mask is not None:
        attn_mask = merged(attn_mask.expand(*attn_mask.shape[:-2], queries, keys), full[len(lead) :])
    return four[0], four[1], four[2], attn_mask, full + torch.Size((queries, value.shape[-1]))


# Torch ops ------------------------------------------------------------------------------------------------------


def _wide_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _fake_dense(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=_wide_dtype(query))
    return query.new_empty((*query.shape[:3], value.shape[3])), lse


def _fake_packed(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=_wide_dtype(query))
    return query.new_empty((*query.shape[:2], value.shape[2])), lse


def _result(outputs: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> Any:
    return_lse = inputs[-3]
    return outputs if return_lse else outputs[0]


def _composite(*inputs: Any) -> Any:
    output, lse = reference.scaled_dot_product_attention_fwd(*inputs)
    return _result((output, lse.detach()), inputs)


def _packed_composite(*inputs: Any) -> Any:
    output, lse = reference.varlen_attention_fwd(*inputs)
    return _result((output, lse.detach()), inputs)


def _beyond_bwd(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> list[str]:
    slopes = inputs.alibi_slopes
    wanted = slopes is not None and slopes.requires_grad and torch.is_grad_enabled()
    return ["gives no gradient of alibi_slopes"] if wanted else []


def _first(op: str, inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> str:
    """Ours for what torch's op lacks or takes as a mask only, which is memory quadratic in T; else whatever
    measured.json says."""
    packed = isinstance(inputs, VarlenAttentionInputs)  # which torch's op is not for
    if not inputs.query.is_cpu and (packed or _native_lacks(inputs) or _needs_mask(inputs)):  # type: ignore[arg-type]
        if _kernel_reasons(inputs):
            return ""
        return "cuda" if _suits_cuda(inputs) else "triton"
    mask = getattr(inputs, "attn_mask", None)
    if torch.compiler.is_compiling() or (mask is not None and mask.requires_grad):  # whether or not it is to get one
        return ""
    if inputs.query.is_cpu and (_native_lacks(inputs) or (not packed and _hides_or_biases(inputs))):  # type: ignore[arg-type]
        return "cpu"
    if getattr(inputs, "key_lengths", None) is not None:
        return fastest(f"{op} with key_lengths", inputs.key)
    return fastest(op, inputs.query) if packed else _fastest(op, inputs.query, inputs.key, mask is not None)


def _fastest(op: str, query: Tensor, key: Tensor, masked: bool = False) -> str:
    if query.shape[-2] == 1:
        return fastest(f"{op} of one query", key)
    if query.is_cpu and query.dtype == torch.float32 and (masked or query.shape[-2] < FEW_QUERIES):
        return ""
    return fastest(op, query)


def native_is_fastest(query: Tensor, key: Tensor, is_causal: bool, dropout_p: float) -> bool:
    """Whether "auto" takes torch's op for (B, H, T, D) tensors on a CPU without further options."""
    op = "scaled_dot_product_attention"
    if entries() and (users := tuned(op, query, _sizes_of(query, key, is_causal, dropout_p))):
        return users == "native"
    return not _fastest(op, query, key)


def _sizes_of(query: Tensor, key: Tensor, is_causal: bool, dropout_p: float, *options: str) -> Sizes:
    B, H, T, D = query.shape
    return B * H, T, key.shape[2], D, "causal" if is_causal else "", "dropout" if dropout_p else "", *options


def _sizes(inputs: ScaledDotProductAttentionInputs) -> Sizes:
    mask = inputs.attn_mask
    given = (*_options(inputs), *_where(masked=mask is not None, cached=inputs.key_lengths is not None))
    return _sizes_of(inputs.query, inputs.key, inputs.is_causal, inputs.dropout_p, *given)


def _packed_sizes(inputs: VarlenAttentionInputs) -> Sizes:
    total, H, D = inputs.query.shape
    given = (*_options(inputs), *_where(causal=inputs.is_causal, dropout=bool(inputs.dropout_p)))
    return total, H, inputs.max_seqlen_q, inputs.max_seqlen_k, D, *given


def _options(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> tuple[str, ...]:
    window = inputs.window_left >= 0 or inputs.window_right >= 0
    alibi, softcap = inputs.alibi_slopes is not None, bool(inputs.softcap)
    return _where(window=window, alibi=alibi, softcap=softcap, lse=inputs.return_lse)


def _where(**given: bool) -> tuple[str, ...]:
    return tuple([name for name, present in given.items() if present])


def _suits_cuda(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> bool:
    """Whether the CUDA kernels come before Triton's: on GPUs whose tensor cores have only the instructions that both
    use, of which there the CUDA kernels need fewer (benchmarks/results/attention.md)."""
    query = inputs.query
    if not query.is_cuda or torch.cuda.get_device_capability(query.device)[0] not in (8, 12):
        return False
    return query.dtype in CUDA_DTYPES and not CUDA.missing() and not _cuda_reasons(inputs)


def _key(inputs: ScaledDotProductAttentionInputs) -> tuple[Any, ...]:
    query, mask = inputs.query, inputs.attn_mask
    hides = inputs.window_left >= 0 or inputs.window_right >= 0 or inputs.key_lengths is not None
    grad = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    sizes = query.shape[3], inputs.value.shape[3]
    return query.device, query.dtype, hides, sizes, mask is None, grad, not inputs.softcap, inputs.return_lse


def _needs_mask(inputs: ScaledDotProductAttentionInputs) -> bool:
    """Whether it is only by a mask made for the call that torch's op can do it."""
    return inputs.key_lengths is not None or _hides_or_biases(inputs)


def _hides_or_biases(inputs: ScaledDotProductAttentionInputs) -> bool:
    """The same, less caches: on a CPU torch's op is given what is filled of them."""
    hides = inputs.window_left >= 0 or inputs.window_right >= 0
    return hides or inputs.alibi_slopes is not None or (inputs.attn_mask is not None and inputs.is_causal)


SCALED_DOT_PRODUCT_ATTENTION = Op(
    "scaled_dot_product_attention",
    inputs=ScaledDotProductAttentionInputs,
    fwd="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, SymInt window_left,"
    " SymInt window_right, Tensor? alibi_slopes, float softcap, Tensor? key_lengths, bool return_lse,"
    " float dropout_p, Tensor? rng_state, str backend) -> (Tensor output, Tensor lse)",
    bwd="(Tensor? grad_output, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes,"
    " Tensor? key_lengths, Tensor? rng_state, Tensor output, Tensor lse, bool is_causal, float scale,"
    " SymInt window_left, SymInt window_right, float softcap, float dropout_p, bool[] needs_grad, str backend)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_attn_mask)",
    fake_fwd=_fake_dense,
    result=_result,
    composite=_composite,
    auto=("native", "reference"),
    fusable=False,
    draws=True,
    beyond_bwd=_beyond_bwd,
    sizes=_sizes,
    measured=functools.partial(_first, "scaled_dot_product_attention"),
    key=_key,
)

VARLEN_ATTENTION = Op(
    "varlen_attention",
    inputs=VarlenAttentionInputs,
    fwd="(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, bool is_causal, float scale, SymInt window_left, SymInt window_right,"
    " Tensor? alibi_slopes, float softcap, bool return_lse, float dropout_p, Tensor? rng_state, str backend)"
    " -> (Tensor output, Tensor lse)",
    bwd="(Tensor? grad_output, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " Tensor? alibi_slopes, Tensor? rng_state, Tensor output, Tensor lse, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " bool is_causal, float scale, SymInt window_left, SymInt window_right, float softcap, float dropout_p,"
    " bool[] needs_grad, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    fake_fwd=_fake_packed,
    result=_result,
    composite=_packed_composite,
    auto=("native", "reference"),
    fusable=False,
    draws=True,
    beyond_bwd=_beyond_bwd,
    sizes=_packed_sizes,
    measured=functools.partial(_first, "varlen_attention"),
)


# Backends: torch's own operations, and the reference --------------------------------------------------------------


def _native_mask(inputs: ScaledDotProductAttentionInputs) -> Tensor | None:
    """One mask for everything that torch's op takes only as a mask; None if all is seen."""
    query, key, mask, lengths = inputs.query, inputs.key, inputs.attn_mask, inputs.key_lengths
    queries, keys = query.shape[2], key.shape[2]
    offset: Tensor | int = 0 if lengths is None else (lengths.long() - queries)[:, None, None, None]
    seen = reference.visible(
        queries, keys, offset, inputs.is_causal, inputs.window_left, inputs.window_right, query.device
    )
    filled = None if lengths is None else torch.arange(keys, device=query.device) < lengths[:, None, None, None]
    boolean = mask if mask is not None and mask.dtype == torch.bool else None
    allowed = [x for x in (seen, filled, boolean) if x is not None]
    if not allowed and inputs.alibi_slopes is None:
        return mask
    biases = [] if mask is None or mask is boolean else [mask]
    if inputs.alibi_slopes is not None:
        biases.append(reference.alibi(inputs.alibi_slopes.to(_wide_dtype(query)), queries, keys, offset))
    if not biases:
        return _all(allowed)
    bias = sum(biases[1:], biases[0])
    return bias.masked_fill(~_all(allowed), float("-inf")) if allowed else bias


def _all(masks: list[Tensor]) -> Tensor:
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask
    return result


def _native_attention(*args: Any) -> Tensor:
    inputs = ScaledDotProductAttentionInputs._make(args)
    if not _needs_mask(inputs):
        return _native_masked(inputs, inputs.attn_mask, inputs.is_causal)
    _check_key_lengths(inputs)
    lengths = inputs.key_lengths
    if lengths is not None:
        if lengths.is_cpu and lengths.numel() and not _only_traced():
            return torch.cat([_native_filled(inputs, b, n) for b, n in enumerate(lengths.tolist())])
        key, value = reference.filled_only(inputs.key, inputs.value, lengths)
        inputs = inputs._replace(key=key, value=value)
    mask = _native_mask(inputs)
    return _native_masked(inputs, mask, inputs.is_causal and mask is None)


def _native_masked(inputs: ScaledDotProductAttentionInputs, mask: Tensor | None, is_causal: bool) -> Tensor:
    query, key, value, grouped = inputs.query, inputs.key, inputs.value, inputs.query.shape[1] != inputs.key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, inputs.dropout_p, is_causal, scale=inputs.scale, enable_gqa=grouped
    )


def _native_filled(inputs: ScaledDotProductAttentionInputs, b: int, n: int) -> Tensor:
    """One sequence of the batch and the n keys that are filled of its cache: the others are not even looked at."""
    own = slice(b, b + 1)
    mask, slopes = inputs.attn_mask, inputs.alibi_slopes
    if mask is not None:
        mask = mask.expand(*inputs.query.shape[:3], inputs.key.shape[2])[own, :, :, :n]
    if slopes is not None:
        slopes = slopes[own] if slopes.dim() == 2 else slopes
    one = inputs._replace(
        query=inputs.query[own], key=inputs.key[own, :, :n], value=inputs.value[own, :, :n], attn_mask=mask,
        alibi_slopes=slopes, key_lengths=torch.full((1,), n),
    )  # fmt: skip
    if inputs.query.shape[2] == 1 and inputs.window_left < 0 and slopes is None:  # which sees all that is filled
        return _native_masked(one, mask, False)
    return _native_masked(one, _native_mask(one), False)


def _only_traced() -> bool:
    """Whether values cannot be looked at: a compiler or a function transform is at work."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _native_varlen(*args: Any) -> Tensor:
    """Torch's op on one sequence after another."""
    inputs = VarlenAttentionInputs(*args)
    _check_lengths(inputs)
    outputs = []
    ends = zip(inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist(), strict=True)
    previous = next(ends)
    for sequence, current in enumerate(ends):
        q = inputs.query[previous[0] : current[0]].transpose(0, 1)[None]
        k, v = (x[previous[1] : current[1]].transpose(0, 1)[None] for x in (inputs.key, inputs.value))
        previous = current
        slopes, lengths = inputs.alibi_slopes, None
        slopes = slopes[sequence] if slopes is not None and slopes.dim() == 2 else slopes
        if q.shape[2] != k.shape[2]:
            lengths = torch.tensor([k.shape[2]], device=q.device)
        output = _native_attention(
            q, k, v, None, inputs.is_causal, inputs.scale, inputs.window_left, inputs.window_right, slopes,
            inputs.softcap, lengths, False, inputs.dropout_p, None,
        )  # fmt: skip
        outputs.append(output[0].transpose(0, 1))
    if outputs:
        return torch.cat(outputs)
    nothing = inputs.query.sum() + inputs.key.sum() + inputs.value.sum()  # no rows, but part of the graph
    return nothing.expand(*inputs.query.shape[:2], inputs.value.shape[2])


def _native_lacks(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> list[str]:
    lacking = {"softcap": inputs.softcap, "log-sum-exp output": inputs.return_lse}
    return [f"torch's scaled_dot_product_attention has no {name}" for name, value in lacking.items() if value]


def _native_reasons(inputs: ScaledDotProductAttentionInputs) -> list[str]:
    reasons = _native_lacks(inputs)
    hides = inputs.window_left >= 0 or inputs.window_right >= 0 or inputs.key_lengths is not None
    if hides and inputs.query.device.type != "cpu":
        reasons.append(f"torch does not promise 0 for queries without a key on {inputs.query.device.type}")
    return reasons


def _native_varlen_reasons(inputs: VarlenAttentionInputs) -> list[str]:
    reasons = _native_lacks(inputs)
    if inputs.query.device.type != "cpu" or torch.compiler.is_compiling():
        reasons.append("going through the sequences one by one needs their lengths on the host")
    return reasons


def _reference_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    _check_key_lengths(ScaledDotProductAttentionInputs(*args))
    return reference.scaled_dot_product_attention_fwd(*args)


def _reference_varlen_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    _check_lengths(VarlenAttentionInputs(*args))
    return reference.varlen_attention_fwd(*args)


SCALED_DOT_PRODUCT_ATTENTION.register(Backend("native", reasons=_native_reasons, call=_native_attention))
SCALED_DOT_PRODUCT_ATTENTION.register(
    Backend(
        "reference",
        fwd=_reference_fwd,
        bwd=reference.scaled_dot_product_attention_bwd,
    )
)
VARLEN_ATTENTION.register(Backend("native", reasons=_native_varlen_reasons, call=_native_varlen))
VARLEN_ATTENTION.register(Backend("reference", fwd=_reference_varlen_fwd, bwd=reference.varlen_attention_bwd))


# Backends: kernels ------------------------------------------------------------------------------------------------


def _kernel_reasons(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> list[str]:
    mask = getattr(inputs, "attn_mask", None)
    reasons = []
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        reasons.append("gives no gradient of attn_mask")
    if (size := max(inputs.query.shape[-1], inputs.value.shape[-1])) > MAX_HEAD:
        reasons.append(f"serves head dimensions up to {MAX_HEAD}, got {size}")
    if inputs.query.is_cuda and (got := torch.cuda.get_device_capability(inputs.query.device)) < (8, 0):
        reasons.append(f"needs a GPU of compute capability 8.0, got {got[0]}.{got[1]}")
    return reasons


def _cuda_reasons(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> list[str]:
    reasons = _kernel_reasons(inputs)
    if getattr(inputs, "attn_mask", None) is not None:
        reasons.append("takes no attn_mask; the backend triton does")
    sizes = (inputs.query.shape[-1], inputs.value.shape[-1])
    if any(size % 8 or not 8 <= size <= MAX_HEAD_CUDA for size in sizes):
        need = f"multiples of 8 up to {MAX_HEAD_CUDA}"
        reasons.append(f"serves head dimensions that are {need}, got {' and '.join(map(str, dict.fromkeys(sizes)))}")
    return reasons


def register(
    name: str,
    load: Callable[[], kernels.Kernels],
    *,
    devices: Iterable[str],
    dtypes: frozenset[torch.dtype],
    available: Callable[[], str],
    reasons: Callable[[Any], list[str]] = _kernel_reasons,
    is_ready: Callable[[Tensor], bool] = kernels.is_ready,
) -> None:
    """Registers a backend of both functions that is two functions of a `Problem`.

    Args:
        name, dtypes, available, reasons: as in `Backend`.
        load: gives the functions.
        devices: device types served.
        is_ready: whether query, key or value is read as it lies.
    """

    def copies(inputs: ScaledDotProductAttentionInputs | VarlenAttentionInputs) -> list[str]:
        tensors = {name: getattr(inputs, name) for name in ("query", "key", "value")}
        return [f"{name}, of strides {x.stride()}" for name, x in tensors.items() if not is_ready(x)]

    def backend(check: Callable[[Any], None], inputs: Any, fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Backend:
        def checked_fwd(*args: Any) -> tuple[Tensor, Tensor]:
            check(inputs(*args))
            return fwd(load(), *args)

        return Backend(
            name,
            devices=frozenset(devices),
            dtypes=dtypes,
            reasons=reasons,
            fwd=checked_fwd,
            bwd=lambda *args: bwd(load(), *args),
            available=available,
            copies=copies,
        )

    SCALED_DOT_PRODUCT_ATTENTION.register(
        backend(_check_key_lengths, ScaledDotProductAttentionInputs, kernels.dense_fwd, kernels.dense_bwd)
    )
    VARLEN_ATTENTION.register(backend(_check_lengths, VarlenAttentionInputs, kernels.packed_fwd, kernels.packed_bwd))


def register_cpu(name: str, launchers: Launchers) -> None:
    """Registers a variant of the CPU kernels as a backend."""
    register(
        name,
        functools.cache(lambda: launch.kernels(launchers)),
        devices={"cpu"},
        dtypes=FLOATS - {torch.float64},
        available=launchers.missing,
    )


def register_cuda(name: str, launchers: Launchers, device: str = "cuda") -> None:
    """Registers the CUDA kernels as a backend."""
    register(
        name,
        functools.cache(lambda: launch.kernels(launchers)),
        devices={device},
        dtypes=CUDA_DTYPES,
        available=launchers.missing,
        reasons=_cuda_reasons,
        is_ready=launch.is_aligned,
    )


def _triton() -> kernels.Kernels:
    from fastlm.ops.attention import triton

    return triton.KERNELS


register_cpu("cpu", CPU)
register_cuda("cuda", CUDA)
register("triton", _triton, devices=triton_devices(), dtypes=FLOATS - {torch.float64}, available=triton_missing)
