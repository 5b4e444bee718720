"""The emulator's build "ptx": launchers compiled by g++ as in the plain build, kernels by nvcc, their PTX executed."""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

from proof import ptx

_EXECUTOR = ctypes.CFUNCTYPE(
    ctypes.c_void_p,  # null, or what is wrong
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


class PtxBuild:
    """Runs what the launchers of `module` launch; has the memory that kernels may access, and counts instructions.

    Args:
        module: the emulator's plain build.
        sources: where the kernels are.
    """

    def __init__(self, module: ModuleType, sources: list[Path]) -> None:
        self.module, self.sources = module, sources
        self.memory, self.eager, self.reverse = ptx.Memory(), False, False
        self.counts: dict[str, list[ptx.Counts]] = defaultdict(list)  # by kernel
        self._error: Any = None
        self._function = _EXECUTOR(self._run)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value

    def forget_regions(self) -> None:
        self.memory = ptx.Memory()

    def add_region(self, address: int, nbytes: int, writable: bool, initialised: bool) -> None:
        self.memory.add(address, nbytes, writable)

    def regions(self) -> list[Any]:
        return []

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Kernels as nm writes them, by their place in the module."""
        done = subprocess.run(["nm", "-C", self.module.__file__], text=True, capture_output=True, check=True)
        lines = (line.split(" ", 2) for line in done.stdout.splitlines())
        return {int(parts[0], 16): parts[2] for parts in lines if parts[0] and parts[1] in "tTwW"}

    @functools.cached_property
    def places(self) -> dict[str, tuple[ptx.Module, str]]:
        """Kernels in the PTX of their source, by their normal names."""
        modules = map(ptx.compile_cuda, self.sources)
        return {name: (module, mangled) for module in modules for name, mangled in module.demangled.items()}

    def _run(self, kernel: int, grid: Any, block: Any, shared: int, params: int, nbytes: int) -> int | None:
        try:
            module, entry = self.places[ptx.normal_name(self.names[kernel - self.module.base()])]
            counts = ptx.run(
                module, entry, list(grid.contents), list(block.contents), ctypes.string_at(params, nbytes), self.memory,
                shared, reverse=self.reverse, eager=self.eager,
            )  # fmt: skip
            self.counts[self.module.kernel_name(kernel)].append(counts)
            return None
        except BaseException as error:  # none can cross the launcher
            text = str(error) if isinstance(error, ptx.PtxError) else f"{type(error).__name__}: {error}"
            self._error = ctypes.create_string_buffer(text.encode())
            return ctypes.addressof(self._error)
