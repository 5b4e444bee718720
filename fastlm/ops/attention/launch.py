"""Attention through compiled launchers (csrc/attention/): what kernels.py asks of a backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastlm.ops.attention.kernels import DECODE, FAR, Kernels, Problem, is_ready, splits
from fastlm.ops.compiled import Launchers

KEY_TILE, KEY_TILE_BWD = 64, 128
QUERY_TILE_BWD = 64  # at most


def splits_bwd(keys: int, heads: int) -> int:
    """Into how many parts the backward divides the keys of a head: the same on every GPU.

    Each costs the memory of the gradient of queries in fp32. So many that there is a block for each of 128
    multiprocessors; up to four where blocks are few enough for a last round of them, half empty, to matter.
    """
    return max(1, min(-(-keys // KEY_TILE_BWD), max(-(-128 // heads), min(4, 512 // heads))))


def splits_bwd_cpu(keys: int, heads: int) -> int:
    """The same for the CPU, whatever the number of threads: each part lays out the queries once more."""
    return max(1, min(keys // 512, -(-8 // heads)))


def kernels(launchers: Launchers) -> Kernels:
    return Kernels(fwd=functools.partial(_fwd, launchers), bwd=functools.partial(_bwd, launchers))


def is_aligned(x: Tensor) -> bool:
    """Whether rows of (..., D) are runs that begin at multiples of 16 bytes."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    return is_ready(x) and x.data_ptr() % 16 == 0 and not any(stride * x.element_size() % 16 for stride in strides)


def _is_cpu(launchers: Launchers) -> bool:
    return launchers.suffix == "_cpu"


def _readable(launchers: Launchers, x: Tensor) -> Tensor:
    return x if _is_cpu(launchers) or is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _problem(launchers: Launchers, problem: Problem) -> tuple[Any, ...]:
    """The fields of AttentionProblem, and the tensors that must live until the launch."""
    query, key, value = (_readable(launchers, x) for x in (problem.query, problem.key, problem.value))
    slopes, lengths = problem.alibi_slopes, problem.key_lengths
    slopes = None if slopes is None else slopes.float().contiguous()
    lengths = None if lengths is None else lengths.int()
    fields = (
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        *map(_pointer, (slopes, lengths, problem.cu_seqlens_q, problem.cu_seqlens_k, problem.rng_state)),
        query.stride(),
        key.stride(),
        value.stride(),
        query.shape[0],
        problem.sequences,
        query.shape[1],
        key.shape[1],
        query.shape[2],
        key.shape[2],
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        query.shape[3],
        value.shape[3],
        FAR if problem.left is None else problem.left,
        FAR if problem.right is None else problem.right,
        problem.scale,
        problem.softcap,
        problem.dropout_p,
        launchers.codes[query.dtype],
    )
    return fields, (query, key, value, slopes, lengths)


def _mask(launchers: Launchers, problem: Problem) -> tuple[Any, ...]:
    """The fields of AttentionMask, which the CPU has."""
    mask = problem.attn_mask
    if not _is_cpu(launchers):
        return ()
    if mask is None:
        return 0, 0, 0, False
    boolean = mask.dtype == torch.bool
    return mask.data_ptr(), mask.stride(), 0 if boolean else launchers.codes[mask.dtype], boolean


def _fwd(launchers: Launchers, problem: Problem, output: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """-> what must live until the launch."""
    grouped = problem.max_seqlen_q <= DECODE
    heads = problem.key.shape[1] if grouped else problem.query.shape[1]
    parts = splits(problem.max_seqlen_k, KEY_TILE, heads * problem.sequences) if grouped else 1
    part = part_lse = None
    if parts > 1:
        part = lse.new_empty((parts, *output.shape))
        part_lse = lse.new_empty((parts, *lse.shape))
    fields, alive = _problem(launchers, problem)
    launchers.attention_fwd(
        *fields,
        output.data_ptr(),
        lse.data_ptr(),
        _pointer(part),
        _pointer(part_lse),
        output.stride(),
        parts,
        grouped,
        *_mask(launchers, problem),
        *launchers.extra(output),
    )
    return part, part_lse, *alive


def _bwd(
    launchers: Launchers, problem: Problem, grad_output: Tensor, output: Tensor, lse: Tensor, *grads: Tensor | None
) -> None:
    query, heads = problem.query, max(1, problem.key.shape[1] * problem.sequences)
    stats = partial = None
    if _is_cpu(launchers):
        parts = splits_bwd_cpu(problem.max_seqlen_k, heads)
        if grads[0] is not None and parts > 1:
            partial = lse.new_empty((parts, *query.shape))
    else:
        parts = splits_bwd(problem.max_seqlen_k, heads)
        stats = lse.new_empty((2, *lse.shape))
        if grads[0] is not None:
            rows = query.shape[0] * query.shape[2] + QUERY_TILE_BWD * (problem.sequences + 1)
            width = -(-max(query.shape[3], problem.value.shape[3]) // 32) * 32
            partial = lse.new_empty((parts, query.shape[1], rows, width))
    grad_output, output, lse = _readable(launchers, grad_output), _readable(launchers, output), lse.contiguous()
    fields, _alive = _problem(launchers, problem)
    launchers.attention_bwd(
        *fields,
        grad_output.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
        _pointer(stats),
        _pointer(partial),
        *map(_pointer, grads),
        grad_output.stride(),
        output.stride(),
        *((0, 0, 0, 0) if grad is None else grad.stride() for grad in grads),
        parts,
        *_mask(launchers, problem),
        *launchers.extra(output),
    )


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
