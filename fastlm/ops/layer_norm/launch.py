"""The norms through compiled launchers (csrc/layer_norm/): allocates, and passes pointers, strides and sizes.

One function each way serves all four ops, which differ in what they leave out: the contract of op.py's `register`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.ops import rows
from fastlm.ops.compiled import Launchers

Shape = Sequence[int]
Fwd = tuple[Tensor, Tensor, Tensor]
Bwd = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def fwd(
    launchers: Launchers,
    rms: bool,
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Fwd:
    """-> output, new_residual (output without residual), stats."""
    columns = math.prod(normalized_shape)
    _check("residual", residual, input.shape)
    _check_parameters(input, normalized_shape, weight, bias)
    (input, residual), sizes, strides = _as_rows((input, residual), normalized_shape, columns)
    weight, bias = _contiguous(weight), _contiguous(bias)
    dtype = input.dtype
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    new_residual = output
    if residual is not None:
        new_residual = torch.empty_like(residual, memory_format=torch.contiguous_format)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    stats = torch.empty((2 - rms, input.numel() // columns), dtype=wide, device=input.device)
    codes = launchers.codes
    launchers.layer_norm_fwd(
        input.data_ptr(),
        _pointer(residual),
        _pointer(weight),
        _pointer(bias),
        _pointer(rng_state),
        output.data_ptr(),
        0 if residual is None else new_residual.data_ptr(),
        stats.data_ptr(),
        sizes,
        *strides,
        columns,
        eps,
        dropout_p,
        rms,
        codes[dtype],
        codes[new_residual.dtype],
        codes[_parameter_dtype(weight, bias)],
        *launchers.extra(input),
    )
    return output, new_residual, stats


def bwd(
    launchers: Launchers,
    partial_rows: Callable[[int], int],
    rms: bool,
    grad_output: Tensor | None,
    grad_new_residual: Tensor | None,
    normalized: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    normalized_shape: Shape,
    dropout_p: float,
    rng_state: Tensor | None,
    input_dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> Bwd:
    """-> gradients of input, residual, weight and bias; None where not needed."""
    columns = math.prod(normalized_shape)
    _check("grad_output", grad_output, normalized.shape, input_dtype)
    _check("grad_new_residual", grad_new_residual, normalized.shape, normalized.dtype)
    wide = torch.float64 if input_dtype == torch.float64 else torch.float32
    _check("stats", stats, (2 - rms, normalized.numel() // columns), wide)
    _check_parameters(normalized, normalized_shape, weight, bias)
    (grad_output, grad_new_residual, normalized), sizes, strides = _as_rows(
        (grad_output, grad_new_residual, normalized), normalized_shape, columns
    )
    weight = _contiguous(weight)
    count = normalized.numel() // columns
    grad_input = _gradient(normalized, input_dtype, needs_grad[0])
    grad_residual = _gradient(normalized, normalized.dtype, needs_grad[1])
    grad_weight, grad_bias = _gradient(weight, None, needs_grad[2]), _gradient(bias, None, needs_grad[3])
    partials = partial_rows(count)
    space = torch.empty(2 * partials * columns, dtype=stats.dtype, device=stats.device)
    codes = launchers.codes
    launchers.layer_norm_bwd(
        _pointer(grad_output),
        _pointer(grad_new_residual),
        normalized.data_ptr(),
        _pointer(weight),
        stats.data_ptr(),
        _pointer(rng_state),
        _pointer(grad_input),
        _pointer(grad_residual),
        _pointer(grad_weight),
        _pointer(grad_bias),
        space.data_ptr(),
        sizes,
        *strides,
        columns,
        dropout_p,
        rms,
        codes[input_dtype],
        codes[normalized.dtype],
        codes[_parameter_dtype(weight, bias)],
        partials,
        *launchers.extra(normalized),
    )
    return grad_input, grad_residual, grad_weight, grad_bias


def _gradient(like: Tensor | None, dtype: torch.dtype | None, wanted: bool) -> Tensor | None:
    return (
        torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        if wanted and like is not None
        else None
    )


def _check(name: str, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Lest a kernel read past a tensor's end, should someone call `torch.ops.fastlm` with what does not fit."""
    if x is not None and (x.shape != shape or (dtype is not None and x.dtype != dtype)):
        need = f"shape {tuple(shape)}" if dtype is None else f"shape {tuple(shape)} and {dtype}"
        raise ValueError(f"norm kernels: {name} must have {need}, got {tuple(x.shape)} and {x.dtype}")


def _check_parameters(x: Tensor, normalized_shape: Shape, weight: Tensor | None, bias: Tensor | None) -> None:
    shape = tuple(normalized_shape)
    if x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(f"norm kernels: normalized_shape {shape} must be the last dimensions of {tuple(x.shape)}")
    _check("weight", weight, shape)
    _check("bias", bias, shape, None if weight is None else weight.dtype)


def _as_rows(tensors: Sequence[Tensor | None], normalized_shape: Shape, columns: int) -> tuple[Any, Any, Any]:
    """`rows.as_rows`, and the short form of its answer where all tensors are contiguous: rows, columns."""
    for x in tensors:
        if x is not None:
            if not x.is_contiguous():
                return rows.as_rows(tensors, len(normalized_shape))
            count = x.numel() // columns
    return tensors, count, (columns,) * len(tensors)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _parameter_dtype(weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    parameter = bias if weight is None else weight
    return torch.float32 if parameter is None else parameter.dtype
