"""The linear layer in plain torch, with its backward written out: the fallback and the oracle.

    y  = (x W^T) * scale + b
    dx = (dy * scale) W,   dW = dy^T x,   db = sum(dy)

Arithmetic is in fp32, in fp64 for fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> Tensor:
    """-> output as input."""
    wide = _wide(input)
    y = input.to(wide) @ weight.to(wide).mT
    y = y if weight_scale is None else y * weight_scale
    return (y if bias is None else y + bias).to(input.dtype)


def linear_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of input, weight and bias; empty where not needed."""
    wide, rows, nothing = _wide(input), math.prod(input.shape[:-1]), input.new_empty(0)
    grad = grad_output.to(wide).reshape(rows, len(weight))
    scaled = grad if weight_scale is None else grad * weight_scale
    x = input.to(wide).reshape(rows, weight.shape[1])
    return (
        (scaled @ weight.to(wide)).reshape(input.shape).to(input.dtype) if needs_grad[0] else nothing,
        (grad.mT @ x).to(weight.dtype) if needs_grad[1] else nothing,
        grad.sum(0).to(bias.dtype) if needs_grad[2] and bias is not None else nothing,
    )


def _wide(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32
