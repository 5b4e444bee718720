"""What every kernel of attention is given, and how the two public functions are made of it.

A batch and packed sequences are one `Problem`: tensors of (B, H, T, D) with any strides between rows of D, where packed
sequences are a batch of one and say by cu_seqlens where each begins. Rows of the log-sum-exp and of the dropout mask
are numbered in the order of (B, H, T_q), so (h * total_q + token) where packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAR = 1 << 30  # a window as wide as this is open: no sequence is as long
DECODE = 16  # queries of a sequence, up to which the heads that share a key head are one tile, and the keys are split
BLOCKS = 512  # up to which keys are split: some for each multiprocessor of any GPU


class Problem(NamedTuple):
    query: Tensor  # [B, H, T_q, D]
    key: Tensor  # [B, H_kv, T_k, D]
    value: Tensor  # [B, H_kv, T_k, D_v]
    attn_mask: Tensor | None  # [B, H, T_q, T_k], stride 0 where it broadcasts; bool or float
    alibi_slopes: Tensor | None  # [sequences, H]
    key_lengths: Tensor | None  # int32 or int64 [B]
    cu_seqlens_q: Tensor | None  # int32 [sequences + 1]
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    left: int | None  # how far a query sees; None is without end
    right: int | None
    scale: float
    softcap: float
    dropout_p: float
    rng_state: Tensor | None

    @property
    def sequences(self) -> int:
        return self.query.shape[0] if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.query.shape[1] // max(1, self.key.shape[1])


class Kernels(NamedTuple):
    """The two functions that a backend gives. Of tensors of rows, those of a head may lie anywhere."""

    fwd: Callable[[Problem, Tensor, Tensor], Any]  # fills output [B, H, T_q, D_v] and lse [B, H, T_q] in fp32
    bwd: Callable[..., None]
    """(Problem, grad_output, output, lse, grad_query, grad_key, grad_value): fills the gradients that are not None."""


def splits(keys: int, tile: int, blocks: int) -> int:
    """Into how many parts decoding divides the keys: the same on every GPU."""
    return max(1, min(-(-keys // (4 * tile)), BLOCKS // max(1, blocks)))


def ready(x: Tensor) -> Tensor:
    """x with rows of D that are one run."""
    return x if is_ready(x) else x.contiguous()


def is_ready(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _sight(is_causal: bool, left: int, right: int) -> tuple[int | None, int | None]:
    right = 0 if is_causal else right
    return (None if left < 0 or left >= FAR else left), (None if right < 0 or right >= FAR else right)


def _slopes(slopes: Tensor | None, sequences: int) -> Tensor | None:
    return None if slopes is None else slopes.expand(sequences, slopes.shape[-1])


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    rng_state: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> Problem:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, queries, keys)
    lengths = None if key_lengths is None else key_lengths.contiguous()
    return Problem(
        ready(query), ready(key), ready(value), mask, _slopes(alibi_slopes, batch), lengths, None, None, queries, keys,
        *_sight(is_causal, window_left, window_right), scale, softcap, dropout_p, rng_state,
    )  # fmt: skip


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
) -> Problem:
    query, key, value = (_batch_of_one(ready(x)) for x in (query, key, value))
    return Problem(
        query, key, value, None, _slopes(alibi_slopes, len(cu_seqlens_q) - 1),
        None, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k,
        *_sight(is_causal, window_left, window_right), scale, softcap, dropout_p, rng_state,
    )  # fmt: skip


def _batch_of_one(x: Tensor) -> Tensor:
    """(total, H, D) as (1, H, total, D)."""
    return x.transpose(0, 1)[None]


# The functions of the ops -----------------------------------------------------------------------------------------


def dense_fwd(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    alibi_slopes: Tensor | None,
    softcap: float,
    key_lengths: Tensor | None,
    return_lse: bool,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> output (B, H, T_q, D_v), which lies in memory as query does, and lse (B, H, T_q)."""
    problem = dense(
        query, key, value, attn_mask, alibi_slopes, key_lengths, rng_state, is_causal, scale, window_left, window_right,
        softcap, dropout_p,
    )  # fmt: skip
    output = _ordered(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    kernels.fwd(problem, output, lse)
    return output, lse


def _ordered(x: Tensor, columns: int) -> Tensor:
    """An empty tensor of rows of so many columns, in the order in which those of x (B, H, T, D) lie in memory."""
    if x.stride(1) < x.stride(2):
        batch, heads, rows, _ = x.shape
        return x.new_empty(batch, rows, heads, columns).transpose(1, 2)
    return x.new_empty(*x.shape[:-1], columns)


def dense_bwd(
    kernels: Kernels,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    rng_state: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of query, key and value, and nothing for the mask."""
    *options, needs_grad = rest
    problem = dense(query, key, value, attn_mask, alibi_slopes, key_lengths, rng_state, *options)
    inputs = (query, key, value)
    grads = [_ordered(x, x.shape[-1]) if wanted else None for x, wanted in zip(inputs, needs_grad, strict=False)]
    kernels.bwd(problem, ready(grad_output), ready(output), lse, *grads)
    return *(query.new_empty(0) if grad is None else grad for grad in grads), query.new_empty(0)  # type: ignore[return-value]


def packed_fwd(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    alibi_slopes: Tensor | None,
    softcap: float,
    return_lse: bool,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> output (total_q, H, D_v), lse (H, total_q)."""
    problem = packed(
        query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, max_seqlen_q, max_seqlen_k, is_causal,
        scale, window_left, window_right, softcap, dropout_p,
    )  # fmt: skip
    output = query.new_empty(*query.shape[:2], value.shape[2])
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    kernels.fwd(problem, _batch_of_one(output), lse[None])
    return output, lse


def packed_bwd(
    kernels: Kernels,
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key and value."""
    *options, needs_grad = rest
    problem = packed(query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, rng_state, *options)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
             for x, wanted in zip((query, key, value), needs_grad, strict=True)]  # fmt: skip
    views = [None if grad is None else _batch_of_one(grad) for grad in grads]
    kernels.bwd(problem, _batch_of_one(ready(grad_output)), _batch_of_one(ready(output)), lse[None], *views)
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]
