"""Triton's kernels, executed as the PTX that its compiler gives for sm_80, on CPU tensors: backend "triton_ptx".

    TRITON_INTERPRET unset, before triton is imported
    import proof.triton_ptx                        # registers the backend; Triton believes that it has a GPU
    with fastlm.use_backend("triton_ptx"):
        F.layer_norm(x, (768,))

Arguments are specialised and compiled by Triton itself: only its driver is replaced. What a kernel may access is the
extents of the tensors that it is given.
"""

from __future__ import annotations

import functools
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from proof import ptx

os.environ.setdefault("TRITON_CACHE_DIR", str(ptx.CACHE / "triton"))

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from fastlm.ops.attention import op as attention
from fastlm.ops.attention import triton as attention_kernels
from fastlm.ops.cross_entropy import op as cross_entropy
from fastlm.ops.cross_entropy import triton as cross_entropy_kernels
from fastlm.ops.layer_norm import op
from fastlm.ops.layer_norm import triton as layer_norm
from fastlm.ops.registry import FLOATS

OPTIONS: dict[str, Any] = {"together": 32}  # of `ptx.run`
COUNTS: Counter[str] = Counter()  # instructions of all warps so far
FORMATS = {"fp32": "f", "fp64": "d", "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"}


def _extent(x: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size() if x.numel() else 0


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of the arguments that a kernel takes when it runs."""
    if isinstance(kind, tuple):
        for pair in zip(kind, value, strict=True):
            yield from _flat(*pair)
    elif kind != "constexpr":
        yield kind, value


@functools.cache
def _parsed(hash_: str, name: str) -> ptx.Module:
    return ptx.parse(Path(get_cache_manager(hash_).get_file(f"{name}.ptx")).read_text())


class Launcher:
    """What Triton calls to start a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = source.signature, metadata

    def __call__(self, x: int, y: int, z: int, stream, function, packed, launch, enter, leave, *values: Any) -> None:
        module = _parsed(self.metadata.hash, self.metadata.name)
        entry, memory, data = module.entries[self.metadata.name], ptx.Memory(), b""
        arguments = _flat(tuple(self.signature.values()), values)
        for _, offset, size in entry.parameters:
            kind, value = next(arguments, ("*", 0))  # scratch memory comes last, of which none is needed
            if isinstance(value, torch.Tensor):
                memory.add(value.data_ptr(), _extent(value))
                value = value.data_ptr()
            encoded = struct.pack("<Q" if kind[0] == "*" else f"<{FORMATS[kind]}", value)
            assert len(encoded) == size, f"{entry.name}: {kind} of {size} bytes"
            data += bytes(offset - len(data)) + encoded
        assert next(arguments, None) is None, f"{entry.name}: the kernel takes fewer arguments"
        block = (32 * self.metadata.num_warps,)
        COUNTS.update(
            ptx.run(module, entry.name, (x, y, z), block, data, memory, self.metadata.shared, **OPTIONS).warps
        )


class Driver:
    """As much of a driver as launching takes."""

    launcher_cls = Launcher

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 163 << 10}

        @staticmethod
        def load_binary(*_: Any) -> tuple[None, None, int, int, int]:
            return None, None, 0, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


triton.runtime.driver.set_active(Driver())
op.register(
    "triton_ptx",
    layer_norm.fwd,
    layer_norm.bwd,
    devices={"cpu"},
    dtypes=FLOATS - {torch.float64},
    reasons=op._triton_reasons,
    available=lambda: "",
)
cross_entropy.register(
    "triton_ptx",
    lambda: cross_entropy_kernels.KERNELS,
    devices={"cpu"},
    dtypes=FLOATS - {torch.float64},
    reasons=cross_entropy._gpu_reasons,
    available=lambda: "",
)
attention.register(
    "triton_ptx",
    lambda: attention_kernels.KERNELS,
    devices={"cpu"},
    dtypes=FLOATS - {torch.float64},
    available=lambda: "",
)
