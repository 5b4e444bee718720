"""What the Triton kernels of every op share: where rows begin, how a kernel is launched, what is compiled for it."""

# mypy: allow-incomplete-defs
# In kernels only constants are typed.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_place(row, sizes, strides):
    """Where rows begin, in elements; all in int64, for strides and offsets may pass 2^31."""
    row = tl.cast(row, tl.int64)
    place = row % sizes[3] * strides[3]
    row = row // sizes[3]
    place += row % sizes[2] * strides[2]
    row = row // sizes[2]
    place += row % sizes[1] * strides[1]
    return place + row // sizes[1] * strides[0]


@triton.jit
def exp(x):
    """Without a care for results below 2^-126, which `tl.exp` takes three instructions for."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def tanh(y):
    """To a few ulp everywhere: near 0 the other formula cancels. Source: Moshier's Cephes."""
    z = y * y
    near = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (near * z - 3.33332819422e-1) * z * y + y
    far = 1.0 - 2.0 / (exp(2.0 * tl.abs(y)) + 1.0)
    return tl.where(tl.abs(y) < 0.625, near, tl.where(y < 0.0, -far, far))


@triton.jit
def keep_mask(rng_state, row, start, threshold, SIZE: tl.constexpr):
    """Which elements of a tile dropout keeps, [rows, SIZE]; see philox.py. Four neighbours share one call of Philox.

    row is [rows, 1] int64; start, the first column, is a multiple of 4; threshold is 2^32 p, in int64.
    """
    group = ((start // 4) + tl.arange(0, SIZE // 4)[None, :]).to(tl.uint32)
    offset = tl.load(rng_state + 1).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(rng_state), group, row.to(tl.uint32), (row >> 32).to(tl.uint32), offset)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape([row.shape[0], SIZE])
    return (words >= threshold.to(tl.uint32)) & (threshold.to(tl.int64) < 4294967296)  # 2^32 is p = 1, more than a word


class Launch(NamedTuple):
    """One kernel launch; `args` by the kernel's own names, constants in capitals among them."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    options: dict[str, Any] = {}  # of the compiler  # noqa: RUF012


def run(launches: Iterable[Launch], device: torch.device) -> None:
    with torch.cuda.device(device if device.type == "cuda" else -1):
        for kernel, grid, args, num_warps, options in launches:
            kernel[grid](**args, num_warps=num_warps, **options)


class Compilation(NamedTuple):
    """What Triton compiles for one launch, as its `ASTSource` takes it: constants and hints by path of argument."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]


def compilation(name: str, launch: Launch) -> Compilation:
    """Specialises arguments as Triton does when it launches: 1 is a constant, multiples of 16 are known to be that."""
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(element, (*path, n)) for n, element in enumerate(value))
        if value is None or (type(value) is int and value == 1):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attrs[path] = [["tt.divisibility", 16]]
        return triton.runtime.jit.mangle_type(value)

    signature = {}
    for n, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[n,] = "constexpr", value
        else:
            known = triton.runtime.jit.mangle_type(value) if parameter.do_not_specialize and value is not None else ""
            signature[parameter.name] = parameter.annotation_type or known or kind(value, (n,))
    name = f"{name} {launch.kernel.__name__}"
    return Compilation(
        name, launch.kernel, signature, constexprs, attrs, {"num_warps": launch.num_warps} | launch.options
    )
