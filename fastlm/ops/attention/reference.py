"""Scaled dot-product attention in plain torch with backward written out: quadratic in memory, right everywhere.

For query i and key j of one head, with offset 0, or T_k - T_q where a sequence is aligned at its end:

    s_ij = softcap(scale * q_i . k_j) - slope * |i + offset - j| + mask_ij       -inf where j is not to be seen
    p_i  = softmax_j(s_i)            0 for a row that sees no key, whose lse is -inf
    o_i  = sum_j dropout(p_ij) v_j

    dp = dropout(do v^T),   ds = p * (dp - sum_j(p * dp))
    dq = scale * ds k,      dk = scale * ds^T q,             dv = dropout(p)^T do

Arithmetic is in fp32, in fp64 for fp64. Packed sequences are padded, queries at the end of their row, so that they are
the same thing as a batch with `key_lengths`; nothing of it looks at a value on the host.

Source: Vaswani et al. 2017 (arXiv 1706.03762); Press et al. 2021 (arXiv 2108.12409) for ALiBi.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastlm.ops.philox import dropout_scale, keep_mask


class Scores(NamedTuple):
    """What turns q k^T into probabilities."""

    attn_mask: Tensor | None  # broadcasts to (B, H, T_q, T_k)
    is_causal: bool
    scale: float
    window_left: int
    window_right: int
    alibi_slopes: Tensor | None  # (H,) or (B, H)
    softcap: float
    key_lengths: Tensor | None  # (B,)
    dropout_p: float
    rng_state: Tensor | None
    rows: Tensor | None  # the number of each row (B, H, T_q) of the dropout mask; None for b, h, i in order


def scaled_dot_product_attention_fwd(
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
    """-> output (B, H, T_q, D_v), lse (B, H, T_q)."""
    scores = Scores(
        attn_mask,
        is_causal,
        scale,
        window_left,
        window_right,
        alibi_slopes,
        softcap,
        key_lengths,
        dropout_p,
        rng_state,
        None,
    )
    return _forward(query, key, value, scores)


def scaled_dot_product_attention_bwd(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    rng_state: Tensor | None,
    output: Tensor,
    lse: Tensor | None,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value and attn_mask; empty where not needed."""
    scores = Scores(
        attn_mask,
        is_causal,
        scale,
        window_left,
        window_right,
        alibi_slopes,
        softcap,
        key_lengths,
        dropout_p,
        rng_state,
        None,
    )
    *grads, grad_scores = _backward(grad_output, query, key, value, scores)
    if needs_grad[3]:
        grads.append(grad_scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype))  # type: ignore[union-attr]
    else:
        grads.append(query.new_empty(0))
    return tuple(grad if needed else query.new_empty(0) for grad, needed in zip(grads, needs_grad, strict=True))  # type: ignore[return-value]


