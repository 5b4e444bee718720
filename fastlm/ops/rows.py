"""How a kernel sees tensors as rows: whatever the rank and the strides, without a copy where it can.

A row is the last `dims` dimensions of a tensor, which must lie in memory as one contiguous run; where they do not, one
copy makes them so. The other dimensions may have any strides (0 where expanded). They are folded together as far as all
the tensors of a call allow, to at most MAX_DIMS; then row r begins at

    (r // (s1 * s2 * s3)) * stride0 + (r // (s2 * s3) % s1) * stride1 + (r // s3 % s2) * stride2 + (r % s3) * stride3

and in the usual case, where they fold into one, at r * stride0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_DIMS = 4
Four = tuple[int, int, int, int]


def is_row_contiguous(x: Tensor, dims: int) -> bool:
    """Whether the last `dims` dimensions of x are one contiguous run."""
    run = 1
    for size, stride in zip(reversed(x.shape[-dims:]), reversed(x.stride()), strict=False):
        if size != 1 and stride != run:
            return False
        run *= size
    return True


def as_rows(tensors: Sequence[Tensor | None], dims: int) -> tuple[list[Tensor | None], Four, list[Four]]:
    """Tensors of one shape as rows that a kernel can read.

    Args:
        tensors: of one shape; None stays None.
        dims: how many of the last dimensions make a row.

    Returns:
        The tensors, copied where `is_row_contiguous` does not hold; the sizes of the folded dimensions, outermost first
        and then 1s; for each tensor their strides in elements, 0 where the size is 1.
    """
    ready = [x if x is None or is_row_contiguous(x, dims) else x.contiguous() for x in tensors]
    folded = _folded([x for x in ready if x is not None], dims)
    if len(folded) > MAX_DIMS:
        ready = [None if x is None else x.contiguous() for x in ready]
        folded = _folded([x for x in ready if x is not None], dims)
    folded += [(1, [0] * len(ready))] * (MAX_DIMS - len(folded))
    sizes = tuple(size for size, _ in folded)
    places = iter(zip(*(strides for _, strides in folded), strict=False))
    return ready, sizes, [(0, 0, 0, 0) if x is None else next(places) for x in ready]  # type: ignore[return-value]


def _folded(tensors: Sequence[Tensor], dims: int) -> list[tuple[int, list[int]]]:
    """(size, the stride of each tensor) of the outer dimensions, outermost first, folded together where possible."""
    outer = tensors[0].shape[: tensors[0].dim() - dims]
    folded: list[tuple[int, list[int]]] = []
    for n, size in enumerate(outer):
        strides = [x.stride(n) for x in tensors]
        if size == 1:
            continue
        if folded and folded[-1][1] == [size * stride for stride in strides]:
            folded[-1] = (folded[-1][0] * size, strides)
        else:
            folded.append((size, strides))
    return folded or [(1, [0] * len(tensors))]


def copies(dims: int, **tensors: Tensor | None) -> list[str]:
    """What `as_rows` would copy, for `explain`."""
    given = {name: x for name, x in tensors.items() if x is not None}
    needed = [name for name, x in given.items() if not is_row_contiguous(x, dims)]
    rows = [x if name not in needed else torch.empty(x.shape, device="meta") for name, x in given.items()]
    if len(_folded(rows, dims)) > MAX_DIMS:
        needed = [name for name, x in given.items() if not x.is_contiguous()]
    return [f"{name}, of strides {given[name].stride()}" for name in needed]
