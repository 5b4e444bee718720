"""Attention, forward and backward, in Triton; see kernels.py for what it is given.

Forward: a program takes a tile of BLOCK_M queries of a head and walks over tiles of BLOCK_N keys with the maximum of
the scores so far, the sum of their exponentials and the sum of values, which are scaled down where the maximum rises.
Tiles of keys that no query of the tile sees are never read; those that all see (the most of them) run a loop without a
mask, and only those at an edge (the diagonal, a window's end, the last keys) compare places. In 16 bits scores are in
units of log2 (UNIT), which saves an instruction; in fp32 in natural ones, where a score less itself is exactly 0.

Decode: where a sequence has at most DECODE queries, the query heads that share a key head are rows of one tile, so that
keys are read once, and the keys are split among programs, each of which leaves its own output and log-sum-exp; a second
kernel adds them in order. Into how many parts does not depend on the GPU.

Backward is deterministic: dq has a pass of its own, over the keys of a tile of queries; dk and dv another one, over the
queries of a tile of keys, of all query heads that share it in order. No atomics and nothing added between programs; the
price is that scores and dp are formed twice, 7 products of matrices instead of 5. delta = sum(do * o) of each row is
formed in the pass over queries and read in the other; by a product of matrices, as dp is, of which the diagonal is
kept: so a row that looks at one key has a gradient of exactly 0, as it should, not what two orders of adding leave.

Bytes for a head of T queries and keys of D elements of b bytes: forward 2TDb + 2TDb * ceil(T / BLOCK_M), the second
part mostly from L2, half of it where causal; 4T for the log-sum-exp. Nothing is quadratic but a mask that is given.

Source: Dao 2023 (arXiv 2307.08691); Milakov and Gimelshein 2018 (arXiv 1805.02867); Press et al. 2021 (arXiv
2108.12409) for ALiBi; Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

# mypy: allow-incomplete-defs, disable-error-code=assignment
# In kernels only constants are typed.

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.attention import kernels
from fastlm.ops.attention.kernels import DECODE, Kernels, Problem, dense
from fastlm.ops.philox import dropout_scale
from fastlm.ops.triton_launch import Compilation, Launch, compilation, exp, keep_mask, run, tanh

LOG2E = 1.4426950408889634


# Parts of kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _place(batch, head, strides):
    """Where the rows of a head begin, in elements."""
    return tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]


@triton.jit
def _cut(x, most):
    """x within [0, most], as int32: a wrong length on the device must not make a kernel read out of bounds."""
    return tl.cast(tl.minimum(tl.maximum(x, 0), most), tl.int32)


@triton.jit
def _sequence(number, cu_seqlens_q, cu_seqlens_k, key_lengths, T_q, T_k):
    """-> the batch, where its queries and keys begin, how many there are, and at which key query 0 is."""
    if cu_seqlens_q is not None:
        q_start = _cut(tl.load(cu_seqlens_q + number), T_q)
        k_start = _cut(tl.load(cu_seqlens_k + number), T_k)
        queries = _cut(tl.load(cu_seqlens_q + number + 1), T_q) - q_start
        keys = _cut(tl.load(cu_seqlens_k + number + 1), T_k) - k_start
        return 0, q_start, k_start, queries, keys, keys - queries
    elif key_lengths is not None:
        keys = _cut(tl.load(key_lengths + number), T_k)
        return number, 0, 0, T_q, keys, keys - T_q
    else:
        return number, 0, 0, T_q, T_k, 0


@triton.jit
def _tile(row, strides, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a tile of rows, and which of its columns exist (None: all)."""
    column = tl.arange(0, BLOCK_D)
    offsets = tl.cast(row, tl.int64)[:, None] * strides[2] + column[None, :]
    if D == BLOCK_D:
        return offsets, None
    else:
        return offsets, (column < D)[None, :]