def varlen_attention_fwd(
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
    queries, keys = _Packing(query, cu_seqlens_q, max_seqlen_q, True), _Packing(key, cu_seqlens_k, max_seqlen_k, False)
    lengths, rows = keys.lengths, queries.rows(query.shape[1])
    scores = Scores(
        None, is_causal, scale, window_left, window_right, alibi_slopes, softcap, lengths, dropout_p, rng_state, rows
    )
    output, lse = _forward(queries.pad(query), keys.pad(key), keys.pad(value), scores)
    return queries.pack(output), queries.pack(lse[..., None])[..., 0].T.contiguous()


def varlen_attention_bwd(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    output: Tensor,
    lse: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of query, key and value; empty where not needed."""
    queries, keys = _Packing(query, cu_seqlens_q, max_seqlen_q, True), _Packing(key, cu_seqlens_k, max_seqlen_k, False)
    lengths, rows = keys.lengths, queries.rows(query.shape[1])
    scores = Scores(
        None, is_causal, scale, window_left, window_right, alibi_slopes, softcap, lengths, dropout_p, rng_state, rows
    )
    padded = _backward(queries.pad(grad_output), queries.pad(query), keys.pad(key), keys.pad(value), scores)
    grads = (side.pack(grad) for side, grad in zip((queries, keys, keys), padded, strict=False))
    return tuple(grad if needed else query.new_empty(0) for grad, needed in zip(grads, needs_grad, strict=True))  # type: ignore[return-value]


def visible(
    queries: int, keys: int, offset: Tensor | int, is_causal: bool, left: int, right: int, device: torch.device
) -> Tensor | None:
    """Which keys each query may see, (..., queries, keys) bool; None for all."""
    right = 0 if is_causal else right
    if left < 0 and right < 0:
        return None
    distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - offset
    if left < 0:
        return distance <= right
    return distance >= -left if right < 0 else (distance >= -left) & (distance <= right)


def filled_only(key: Tensor, value: Tensor, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """key and value with zeros where a cache is not filled: a nan there, times the probability 0, would be nan."""
    if key_lengths is None:
        return key, value
    unfilled = (torch.arange(key.shape[2], device=key.device) >= key_lengths[:, None])[:, None, :, None]
    return key.masked_fill(unfilled, 0.0), value.masked_fill(unfilled, 0.0)


def alibi(slopes: Tensor, queries: int, keys: int, offset: Tensor | int) -> Tensor:
    """-slope * |i + offset - j|, (1 or B, H, queries, keys)."""
    distance = torch.arange(queries, device=slopes.device)[:, None] + offset - torch.arange(keys, device=slopes.device)
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance.abs()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads(x: Tensor, heads: int) -> Tensor:
    """x (B, H_kv, T, D) in the dtype of the arithmetic, each head repeated for its group of query heads."""
    return _wide(x).repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else _wide(x)


def _probabilities(q: Tensor, k: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """-> p (B, H, T_q, T_k), lse (B, H, T_q), and d(capped score)/d(score)."""
    queries, keys, lengths = q.shape[2], k.shape[2], scores.key_lengths
    s, slope = q @ k.transpose(-1, -2) * scores.scale, torch.ones((), dtype=q.dtype, device=q.device)
    if scores.softcap:
        tanh = torch.tanh(s / scores.softcap)
        s, slope = scores.softcap * tanh, 1 - tanh.square()
    offset: Tensor | int = 0 if lengths is None else (lengths.long() - queries)[:, None, None, None]
    if scores.alibi_slopes is not None:
        s = s + alibi(scores.alibi_slopes.to(s.dtype), queries, keys, offset)
    if scores.attn_mask is not None and scores.attn_mask.dtype != torch.bool:
        s = s + scores.attn_mask
    seen = visible(queries, keys, offset, scores.is_causal, scores.window_left, scores.window_right, q.device)
    filled = None if lengths is None else torch.arange(keys, device=q.device) < lengths[:, None, None, None]
    for allowed in (scores.attn_mask, seen, filled):
        if allowed is not None and allowed.dtype == torch.bool:
            s = s.masked_fill(~allowed, float("-inf"))
    dead = (s == float("-inf")).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    lse = torch.logsumexp(s, -1, keepdim=True)
    p = (s - lse).exp().masked_fill(dead, 0.0)
    return p, lse.masked_fill(dead, float("-inf"))[..., 0], slope


def _dropped(x: Tensor, scores: Scores) -> Tensor:
    """Dropout on the probabilities; its own transpose, so backward too."""
    if scores.rng_state is None:
        return x
    rows = scores.rows
    if rows is None:
        rows = torch.arange(x.shape[:3].numel(), device=x.device).reshape(x.shape[:3])
    keep = keep_mask(scores.rng_state, rows, x.shape[3], scores.dropout_p)
    return torch.where(keep, x * dropout_scale(scores.dropout_p), 0.0)


def _forward(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    heads = query.shape[1]
    key, value = filled_only(key, value, scores.key_lengths)
    p, lse, _ = _probabilities(_wide(query), _heads(key, heads), scores)
    return (_dropped(p, scores) @ _heads(value, heads)).to(query.dtype), lse


def _backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of query, key, value, and of what is added to the scores."""
    heads, grad = query.shape[1], _wide(grad_output)
    key, value = filled_only(key, value, scores.key_lengths)
    q, k, v = _wide(query), _heads(key, heads), _heads(value, heads)
    p, _, slope = _probabilities(q, k, scores)
    dp = _dropped(grad @ v.transpose(-1, -2), scores)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    raw = ds * slope * scores.scale
    dk, dv = raw.transpose(-1, -2) @ q, _dropped(p, scores).transpose(-1, -2) @ grad
    return (raw @ k).to(query.dtype), _group_sum(dk, key), _group_sum(dv, value), ds


def _group_sum(grad: Tensor, like: Tensor) -> Tensor:
    """The transpose of `_heads`."""
    if grad.shape[1] != like.shape[1]:
        grad = grad.unflatten(1, (like.shape[1], grad.shape[1] // like.shape[1])).sum(2)
    return grad.to(like.dtype)


class _Packing:
    """Between packed rows (total, H, D) and padded ones (B, H, max_seqlen, D), at the start or the end of each."""

    def __init__(self, like: Tensor, cu_seqlens: Tensor, max_seqlen: int, at_end: bool) -> None:
        cu_seqlens = cu_seqlens.long()
        self.total = like.shape[0]
        self.lengths = cu_seqlens.diff()
        place = torch.arange(max_seqlen, device=like.device)
        starts = cu_seqlens[1:] - max_seqlen if at_end else cu_seqlens[:-1]
        token = starts[:, None] + place
        inside = (token >= cu_seqlens[:-1, None]) & (token < cu_seqlens[1:, None])
        self.token = torch.where(inside, token, self.total)  # (B, max_seqlen); one past the end for padding
        tokens = torch.arange(self.total, device=like.device)
        sequence = torch.searchsorted(cu_seqlens[1:], tokens, right=True).clamp(max=max(0, len(starts) - 1))
        self.place = sequence * max_seqlen + tokens - starts[sequence] if len(starts) else tokens  # (total,)

    def pad(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.token].transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[self.place]

    def rows(self, heads: int) -> Tensor:
        """Numbers of the rows of a dropout mask, (B, heads, max_seqlen): head * total + token."""
        return self.token[:, None] + torch.arange(heads, device=self.token.device)[:, None] * self.total
