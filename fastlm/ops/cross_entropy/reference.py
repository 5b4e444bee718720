"""Softmax cross-entropy in plain torch with backward written out.

Logits are seen as rows x classes, in fp32 (fp64 for fp64). With x the logits after the soft cap s * tanh(x / s), the
softmax p = exp(x - lse), and q the target distribution (1 - label_smoothing) * onehot(target) + label_smoothing / C
times the class weights (the target's weight in the first term, each class's in the second):

    loss     = lse * sum(q) - sum(q * x) + z_loss * lse^2
    dloss/dx = p * (sum(q) + 2 * z_loss * lse) - q

Rows whose target is `ignore_index` give 0 and no gradient. The mean divides the first part by the sum of the targets'
weights (by the number of rows for probabilities), the z part by the number of rows that are not ignored.

Of each row are kept lse in two parts, the largest logit and the log of what is left, and sum(q); of the whole, for the
mean, the two divisors. The last section is the same for
`linear_cross_entropy`, whose loop over chunks of rows is in kernels.py.

Source: Szegedy et al. 2015 (arXiv 1512.00567) for label smoothing; de Brébisson and Vincent 2016 (arXiv 1604.08859) for
z_loss; Gemma Team 2024 (arXiv 2408.00118) for the soft cap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops.cross_entropy.kernels import Kernels, Options, linear_bwd, never_zero, wide_dtype

BLOCK_ELEMENTS = 2**19  # of the logits that a CPU goes through at a time, so that they stay in its cache


class Targets(NamedTuple):
    """What the rows are compared with, and how much each counts."""

    rows: Tensor  # (rows, 1) int64 classes, 0 where ignored; or (rows, classes) probabilities
    valid: Tensor  # (rows, 1) bool, False where ignored
    row_weight: Tensor  # (rows, 1) class weight of the row's target, 0 where ignored; 1 with probabilities
    weight: Tensor | None  # (classes,)
    label_smoothing: float


def cross_entropy_fwd(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss in fp32 or fp64; max, log and sum(q), (3, rows); the mean's divisors, (2,), else empty."""
    x = _capped(_class_rows(input), softcap)
    targets = _targets(_target_rows(target), weight, ignore_index, label_smoothing, x.dtype)
    top, log = _lse(x)
    losses, z = _row_losses(x, top, log, targets, z_loss)
    divisors = _divisors(targets) if reduction == "mean" else log.new_empty(0)
    if reduction == "none":
        loss = losses + z
    else:
        loss = losses.sum() / divisors[0] + z.sum() / divisors[1] if reduction == "mean" else (losses + z).sum()
    return loss.reshape(_loss_shape(input, reduction)), torch.cat([top, log, _mass(x, targets)], 1).T.clone(), divisors


def cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    divisors: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace_backward: bool,
    needs_grad: Sequence[bool],
    in_place: bool = False,
) -> Tensor:
    """-> gradient of input."""
    x = _capped(_class_rows(input), softcap)
    targets = _targets(_target_rows(target), weight, ignore_index, label_smoothing, x.dtype)
    top, log = _lse(x) if stats is None else (stats[0, :, None], stats[1, :, None])
    upstream = _upstream(grad_loss.to(x.dtype), _divisors(targets) if reduction == "mean" else None)
    grad = _logit_gradient(x, (x - top - log).exp(), top + log, targets, *upstream, z_loss, softcap)
    classes_last = grad.reshape(*_loss_shape(input, "none"), x.shape[-1])
    return classes_last.movedim(-1, _class_dim(input)).to(input.dtype)


def _targets(target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, dtype: torch.dtype) -> Targets:
    """From (rows, 1) class indices or (rows, classes) probabilities."""
    weight = None if weight is None else weight.to(dtype)
    if target.is_floating_point():
        valid = target.new_ones((len(target), 1), dtype=torch.bool)
        return Targets(target.to(dtype), valid, valid.to(dtype), weight, smoothing)
    target = target.long()
    valid = target != ignore_index
    target = torch.where(valid, target, 0)
    row_weight = valid.to(dtype) if weight is None else torch.where(valid, weight[target], 0.0)
    return Targets(target, valid, row_weight, weight, smoothing)


