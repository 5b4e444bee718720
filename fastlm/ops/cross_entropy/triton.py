"""Softmax cross-entropy over rows of logits: forward, backward and the sum over rows, in Triton; see kernels.py.

Forward reads a row once, block by block: the maximum m so far and sum(exp(x - m)) are scalars, and the sum is scaled
down where m rises. sum(q * (x - m)), which label smoothing and probabilities need, moves along with m in the same way,
so that what all logits have in common cancels before anything is rounded: loss = log(sum(exp(x - m))) * sum(q) -
sum(q * (x - m)). m starts at the lowest number, not at -inf: -inf - -inf is NaN. Asked for gradients too, forward reads
the row again, for the most part from cache, and writes them in its place. Backward's columns are independent.

Work: a program of forward takes a row, one of backward a block of a row; the sum over rows is one program with a fixed
order: no atomics, the same bits every time. A block is a power of two, at most 4096; a thread has 16 of it, 4 in the
sum. Loads of 16 bytes need V, and strides, to be multiples of 16: Triton knows of no other alignment.

Bytes per row of V logits of b bytes each, c for probabilities: forward (b + c)V, with gradients (3b + 2c)V, of which
(b + c)V may come from cache; backward (2b + c)V; 12 to 32 for the statistics, the loss and an index. Class weights come
from cache. A row that is ignored is not read.

Source: Milakov and Gimelshein 2018 (arXiv 1805.02867) for the running maximum.
"""

# mypy: allow-incomplete-defs, disable-error-code=assignment
# In kernels only constants are typed.

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.cross_entropy.kernels import Kernels, Options, check_range
from fastlm.ops.rows import as_rows
from fastlm.ops.triton_launch import Compilation, Launch, compilation, exp, row_place, run, tanh

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32
CHECKED = {"debug": True, "sanitize_overflow": False}  # the assertion is always compiled, and no checks of integers are


# Parts of kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _logits(place, mask, softcap):
    """x, -inf where there is none, and what the soft cap's derivative is formed from."""
    x = tl.load(place, mask=mask, other=float("-inf")).to(tl.float32)
    if softcap is None:
        return x, x
    else:
        ratio = tanh(x / softcap)
        return tl.where(mask, softcap * ratio, float("-inf")), ratio


@triton.jit
def _spread(probabilities, weight, keep, share, column, mask):
    """q of a block of classes, but for the peak that it has at an index; 0 where there is no class."""
    q = tl.where(mask, 0.0 if share is None else share, 0.0)
    if probabilities is not None:
        q += keep * tl.load(probabilities + column, mask=mask, other=0.0).to(tl.float32)
    if weight is not None:
        q *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    return q