@triton.jit
def _load(place, columns, row, rows, MASKED: tl.constexpr):
    """A tile; rows are compared with how many there are only where MASKED."""
    if MASKED:
        exists = (row < rows)[:, None]
        return tl.load(place, mask=exists if columns is None else exists & columns, other=0.0)
    elif columns is not None:
        return tl.load(place, mask=columns, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _store(place, value, exists, columns):
    mask = exists[:, None] if columns is None else exists[:, None] & columns
    tl.store(place, value.to(place.dtype.element_ty), mask=mask)


@triton.jit
def _exp(x, UNIT: tl.constexpr):
    """Of x in units of UNIT."""
    if UNIT == 1.0:
        return exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def _scores(dot, i, j, queries, keys, offset, left, right, scale, softcap, slope, attn_mask, mask_strides,
            MASKED: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """What the products q.k become: -> scores, the factor that they lack still, and tanh of the soft cap.

    i and j are places of queries and keys, one of them along each dimension of dot.
    """
    if (softcap is None) and (slope is None) and (attn_mask is None) and (not MASKED):
        return dot, scale * UNIT, dot
    else:
        ratio = dot
        if softcap is None:
            s = dot * (scale * UNIT)
        else:
            ratio = tanh(dot * (scale / softcap))
            s = ratio * (softcap * UNIT)
        if slope is not None:
            s -= slope * tl.abs(i + offset - j).to(tl.float32)
        if attn_mask is not None:
            place = attn_mask + (tl.cast(i, tl.int64) * mask_strides[2] + tl.cast(j, tl.int64) * mask_strides[3])
            bias = tl.load(place, mask=(i < queries) & (j < keys), other=0)
            if bias.dtype == tl.uint8:
                s = tl.where(bias != 0, s, float("-inf"))
            else:
                s += bias.to(tl.float32) * UNIT
        if MASKED:
            seen = j < keys
            if left is not None:
                seen &= j >= i + offset - left
            if right is not None:
                seen &= j <= i + offset + right
            s = tl.where(seen, s, float("-inf"))
        return s, 1.0, ratio


@triton.jit
def _key_range(first, last, keys, offset, left, right, BLOCK: tl.constexpr):
    """Keys that queries first to last see: -> the start, the part that all of them see, and the stop.

    The start and the part are whole tiles; keys between are compared one by one.
    """
    start = 0
    stop = keys
    full_start = 0
    full_stop = keys
    if left is not None:
        stop = tl.where(first + offset - left < keys, stop, 0)
        start = tl.maximum(first + offset - left, 0) // BLOCK * BLOCK
        full_start = (tl.maximum(last + offset - left, 0) + BLOCK - 1) // BLOCK * BLOCK
    if right is not None:
        stop = tl.minimum(stop, last + offset + right + 1)
        full_stop = tl.minimum(keys, tl.maximum(first + offset + right + 1, 0))
    return start, full_start, full_stop // BLOCK * BLOCK, stop


@triton.jit
def _query_range(first, last, queries, offset, left, right, BLOCK: tl.constexpr):
    """As `_key_range`, of the queries that see keys first to last."""
    start = 0
    stop = queries
    full_start = 0
    full_stop = queries
    if right is not None:
        stop = tl.where(first - offset - right < queries, stop, 0)
        start = tl.maximum(first - offset - right, 0) // BLOCK * BLOCK
        full_start = (tl.maximum(last - offset - right, 0) + BLOCK - 1) // BLOCK * BLOCK
    if left is not None:
        stop = tl.minimum(stop, last - offset + left + 1)
        full_stop = tl.minimum(queries, tl.maximum(first - offset + left + 1, 0))
    return start, full_start, full_stop // BLOCK * BLOCK, stop


# Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_keys(
    q, state, key, key_offsets, key_columns, value, value_offsets, value_columns, k_stride, v_stride, i, numbers,
    start, stop, queries, keys, offset, left, right, scale, softcap, slope, attn_mask, mask_strides, rng_state,
    threshold, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Goes on with the maximum, the sum of exponentials and the sum of values over keys start to stop."""
    top, total, sums = state
    for at in range(start, stop, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        k = _load(key + tl.cast(at, tl.int64) * k_stride + key_offsets, key_columns, j, keys, MASKED)
        s, unit, _ = _scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), i, j[None, :], queries, keys, offset, left, right, scale,
            softcap, slope, attn_mask, mask_strides, MASKED, UNIT,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(s, 1) * unit)
        base = new_top
        if MASKED or attn_mask is not None:  # a row may have seen nothing yet, and -inf - -inf is NaN
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = _exp(s * unit - base[:, None], UNIT)
        shrink = _exp(top - base, UNIT)
        total = total * shrink + tl.sum(p, 1)
        if rng_state is not None:
            p = tl.where(keep_mask(rng_state, numbers[:, None], at, threshold, BLOCK_N), p, 0.0)
        v = _load(value + tl.cast(at, tl.int64) * v_stride + value_offsets, value_columns, j, keys, MASKED)
        sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=["tiles", "H", "T_q", "T_k", "threshold"])
def _fwd_kernel(
    query,  # T [B, H, T_q, D], any strides between rows, as all of them
    key,  # T [B, H_kv, T_k, D]
    value,  # T [B, H_kv, T_k, D_V]
    attn_mask,  # uint8, fp32 or T [B, H, T_q, T_k], any strides, or None
    alibi_slopes,  # [sequences, H] or None
    key_lengths,  # int32 or int64 [B], or None
    cu_seqlens_q,  # int32 [sequences + 1], or None
    cu_seqlens_k,
    rng_state,  # int64 [2] or None
    output,  # T [B, H, T_q, D_V]; split: fp32 [splits, B, H, T_q, D_V]
    lse,  # fp32 [splits, B, H, T_q]
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    slopes_strides,
    output_strides,
    split_strides,  # of output and lse
    H,  # of heads; PACKED: of key heads
    T_q,
    T_k,
    tiles,  # of queries, in the longest sequence
    left,  # or None
    right,  # or None
    scale,
    softcap,  # or None
    threshold: tl.int64,  # of dropout, 2^32 p
    keep_scale,
    GROUP: tl.constexpr,  # query heads of a key head
    PACKED: tl.constexpr,  # rows of a tile are the queries of all heads of a group
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # the longest first, where causal
    head = program // tiles % H
    number = program // tiles // H
    batch, q_start, k_start, queries, keys, offset = _sequence(
        number, cu_seqlens_q, cu_seqlens_k, key_lengths, T_q, T_k
    )
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if tile * BLOCK_M >= (GROUP * queries if PACKED else queries):
        return
    if PACKED:
        kv_head = head
        q_head = tl.minimum(head * GROUP + row // queries, (head + 1) * GROUP - 1)
        i = row % queries
        exists = row < GROUP * queries
        first = 0
        last = queries - 1
    else:
        kv_head = head // GROUP
        q_head = head + tl.zeros([BLOCK_M], tl.int32)
        i = row
        exists = row < queries
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, queries) - 1
    heads = H * GROUP if PACKED else H
    numbers = (tl.cast(batch, tl.int64) * heads + q_head) * T_q + q_start + i

    q_offsets, q_columns = _tile(q_start + i, query_strides, D, BLOCK_D)
    q_offsets += (tl.cast(q_head, tl.int64) * query_strides[1])[:, None]
    q_exists = exists[:, None] if q_columns is None else exists[:, None] & q_columns
    q = tl.load(query + tl.cast(batch, tl.int64) * query_strides[0] + q_offsets, mask=q_exists, other=0.0)
    q = tl.where(scale < 0.0, -q.to(tl.float32), q.to(tl.float32)).to(q.dtype)  # the largest product scores most
    scale = tl.abs(scale)
    j = tl.arange(0, BLOCK_N)
    key_offsets, key_columns = _tile(j, key_strides, D, BLOCK_D)
    value_offsets, value_columns = _tile(j, value_strides, D_V, BLOCK_DV)
    key += _place(batch, kv_head, key_strides) + tl.cast(k_start, tl.int64) * key_strides[2]
    value += _place(batch, kv_head, value_strides) + tl.cast(k_start, tl.int64) * value_strides[2]
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + number * slopes_strides[0] + q_head * slopes_strides[1]).to(tl.float32)
        slope = slope[:, None] * UNIT
    if attn_mask is not None:
        attn_mask += (tl.cast(batch, tl.int64) * mask_strides[0] + tl.cast(q_head, tl.int64) * mask_strides[1])[:, None]

    start, full_start, full_stop, stop = _key_range(first, last, keys, offset, left, right, BLOCK_N)
    if SPLITS > 1:
        split = tl.program_id(1)
        part = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), SPLITS), BLOCK_N) * BLOCK_N
        start += split * part
        stop = tl.minimum(stop, start + part)
        output += split * split_strides[0]
        lse += split * split_strides[1]
    full_start = tl.maximum(full_start, start)
    full_stop = tl.maximum(tl.minimum(full_stop, stop // BLOCK_N * BLOCK_N), full_start)
    state = (tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32),
             tl.zeros([BLOCK_M, BLOCK_DV], tl.float32))  # fmt: skip
    for n in tl.static_range(3):
        if n != 0 or left is not None:
            state = _fwd_keys(
                q, state, key, key_offsets, key_columns, value, value_offsets, value_columns, key_strides[2],
                value_strides[2], i[:, None], numbers,
                start if n == 0 else full_start if n == 1 else full_stop,
                tl.minimum(full_start, stop) if n == 0 else full_stop if n == 1 else stop,
                queries, keys, offset, left, right, scale, softcap, slope, attn_mask, mask_strides, rng_state,
                threshold, n != 1, BLOCK_N, PRECISION, UNIT,
            )  # fmt: skip
    top, total, sums = state
    if rng_state is not None:
        sums *= keep_scale
    result = tl.where((total == 0.0)[:, None], 0.0, sums / total[:, None])
    out_offsets, out_columns = _tile(q_start + i, output_strides, D_V, BLOCK_DV)
    out_offsets += (tl.cast(q_head, tl.int64) * output_strides[1])[:, None]
    _store(output + tl.cast(batch, tl.int64) * output_strides[0] + out_offsets, result, exists, out_columns)
    tl.store(lse + numbers, top / UNIT + tl.log(total), mask=exists)


@triton.jit(do_not_specialize=["rows", "heads", "tokens"])
def _combine_kernel(
    parts,  # fp32 [SPLITS, rows, D_V]
    part_lse,  # fp32 [SPLITS, rows]
    output,  # T [B, H, T_q, D_V], any strides between rows
    lse,  # fp32 [rows]
    output_strides,
    rows: tl.int64,  # B * H * T_q
    heads,
    tokens,
    SPLITS: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < rows
    column = tl.arange(0, BLOCK_DV)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in range(SPLITS):
        top = tl.maximum(top, tl.load(part_lse + split * rows + row, mask=exists, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    columns = (column < D_V)[None, :]
    for split in range(SPLITS):
        part = split * rows + row
        share = exp(tl.load(part_lse + part, mask=exists, other=float("-inf")) - base)
        total += share
        place = parts + part[:, None] * D_V + column[None, :]
        sums += share[:, None] * tl.load(place, mask=exists[:, None] & columns, other=0.0)
    place = row // tokens // heads * output_strides[0] + row // tokens % heads * output_strides[1]
    place += row % tokens * output_strides[2]
    result = tl.where((total == 0.0)[:, None], 0.0, sums / total[:, None])
    _store(output + place[:, None] + column[None, :], result, exists, columns)
    tl.store(lse + row, base + tl.log(total), mask=exists)


# Backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _probabilities(s, unit, lse, UNIT: tl.constexpr):
    """exp(s - lse); 0 for a row that sees no key or does not exist, whose lse is -inf."""
    return _exp(s * unit - tl.where(lse == float("-inf"), float("inf"), lse * UNIT), UNIT)


@triton.jit
def _grad_scores(p, dp, delta, ratio, softcap, keep, keep_scale):
    """-> the gradient of scaled scores."""
    if keep is not None:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    if softcap is not None:
        ds *= 1.0 - ratio * ratio
    return ds


@triton.jit
def _bwd_keys(
    dq, q, do, delta, row_lse, key, key_offsets, key_columns, value, value_offsets, value_columns, k_stride, v_stride,
    i, numbers, start, stop, queries, keys, offset, left, right, scale, softcap, slope, attn_mask, mask_strides,
    rng_state, threshold, keep_scale, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Adds what keys start to stop give to dq."""
    for at in range(start, stop, BLOCK_N):
        j = at + tl.arange(0, BLOCK_N)
        k = _load(key + tl.cast(at, tl.int64) * k_stride + key_offsets, key_columns, j, keys, MASKED)
        s, unit, ratio = _scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), i, j[None, :], queries, keys, offset, left, right, scale,
            softcap, slope, attn_mask, mask_strides, MASKED, UNIT,
        )  # fmt: skip
        p = _probabilities(s, unit, row_lse[:, None], UNIT)
        v = _load(value + tl.cast(at, tl.int64) * v_stride + value_offsets, value_columns, j, keys, MASKED)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        keep = None
        if rng_state is not None:
            keep = keep_mask(rng_state, numbers[:, None], at, threshold, BLOCK_N)
        ds = _grad_scores(p, dp, delta[:, None], ratio, softcap, keep, keep_scale)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["tiles", "H", "T_q", "T_k", "threshold"])