def _lse(x: Tensor) -> tuple[Tensor, Tensor]:
    """lse in two parts, both (rows, 1): the largest element, which needs no gradient, and log(sum(exp(x - top)))."""
    top = x.detach().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((len(x), 1))
    top = torch.where(top.isinf(), 0.0, top)
    return top, (x - top).exp().sum(-1, keepdim=True).log()


def _row_losses(x: Tensor, top: Tensor, log: Tensor, targets: Targets, z_loss: float) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy and its z part, both (rows, 1)."""
    epsilon, weight = targets.label_smoothing, targets.weight
    if targets.rows.is_floating_point():
        loss = ((top - x + log) * _distribution(targets)).sum(-1, keepdim=True)
    else:
        loss = (top - x.gather(1, targets.rows) + log) * targets.row_weight
        if epsilon:
            every = (top - x + log) * (1.0 if weight is None else weight)
            loss = (1 - epsilon) * loss + epsilon / max(1, x.shape[-1]) * every.sum(-1, keepdim=True)
    z = z_loss * (top + log).square() if z_loss else torch.zeros_like(log)
    return torch.where(targets.valid, loss, 0.0), torch.where(targets.valid, z, 0.0)


def _logit_gradient(
    x: Tensor,
    p: Tensor,
    lse: Tensor,
    targets: Targets,
    scale: Tensor | float,
    z_scale: Tensor | float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """scale * d(cross-entropy)/d(logits) + z_scale * d(z part)/d(logits), before the soft cap; (rows, classes)."""
    epsilon, weight = targets.label_smoothing, targets.weight
    valid = targets.valid.to(p.dtype)
    scale, through_lse = valid * scale, valid * (2 * z_loss * lse * z_scale)
    if targets.rows.is_floating_point():
        grad = p * (_mass(x, targets) * scale + through_lse) - _distribution(targets) * scale
    else:
        grad = p * (_mass(x, targets) * scale + through_lse)
        grad.scatter_add_(1, targets.rows, -(1 - epsilon) * targets.row_weight * scale)
        grad = grad - epsilon / max(1, x.shape[-1]) * (1.0 if weight is None else weight) * scale if epsilon else grad
    return grad * (1 - (x / softcap).square()) if softcap else grad


def _distribution(targets: Targets) -> Tensor:
    """q of rows that are compared with probabilities."""
    q, epsilon = targets.rows, targets.label_smoothing
    q = (1 - epsilon) * q + epsilon / max(1, q.shape[-1]) if epsilon else q
    return q if targets.weight is None else q * targets.weight


def _mass(x: Tensor, targets: Targets) -> Tensor:
    """sum(q), (rows, 1)."""
    epsilon, weight = targets.label_smoothing, targets.weight
    if targets.rows.is_floating_point():
        return _distribution(targets).sum(-1, keepdim=True)
    mass = (1 - epsilon) * targets.row_weight
    if not epsilon:
        return mass
    return mass + targets.valid.to(mass.dtype) * (
        epsilon * (1.0 if weight is None else weight.sum() / max(1, x.shape[-1]))
    )


def _divisors(targets: Targets) -> Tensor:
    """What "mean" divides the cross-entropy and the z part by, (2,); stays on the device."""
    return torch.stack([targets.row_weight.sum(), targets.valid.sum().to(targets.row_weight.dtype)])


def _upstream(grad_loss: Tensor, divisors: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gradients of the cross-entropy and of the z part are multiplied by, each (rows, 1) or (1, 1)."""
    scale = grad_loss.reshape(-1, 1)
    return (scale, scale) if divisors is None else tuple(scale / never_zero(divisors)[:, None, None])


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def _class_dim(input: Tensor) -> int:
    return min(1, input.dim() - 1)


