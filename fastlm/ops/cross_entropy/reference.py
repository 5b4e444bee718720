"""Softmax cross-entropy, of logits and of a linear layer, in plain torch with backward written out.

Logits are seen as rows x classes, in fp32 (fp64 for fp64). With x the logits after the soft cap s * tanh(x / s), the
softmax p = exp(x - lse), and q the target distribution (1 - label_smoothing) * onehot(target) + label_smoothing / C
times the class weights (the target's weight in the first term, each class's in the second):

    loss     = lse * sum(q) - sum(q * x) + z_loss * lse^2
    dloss/dx = p * (sum(q) + 2 * z_loss * lse) - q

Rows whose target is `ignore_index` give 0 and no gradient. The mean divides the first part by the sum of the targets'
weights (by the number of rows for probabilities), the z part by the number of rows that are not ignored.

`linear_cross_entropy` goes through the rows in chunks, so that the logits never exist in full. For "mean" and "sum" it
forms the gradients chunk by chunk in the forward pass, and backward only scales them; for "none", whose upstream
gradient differs by row, backward forms the logits again from lse.

Source: Szegedy et al. 2015 (arXiv 1512.00567) for label smoothing; de Brébisson and Vincent 2016 (arXiv 1604.08859) for
z_loss; Gemma Team 2024 (arXiv 2408.00118) for the soft cap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 2**27  # of one chunk's logits: few, large chunks keep the matrix products efficient
BLOCK_ELEMENTS = 2**19  # of the logits that a CPU goes through at a time, so that they stay in its cache


class Targets(NamedTuple):
    """What the rows are compared with, and how much each counts."""

    rows: Tensor  # (rows, 1) int64 classes, 0 where ignored; or (rows, classes) probabilities
    valid: Tensor  # (rows, 1) bool, False where ignored
    row_weight: Tensor  # (rows, 1) class weight of the row's target, 0 where ignored; 1 with probabilities
    weight: Tensor | None  # (classes,)
    label_smoothing: float

    def at(self, rows: slice) -> Targets:
        return Targets(self.rows[rows], self.valid[rows], self.row_weight[rows], self.weight, self.label_smoothing)


def cross_entropy_fwd(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """-> loss in fp32 or fp64, lse (rows,)."""
    x = _capped(_class_rows(input), softcap)
    targets = _targets(_target_rows(target), weight, ignore_index, label_smoothing, x.dtype)
    lse = torch.logsumexp(x, -1, keepdim=True)
    loss = _reduced(*_row_losses(x, lse, targets, z_loss), targets, reduction)
    return loss.reshape(_loss_shape(input, reduction)), lse[:, 0].clone()


def cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_grad: Sequence[bool],
) -> Tensor:
    """-> gradient of input."""
    x = _capped(_class_rows(input), softcap)
    targets = _targets(_target_rows(target), weight, ignore_index, label_smoothing, x.dtype)
    lse = torch.logsumexp(x, -1, keepdim=True) if lse is None else lse[:, None]
    divisor, z_divisor = _divisors(targets, reduction)
    divisor, z_divisor = _never_zero(divisor), _never_zero(z_divisor)
    upstream = grad_loss.to(x.dtype).reshape(-1, 1)
    grad = _logit_gradient(x, (x - lse).exp(), lse, targets, upstream / divisor, upstream / z_divisor * z_loss, softcap)
    classes_last = grad.reshape(*_loss_shape(input, "none"), x.shape[-1])
    return classes_last.movedim(-1, _class_dim(input)).to(input.dtype)


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss in fp32 or fp64, lse (rows,), unscaled gradients of input, linear_weight and linear_bias, their divisor.

    The gradients are empty where not needed and for "none"; those of the parameters are sums in fp32.
    """
    x = input if input.dim() == 2 else input[None]
    dtype = _wide_dtype(x)
    targets = _targets(_linear_targets(x, linear_weight, target), weight, ignore_index, label_smoothing, dtype)
    lse, losses, z_losses = (x.new_empty((len(x), 1), dtype=dtype) for _ in range(3))
    divisor, z_divisor = _divisors(targets, reduction)
    divisor = _never_zero(divisor)
    z_scale = divisor / _never_zero(z_divisor) * z_loss
    sums = _GradientSums(x, linear_weight, linear_bias, needs_grad if reduction != "none" else (False,) * 3)
    for rows, logits in _chunks(x, linear_weight, linear_bias):
        for block in _blocks(rows, logits):
            part, part_targets = logits[block.start - rows.start : block.stop - rows.start], targets.at(block)
            capped = _capped(_wide(part), softcap)
            p = torch.softmax(capped, -1)  # whose largest element is exp(max - lse)
            lse[block] = capped.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
            losses[block], z_losses[block] = _row_losses(capped, lse[block], part_targets, z_loss)
            if sums.needed:
                part.copy_(_logit_gradient(capped, p, lse[block], part_targets, 1.0, z_scale, softcap))
        sums.add(rows, logits)
    loss = _reduced(losses, z_losses, targets, reduction).reshape(_loss_shape(input, reduction))
    return (
        loss,
        lse[:, 0].clone(),
        sums.input.view(input.shape) if sums.needs_grad[0] else sums.input,
        sums.weight,
        sums.bias,
        divisor,
    )


