"""The memory of the process that trains."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["kept_memory", "peak_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
# glibc raises its thresholds to these by itself as large memory is freed, but no longer once they have been set.
_DEFAULTS = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 65536}
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """What is freed within stays with the process, for the next step: on a CPU with glibc.

    glibc gives every large tensor back to the system when it is freed, and the system clears every page of the next
    one: of a step of a GPT on a CPU about a fifth.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    try:
        for option, value in _KEEP.items():
            libc.mallopt(option, value)  # type: ignore[union-attr]
        yield
    finally:
        for option, value in _DEFAULTS.items():
            libc.mallopt(option, value)  # type: ignore[union-attr]
        libc.malloc_trim(0)  # type: ignore[union-attr]


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors had of a GPU's memory, or the process of the machine's, at most; 0 where that is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
