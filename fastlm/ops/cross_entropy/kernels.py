"""Both losses, over what each backend brings: three functions of rows of logits.

`linear_cross_entropy` goes through the rows in chunks, so that the logits are only ever in one workspace of a chunk's
size. For "mean" and "sum" the gradients are formed in forward, for an upstream gradient of 1: the gradient of a chunk's
logits takes their place and is multiplied out at once, and backward only scales the results, in place unless the graph
is retained. For "none", whose upstream gradient differs by row, and for `recompute`, backward forms the logits again
from lse.

The weight's and the bias's gradients are summed over chunks in fp32 whatever the dtype. In fp16 what is kept is not yet
divided by the mean's divisor, and the weight's stays in fp32: a loss scale that arrives with the upstream gradient
still reaches what would have been too small.

Source: Hsu et al. 2024 (arXiv 2410.10989); Wijmans et al. 2024 (arXiv 2411.09009).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.ops import onednn, rows

CHUNK_BYTES = {
    "cpu": 2**27,
    "cuda": 2**29,
}  # of a chunk's logits, at most: few, large chunks keep the products efficient
CHUNKS = 4  # at least: of what torch holds beside the gradients, more than two tensors of the logits' size, a ninth ...
CHUNK_ROWS = 256  # ... but of at least so many rows each, and two chunks in any case


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


class Kernels(NamedTuple):
    """What a backend brings: functions of rows. None syncs with the device.

    logits are (..., classes), any strides; target is (rows,) int64 class indices, contiguous, or probabilities of the
    shape of the logits, any strides; weight is (classes,) or None. losses (rows,), stats (3, rows) and divisors (2,)
    are fp32, fp64 if the logits are; stats need only be contiguous along the rows. Of each row they are the largest
    logit m (after the soft cap), the log of sum(exp(x - m)), and sum(q): lse in two parts, so that exp(x - m - log)
    stays exact where logits are large. `divisors` None is reduction "sum" or "none".

    Args:
        fwd: (logits, target, weight, options, losses, stats, divisors) fills losses, without their z part, and stats;
            both are 0 where ignored. Given divisors, the gradient of the mean takes the logits' place; these are then
            (rows, classes) and contiguous. IndexError on a CPU for a target out of range.
        sum: (target, weight, options, losses, stats, divisors) -> the loss with its z part, (). Fills divisors: the sum
            of the weights of the targets that are not ignored (for probabilities the number of rows), and the number
            of these targets. Without losses and stats (None) it does that alone. IndexError as `fwd`.
        bwd: (grad_loss, logits, target, weight, options, stats, divisors, grad) fills grad, of the logits' shape and
            dtype and any strides, or the logits themselves. grad_loss is (rows,), or (1,) for all of them.
    """

    fwd: Callable[..., Any]
    sum: Callable[..., Any]
    bwd: Callable[..., Any]


def fwd(
    kernels: Kernels,
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
    """Cross-entropy: -> loss, stats, divisors (empty unless the mean's)."""
    logits, options = classes_last(input), Options(ignore_index, label_smoothing, z_loss, softcap)
    shape, dtype, device = logits.shape[:-1], wide_dtype(input), input.device
    target = _target_rows(target, logits.shape, weight)
    losses = torch.empty(shape, dtype=dtype, device=device)
    stats = torch.empty((3, losses.numel()), dtype=dtype, device=device)
    divisors = torch.empty(2 if reduction == "mean" else 0, dtype=dtype, device=device)
    kernels.fwd(logits, target, weight, options, losses, stats, None)
    if reduction == "none":
        return _with_z(losses, stats, z_loss), stats, divisors
    return kernels.sum(target, weight, options, losses, stats, _given(divisors)), stats, divisors


def bwd(
    kernels: Kernels,
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    divisors: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace_backward: bool,
    needs_grad: Sequence[bool],
    in_place: bool,
) -> Tensor:
    """-> the gradient of input, in its place if that is allowed and asked for."""
    logits, options = classes_last(input), Options(ignore_index, label_smoothing, z_loss, softcap)
    target = _target_rows(target, logits.shape, weight)
    _check_statistics(input, logits.shape[:-1].numel(), grad_loss, stats, divisors, reduction)
    over = in_place and inplace_backward and rows.is_row_contiguous(logits, 1)
    grad = logits.detach() if over else torch.empty(logits.shape, dtype=input.dtype, device=input.device)
    upstream = grad_loss.to(stats.dtype).reshape(-1)
    kernels.bwd(upstream, logits, target, weight, options, stats, _given(divisors), grad)
    return grad if input.dim() < 3 else grad.movedim(-1, 1)


def linear_fwd(
    kernels: Kernels,
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
    recompute: bool,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, stats, divisors, and the gradients of input, linear_weight and linear_bias for an upstream gradient of 1
    (empty where not formed)."""
    x, dtype = _matrix(input), wide_dtype(input)
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    target = _target_rows(
        _matrix(target) if target.is_floating_point() else target, (len(x), len(linear_weight)), weight
    )
    losses, stats = x.new_empty(len(x), dtype=dtype), x.new_empty((3, len(x)), dtype=dtype)
    divisors = x.new_empty(2 if reduction == "mean" else 0, dtype=dtype)
    if reduction == "mean":
        kernels.sum(target, weight, options, None, None, divisors)
    sums, scale = _GradientSums(x, linear_weight, linear_bias, needs_grad, recompute or reduction == "none"), None
    if sums.needed:
        scale = never_zero(divisors) if reduction == "mean" else divisors.new_ones(2)
        scale = scale / scale[0] if input.dtype == torch.float16 else scale
    for chunk, logits in _chunks(x, linear_weight, linear_bias):
        kernels.fwd(logits, target[chunk], weight, options, losses[chunk], stats[:, chunk], scale)
        sums.add(chunk, logits)
        del logits
    if reduction == "none":
        loss = _with_z(losses, stats, z_loss)
    else:
        loss = kernels.sum(target, weight, options, losses, stats, _given(divisors))
    return loss.reshape(() if input.dim() == 1 else loss.shape), stats, divisors, *sums.totals(input.shape)


def linear_bwd(
    kernels: Kernels,
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    divisors: Tensor,
    formed_input: Tensor,
    formed_weight: Tensor,
    formed_bias: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    recompute: bool,
    needs_grad: Sequence[bool],
    in_place: bool,
) -> tuple[Tensor, ...]:
    """-> gradients of input, linear_weight and linear_bias; empty where not needed."""
    likes, formed = (input, linear_weight, linear_bias), (formed_input, formed_weight, formed_bias)
    if reduction != "none" and not recompute:
        divisor: Any = never_zero(divisors)[0] if input.dtype == torch.float16 and reduction == "mean" else 1.0
        grads, factor = formed, grad_loss.to(stats.dtype) / divisor
    else:
        x, options = _matrix(input), Options(ignore_index, label_smoothing, z_loss, softcap)
        target = _target_rows(
            _matrix(target) if target.is_floating_point() else target, (len(x), len(linear_weight)), weight
        )
        _check_statistics(input, len(x), grad_loss, stats, divisors, reduction)
        upstream = grad_loss.to(stats.dtype).reshape(-1)
        sums = _GradientSums(x, linear_weight, linear_bias, needs_grad)
        for chunk, logits in _chunks(x, linear_weight, linear_bias):
            part = upstream[chunk] if reduction == "none" else upstream
            kernels.bwd(part, logits, target[chunk], weight, options, stats[:, chunk], _given(divisors), logits)
            sums.add(chunk, logits)
            del logits
        grads, factor, in_place = sums.totals(input.shape), None, True
    return tuple(
        input.new_empty(0) if like is None or not needed else _scaled(grad, factor, like, in_place)
        for grad, like, needed in zip(grads, likes, needs_grad, strict=True)
    )


def _with_z(losses: Tensor, stats: Tensor, z_loss: float) -> Tensor:
    return losses + z_loss * (stats[0] + stats[1]).square().view(losses.shape) if z_loss else losses


def _scaled(grad: Tensor, factor: Tensor | None, like: Tensor, in_place: bool) -> Tensor:
    """grad * factor in the dtype of `like`; `grad` itself if that may be overwritten."""
    if in_place and grad.dtype == like.dtype:
        # Only a CPU can look at the factor without waiting for it.
        return grad if factor is None or (factor.is_cpu and factor == 1) else grad.mul_(factor)
    return (
        grad.to(like.dtype) if factor is None else torch.mul(grad, factor, out=torch.empty_like(grad, dtype=like.dtype))
    )


class _GradientSums:
    """The gradients of a linear layer, from chunk to chunk of its output's."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs_grad: Sequence[bool],
        none: bool = False,
    ) -> None:
        self.x, self.linear_weight = x, weight
        self.needs_grad = [needed and not none for needed in needs_grad]
        self.needed = any(self.needs_grad)
        self.dtype, self.device_type = wide_dtype(x), x.device.type
        self.input = x.new_empty(x.shape if self.needs_grad[0] else 0)
        self.weight = x.new_empty(0)
        self.product: Tensor | None = None
        self.bias = x.new_zeros(len(weight) if self.needs_grad[2] else 0, dtype=self.dtype)

    def add(self, chunk: slice, grad: Tensor) -> None:
        x = self.x[chunk]
        if self.needs_grad[0] and _by_onednn(grad, self.linear_weight):
            self.input[chunk] = onednn.product(grad, self.linear_weight.T)
        elif self.needs_grad[0]:
            torch.mm(grad, self.linear_weight, out=self.input[chunk])
        if self.needs_grad[1]:
            self._add_weight(grad.T, x, chunk.start == 0)
        if self.needs_grad[2]:
            self.bias.add_(grad.sum(0, dtype=self.dtype))

    def _add_weight(self, grad: Tensor, x: Tensor, first: bool) -> None:
        if x.dtype == self.dtype:
            self.weight = torch.mm(grad, x) if first else self.weight.addmm_(grad, x)
            return
        if self.product is None and not first:
            self.product, self.weight = torch.empty_like(self.weight), self.weight.to(self.dtype)
        if self.device_type == "cuda":
            product = torch.mm(grad, x, out_dtype=self.dtype, out=self.product)
        elif x.dtype == torch.float16:
            product = torch.mm(
                grad.to(self.dtype), x.to(self.dtype), out=self.product
            )  # may pass fp16's largest number
        else:
            product = torch.mm(grad, x, out=self.product)
        if first:
            self.weight = product
        else:
            self.weight.add_(product)

    def totals(self, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        kept = self.dtype if self.x.dtype == torch.float16 else self.x.dtype
        return (
            self.input.view(shape) if self.needs_grad[0] else self.input,
            self._or_zeros().to(kept) if self.needs_grad[1] else self.weight,
            self.bias.to(kept) if self.needs_grad[2] else self.bias,
        )

    def _or_zeros(self) -> Tensor:
        return (
            self.weight if len(self.x) else torch.zeros_like(self.linear_weight, memory_format=torch.contiguous_format)
        )


def _chunks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows with their logits, which live in one workspace, or in one after the other: whoever takes them lets
    go of them before the next."""
    size = max(1, -(-len(x) // _chunk_count(x, len(weight))))
    chunks = [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]
    if _by_onednn(x[:size], weight):  # which writes to nothing that is there
        for chunk in chunks:
            yield chunk, onednn.product(x[chunk], weight, bias)
        return
    workspace = x.new_empty((min(size, len(x)), len(weight)))
    for chunk in chunks:
        logits, part = workspace[: chunk.stop - chunk.start], x[chunk]
        torch.mm(part, weight.T, out=logits) if bias is None else torch.addmm(bias, part, weight.T, out=logits)
        yield chunk, logits


def _by_onednn(rows: Tensor, weight: Tensor) -> bool:
    return rows.is_cpu and weight.is_contiguous() and rows.is_contiguous() and onednn.faster(len(rows), weight)


def _chunk_count(x: Tensor, classes: int) -> int:
    fitting = -(-len(x) * classes * x.element_size() // CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"]))
    if x.is_cpu and x.dtype != wide_dtype(x):
        return max(
            1, fitting
        )  # adding up in fp32 what is multiplied in 16 bits costs a CPU more than the memory is worth
    return max(fitting, min(CHUNKS, max(2, len(x) // CHUNK_ROWS)))


def check_range(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """On a CPU, where looking at values costs no sync; on a GPU the kernels assert."""
    if target.device.type == "cpu" and not target.is_floating_point():
        bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if bad.any():
            need = f"in [0, {classes}) or ignore_index {ignore_index}"
            raise IndexError(f"{op}: target must be {need}, got {target[bad][0].item()}")


def classes_last(x: Tensor) -> Tensor:
    return x if x.dim() < 3 else x.movedim(1, -1)


def never_zero(divisors: Tensor) -> Tensor:
    """For gradients: where all is ignored the mean is 0 / 0, but no row has a gradient."""
    return torch.where(divisors == 0, 1.0, divisors)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Of the arithmetic."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _target_rows(target: Tensor, logits_shape: Sequence[int], weight: Tensor | None) -> Tensor:
    """Class indices (rows,), or probabilities of the shape of the logits, whose classes are last."""
    *outer, classes = logits_shape
    if target.is_floating_point():
        target = classes_last(target) if len(outer) != 1 else target
        _check("target", target, logits_shape)
    else:
        target = target.reshape(-1).long().contiguous()
        _check("target", target, (math.prod(outer),))
    _check("weight", weight, (classes,))
    return target


def _check_statistics(
    input: Tensor, count: int, grad_loss: Tensor, stats: Tensor, divisors: Tensor, reduction: str
) -> None:
    _check("stats", stats, (3, count), wide_dtype(input))
    _check("divisors", divisors, (2 if reduction == "mean" else 0,), wide_dtype(input))
    _check("grad_loss", grad_loss.reshape(-1), (count if reduction == "none" else 1,))


def _check(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Lest a kernel read past a tensor's end, should someone call `torch.ops.fastlm` with what does not fit."""
    if x is not None and (x.shape != tuple(shape) or (dtype is not None and x.dtype != dtype)):
        need = f"shape {tuple(shape)}" + ("" if dtype is None else f" and {dtype}")
        raise ValueError(f"loss kernels: {name} must have {need}, got {tuple(x.shape)} and {x.dtype}")


def _matrix(input: Tensor) -> Tensor:
    return input if input.dim() == 2 else input[None]


def _given(divisors: Tensor) -> Tensor | None:
    return divisors if divisors.numel() else None