def linear_cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    lse: Tensor | None,
    unscaled_input: Tensor,
    unscaled_weight: Tensor,
    unscaled_bias: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """-> gradients of input, linear_weight and linear_bias; empty where not needed."""
    if lse is None:  # double backward: through the logits in full
        logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
        grad = cross_entropy_bwd(
            grad_loss, logits, target, weight, None, ignore_index, reduction, label_smoothing, z_loss, softcap, (True,)
        )
        flat = grad.reshape(-1, grad.shape[-1])
        return grad @ linear_weight, flat.T @ (input if input.dim() == 2 else input[None]), flat.sum(0)
    if reduction == "none":
        x = input if input.dim() == 2 else input[None]
        targets = _targets(_linear_targets(x, linear_weight, target), weight, ignore_index, label_smoothing, lse.dtype)
        upstream = grad_loss.to(lse.dtype).reshape(-1, 1)
        sums = _GradientSums(x, linear_weight, linear_bias, needs_grad)
        for rows, logits in _chunks(x, linear_weight, linear_bias):
            for block in _blocks(rows, logits):
                part, scale = logits[block.start - rows.start : block.stop - rows.start], upstream[block]
                capped, row_lse = _capped(_wide(part), softcap), lse[block, None]
                p = (capped - row_lse).exp()
                part.copy_(_logit_gradient(capped, p, row_lse, targets.at(block), scale, scale * z_loss, softcap))
            sums.add(rows, logits)
        grads, factor = [sums.input, sums.weight, sums.bias], None
    else:
        grads, factor = [unscaled_input, unscaled_weight, unscaled_bias], grad_loss.to(divisor.dtype) / divisor
    return tuple(
        input.new_empty(0) if like is None or not needed else _scaled(grad, factor, like)
        for grad, like, needed in zip(grads, (input, linear_weight, linear_bias), needs_grad, strict=True)
    )


def _scaled(grad: Tensor, factor: Tensor | None, like: Tensor) -> Tensor:
    """grad * factor in the shape and dtype of `like`; block by block, so that no product in fp32 is kept."""
    result = like.new_empty(like.shape)
    target, grad = (x if x.dim() == 2 else x[None] for x in (result, grad.reshape(result.shape)))
    for block in _blocks(slice(0, len(grad)), grad):
        target[block] = grad[block] if factor is None else grad[block] * factor
    return result


