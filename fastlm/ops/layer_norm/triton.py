"""Layer norm, RMS norm and both fused with a residual addition and dropout, forward and backward, in Triton.

A row is read once and stays in registers in fp32, where the mean is formed first and the variance from the deviations.
Backward forms x_hat again from the input and the statistics; the gradients of weight and bias are summed over a fixed
number of partial rows, and a second kernel adds these in a fixed order: no atomics, the same bits every time. Dropout
is counter-based, so that backward computes the mask again.

Work: a program takes a tile of `ROWS` rows. A row is `COUNT` pieces of `SIZE` columns, a power of two, as Triton wants:
of 1 to 7 pieces those that pad the row least, by less than a quarter beyond a dozen columns (768 = 3 x 256, 5120 =
5 x 1024, 1600 is 7 x 256 less 11%; padding is masked: it costs lanes, not memory). A thread has 8 elements of each
piece, and a tile as many rows as occupy four warps, so that a narrow piece of a row lies in one warp. In backward a
program walks through tiles as far apart as there are programs, and keeps its sums for weight and bias in registers.

A row too wide for registers (16384 columns; 8192 in backward) is read twice, in tiles: forward merges the statistics of
the tiles (Chan), backward sums first and writes then, and its weight and bias gradients have a kernel of their own, in
which a program keeps one tile of columns and walks down the rows.

Bytes per row of N columns of b bytes each, c for the residual: forward 2bN, with residual 2(b + c)N; backward 3bN, with
residual (2b + 3c)N; 4 or 8 for the statistics; weight and bias come from cache. Wide rows: half as much again, partly
from cache.

Source: Ba, Kiros and Hinton 2016 (arXiv 1607.06450); Zhang and Sennrich 2019 (arXiv 1910.07467); Chan, Golub and
LeVeque 1979 for the merging of variances; Salmon et al. 2011 for Philox.
"""

# mypy: allow-incomplete-defs, disable-error-code=assignment
# ruff: noqa: RUF005
# In kernels only constants are typed, and tuples can be added but not unpacked.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm.ops.philox import dropout_scale
from fastlm.ops.rows import as_rows
from fastlm.ops.triton_launch import Compilation, Launch, compilation, keep_mask, row_place, run

Shape = Sequence[int]