def _dq_kernel(
    query,  # T [B, H, T_q, D], any strides between rows, as all of them
    key,  # T [B, H_kv, T_k, D]
    value,  # T [B, H_kv, T_k, D_V]
    attn_mask,  # uint8, fp32 or T [B, H, T_q, T_k], any strides, or None
    alibi_slopes,  # [sequences, H] or None
    key_lengths,  # int32 or int64 [B], or None
    cu_seqlens_q,  # int32 [sequences + 1], or None
    cu_seqlens_k,
    rng_state,  # int64 [2] or None
    grad_output,  # T [B, H, T_q, D_V]
    output,  # T [B, H, T_q, D_V]
    lse,  # fp32 [B, H, T_q]
    delta,  # fp32 [B, H, T_q], written
    grad_query,  # T [B, H, T_q, D], or None: only delta is wanted
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    slopes_strides,
    grad_output_strides,
    output_strides,
    grad_query_strides,
    H,
    T_q,
    T_k,
    tiles,  # of queries, in the longest sequence
    left,  # or None
    right,  # or None
    scale,
    softcap,  # or None
    threshold: tl.int64,
    keep_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = program // tiles % H
    number = program // tiles // H
    batch, q_start, k_start, queries, keys, offset = _sequence(
        number, cu_seqlens_q, cu_seqlens_k, key_lengths, T_q, T_k
    )
    first = tile * BLOCK_M
    if first >= queries:
        return
    i = first + tl.arange(0, BLOCK_M)
    exists = i < queries
    numbers = (tl.cast(batch, tl.int64) * H + head) * T_q + q_start + i

    do_offsets, value_columns = _tile(q_start + i, grad_output_strides, D_V, BLOCK_DV)
    o_offsets, _ = _tile(q_start + i, output_strides, D_V, BLOCK_DV)
    do = _load(grad_output + _place(batch, head, grad_output_strides) + do_offsets, value_columns, i, queries, True)
    o = _load(output + _place(batch, head, output_strides) + o_offsets, value_columns, i, queries, True)
    place = tl.arange(0, BLOCK_M)
    products = tl.dot(do, tl.trans(o), input_precision=PRECISION)
    row_delta = tl.sum(tl.where(place[:, None] == place[None, :], products, 0.0), 1)
    tl.store(delta + numbers, row_delta, mask=exists)
    if grad_query is not None:
        q_offsets, q_columns = _tile(q_start + i, query_strides, D, BLOCK_D)
        q = _load(query + _place(batch, head, query_strides) + q_offsets, q_columns, i, queries, True)
        row_lse = tl.load(lse + numbers, mask=exists, other=float("-inf"))
        j = tl.arange(0, BLOCK_N)
        key_offsets, key_columns = _tile(j, key_strides, D, BLOCK_D)
        value_offsets, _ = _tile(j, value_strides, D_V, BLOCK_DV)
        key += _place(batch, head // GROUP, key_strides) + tl.cast(k_start, tl.int64) * key_strides[2]
        value += _place(batch, head // GROUP, value_strides) + tl.cast(k_start, tl.int64) * value_strides[2]
        slope = None
        if alibi_slopes is not None:
            slope = tl.load(alibi_slopes + number * slopes_strides[0] + head * slopes_strides[1]).to(tl.float32) * UNIT
        if attn_mask is not None:
            attn_mask += _place(batch, head, mask_strides)
        start, full_start, full_stop, stop = _key_range(
            first, tl.minimum(first + BLOCK_M, queries) - 1, keys, offset, left, right, BLOCK_N
        )
        full_start = tl.maximum(full_start, start)
        full_stop = tl.maximum(full_stop, full_start)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n in tl.static_range(3):
            if n != 0 or left is not None:
                dq = _bwd_keys(
                    dq, q, do, row_delta, row_lse, key, key_offsets, key_columns, value, value_offsets, value_columns,
                    key_strides[2], value_strides[2], i[:, None], numbers,
                    start if n == 0 else full_start if n == 1 else full_stop,
                    tl.minimum(full_start, stop) if n == 0 else full_stop if n == 1 else stop,
                    queries, keys, offset, left, right, scale, softcap, slope, attn_mask, mask_strides, rng_state,
                    threshold, keep_scale, n != 1, BLOCK_N, PRECISION, UNIT,
                )  # fmt: skip
        dq_offsets, _ = _tile(q_start + i, grad_query_strides, D, BLOCK_D)
        _store(grad_query + _place(batch, head, grad_query_strides) + dq_offsets, dq * scale, exists, q_columns)


@triton.jit
def _bwd_queries(
    state, k, v, query, q_offsets, q_columns, grad_output, do_offsets, do_columns, q_strides, do_strides, lse, delta,
    number, T_q, first, j, start, stop, queries, keys, offset, left, right, scale, softcap, slopes, slopes_strides,
    attn_mask, mask_strides, rng_state, threshold, keep_scale, GROUP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds what queries start to stop of each head of the group give to dk and dv; scores are [BLOCK_N, BLOCK_M].

    One loop for all heads: a loop in a loop would keep more in registers.
    """
    dk, dv = state
    at = start - BLOCK_M
    head = 0
    for _ in range(GROUP * tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)):
        at += BLOCK_M
        if GROUP != 1:
            head = tl.where(at < stop, head, head + 1)
            at = tl.where(at < stop, at, start)
        i = at + tl.arange(0, BLOCK_M)
        row = number + tl.cast(head, tl.int64) * T_q + i
        q_place = _place(0, head, q_strides) + tl.cast(at, tl.int64) * q_strides[2]
        q = _load(query + q_place + q_offsets, q_columns, i, queries, MASKED)
        if MASKED:
            row_lse = tl.load(lse + row, mask=i < queries, other=float("-inf"))
            row_delta = tl.load(delta + row, mask=i < queries, other=0.0)
        else:
            row_lse = tl.load(lse + row)
            row_delta = tl.load(delta + row)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head * slopes_strides[1]).to(tl.float32) * UNIT
        mask_place = None
        if attn_mask is not None:
            mask_place = attn_mask + _place(0, head, mask_strides)
        s, unit, ratio = _scores(
            tl.dot(k, tl.trans(q), input_precision=PRECISION), i[None, :], j[:, None], queries, keys, offset, left,
            right, scale, softcap, slope, mask_place, mask_strides, MASKED, UNIT,
        )  # fmt: skip
        p = _probabilities(s, unit, row_lse[None, :], UNIT)
        do_place = _place(0, head, do_strides) + tl.cast(at, tl.int64) * do_strides[2]
        do = _load(grad_output + do_place + do_offsets, do_columns, i, queries, MASKED)
        keep = None
        dropped = p
        if rng_state is not None:
            keep = tl.trans(keep_mask(rng_state, row[:, None], first, threshold, BLOCK_N))
            dropped = tl.where(keep, p, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = _grad_scores(p, dp, row_delta[None, :], ratio, softcap, keep, keep_scale)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tiles", "H_KV", "T_q", "T_k", "threshold"])
def _dkdv_kernel(
    query,  # T [B, H, T_q, D], any strides between rows, as all of them
    key,  # T [B, H_kv, T_k, D]
    value,  # T [B, H_kv, T_k, D_V]
    attn_mask,  # uint8, fp32 or T [B, H, T_q, T_k], any strides, or None
    alibi_slopes,  # [sequences, H] or None
    key_lengths,  # int32 or int64 [B], or None
    cu_seqlens_q,  # int32 [sequences + 1], or None
    cu_seqlens_k,
    rng_state,  # int64 [2] or None
    grad_output,  # T [B, H, T_q, D_V]
    lse,  # fp32 [B, H, T_q]
    delta,  # fp32 [B, H, T_q]
    grad_key,  # T [B, H_kv, T_k, D], or None
    grad_value,  # T [B, H_kv, T_k, D_V], or None
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    slopes_strides,
    grad_output_strides,
    grad_key_strides,
    grad_value_strides,
    H_KV,
    T_q,
    T_k,
    tiles,  # of keys, in the longest sequence
    left,  # or None
    right,  # or None
    scale,
    softcap,  # or None
    threshold: tl.int64,
    keep_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):
    program = tl.program_id(0)
    first = program % tiles * BLOCK_N
    kv_head = program // tiles % H_KV
    sequence = program // tiles // H_KV
    batch, q_start, k_start, queries, keys, offset = _sequence(
        sequence, cu_seqlens_q, cu_seqlens_k, key_lengths, T_q, T_k
    )
    rows = T_k if cu_seqlens_q is None else keys  # those of a cache that are not filled get zeros
    if first >= rows:
        return
    j = first + tl.arange(0, BLOCK_N)
    k_offsets, k_columns = _tile(k_start + j, key_strides, D, BLOCK_D)
    v_offsets, v_columns = _tile(k_start + j, value_strides, D_V, BLOCK_DV)
    k = _load(key + _place(batch, kv_head, key_strides) + k_offsets, k_columns, j, keys, True)
    v = _load(value + _place(batch, kv_head, value_strides) + v_offsets, v_columns, j, keys, True)
    i = tl.arange(0, BLOCK_M)
    q_offsets, q_columns = _tile(i, query_strides, D, BLOCK_D)
    do_offsets, do_columns = _tile(i, grad_output_strides, D_V, BLOCK_DV)
    start, full_start, full_stop, stop = _query_range(
        first, tl.minimum(first + BLOCK_N, keys) - 1, queries, offset, left, right, BLOCK_M
    )
    stop = tl.where(first < keys, stop, 0)
    full_start = tl.maximum(full_start, start)
    full_stop = tl.maximum(tl.minimum(full_stop, stop // BLOCK_M * BLOCK_M), full_start)
    state = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    head = kv_head * GROUP
    query += _place(batch, head, query_strides) + tl.cast(q_start, tl.int64) * query_strides[2]
    grad_output += _place(batch, head, grad_output_strides) + tl.cast(q_start, tl.int64) * grad_output_strides[2]
    number = (tl.cast(batch, tl.int64) * (H_KV * GROUP) + head) * T_q + q_start
    if alibi_slopes is not None:
        alibi_slopes += sequence * slopes_strides[0] + head * slopes_strides[1]
    if attn_mask is not None:
        attn_mask += _place(batch, head, mask_strides)
    for n in tl.static_range(3):
        if n != 0 or right is not None:
            state = _bwd_queries(
                state, k, v, query, q_offsets, q_columns, grad_output, do_offsets, do_columns, query_strides,
                grad_output_strides, lse, delta, number, T_q, first, j,
                start if n == 0 else full_start if n == 1 else full_stop,
                tl.minimum(full_start, stop) if n == 0 else full_stop if n == 1 else stop,
                queries, keys, offset, left, right, scale, softcap, alibi_slopes, slopes_strides, attn_mask,
                mask_strides, rng_state, threshold, keep_scale, GROUP, n != 1, BLOCK_M, BLOCK_N, PRECISION, UNIT,
            )  # fmt: skip
    dk, dv = state
    inside = (j < keys)[:, None]
    exists = j < rows
    if grad_key is not None:
        offsets, _ = _tile(k_start + j, grad_key_strides, D, BLOCK_D)
        dk = tl.where(inside, dk * scale, 0.0)
        _store(grad_key + _place(batch, kv_head, grad_key_strides) + offsets, dk, exists, k_columns)
    if grad_value is not None:
        offsets, _ = _tile(k_start + j, grad_value_strides, D_V, BLOCK_DV)
        dv = tl.where(inside, dv if rng_state is None else dv * keep_scale, 0.0)
        _store(grad_value + _place(batch, kv_head, grad_value_strides) + offsets, dv, exists, v_columns)


# Launches ---------------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """How large the tiles of a kernel are, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# block_m, block_n, num_warps, num_stages for heads padded to a width of 32, 64, 128 and 256: what compiles without
# spilling and makes most of an instruction (`python tests/proof/kernel_report.py attention`). sm_80's fit the shared
# memory of 86, 89 and 120 too. On sm_100 the sums of a key's gradients fill all of tensor memory at a width of 256, so
# that tiles there are too small for it. "busy" are scores with a soft cap, a mask or dropout, which need registers;
# these and fp32 are for every architecture.
CONFIGURATIONS = {
    ("sm_80", "fwd"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
    ("sm_80", "dq"): ((64, 64, 4, 2), (128, 32, 4, 2), (128, 32, 8, 2), (32, 32, 8, 2)),
    ("sm_80", "dkdv"): ((32, 128, 4, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("sm_90", "fwd"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2)),
    ("sm_90", "dq"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_90", "dkdv"): ((64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 2)),
    ("sm_100", "fwd"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 2), (128, 32, 8, 2)),
    ("sm_100", "dq"): ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 4, 2), (128, 32, 8, 2)),
    ("sm_100", "dkdv"): ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("busy", "fwd"): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("busy", "dq"): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("busy", "dkdv"): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("fp32", "fwd"): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    ("fp32", "dq"): ((32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
    ("fp32", "dkdv"): ((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 1)),
}
WIDTHS = (32, 64, 128, 256)


def tiles(kernel: str, architecture: int, dtype: torch.dtype, width: int, busy: bool) -> Tiles:
    """Of "fwd", "dq" or "dkdv", or of "decode", whose rows are as many as there are."""
    if kernel == "decode":
        narrow = width * dtype.itemsize <= 256
        return Tiles(16, 64 if narrow else 32, 4, 3 if narrow else 2)
    kind = "busy" if busy else {9: "sm_90", 10: "sm_100"}.get(architecture // 10, "sm_80")
    kind = "fp32" if dtype == torch.float32 else kind
    return Tiles(*CONFIGURATIONS[kind, kernel][WIDTHS.index(max(32, width))])


@functools.cache
def _architecture(device: torch.device) -> int:
    """10 * major + minor of a GPU's compute capability; under the interpreter as if sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _precision(dtype: torch.dtype) -> str:
    """Of products of fp32: TF32 only if torch is told so."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and dtype == torch.float32 else "ieee"


def _width(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else x.stride()


def _args(problem: Problem) -> dict[str, Any]:
    """What all three kernels take."""
    mask = problem.attn_mask
    p = problem.dropout_p
    slopes = problem.alibi_slopes
    return {
        "query": problem.query,
        "key": problem.key,
        "value": problem.value,
        "attn_mask": mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
        "alibi_slopes": slopes,
        "key_lengths": problem.key_lengths,
        "cu_seqlens_q": problem.cu_seqlens_q,
        "cu_seqlens_k": problem.cu_seqlens_k,
        "rng_state": problem.rng_state,
        "query_strides": _strides(problem.query)[:3],
        "key_strides": _strides(problem.key)[:3],
        "value_strides": _strides(problem.value)[:3],
        "mask_strides": _strides(mask),
        "slopes_strides": (0, 0) if slopes is None else slopes.stride(),
        "T_q": problem.query.shape[2],
        "T_k": problem.key.shape[2],
        "left": problem.left,
        "right": problem.right,
        "scale": problem.scale,
        "softcap": problem.softcap or None,
        "threshold": round(p * 2**32),
        "keep_scale": dropout_scale(p),
        "GROUP": problem.group,
        "D": problem.query.shape[3],
        "D_V": problem.value.shape[3],
        "BLOCK_D": _width(problem.query.shape[3]),
        "BLOCK_DV": _width(problem.value.shape[3]),
        "PRECISION": _precision(problem.query.dtype),
        "UNIT": 1.0 if problem.query.dtype == torch.float32 else LOG2E,
    }


def _launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], config: Tiles) -> Launch:
    args = {name: value for name, value in args.items() if name in kernel.arg_names}
    # In fp32 a product less what it was rounded to has to be 0.
    options = {"num_stages": config.num_stages, "enable_fp_fusion": args["UNIT"] != 1.0}
    return Launch(kernel, grid, args, config.num_warps, options)


def _configuration(kernel: str, problem: Problem, architecture: int) -> Tiles:
    width = _width(max(problem.query.shape[3], problem.value.shape[3]))
    busy = bool(problem.softcap) or problem.attn_mask is not None or problem.rng_state is not None
    return tiles(kernel, architecture, problem.query.dtype, width, busy)


def plan_fwd(problem: Problem, output: Tensor, lse: Tensor, architecture: int) -> list[Launch]:
    query, key = problem.query, problem.key
    packed = problem.max_seqlen_q <= DECODE
    config = _configuration("decode" if packed else "fwd", problem, architecture)
    rows, heads = problem.max_seqlen_q, query.shape[1]
    if packed:
        rows, heads = rows * problem.group, key.shape[1]
        config = config._replace(block_m=min(64, max(16, triton.next_power_of_2(rows))))
    tiles_ = triton.cdiv(rows, config.block_m)
    programs = tiles_ * heads * problem.sequences
    splits = kernels.splits(problem.max_seqlen_k, config.block_n, programs) if packed else 1
    to, to_lse = output, lse
    if splits > 1:
        to = output.new_empty((splits, *output.shape), dtype=torch.float32)
        to_lse = lse.new_empty((splits, *lse.shape))
    args = _args(problem) | {
        "output": to,
        "lse": to_lse,
        "output_strides": to.stride()[-4:-1],
        "split_strides": (to.stride(0), to_lse.stride(0)) if splits > 1 else (0, 0),
        "H": heads,
        "tiles": tiles_,
        "PACKED": packed,
        "SPLITS": splits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    launches = [_launch(_fwd_kernel, (programs, splits), args, config)]
    if splits > 1:
        block = max(1, 1024 // args["BLOCK_DV"])
        combine = {
            "parts": to,
            "part_lse": to_lse,
            "output": output,
            "lse": lse,
            "output_strides": output.stride()[:3],
            "rows": lse.numel(),
            "heads": query.shape[1],
            "tokens": query.shape[2],
            "SPLITS": splits,
            "D_V": args["D_V"],
            "BLOCK_M": block,
            "BLOCK_DV": args["BLOCK_DV"],
        }
        launches.append(Launch(_combine_kernel, (triton.cdiv(lse.numel(), block),), combine, 4))
    return [launch for launch in launches if launch.grid[0]]


def plan_bwd(
    problem: Problem,
    grad_output: Tensor,
    output: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor | None],
    architecture: int,
) -> list[Launch]:
    query, key = problem.query, problem.key
    grad_query, grad_key, grad_value = grads
    delta = torch.empty_like(lse)
    args = _args(problem) | {
        "grad_output": grad_output,
        "output": output,
        "lse": lse,
        "delta": delta,
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_output_strides": grad_output.stride()[:3],
        "output_strides": output.stride()[:3],
        "grad_query_strides": _strides(grad_query)[:3],
        "grad_key_strides": _strides(grad_key)[:3],
        "grad_value_strides": _strides(grad_value)[:3],
        "H": query.shape[1],
        "H_KV": key.shape[1],
    }
    launches = []
    for kernel, name, rows, heads in (
        (_dq_kernel, "dq", problem.max_seqlen_q, query.shape[1]),
        (_dkdv_kernel, "dkdv", problem.max_seqlen_k, key.shape[1]),
    ):
        config = _configuration(name, problem, architecture)
        tiles_ = triton.cdiv(rows, config.block_m if kernel is _dq_kernel else config.block_n)
        more = {"tiles": tiles_, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        if kernel is _dq_kernel or not (grad_key is None and grad_value is None):
            launches.append(_launch(kernel, (tiles_ * heads * problem.sequences,), args | more, config))
    return [launch for launch in launches if launch.grid[0]]


# The contract of kernels.py ---------------------------------------------------------------------------------------


def fwd(problem: Problem, output: Tensor, lse: Tensor) -> None:
    run(plan_fwd(problem, output, lse, _architecture(output.device)), output.device)


def bwd(problem: Problem, grad_output: Tensor, output: Tensor, lse: Tensor, *grads: Tensor | None) -> None:
    run(plan_bwd(problem, grad_output, output, lse.contiguous(), grads, _architecture(output.device)), output.device)


KERNELS = Kernels(fwd=fwd, bwd=bwd)


# Compiling without a GPU ------------------------------------------------------------------------------------------


def compilations(architecture: int) -> Iterator[Compilation]:
    """The kernels that representative calls launch, specialised as the launches are."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def call(name: str, query: Tensor, key: Tensor, *options: Any, backward: bool = True) -> Iterator[Compilation]:
        problem = dense(query, key, key, *options)
        lse = meta(*query.shape[:3])
        launches = plan_fwd(problem, query, lse, architecture)
        if backward:
            launches += plan_bwd(problem, query, query, lse, (query, key, key), architecture)
        dtype = str(query.dtype).removeprefix("torch.")
        yield from (compilation(f"attention {name} {query.shape[3]} {dtype}", launch) for launch in launches)

    for size, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32)):
        x = meta(4, 16, 4096, size, dtype=dtype)
        yield from call("causal", x, x, None, None, None, None, True, 0.125, -1, -1, 0.0, 0.0)
        if dtype == torch.float32 or size == 256:
            continue
        key, lengths = x[:, :4], meta(4, dtype=torch.int32)
        yield from call(
            "decode", x[:, :, :1], key, None, None, lengths, None, True, 0.125, -1, -1, 0.0, 0.0, backward=False
        )
        rng_state, mask = meta(2, dtype=torch.int64), meta(1, 1, 4096, 4096, dtype=dtype)
        yield from call("grouped", x, key, None, None, None, None, True, 0.125, -1, -1, 0.0, 0.0)
        options = mask, meta(16), None, rng_state, True, 0.125, 1024, -1, 30.0, 0.1
        yield from call("everything", x, key, *options)