class _GradientSums:
    """The gradients of a linear layer, from chunk to chunk of its output's: those of the parameters summed in fp32."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: Sequence[bool]) -> None:
        self.x, self.linear_weight, self.needs_grad = x, weight, needs_grad
        self.needed = any(needs_grad)
        self.dtype, empty = _wide_dtype(x), x.new_empty(0)
        self.input = x.new_empty(x.shape) if needs_grad[0] else empty
        create = weight.new_empty if len(x) else weight.new_zeros  # the first chunk, if there is one, fills it
        self.weight = create(weight.shape, dtype=self.dtype) if needs_grad[1] else empty.clone()
        self.bias = x.new_zeros(len(weight), dtype=self.dtype) if needs_grad[2] else empty.clone()
        self.workspace = weight.new_empty(weight.shape) if needs_grad[1] and x.dtype != self.dtype else empty

    def add(self, rows: slice, grad: Tensor) -> None:
        if self.needs_grad[0]:
            torch.mm(grad, self.linear_weight, out=self.input[rows])
        beta = 0.0 if rows.start == 0 else 1.0  # nothing to add to at first
        if self.needs_grad[1] and grad.dtype == self.dtype:
            self.weight.addmm_(grad.T, self.x[rows], beta=beta)
        elif self.needs_grad[1]:
            torch.mm(grad.T, self.x[rows], out=self.workspace)
            self.weight.add_(self.workspace) if beta else self.weight.copy_(self.workspace)
        if self.needs_grad[2]:
            self.bias.add_(grad.sum(0, dtype=self.dtype))


def _chunks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows with their logits, which live in one workspace."""
    count = max(2, -(-len(x) * len(weight) * x.element_size() // CHUNK_BYTES))
    size = max(1, -(-len(x) // count))
    workspace = x.new_empty((min(size, len(x)), len(weight)))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        logits = torch.mm(x[rows], weight.T, out=workspace[: rows.stop - start])
        yield rows, logits if bias is None else logits.add_(bias)


def _blocks(rows: slice, logits: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // max(1, logits.shape[-1])) if logits.device.type == "cpu" else len(logits)
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


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


def _row_losses(x: Tensor, lse: Tensor, targets: Targets, z_loss: float) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy and its z part, both (rows, 1)."""
    epsilon, weight = targets.label_smoothing, targets.weight
    if targets.rows.is_floating_point():
        loss = ((lse - x) * _distribution(targets)).sum(-1, keepdim=True)
    else:
        loss = (lse - x.gather(1, targets.rows)) * targets.row_weight
        if epsilon:
            every = lse - x if weight is None else (lse - x) * weight
            loss = (1 - epsilon) * loss + epsilon / max(1, x.shape[-1]) * every.sum(-1, keepdim=True)
    z = z_loss * lse.square() if z_loss else torch.zeros_like(lse)
    return torch.where(targets.valid, loss, 0.0), torch.where(targets.valid, z, 0.0)


def _logit_gradient(
    x: Tensor, p: Tensor, lse: Tensor, targets: Targets, scale: Tensor | float, z_scale: Tensor | float, softcap: float
) -> Tensor:
    """scale * d(cross-entropy)/d(logits) + z_scale * d(lse^2)/d(logits), before the soft cap; (rows, classes)."""
    epsilon, weight = targets.label_smoothing, targets.weight
    valid = targets.valid.to(p.dtype)
    scale, through_lse = valid * scale, valid * (2 * z_scale * lse)
    if targets.rows.is_floating_point():
        q = _distribution(targets)
        grad = p * (q.sum(-1, keepdim=True) * scale + through_lse) - q * scale
    else:
        at_target = (1 - epsilon) * targets.row_weight * scale
        smooth = epsilon / max(1, x.shape[-1]) * (x.new_ones(x.shape[-1]) if weight is None else weight)
        grad = p * (at_target + smooth.sum() * scale + through_lse)
        grad.scatter_add_(1, targets.rows, -at_target)
        grad = grad - smooth * scale if epsilon else grad
    return grad * (1 - (x / softcap).square()) if softcap else grad


def _distribution(targets: Targets) -> Tensor:
    """q of rows that are compared with probabilities."""
    q, epsilon = targets.rows, targets.label_smoothing
    q = (1 - epsilon) * q + epsilon / max(1, q.shape[-1]) if epsilon else q
    return q if targets.weight is None else q * targets.weight


def _divisors(targets: Targets, reduction: str) -> tuple[Tensor, Tensor]:
    """What "mean" divides the cross-entropy and the z part by; stays on the device."""
    if reduction == "mean":
        return targets.row_weight.sum(), targets.valid.sum().to(targets.row_weight.dtype)
    one = targets.row_weight.new_ones(())
    return one, one


def _never_zero(divisor: Tensor) -> Tensor:
    """For gradients: where all is ignored the mean is 0 / 0, but no row has a gradient."""
    return torch.where(divisor == 0, 1.0, divisor)


def _reduced(loss: Tensor, z: Tensor, targets: Targets, reduction: str) -> Tensor:
    if reduction == "none":
        return loss + z
    divisor, z_divisor = _divisors(targets, reduction)
    return loss.sum() / divisor + z.sum() / z_divisor


def _capped(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _class_dim(input: Tensor) -> int:
    return min(1, input.dim() - 1)


def _class_rows(input: Tensor) -> Tensor:
    """(C,) or (N, C, d1, ...) as (rows, C) in the dtype of the arithmetic."""
    classes = input.shape[_class_dim(input)]
    rows = input.numel() // classes if classes else math.prod(_loss_shape(input, "none"))
    return _wide(input.movedim(_class_dim(input), -1).reshape(rows, classes))


def _target_rows(target: Tensor) -> Tensor:
    return _class_rows(target) if target.is_floating_point() else target.reshape(-1, 1)


def _linear_targets(x: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """(rows, 1) class indices or (rows, classes) probabilities."""
    return target.reshape(len(x), len(linear_weight) if target.is_floating_point() else 1)


def _loss_shape(input: Tensor, reduction: str) -> torch.Size:
    if reduction != "none":
        return torch.Size(())
    dim = _class_dim(input)
    return input.shape[:dim] + input.shape[dim + 1 :]
