"""Token ids on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Tokens"]


class Tokens:
    """One sequence of token ids, (N,), over shards that are usually memory-mapped.

    `tokens[i]` is a numpy scalar, `tokens[slice]` and `tokens[array of integers of any shape]` are arrays, of the same
    shape as the indices; a slice that lies in one shard is a view of it. `numpy.asarray(tokens)` reads everything.

    Args:
        shards: (n,) each, of one dtype.

    Raises ValueError without shards or when they are not (n,) each and of one dtype, IndexError for an index out of
    range or not of integers.
    """

    def __init__(self, shards: Sequence[npt.NDArray[Any]]) -> None:
        if not shards or any(shard.ndim != 1 or shard.dtype != shards[0].dtype for shard in shards):
            raise ValueError("data: shards must be at least one, each (n,) and all of one dtype")
        self.shards = [np.asarray(shard) for shard in shards]  # a plain view of a memmap is faster to index
        self.dtype = self.shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._starts = self._ends - [len(shard) for shard in self.shards]

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if len(self.shards) == 1:
            return np.array(self.shards[0], dtype, copy=copy)
        if copy is False:
            raise ValueError("data: tokens of several shards cannot become an array without a copy")
        return np.concatenate(self.shards).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        if len(self.shards) == 1 and isinstance(index, slice):
            return self.shards[0][index]
        if isinstance(index, slice):
            return self._slice(range(*index.indices(len(self))))
        index = np.asarray(index)
        if index.size == 0:
            return np.empty(index.shape, self.dtype)
        if not np.issubdtype(index.dtype, np.integer):
            raise IndexError(f"data: indices of tokens must be integers or slices, got {index.dtype}")
        if len(self.shards) == 1:
            return self.shards[0][index]
        return self._take(index)

    def _slice(self, where: range) -> npt.NDArray[Any]:
        if where.step < 0:
            return self._slice(where[::-1])[::-1]
        parts = []
        for shard, start, end in zip(self.shards, self._starts.tolist(), self._ends.tolist(), strict=True):
            first = max(where.start, start + (where.start - start) % where.step)
            if first < min(end, where.stop):
                parts.append(shard[first - start : where.stop - start : where.step])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self.shards[0][:0]])

    def _take(self, index: npt.NDArray[Any]) -> Any:
        position = index.astype(np.int64)
        if position.min() < -len(self) or position.max() >= len(self):
            raise IndexError(f"data: an index is out of range for {len(self):,} tokens")
        position = np.where(position < 0, position + len(self), position)
        shard_of = np.searchsorted(self._ends, position, side="right")
        taken = np.empty(position.shape, self.dtype)
        for i in np.unique(shard_of).tolist():
            here = shard_of == i
            taken[here] = self.shards[i][position[here] - self._starts[i]]
        return taken[()]  # a scalar for a scalar
