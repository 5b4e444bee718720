"""Triton's interpreter, put right: what differs from a GPU, and what takes most of its time for nothing."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def correct() -> None:
    """Rounds fp32 to bf16 to nearest, ties to even, where the interpreter would cut off the lower bits; multiplies
    matrices of bf16 as numbers, not as the integers of their bits; and prepares triton.language once for each kernel,
    not again for each function that a kernel calls, which is more than half of its time.

    Not when it is imported: importing fastlm imports no triton, nor do the tests before a kernel runs.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot, prepare, prepared = builder.cast_impl, builder.create_dot, interpreter._patch_lang, set()

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.bfloat16:
            return cast(self, source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def prepare_once(function: Any) -> Any:
        languages = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if tl.core.is_builtin(tl.load):  # no kernel is running
            prepared.clear()
        elif languages in prepared:
            return None
        prepared.add(languages)
        return prepare(function)

    builder.cast_impl, builder.create_dot, interpreter._patch_lang = cast_impl, create_dot, prepare_once