# Parts of kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _tile(number, rows, ROWS: tl.constexpr):
    """Rows of a tile, [ROWS, 1] int64, and which of them exist."""
    row = tl.cast(number, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < rows


@triton.jit
def _columns(start, exists, SIZE: tl.constexpr, COLS: tl.constexpr, FULL: tl.constexpr):
    """Columns of a piece, [1, SIZE], and which elements exist; compared with COLS only where a piece may stick out."""
    column = start + tl.arange(0, SIZE)[None, :]
    if FULL:
        return column, exists
    else:
        return column, exists & (column < COLS)


@triton.jit
def _dropout(x, row, start, rng_state, threshold, scale, SIZE: tl.constexpr):
    """x with dropped elements at 0 and the others scaled; four neighbours share one call of Philox."""
    if rng_state is None:
        return x
    else:
        keep = keep_mask(rng_state, row, start, threshold, SIZE)
        return tl.where(keep, x * scale, 0.0)


@triton.jit
def _stream(
    x, residual, new_residual, row, start, column, mask, rng_state, threshold, scale, SIZE: tl.constexpr
):  # fmt: skip
    """What is normalised: x, or what the residual stream becomes, rounded as it is stored."""
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value = _dropout(value, row, start, rng_state, threshold, scale, SIZE)
        value += tl.load(residual + column, mask=mask, other=0.0).to(tl.float32)
        value = value.to(new_residual.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _affine(x_hat, weight, bias, column, mask):
    if weight is not None:
        x_hat *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        x_hat += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    return x_hat


@triton.jit
def _load_stats(stats, number, rows, ROWS: tl.constexpr, RMS: tl.constexpr):
    """mean and rstd of a tile, [ROWS, 1]; loaded as [ROWS], lest a thread load them anew for each of its columns."""
    row = tl.cast(number, tl.int64) * ROWS + tl.arange(0, ROWS)
    if RMS:
        return 0.0, tl.load(stats + row, mask=row < rows, other=0.0)[:, None]
    else:
        mean = tl.load(stats + row, mask=row < rows, other=0.0)[:, None]
        return mean, tl.load(stats + rows + row, mask=row < rows, other=0.0)[:, None]


@triton.jit
def _store_stats(stats, mean, rstd, row, rows, exists, RMS: tl.constexpr):
    if RMS:
        tl.store(stats + row, rstd, mask=exists)
    else:
        tl.store(stats + row, mean, mask=exists)
        tl.store(stats + rows + row, rstd, mask=exists)


@triton.jit
def _upstream(dy, x, weight, mean, rstd, column, mask):
    """dy, g = dy * weight, and x_hat. Padding must be 0 in x_hat too, lest mean * rstd overflow there: 0 * inf."""
    dy = tl.load(dy + column, mask=mask, other=0.0).to(tl.float32)
    x_hat = tl.where(mask, (tl.load(x + column, mask=mask, other=0.0).to(tl.float32) - mean) * rstd, 0.0)
    return dy, _affine(dy, weight, None, column, mask), x_hat


@triton.jit
def _store_grads(
    grad, dnew_residual, dx, dresidual, row, start, column, mask, rng_state, threshold, scale, SIZE: tl.constexpr
):  # fmt: skip
    """Writes the gradients of input and residual, given the one that came through the norm."""
    if dnew_residual is not None:
        grad += tl.load(dnew_residual + column, mask=mask, other=0.0).to(tl.float32)
    if dresidual is not None:
        tl.store(dresidual + column, grad, mask=mask)
    if dx is not None:
        tl.store(dx + column, _dropout(grad, row, start, rng_state, threshold, scale, SIZE), mask=mask)


# Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["threshold"])
def _fwd_kernel(
    x,  # T [rows, COLS], any strides between rows
    residual,  # R [rows, COLS], any strides between rows, or None
    weight,  # [COLS] or None
    bias,  # [COLS] or None
    y,  # T [rows, COLS]
    new_residual,  # R [rows, COLS] or None
    stats,  # fp32 [2, rows] mean, rstd; [1, rows] rstd if RMS
    rng_state,  # int64 [2] seed, offset, or None
    sizes,
    x_strides,
    residual_strides,
    rows,
    eps,
    threshold: tl.int64,
    scale,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    RMS: tl.constexpr,
):
    row, exists = _tile(tl.program_id(0), rows, ROWS)
    x += row_place(row, sizes, x_strides)
    if residual is not None:
        residual += row_place(row, sizes, residual_strides)
        new_residual += row * COLS
    y += row * COLS

    columns, masks, pieces = (), (), ()
    total = tl.full([ROWS, SIZE], 0.0, tl.float32)  # pieces are added first, so that warps meet once for a sum
    for n in tl.static_range(COUNT):
        column, mask = _columns(n * SIZE, exists, SIZE, COLS, (n + 1) * SIZE <= COLS)
        value = _stream(
            x, residual, new_residual, row, n * SIZE, column, mask, rng_state, threshold, scale, SIZE
        )  # fmt: skip
        if residual is not None:
            tl.store(new_residual + column, value, mask=mask)
        columns, masks, pieces = columns + (column,), masks + (mask,), pieces + (value,)
        total += value
    mean = 0.0
    if not RMS:
        mean = tl.sum(total, 1, keep_dims=True) / COLS
    squares = tl.full([ROWS, SIZE], 0.0, tl.float32)
    for n in tl.static_range(COUNT):
        deviation = tl.where(masks[n], pieces[n] - mean, 0.0)
        squares += deviation * deviation
    rstd = tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / COLS + eps)
    _store_stats(stats, mean, rstd, row, rows, exists, RMS)
    for n in tl.static_range(COUNT):
        value = _affine((pieces[n] - mean) * rstd, weight, bias, columns[n], masks[n])
        tl.store(y + columns[n], value, mask=masks[n])


@triton.jit(do_not_specialize=["threshold"])
def _fwd_wide_kernel(
    x,  # T [rows, COLS], any strides between rows
    residual,  # R [rows, COLS], any strides between rows, or None
    weight,  # [COLS] or None
    bias,  # [COLS] or None
    y,  # T [rows, COLS]
    new_residual,  # R [rows, COLS] or None
    stats,  # fp32 [2, rows] mean, rstd; [1, rows] rstd if RMS
    rng_state,  # int64 [2] seed, offset, or None
    sizes,
    x_strides,
    residual_strides,
    rows,
    eps,
    threshold: tl.int64,
    scale,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    RMS: tl.constexpr,
):
    row, exists = _tile(tl.program_id(0), rows, 1)
    x += row_place(row, sizes, x_strides)
    if residual is not None:
        residual += row_place(row, sizes, residual_strides)
        new_residual += row * COLS
    y += row * COLS

    mean = tl.full([1, 1], 0.0, tl.float32)
    squares = tl.full([1, 1], 0.0, tl.float32)  # the sum of squared deviations from mean
    for start in range(0, COLS, SIZE):
        column, mask = _columns(start, exists, SIZE, COLS, COLS % SIZE == 0)
        value = _stream(
            x, residual, new_residual, row, start, column, mask, rng_state, threshold, scale, SIZE
        )  # fmt: skip
        if not RMS:
            count = tl.minimum(COLS - start, SIZE)
            tile_mean = tl.sum(value, 1, keep_dims=True) / count
            value = tl.where(mask, value - tile_mean, 0.0)
            share = count / (start + count)
            squares += (tile_mean - mean) * (tile_mean - mean) * (start * share)
            mean += (tile_mean - mean) * share
        squares += tl.sum(value * value, 1, keep_dims=True)
    rstd = tl.rsqrt(squares / COLS + eps)
    _store_stats(stats, mean, rstd, row, rows, exists, RMS)
    for start in range(0, COLS, SIZE):
        column, mask = _columns(start, exists, SIZE, COLS, COLS % SIZE == 0)
        # The sum is formed anew: what other threads have stored could not be read here without a barrier.
        value = _stream(
            x, residual, new_residual, row, start, column, mask, rng_state, threshold, scale, SIZE
        )  # fmt: skip
        if residual is not None:
            tl.store(new_residual + column, value, mask=mask)
        tl.store(y + column, _affine((value - mean) * rstd, weight, bias, column, mask), mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _bwd_kernel(
    dy,  # T [rows, COLS], any strides between rows
    dnew_residual,  # R [rows, COLS], any strides between rows, or None
    x,  # R [rows, COLS] what was normalised, any strides between rows
    weight,  # [COLS] or None
    stats,  # fp32 [2, rows] mean, rstd; [1, rows] rstd if RMS
    rng_state,  # int64 [2] seed, offset, or None
    dx,  # T [rows, COLS] or None
    dresidual,  # R [rows, COLS] or None
    dweight,  # fp32 [programs, COLS] or None
    dbias,  # fp32 [programs, COLS] or None
    sizes,
    dy_strides,
    dnew_residual_strides,
    x_strides,
    rows,
    threshold: tl.int64,
    scale,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    RMS: tl.constexpr,
):
    program = tl.program_id(0)
    dweights, dbiases = (), ()
    for _ in tl.static_range(COUNT):
        dweights = dweights + (tl.full([ROWS, SIZE], 0.0, tl.float32),)
        dbiases = dbiases + (tl.full([ROWS, SIZE], 0.0, tl.float32),)

    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists = _tile(tile, rows, ROWS)
        mean, rstd = _load_stats(stats, tile, rows, ROWS, RMS)
        dy_row = dy + row_place(row, sizes, dy_strides)
        x_row = x + row_place(row, sizes, x_strides)

        columns, masks, gs, x_hats, new_dweights, new_dbiases = (), (), (), (), (), ()
        sum_g = tl.full([ROWS, SIZE], 0.0, tl.float32)
        sum_gx = tl.full([ROWS, SIZE], 0.0, tl.float32)
        for n in tl.static_range(COUNT):
            column, mask = _columns(n * SIZE, exists, SIZE, COLS, (n + 1) * SIZE <= COLS)
            dy_n, g, x_hat = _upstream(dy_row, x_row, weight, mean, rstd, column, mask)
            columns, masks, gs, x_hats = columns + (column,), masks + (mask,), gs + (g,), x_hats + (x_hat,)
            new_dweights = new_dweights + (dweights[n] + dy_n * x_hat,)
            new_dbiases = new_dbiases + (dbiases[n] + dy_n,)
            sum_g += g
            sum_gx += g * x_hat
        if dweight is not None:
            dweights = new_dweights
        if dbias is not None:
            dbiases = new_dbiases

        if dx is not None or dresidual is not None:
            mean_g = 0.0
            if not RMS:
                mean_g = tl.sum(sum_g, 1, keep_dims=True) / COLS
            mean_gx = tl.sum(sum_gx, 1, keep_dims=True) / COLS
            for n in tl.static_range(COUNT):
                _store_grads(
                    rstd * (gs[n] - mean_g - x_hats[n] * mean_gx),
                    None if dnew_residual is None else dnew_residual + row_place(row, sizes, dnew_residual_strides),
                    None if dx is None else dx + row * COLS,
                    None if dresidual is None else dresidual + row * COLS,
                    row, n * SIZE, columns[n], masks[n], rng_state, threshold, scale, SIZE,
                )  # fmt: skip

    partial = tl.cast(program, tl.int64) * COLS
    for n in tl.static_range(COUNT):
        column = n * SIZE + tl.arange(0, SIZE)
        if dweight is not None:
            tl.store(dweight + partial + column, tl.sum(dweights[n], 0), mask=column < COLS)
        if dbias is not None:
            tl.store(dbias + partial + column, tl.sum(dbiases[n], 0), mask=column < COLS)


@triton.jit(do_not_specialize=["threshold"])
def _bwd_wide_kernel(
    dy,  # T [rows, COLS], any strides between rows
    dnew_residual,  # R [rows, COLS], any strides between rows, or None
    x,  # R [rows, COLS] what was normalised, any strides between rows
    weight,  # [COLS] or None
    stats,  # fp32 [2, rows] mean, rstd; [1, rows] rstd if RMS
    rng_state,  # int64 [2] seed, offset, or None
    dx,  # T [rows, COLS] or None
    dresidual,  # R [rows, COLS] or None
    sizes,
    dy_strides,
    dnew_residual_strides,
    x_strides,
    rows,
    threshold: tl.int64,
    scale,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    RMS: tl.constexpr,
):
    row, exists = _tile(tl.program_id(0), rows, 1)
    mean, rstd = _load_stats(stats, tl.program_id(0), rows, 1, RMS)
    dy += row_place(row, sizes, dy_strides)
    x += row_place(row, sizes, x_strides)
    sum_g = tl.full([1, SIZE], 0.0, tl.float32)
    sum_gx = tl.full([1, SIZE], 0.0, tl.float32)
    for start in range(0, COLS, SIZE):
        column, mask = _columns(start, exists, SIZE, COLS, COLS % SIZE == 0)
        _, g, x_hat = _upstream(dy, x, weight, mean, rstd, column, mask)
        sum_g += g
        sum_gx += g * x_hat
    mean_g = 0.0
    if not RMS:
        mean_g = tl.sum(sum_g, 1, keep_dims=True) / COLS
    mean_gx = tl.sum(sum_gx, 1, keep_dims=True) / COLS
    for start in range(0, COLS, SIZE):
        column, mask = _columns(start, exists, SIZE, COLS, COLS % SIZE == 0)
        _, g, x_hat = _upstream(dy, x, weight, mean, rstd, column, mask)
        _store_grads(
            rstd * (g - mean_g - x_hat * mean_gx),
            None if dnew_residual is None else dnew_residual + row_place(row, sizes, dnew_residual_strides),
            None if dx is None else dx + row * COLS,
            None if dresidual is None else dresidual + row * COLS,
            row, start, column, mask, rng_state, threshold, scale, SIZE,
        )  # fmt: skip


@triton.jit
def _bwd_wide_parameters_kernel(
    dy,  # T [rows, COLS], any strides between rows
    x,  # R [rows, COLS] what was normalised, any strides between rows
    stats,  # fp32 [2, rows] mean, rstd; [1, rows] rstd if RMS
    dweight,  # fp32 [programs, COLS] or None
    dbias,  # fp32 [programs, COLS] or None
    sizes,
    dy_strides,
    x_strides,
    rows,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    RMS: tl.constexpr,
):
    program = tl.program_id(0)
    sum_dweight = tl.full([ROWS, SIZE], 0.0, tl.float32)
    sum_dbias = tl.full([ROWS, SIZE], 0.0, tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists = _tile(tile, rows, ROWS)
        mean, rstd = _load_stats(stats, tile, rows, ROWS, RMS)
        column, mask = _columns(tl.program_id(1) * SIZE, exists, SIZE, COLS, COLS % SIZE == 0)
        dy_row = dy + row_place(row, sizes, dy_strides)
        x_row = x + row_place(row, sizes, x_strides)
        dy_tile, _, x_hat = _upstream(dy_row, x_row, None, mean, rstd, column, mask)
        sum_dweight += dy_tile * x_hat
        sum_dbias += dy_tile
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    place = tl.cast(program, tl.int64) * COLS + column
    if dweight is not None:
        tl.store(dweight + place, tl.sum(sum_dweight, 0), mask=column < COLS)
    if dbias is not None:
        tl.store(dbias + place, tl.sum(sum_dbias, 0), mask=column < COLS)


@triton.jit
def _sum_partials(
    total,  # [COLS] or None
    partial,  # fp32 [partials, COLS] or None
    partials,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    if total is not None:
        column = tl.program_id(0) * SIZE + tl.arange(0, SIZE)[None, :]
        sums = tl.full([ROWS, SIZE], 0.0, tl.float32)
        for first in range(0, partials, ROWS):
            row = first + tl.arange(0, ROWS)[:, None]
            exists = (row < partials) & (column < COLS)
            sums += tl.load(partial + tl.cast(row, tl.int64) * COLS + column, mask=exists, other=0.0).to(tl.float32)
        tl.store(total + column, tl.sum(sums, 0, keep_dims=True), mask=column < COLS)


@triton.jit
def _sum_kernel(
    dweight,  # [COLS] or None
    dbias,  # [COLS] or None
    partial_dweight,  # fp32 [partials, COLS] or None
    partial_dbias,  # fp32 [partials, COLS] or None
    partials,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    _sum_partials(dweight, partial_dweight, partials, COLS, SIZE, ROWS)
    _sum_partials(dbias, partial_dbias, partials, COLS, SIZE, ROWS)


# Launches ---------------------------------------------------------------------------------------------------------


WIDEST, WIDEST_BWD = 16384, 8192  # columns of a row that stays in registers
WIDE_SIZE, WIDE_WARPS = 4096, 16


def _tiling(cols: int, backward: bool) -> tuple[dict[str, int], int]:
    """How rows that fit into registers are cut: SIZE, COUNT and ROWS; and the number of warps, 4 to 16.

    A thread has 8 elements of each piece: one load of 16 bytes in bf16, two in fp32. Backward keeps four arrays in
    registers rather than one, so with more than three pieces a thread has 4 of each.
    """
    cuts = [(max(4, triton.next_power_of_2(triton.cdiv(cols, count))), count) for count in (1, 2, 3, 4, 5, 7)]
    size, count = min((cut for cut in cuts if cut[0] <= 4096), key=math.prod)
    each = 4 if backward and count > 3 else 8
    rows = max(1, 4 * 32 * each // size)
    return {"SIZE": size, "COUNT": count, "ROWS": rows}, rows * size // (32 * each)


def _programs(rows: int, tile: int) -> int:
    """Programs of backward, each with one partial row for weight and bias; the same on every GPU, for the same bits."""
    return min(triton.cdiv(rows, tile), max(128, min(rows // 32, 1024)))


def _plan_fwd(
    rms: bool,
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[list[Launch], tuple[Tensor, Tensor | None, Tensor]]:
    """-> launches; what they fill: output, new_residual, stats."""
    cols = math.prod(normalized_shape)
    rows = input.numel() // cols
    (x, residual_rows), sizes, strides = as_rows([input, residual], len(normalized_shape))
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    new_residual = None if residual is None else torch.empty(input.shape, dtype=residual.dtype, device=input.device)
    stats = torch.empty((1 if rms else 2, rows), dtype=torch.float32, device=input.device)
    args = {
        "x": x,
        "residual": residual_rows,
        "weight": _flat(weight),
        "bias": _flat(bias),
        "y": output,
        "new_residual": new_residual,
        "stats": stats,
        "rng_state": rng_state,
        "sizes": sizes,
        "x_strides": strides[0],
        "residual_strides": strides[1],
        "rows": rows,
        "eps": eps,
        "threshold": round(dropout_p * 2**32),
        "scale": dropout_scale(dropout_p),
        "COLS": cols,
        "RMS": rms,
    }
    if cols > WIDEST:
        launch = Launch(_fwd_wide_kernel, (rows,), args | {"SIZE": WIDE_SIZE}, WIDE_WARPS)
    else:
        tiling, num_warps = _tiling(cols, backward=False)
        launch = Launch(_fwd_kernel, (triton.cdiv(rows, tiling["ROWS"]),), args | tiling, num_warps)
    return [launch], (output, new_residual, stats)


def _plan_bwd(
    rms: bool,
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    normalized_shape: Shape,
    dropout_p: float,
    rng_state: Tensor | None,
    input_dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """-> launches; what they fill, empty where not needed: the gradients of input, residual, weight and bias."""
    cols = math.prod(normalized_shape)
    rows = x.numel() // cols
    tensors, sizes, strides = as_rows([grad_output, grad_new_residual, x], len(normalized_shape))
    wanted = [n and p is not None for n, p in zip(needs_grad, (x, x, weight, bias), strict=True)]

    def new(n: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if wanted[n] else 0, dtype=dtype, device=x.device)

    def given(n: int, tensor: Tensor) -> Tensor | None:
        return tensor if wanted[n] else None

    wide = cols > WIDEST_BWD
    tiling, num_warps = ({"SIZE": 1024, "ROWS": 2}, 4) if wide else _tiling(cols, backward=True)
    programs = _programs(rows, tiling["ROWS"])
    dx, dresidual = new(0, x.shape, input_dtype), new(1, x.shape, x.dtype)
    dweight = new(2, normalized_shape, torch.float32 if weight is None else weight.dtype)
    dbias = new(3, normalized_shape, torch.float32 if bias is None else bias.dtype)
    partial_dweight, partial_dbias = (given(n, new(n, (programs, cols), torch.float32)) for n in (2, 3))

    read = {
        "dy": tensors[0],
        "x": tensors[2],
        "stats": stats,
        "sizes": sizes,
        "dy_strides": strides[0],
        "x_strides": strides[2],
        "rows": rows,
        "COLS": cols,
        "RMS": rms,
    }
    through = read | {
        "dnew_residual": tensors[1],
        "dnew_residual_strides": strides[1],
        "weight": _flat(weight),
        "rng_state": rng_state,
        "dx": given(0, dx),
        "dresidual": given(1, dresidual),
        "threshold": round(dropout_p * 2**32),
        "scale": dropout_scale(dropout_p),
    }
    partial = {"dweight": partial_dweight, "dbias": partial_dbias}
    launches = []
    if not wide and any(wanted):
        launches.append(Launch(_bwd_kernel, (programs,), through | partial | tiling, num_warps))
    if wide and any(wanted[:2]):
        launches.append(Launch(_bwd_wide_kernel, (rows,), through | {"SIZE": WIDE_SIZE}, WIDE_WARPS))
    if wide and any(wanted[2:]):
        grid = (programs, triton.cdiv(cols, tiling["SIZE"]))
        launches.append(Launch(_bwd_wide_parameters_kernel, grid, read | partial | tiling, num_warps))
    if any(wanted[2:]):
        total = {"dweight": given(2, dweight), "dbias": given(3, dbias)}
        sums = {"partial_dweight": partial_dweight, "partial_dbias": partial_dbias, "partials": programs}
        at_once = min(32, triton.next_power_of_2(programs))
        cut = {"COLS": cols, "SIZE": 1024 // at_once, "ROWS": at_once}
        launches.append(Launch(_sum_kernel, (triton.cdiv(cols, cut["SIZE"]),), total | sums | cut, 4))
    return launches, (dx, dresidual, dweight, dbias)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


# The contract of op.py's `register` ----------------------------------------------------------------------------------


def fwd(
    rms: bool,
    input: Tensor,
    residual: Tensor | None,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> output, new_residual, stats."""
    launches, outputs = _plan_fwd(
        rms, input, residual, normalized_shape, weight, bias, eps, dropout_p, rng_state
    )  # fmt: skip
    run(launches, input.device)
    return outputs


def bwd(
    rms: bool,
    grad_output: Tensor | None,
    grad_new_residual: Tensor | None,
    normalized: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    normalized_shape: Shape,
    dropout_p: float,
    rng_state: Tensor | None,
    input_dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of input, residual, weight and bias; empty where not needed."""
    if grad_output is None:  # one row of zeros, which stays in cache
        grad_output = normalized.new_zeros(tuple(normalized_shape)).expand(normalized.shape)
    launches, grads = _plan_bwd(
        rms, grad_output, grad_new_residual, normalized, weight, bias, stats, normalized_shape, dropout_p, rng_state,
        input_dtype, needs_grad,
    )  # fmt: skip
    run(launches, normalized.device)
    return grads


# Compiling without a GPU ------------------------------------------------------------------------------------------


def compilations() -> Iterator[Compilation]:
    """The kernels that representative calls launch, specialised as the launches are."""
    dtypes = (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)
    for cols in (768, 1600, 5120, 8192, 32768):
        for dtype, residual_dtype in dtypes:
            added = dtype != residual_dtype
            x = torch.empty(4096, cols, dtype=dtype, device="meta")
            residual = torch.empty(4096, cols, dtype=residual_dtype, device="meta") if added else None
            weight = torch.empty(cols, dtype=dtype, device="meta")
            rng_state = torch.empty(2, dtype=torch.int64, device="meta") if added else None
            p = 0.1 if added else 0.0
            fwd, (_, new_residual, stats) = _plan_fwd(
                False, x, residual, (cols,), weight, weight, 1e-5, p, rng_state
            )  # fmt: skip
            bwd, _ = _plan_bwd(
                False, x, residual, x if new_residual is None else new_residual, weight, weight, stats, (cols,), p,
                rng_state, dtype, (True, added, True, True),
            )  # fmt: skip
            op = "add_layer_norm" if added else "layer_norm"
            for launch in fwd + bwd:
                yield compilation(f"{op} {cols} {str(dtype).removeprefix('torch.')}", launch)
