"""The losses' functions of rows through compiled launchers (csrc/cross_entropy/); the contract is kernels.py's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import rows
from fastlm.ops.compiled import Launchers
from fastlm.ops.cross_entropy.kernels import Kernels, Options, check_range


def kernels(launchers: Launchers) -> Kernels:
    fwd, total, bwd = (functools.partial(function, launchers) for function in (_fwd, _sum, _bwd))
    return Kernels(fwd=fwd, sum=total, bwd=bwd)


def _fwd(
    launchers: Launchers,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    losses: Tensor,
    stats: Tensor,
    divisors: Tensor | None,
) -> None:
    (logits, target), sizes, strides = _as_rows(logits, target)
    weight, codes = None if weight is None else weight.contiguous(), launchers.codes
    try:
        launchers.cross_entropy_fwd(
            logits.data_ptr(),
            target.data_ptr(),
            _pointer(weight),
            _pointer(divisors),
            losses.data_ptr(),
            stats.data_ptr(),
            sizes,
            *strides,
            logits.shape[-1],
            stats.stride(0),
            *options,
            target.is_floating_point(),
            codes[logits.dtype],
            codes.get(target.dtype, 0),
            0 if weight is None else codes[weight.dtype],
            *launchers.extra(logits),
        )
    except RuntimeError:
        check_range("cross_entropy", target, logits.shape[-1], options.ignore_index)
        raise


def _sum(
    launchers: Launchers,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    losses: Tensor | None,
    stats: Tensor | None,
    divisors: Tensor | None,
) -> Tensor | None:
    given: Any = divisors if losses is None else losses
    loss = None if losses is None else torch.empty((), dtype=given.dtype, device=given.device)
    probabilities = target.is_floating_point()
    count = target.numel() // target.shape[-1] if probabilities else target.numel()
    weight, codes = None if weight is None or probabilities else weight.contiguous(), launchers.codes
    try:
        launchers.cross_entropy_sum(
            0 if probabilities else target.data_ptr(),
            _pointer(weight),
            _pointer(losses),
            _pointer(stats),
            _pointer(divisors),
            _pointer(loss),
            count,
            0 if stats is None else stats.stride(0),
            0 if weight is None else len(weight),
            options.ignore_index,
            options.z_loss,
            codes[given.dtype],
            0 if weight is None else codes[weight.dtype],
            *launchers.extra(given),
        )
    except RuntimeError:
        if weight is not None:
            check_range("cross_entropy", target, len(weight), options.ignore_index)
        raise
    return loss


def _bwd(
    launchers: Launchers,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    stats: Tensor,
    divisors: Tensor | None,
    grad: Tensor,
) -> None:
    (logits, target, written), sizes, strides = _as_rows(logits, target, grad)
    weight, grad_loss, codes = None if weight is None else weight.contiguous(), grad_loss.contiguous(), launchers.codes
    launchers.cross_entropy_bwd(
        grad_loss.data_ptr(),
        logits.data_ptr(),
        target.data_ptr(),
        _pointer(weight),
        _pointer(divisors),
        stats.data_ptr(),
        written.data_ptr(),
        sizes,
        *strides,
        logits.shape[-1],
        stats.stride(0),
        len(grad_loss) > 1,
        *options,
        target.is_floating_point(),
        codes[logits.dtype],
        codes.get(target.dtype, 0),
        0 if weight is None else codes[weight.dtype],
        *launchers.extra(logits),
    )
    if written is not grad:  # more dimensions than rows can have: `as_rows` had to copy
        grad.data.copy_(written)  # unseen by autograd, as what a kernel writes is


def _as_rows(logits: Tensor, target: Tensor, *grad: Tensor) -> tuple[Any, Any, Any]:
    """Logits, target and gradient as rows, with their sizes and strides; class indices have no strides."""
    probabilities = target.is_floating_point()
    if (
        logits.is_contiguous()
        and all([x.is_contiguous() for x in grad])
        and (not probabilities or target.is_contiguous())
    ):
        columns = logits.shape[-1]
        return (logits, target, *grad), logits.numel() // columns, (columns,) * (2 + len(grad))
    ready, sizes, strides = rows.as_rows((logits, target if probabilities else None, *grad), 1)
    return (ready[0], ready[1] if probabilities else target, *ready[2:]), sizes, strides


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
