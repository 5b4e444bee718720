"""Hostile inputs: the layouts, values and sizes that break kernels, for inputs and for upstream gradients."""

from __future__ import annotations

import torch
from torch import Tensor

# What surrounds the elements of a view: a kernel that reads it shows.
POISON = float("nan")


def _blank(x: Tensor, *shape: int) -> Tensor:
    return x.new_full(shape, POISON) if x.is_floating_point() else x.new_full(shape, 0)


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions swapped in memory."""
    return x.mT.contiguous().mT if x.dim() > 1 else x


def outer_swapped(x: Tensor) -> Tensor:
    """(B, H, T, D) that lies as (B, T, H, D): what a view of one projection gives; else the first two swapped."""
    a, b = (1, 2) if x.dim() > 3 else (0, 1)
    return x.transpose(a, b).contiguous().transpose(a, b) if x.dim() > 1 else x


def misaligned(x: Tensor) -> Tensor:
    """Rows of a wider tensor, from its second element on: nothing is aligned, rows are not adjacent."""
    if x.dim() == 0:
        return _blank(x, 3)[1].copy_(x)
    wide = _blank(x, *x.shape[:-1], x.shape[-1] + 3)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def shifted(x: Tensor) -> Tensor:
    """Contiguous, but one element into its storage."""
    storage = _blank(x, x.numel() + 1)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def strided(x: Tensor) -> Tensor:
    """Every other element of the last dimension."""
    if x.dim() == 0:
        return shifted(x)
    wide = _blank(x, *x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


def sliced_rows(x: Tensor) -> Tensor:
    """Every other row."""
    if x.dim() < 2:
        return strided(x)
    wide = _blank(x, *x.shape[:-2], 2 * x.shape[-2], x.shape[-1])
    wide[..., 1::2, :] = x
    return wide[..., 1::2, :]


def expanded(x: Tensor) -> Tensor:
    """The first element of the first dimension again and again, stride 0. Changes the values."""
    return x[:1].expand_as(x) if x.dim() else x


def expanded_last(x: Tensor) -> Tensor:
    """The first element of the last dimension again and again, stride 0. Changes the values."""
    return x[..., :1].expand_as(x) if x.dim() else x


def from_sum(x: Tensor) -> Tensor:
    """One element for all, every stride 0: the upstream gradient that `.sum()` sends. Changes the values."""
    return x.new_full((), 1.0).expand(x.shape)


def contiguous(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


KEEP_VALUES = (contiguous, transposed, outer_swapped, misaligned, shifted, strided, sliced_rows)
CHANGE_VALUES = (expanded, expanded_last, from_sum)
LAYOUTS = {layout.__name__: layout for layout in (*KEEP_VALUES, *CHANGE_VALUES)}


def far_apart(x: Tensor, *, dim: int = 0) -> Tensor:
    """The values of x with a stride along `dim` that takes element offsets past 2^31.

    The storage is reserved, not touched, so this costs a few pages of memory whatever its size.
    """
    other = x.numel() // x.shape[dim]
    stride = (2**31 + 2**10) // (x.shape[dim] - 1)
    storage = torch.empty(stride * (x.shape[dim] - 1) + other, dtype=x.dtype, device=x.device)
    moved = x.movedim(dim, 0)
    strides = (stride, *torch.empty(moved.shape[1:], device="meta").stride())
    view = storage.as_strided(moved.shape, strides)
    view.copy_(moved)
    return view.movedim(0, dim)


def salted(x: Tensor, *values: float) -> Tensor:
    """x with these values strewn in, in the second half of the rows, so that the others must stay clean."""
    x = x.clone()
    flat = x.view(-1)
    half = flat.numel() // 2
    for n, value in enumerate(values):
        flat[half + (n * 7919) % (flat.numel() - half)] = value
    return x