def _class_rows(input: Tensor) -> Tensor:
    """(C,) or (N, C, d1, ...) as (rows, C) in the dtype of the arithmetic."""
    classes = input.shape[_class_dim(input)]
    rows = input.numel() // classes if classes else math.prod(_loss_shape(input, "none"))
    return _wide(input.movedim(_class_dim(input), -1).reshape(rows, classes))


def _target_rows(target: Tensor) -> Tensor:
    return _class_rows(target) if target.is_floating_point() else target.reshape(-1, 1)


def _loss_shape(input: Tensor, reduction: str) -> torch.Size:
    if reduction != "none":
        return torch.Size(())
    dim = _class_dim(input)
    return input.shape[:dim] + input.shape[dim + 1 :]


# Rows, for linear_cross_entropy: the contract of kernels.py ---------------------------------------------------------


def _fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    losses: Tensor,
    stats: Tensor,
    divisors: Tensor | None,
) -> None:
    for block in _blocks(logits):
        targets = _targets(_target_rows(target[block]), weight, *options[:2], losses.dtype)
        x = _capped(_wide(logits[block]), options.softcap)
        top, log = _lse(x)
        losses[block] = _row_losses(x, top, log, targets, 0.0)[0][:, 0]
        stats[:, block] = torch.where(targets.valid, torch.cat([top, log, _mass(x, targets)], 1), 0.0).T
        if divisors is not None:
            upstream = _upstream(losses.new_ones(()), divisors)
            p = (x - top - log).exp()
            logits[block] = _logit_gradient(x, p, top + log, targets, *upstream, options.z_loss, options.softcap)


def _sum(
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    losses: Tensor | None,
    stats: Tensor | None,
    divisors: Tensor | None,
) -> Tensor | None:
    if divisors is not None:
        divisors.copy_(_divisors(_targets(_target_rows(target), weight, *options[:2], divisors.dtype)))
    if losses is None or stats is None:
        return None
    z = (options.z_loss * (stats[0] + stats[1]).square()).sum() if options.z_loss else losses.new_zeros(())
    return losses.sum() + z if divisors is None else losses.sum() / divisors[0] + z / divisors[1]


def _bwd(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    stats: Tensor,
    divisors: Tensor | None,
    grad: Tensor,
) -> None:
    for block in _blocks(logits):
        targets = _targets(_target_rows(target[block]), weight, *options[:2], stats.dtype)
        x, (top, log, _) = _capped(_wide(logits[block]), options.softcap), stats[:, block, None]
        upstream = _upstream(grad_loss[block] if len(grad_loss) > 1 else grad_loss, divisors)
        p = (x - top - log).exp()
        grad[block] = _logit_gradient(x, p, top + log, targets, *upstream, options.z_loss, options.softcap)


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, logits.shape[-1])) if logits.device.type == "cpu" else len(logits)
    for start in range(0, len(logits), size):
        yield slice(start, min(start + size, len(logits)))


KERNELS = Kernels(fwd=_fwd, sum=_sum, bwd=_bwd)


def linear_cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """-> gradients of input, linear_weight and linear_bias; empty where not needed."""
    if stats is not None:
        return linear_bwd(KERNELS, grad_loss, input, linear_weight, target, linear_bias, weight, stats, *rest)
    # Double backward: through the logits in full.
    ignore_index, reduction, label_smoothing, z_loss, softcap = rest[4:9]
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    grad = cross_entropy_bwd(
        grad_loss, logits, target, weight, None, None, ignore_index, reduction, label_smoothing, z_loss, softcap,
        False, (True,),
    )  # fmt: skip
    flat = grad.reshape(-1, grad.shape[-1])
    return grad @ linear_weight, flat.T @ (input if input.dim() == 2 else input[None]), flat.sum(0)
