"""Layer norm and RMS norm in plain torch, with their backward written out: the fallback and the oracle.

All functions see the input as rows x columns, the columns being the last `len(normalized_shape)` dimensions. With
`rms` the mean is taken as 0. Arithmetic is in fp32, in fp64 for fp64.

    x_hat = (x - mean) * rstd,   rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    y     = x_hat * weight + bias
    dx    = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),   g = dy * weight

Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450); Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.ops.philox import dropout_scale, keep_mask

Shape = Sequence[int]


def layer_norm_fwd(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """-> output as input, stats (2, rows): mean, rstd."""
    x = _rows(input, normalized_shape)
    mean, rstd = _statistics(x, eps, rms=False)
    y = _affine((x - mean[:, None]) * rstd[:, None], weight, bias)
    return y.reshape(input.shape).to(input.dtype), torch.stack([mean, rstd])


def rms_norm_fwd(input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """-> output as input, stats (1, rows): rstd."""
    x = _rows(input, normalized_shape)
    _, rstd = _statistics(x, eps, rms=True)
    y = _affine(x * rstd[:, None], weight, None)
    return y.reshape(input.shape).to(input.dtype), rstd[None].clone()


def layer_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    normalized_shape: Shape,
    eps: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of input, weight and bias; empty where not needed."""
    x = _rows(input, normalized_shape)
    mean, rstd = _statistics(x, eps, rms=False) if stats is None else stats
    grad, x_hat = _rows(grad_output, normalized_shape), (x - mean[:, None]) * rstd[:, None]
    g = _affine(grad, weight, None)
    dx = rstd[:, None] * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return (
        dx.reshape(input.shape).to(input.dtype) if needs_grad[0] else input.new_empty(0),
        _parameter_gradient(grad * x_hat, weight, needs_grad[1]),
        _parameter_gradient(grad, bias, needs_grad[2]),
    )


def rms_norm_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    normalized_shape: Shape,
    eps: float,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """-> gradients of input and weight; empty where not needed."""
    x = _rows(input, normalized_shape)
    rstd = _statistics(x, eps, rms=True)[1] if stats is None else stats[0]
    grad, x_hat = _rows(grad_output, normalized_shape), x * rstd[:, None]
    g = _affine(grad, weight, None)
    dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return (
        dx.reshape(input.shape).to(input.dtype) if needs_grad[0] else input.new_empty(0),
        _parameter_gradient(grad * x_hat, weight, needs_grad[1]),
    )


def add_layer_norm_fwd(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output in input's dtype, new_residual in residual's, stats (2, rows) of new_residual."""
    new_residual = _add(input, residual, normalized_shape, dropout_p, rng_state)
    output, stats = layer_norm_fwd(_wide(new_residual), normalized_shape, weight, bias, eps)
    return output.to(input.dtype), new_residual, stats


def add_rms_norm_fwd(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> output in input's dtype, new_residual in residual's, stats (1, rows) of new_residual."""
    new_residual = _add(input, residual, normalized_shape, dropout_p, rng_state)
    output, stats = rms_norm_fwd(_wide(new_residual), normalized_shape, weight, eps)
    return output.to(input.dtype), new_residual, stats


def add_layer_norm_bwd(
    grad_output: Tensor | None,
    grad_new_residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rng_state: Tensor | None,
    new_residual: Tensor,
    stats: Tensor | None,
    normalized_shape: Shape,
    eps: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of input, residual, weight and bias; empty where not needed."""
    grad_output = torch.zeros_like(new_residual) if grad_output is None else grad_output
    needs_norm = (needs_grad[0] or needs_grad[1], *needs_grad[2:])
    through_norm, grad_weight, grad_bias = layer_norm_bwd(
        grad_output, _wide(new_residual), weight, bias, stats, normalized_shape, eps, needs_norm
    )
    grads = _add_bwd(
        through_norm, grad_new_residual, new_residual, normalized_shape, dropout_p, rng_state, input_dtype, needs_grad
    )
    return *grads, grad_weight, grad_bias


def add_rms_norm_bwd(
    grad_output: Tensor | None,
    grad_new_residual: Tensor | None,
    weight: Tensor | None,
    rng_state: Tensor | None,
    new_residual: Tensor,
    stats: Tensor | None,
    normalized_shape: Shape,
    eps: float,
    dropout_p: float,
    input_dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of input, residual and weight; empty where not needed."""
    grad_output = torch.zeros_like(new_residual) if grad_output is None else grad_output
    needs_norm = (needs_grad[0] or needs_grad[1], needs_grad[2])
    through_norm, grad_weight = rms_norm_bwd(
        grad_output, _wide(new_residual), weight, stats, normalized_shape, eps, needs_norm
    )
    grads = _add_bwd(
        through_norm, grad_new_residual, new_residual, normalized_shape, dropout_p, rng_state, input_dtype, needs_grad
    )
    return *grads, grad_weight


def _wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(x: Tensor, normalized_shape: Shape) -> Tensor:
    """x as (rows, columns) in the dtype of the arithmetic."""
    rows = math.prod(x.shape[: x.dim() - len(normalized_shape)])
    return _wide(x).reshape(rows, math.prod(normalized_shape))


def _statistics(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """mean, rstd (rows,); for RMS norm the mean is taken as 0."""
    mean = x.new_zeros(len(x)) if rms else x.mean(-1)
    return mean, ((x - mean[:, None]).square().mean(-1) + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.reshape(-1)
    return x if bias is None else x + bias.reshape(-1)


def _parameter_gradient(per_row: Tensor, parameter: Tensor | None, needed: bool) -> Tensor:
    if parameter is None or not needed:
        return per_row.new_empty(0)
    return per_row.sum(0).reshape(parameter.shape).to(parameter.dtype)


def _dropout(x: Tensor, normalized_shape: Shape, p: float, rng_state: Tensor | None) -> Tensor:
    """x with dropped elements at 0 and the others scaled by 1 / (1 - p); its own transpose, so backward too."""
    if rng_state is None:
        return x
    rows, columns = math.prod(x.shape[: x.dim() - len(normalized_shape)]), math.prod(normalized_shape)
    keep = keep_mask(rng_state, torch.arange(rows, device=x.device), columns, p).reshape(x.shape)
    return torch.where(keep, x * dropout_scale(p), 0.0)


def _add(input: Tensor, residual: Tensor, normalized_shape: Shape, p: float, rng_state: Tensor | None) -> Tensor:
    total = _wide(residual) + _dropout(_wide(input), normalized_shape, p, rng_state)
    return total.to(residual.dtype)


def _add_bwd(
    through_norm: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_shape: Shape,
    dropout_p: float,
    rng_state: Tensor | None,
    input_dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """-> gradients of input and residual, from the one that came through the norm and the one of new_residual."""
    empty = new_residual.new_empty(0)
    if not (needs_grad[0] or needs_grad[1]):
        return empty, empty.clone()
    grad = through_norm if grad_new_residual is None else through_norm + _wide(grad_new_residual)
    grad_input = _dropout(grad, normalized_shape, dropout_p, rng_state)
    return (
        grad_input.to(input_dtype, copy=grad_input is grad) if needs_grad[0] else empty,
        grad.to(new_residual.dtype) if needs_grad[1] else empty.clone(),
    )