@triton.jit
def _peak(weight, keep, target, inside):
    """What q has at the index beyond what is spread."""
    if weight is None:
        return keep
    else:
        return keep * tl.load(weight + target, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _factors(upstream, divisors, top, log, mass, z_loss):
    """Of exp(x - top) and of q in the gradient. A divisor of 0 is that of no rows, and counts as 1."""
    scale = upstream
    z_scale = upstream
    if divisors is not None:
        divisor, z_divisor = tl.load(divisors), tl.load(divisors + 1)
        scale = upstream / tl.where(divisor == 0.0, 1.0, divisor)
        z_scale = upstream / tl.where(z_divisor == 0.0, 1.0, z_divisor)
    of_p = mass * scale
    if z_loss is not None:
        of_p += 2.0 * z_loss * (top + log) * z_scale
    return of_p * exp(-log), scale


@triton.jit
def _store_gradient(
    grad, logits, probabilities, weight, target, peak, column, mask, keep, share, softcap, top, of_exp, of_q
):  # fmt: skip
    """Writes exp(x - top) * of_exp - q * of_q, through the soft cap."""
    x, ratio = _logits(logits + column, mask, softcap)
    value = exp(x - top) * of_exp
    if probabilities is not None or share is not None:
        value -= _spread(probabilities, weight, keep, share, column, mask) * of_q
    if probabilities is None:
        value = tl.where(column == tl.cast(target, tl.int32), value - peak * of_q, value)
    if softcap is not None:
        value *= 1.0 - ratio * ratio
    tl.store(grad + column, value, mask=mask)


# Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ignore_index"])
def _fwd_kernel(
    logits,  # T [rows, V], any strides between rows; given divisors, the gradient takes their place
    index,  # int64 [rows], or None with probabilities
    probabilities,  # P [rows, V], any strides between rows, or None
    weight,  # [V] or None
    losses,  # fp32 [rows]
    stats,  # fp32 [3, rows] m, log(sum(exp(x - m))), sum(q)
    divisors,  # fp32 [2] or None
    sizes,
    logits_strides,
    probabilities_strides,
    index_stride,
    stats_stride,
    V,
    ignore_index: tl.int64,
    keep,  # 1 - label smoothing
    share,  # of a class in what label smoothing spreads, or None
    z_loss,  # or None
    softcap,  # or None
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row_place(row, sizes, logits_strides)
    target = 0
    peak = 0.0
    peak_x = 0.0
    if probabilities is not None:
        probabilities += row_place(row, sizes, probabilities_strides)
    else:
        target = tl.load(index + row * index_stride)
        if target == ignore_index:
            tl.store(losses + row, 0.0)
            for n in tl.static_range(3):
                tl.store(stats + n * stats_stride + row, 0.0)
            if divisors is not None:
                for start in range(0, V, SIZE):
                    column = start + tl.arange(0, SIZE)
                    tl.store(logits + column, tl.zeros([SIZE], tl.float32), mask=column < V)
            return
        inside = (target >= 0) & (target < V)
        tl.device_assert(inside, "cross_entropy: target must be in [0, classes) or ignore_index")
        # Read before the sums, in which warps meet: afterwards another one may have written its gradient there.
        peak_x = _logits(logits + target, inside, softcap)[0]
        peak = _peak(weight, keep, target, inside)

    top = LOWEST
    total = 0.0  # sum(exp(x - top))
    mass = 0.0  # sum(q)
    dot = 0.0  # sum(q * (x - top))
    for start in range(0, V, SIZE):
        column = start + tl.arange(0, SIZE)
        mask = column < V
        x = _logits(logits + column, mask, softcap)[0]
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * exp(top - new_top) + tl.sum(exp(x - new_top), 0)
        if probabilities is not None or share is not None:
            q = _spread(probabilities, weight, keep, share, column, mask)
            dot += mass * tl.where(start > 0, top - new_top, 0.0) + tl.sum(tl.where(mask, q * (x - new_top), 0.0), 0)
            mass += tl.sum(q, 0)
        top = new_top
    if probabilities is None:
        mass += peak
        dot += peak * (peak_x - top)

    log = tl.log(total)
    loss = log * mass - dot
    tl.store(losses + row, loss)
    tl.store(stats + row, top)
    tl.store(stats + stats_stride + row, log)
    tl.store(stats + 2 * stats_stride + row, mass)
    if divisors is not None:
        of_exp, of_q = _factors(1.0, divisors, top, log, mass, z_loss)
        for start in range(0, V, SIZE):
            column = start + tl.arange(0, SIZE)
            _store_gradient(
                logits, logits, probabilities, weight, target, peak, column, column < V, keep, share, softcap, top,
                of_exp, of_q,
            )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index"])
def _bwd_kernel(
    grad_loss,  # fp32 [rows], or [1] with a stride of 0
    logits,  # T [rows, V], any strides between rows
    index,  # int64 [rows], or None with probabilities
    probabilities,  # P [rows, V], any strides between rows, or None
    weight,  # [V] or None
    stats,  # fp32 [3, rows] m, log(sum(exp(x - m))), sum(q)
    divisors,  # fp32 [2] or None
    grad,  # T [rows, V], any strides between rows; may be the logits
    sizes,
    logits_strides,
    probabilities_strides,
    grad_strides,
    grad_loss_stride,
    index_stride,
    stats_stride,
    V,
    ignore_index: tl.int64,
    keep,
    share,
    z_loss,
    softcap,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    logits += row_place(row, sizes, logits_strides)
    grad += row_place(row, sizes, grad_strides)
    target = 0
    peak = 0.0
    if probabilities is not None:
        probabilities += row_place(row, sizes, probabilities_strides)
    else:
        target = tl.load(index + row * index_stride)
        if target == ignore_index:
            tl.store(grad + column, tl.zeros([SIZE], tl.float32), mask=column < V)
            return
        peak = _peak(weight, keep, target, (target >= 0) & (target < V))
    top, log = tl.load(stats + row), tl.load(stats + stats_stride + row)
    mass, upstream = tl.load(stats + 2 * stats_stride + row), tl.load(grad_loss + row * grad_loss_stride)
    of_exp, of_q = _factors(upstream, divisors, top, log, mass, z_loss)
    _store_gradient(
        grad, logits, probabilities, weight, target, peak, column, column < V, keep, share, softcap, top, of_exp, of_q
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _sum_kernel(
    loss,  # fp32 [] or None
    losses,  # fp32 [rows] or None
    index,  # int64 [rows], or None with probabilities
    weight,  # [V] or None, as with probabilities
    stats,  # fp32 [3, rows] m, log(sum(exp(x - m))), sum(q)
    divisors,  # fp32 [2] or None
    index_stride,
    stats_stride,
    rows: tl.int64,
    V,
    ignore_index: tl.int64,
    z_loss,
    SIZE: tl.constexpr,
):
    loss_sum = tl.zeros([SIZE], tl.float32)
    z_sum = tl.zeros([SIZE], tl.float32)
    weight_sum = tl.zeros([SIZE], tl.float32)
    count = tl.zeros([SIZE], tl.int32)  # exact, as fp32 is not beyond 2^24
    for start in range(0, rows, SIZE):
        row = start + tl.arange(0, SIZE)
        valid = row < rows
        if index is not None:
            target = tl.load(index + row * index_stride, mask=valid, other=0)
            valid &= target != ignore_index
            if weight is not None:
                inside = valid & (target >= 0) & (target < V)  # others are for forward to assert
                weight_sum += tl.load(weight + target, mask=inside, other=0.0).to(tl.float32)
        count += valid.to(tl.int32)
        if losses is not None:
            loss_sum += tl.load(losses + row, mask=valid, other=0.0)
            if z_loss is not None:
                lse = tl.load(stats + row, mask=valid, other=0.0)
                lse += tl.load(stats + stats_stride + row, mask=valid, other=0.0)
                z_sum += z_loss * lse * lse

    result = tl.sum(loss_sum, 0)
    z = tl.sum(z_sum, 0)
    if divisors is not None:
        z_divisor = tl.sum(count.to(tl.int64), 0).to(tl.float32)
        divisor = z_divisor if weight is None else tl.sum(weight_sum, 0)
        tl.store(divisors, divisor)
        tl.store(divisors + 1, z_divisor)
        result /= divisor
        z /= z_divisor
    if losses is not None:
        tl.store(loss, result if z_loss is None else result + z)


# Launches ---------------------------------------------------------------------------------------------------------


def _block(count: int, each: int) -> tuple[int, int]:
    """Elements of a block, and warps, of whose threads each has so many of them."""
    size = min(4096, triton.next_power_of_2(count))
    return size, max(1, size // (32 * each))


def _index(target: Tensor, options: Options) -> dict[str, Any]:
    given = not target.is_floating_point()
    return {
        "index": target if given else None,
        "index_stride": target.stride(0) if given else 0,
        "ignore_index": options.ignore_index,
        "z_loss": options.z_loss or None,
    }


def _launch(
    kernel: Any,
    rows: dict[str, Tensor],
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    stats: Tensor,
    divisors: Tensor | None,
    more: dict[str, Any],
) -> Launch:
    """Of a kernel that takes logits and others as `rows`. What there is not is None, which the compiler sees."""
    classes = rows["logits"].shape[-1]
    size, num_warps = _block(classes, 16)
    tensors, sizes, strides = as_rows([*rows.values(), target if target.is_floating_point() else None], 1)
    names = [*rows, "probabilities"]
    args = _index(target, options) | {
        "weight": None if weight is None else weight.contiguous(),
        "stats": stats,
        "divisors": divisors,
        "sizes": sizes,
        "stats_stride": stats.stride(0),
        "V": classes,
        "keep": 1 - options.label_smoothing,
        "share": options.label_smoothing / classes if options.label_smoothing else None,
        "softcap": options.softcap or None,
        "SIZE": size,
    }
    args |= dict(zip(names, tensors, strict=True)) | {
        f"{name}_strides": four for name, four in zip(names, strides, strict=True)
    }
    blocks = triton.cdiv(classes, size) if kernel is _bwd_kernel else 1
    return Launch(kernel, (math.prod(rows["logits"].shape[:-1]), blocks), args | more, num_warps, CHECKED)


def _launch_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    losses: Tensor,
    stats: Tensor,
    divisors: Tensor | None,
) -> Launch:
    return _launch(_fwd_kernel, {"logits": logits}, target, weight, options, stats, divisors, {"losses": losses})


def _launch_sum(
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    losses: Tensor | None,
    stats: Tensor | None,
    divisors: Tensor | None,
) -> Launch:
    index = _index(target, options)
    rows = math.prod(target.shape[:-1] if index["index"] is None else target.shape)
    size, num_warps = _block(max(1, rows), 4)
    weight = None if index["index"] is None or weight is None else weight.contiguous()
    args = {
        "loss": None if losses is None else torch.empty((), dtype=losses.dtype, device=losses.device),
        "losses": losses,
        "weight": weight,
        "stats": stats,
        "divisors": divisors,
        "stats_stride": 0 if stats is None else stats.stride(0),
        "rows": rows,
        "V": 0 if weight is None else len(weight),
        "SIZE": size,
    }
    return Launch(_sum_kernel, (1,), index | args, num_warps)


def _launch_bwd(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    stats: Tensor,
    divisors: Tensor | None,
    grad: Tensor,
) -> Launch:
    more = {"grad_loss": grad_loss, "grad_loss_stride": grad_loss.stride(0) if len(grad_loss) > 1 else 0}
    rows = {"logits": logits, "grad": grad}
    return _launch(_bwd_kernel, rows, target, weight, options, stats, divisors, more)


# The contract of kernels.py ---------------------------------------------------------------------------------------


def fwd(logits: Tensor, target: Tensor, weight: Tensor | None, options: Options, *outputs: Any) -> None:
    """Fills losses and stats; given divisors, the gradient of the mean takes the logits' place."""
    check_range("cross_entropy", target, logits.shape[-1], options.ignore_index)
    run([_launch_fwd(logits, target, weight, options, *outputs)], logits.device)


def sum_rows(target: Tensor, weight: Tensor | None, options: Options, *rest: Any) -> Tensor | None:
    """-> the loss, None without losses; fills divisors."""
    if weight is not None:
        check_range("cross_entropy", target, len(weight), options.ignore_index)
    launch = _launch_sum(target, weight, options, *rest)
    run([launch], target.device)
    return launch.args["loss"]


def bwd(grad_loss: Tensor, logits: Tensor, *rest: Any) -> None:
    """Fills grad, which may be the logits."""
    launch, grad = _launch_bwd(grad_loss, logits, *rest), rest[-1]
    run([launch], logits.device)
    if launch.args["grad"] is not grad:  # `as_rows` had to copy
        grad.data.copy_(launch.args["grad"])  # unseen by autograd, as what a kernel writes is


KERNELS = Kernels(fwd=fwd, sum=sum_rows, bwd=bwd)


# Compiling without a GPU ------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """The kernels that representative calls launch, specialised as the launches are."""
    plain, everything = Options(-100, 0.0, 0.0, 0.0), Options(-100, 0.1, 1e-4, 30.0)
    row, stats = torch.empty(4096, device="meta"), torch.empty(3, 4096, device="meta")
    index = torch.empty(4096, dtype=torch.int64, device="meta")
    for classes, dtype in itertools.product((50257, 50304), (torch.float32, torch.bfloat16)):
        logits = torch.empty(4096, classes, dtype=dtype, device="meta")
        kinds: list[tuple[str, Tensor, Any, Options]] = [("plain", index, None, plain)]
        if classes % 16 == 0:
            kinds += [("everything", index, logits[0], everything), ("probabilities", logits, logits[0], everything)]
        for kind, target, weight, options in kinds:
            for formed, launch in (
                ("", _launch_fwd(logits, target, weight, options, row, stats, None)),
                (" with gradient", _launch_fwd(logits, target, weight, options, row, stats, row[:2])),
                ("", _launch_sum(target, weight, options, row, stats, row[:2])),
                ("", _launch_bwd(row, logits, target, weight, options, stats, row[:2], logits)),
            ):
                name = f"cross_entropy {kind} {classes} {str(dtype).removeprefix('torch.')}{formed}"
                yield compilation(name, launch)
