"""The emulator and its checkers, checked: each primitive against what NVIDIA's manuals say, each seeded bug against the
layer that must see it, each counter of traffic against figures found by hand.

The kernels are in proof/kernels. "PTX ISA" is NVIDIA's Parallel Thread Execution ISA, "guide" the CUDA C++ Programming
Guide; what they show as figures stands here as data.
"""

import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from proof import emulator

import fastlm
import fastlm.functional as F
from fastlm.ops import philox

TESTS = Path(__file__).parent
KERNELS = TESTS / "proof" / "kernels"
ALL_LANES = range(32)

# Every landing and order of blocks under both schedules without chance, and with ten seeds under the random one.
COMBINATIONS = [
    {"schedule": schedule, "seed": seed, "landing": landing, "blocks": blocks}
    for schedule, seeds in (("adversarial", 1), ("round_robin", 1), ("random", 10))
    for seed, landing, blocks in itertools.product(range(seeds), ("lazy", "eager"), ("in_order", "random"))
]
FEW = [COMBINATIONS[n] for n in (0, 3, 5, 10)]

correct = []


def is_correct(test):
    """A test that passes on any build and in any order that threads, copies and blocks may take."""
    correct.append(test)
    return test


def test_combinations_are_forty_at_least_and_the_few_have_every_choice():
    assert len(COMBINATIONS) >= 40
    for choice in ("schedule", "landing", "blocks"):
        assert {c[choice] for c in FEW} == {c[choice] for c in COMBINATIONS}


# Threads and blocks -----------------------------------------------------------------------------------------------


@is_correct
@pytest.mark.parametrize(
    ("grid", "block"), [(1, 1), (3, 64), ((2, 3, 2), (4, 2, 3)), ((1, 2), (33, 1, 2)), (2, (1, 1, 64)), (1, 1024)]
)
def test_every_thread_sees_its_place_and_the_launch(grid, block):
    grid3, block3 = ((*((n,) if isinstance(n, int) else n), 1, 1)[:3] for n in (grid, block))
    seen = torch.full((np.prod(grid3), np.prod(block3), 12), -1, dtype=torch.int32)
    emulator.run("indices", grid, block, seen)
    expected = [
        [(*thread[::-1], *index[::-1], *block3, *grid3) for thread in np.ndindex(*block3[::-1])]
        for index in np.ndindex(*grid3[::-1])
    ]
    assert seen.tolist() == [list(map(list, threads)) for threads in expected]


def order_of_warps(**settings):
    """Blocks in the order in which they ran, and when each warp came by: [3, blocks, warps]."""
    counter, when = torch.zeros(1, dtype=torch.int32), torch.full((3, 8, 4), -1, dtype=torch.int32)
    with emulator.settings(**settings):
        emulator.run("order", 8, 128, counter, when)
    assert sorted(when.flatten().tolist()) == list(range(3 * 8 * 4))
    return when.amin((0, 2)).argsort().tolist(), when


def test_blocks_run_in_order_or_in_one_that_the_seed_decides():
    assert order_of_warps(blocks="in_order")[0] == list(range(8))
    orders = [order_of_warps(blocks="random", seed=seed)[0] for seed in range(6)]
    assert len(set(map(tuple, orders))) >= 5
    assert orders == [order_of_warps(blocks="random", seed=seed)[0] for seed in range(6)]


def test_schedules_differ_and_a_seed_replays_one():
    ways = [("adversarial", 0), ("round_robin", 0), *(("random", seed) for seed in range(4))]
    orders = [tuple(order_of_warps(schedule=s, seed=seed)[1].flatten().tolist()) for s, seed in ways]
    assert len(set(orders)) == len(orders)
    assert orders == [tuple(order_of_warps(schedule=s, seed=seed)[1].flatten().tolist()) for s, seed in ways]


LIMITS = [  # guide, "Compute Capabilities", technical specifications; the largest that is allowed, and one more
    ((2, 1, 1), (1024, 1, 1), (2, 1, 1), (1025, 1, 1)),
    ((1, 1, 1), (1, 1024, 1), (1, 1, 1), (1, 1025, 1)),
    ((1, 1, 1), (1, 1, 64), (1, 1, 1), (1, 1, 65)),
    ((1, 1, 1), (32, 32, 1), (1, 1, 1), (33, 32, 1)),
    ((1, 1, 1), (16, 1, 64), (1, 1, 1), (17, 1, 64)),
    ((1, 65535, 1), (1, 1, 1), (1, 65536, 1), (1, 1, 1)),
    ((1, 1, 65535), (1, 1, 1), (1, 1, 65536), (1, 1, 1)),
]


@pytest.mark.parametrize(("grid", "block", "large_grid", "large_block"), LIMITS)
def test_launches_up_to_the_limits_run_and_larger_ones_do_not(grid, block, large_grid, large_block):
    seen = torch.zeros(int(np.prod(grid)) * int(np.prod(block)), 12, dtype=torch.int32)
    emulator.run("indices", grid, block, seen)
    assert (seen[:, 6] == block[0]).all()
    with pytest.raises(emulator.EmulatorError, match="indices"):
        emulator.run("indices", large_grid, large_block, seen)


@pytest.mark.parametrize("empty", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_launches_without_threads_or_blocks_are_errors(empty):
    seen = torch.zeros(12, dtype=torch.int32)
    with pytest.raises(emulator.EmulatorError, match="indices"):
        emulator.run("indices", empty, 1, seen)
    with pytest.raises(emulator.EmulatorError, match="indices"):
        emulator.run("indices", 1, empty, seen)


def test_the_emulator_is_there():
    # Without CUDA's headers every test of the backend would pass for want of it; `make test` installs them.
    assert emulator.missing() == ""


def test_shared_memory_over_the_limit_is_an_error():
    limit = 227 << 10  # of a block with opt-in, on sm_90 and sm_100
    n = limit // 4
    x, y, addresses = torch.randn(1, n), torch.zeros(1, n), torch.zeros(1, dtype=torch.int32)
    emulator.run("dynamic_shared", 1, 1024, x, y, addresses, n, shared_bytes=limit)
    assert torch.equal(y, x.flip(1))
    with pytest.raises(emulator.EmulatorError, match="dynamic_shared"):
        emulator.run("dynamic_shared", 1, 1024, x, y, addresses, n, shared_bytes=limit + 4)
    with pytest.raises(emulator.EmulatorError, match=r"dynamic_shared.*without opting in"):
        emulator.run("dynamic_shared", 1, 1024, x, y, addresses, n, shared_bytes=(48 << 10) + 4, opt_in=False)
    with pytest.raises(emulator.EmulatorError, match="too_much_static_shared"):
        emulator.run("too_much_static_shared", 1, 32)


# Shuffles and votes -----------------------------------------------------------------------------------------------


def shuffled(x, operand, width, kind="float"):
    y = torch.zeros(4, 32, dtype=x.dtype)
    emulator.run(f"shuffle_{kind}", 1, 32, x, torch.as_tensor(operand).expand(32).int().contiguous(), y, width)
    return dict(zip(("idx", "up", "down", "xor"), y.tolist(), strict=True))


# PTX ISA, "shfl.sync": from which lane each lane takes, for a constant operand, written out. `own`: out of the segment,
# so that the lane's own value is kept.
SHUFFLES = [
    ("xor", 1, 32, "1 0 3 2 5 4 7 6 9 8 11 10 13 12 15 14 17 16 19 18 21 20 23 22 25 24 27 26 29 28 31 30"),
    ("xor", 16, 32, "16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
    ("xor", 5, 32, "5 4 7 6 1 0 3 2 13 12 15 14 9 8 11 10 21 20 23 22 17 16 19 18 29 28 31 30 25 24 27 26"),
    ("up", 1, 32, "0 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30"),
    ("up", 3, 8, "0 1 2 0 1 2 3 4 8 9 10 8 9 10 11 12 16 17 18 16 17 18 19 20 24 25 26 24 25 26 27 28"),
    ("down", 1, 32, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 31"),
    ("down", 3, 8, "3 4 5 6 7 5 6 7 11 12 13 14 15 13 14 15 19 20 21 22 23 21 22 23 27 28 29 30 31 29 30 31"),
    ("down", 2, 4, "2 3 2 3 6 7 6 7 10 11 10 11 14 15 14 15 18 19 18 19 22 23 22 23 26 27 26 27 30 31 30 31"),
    ("idx", 7, 32, "7 " * 32),
    ("idx", 3, 4, "3 3 3 3 7 7 7 7 11 11 11 11 15 15 15 15 19 19 19 19 23 23 23 23 27 27 27 27 31 31 31 31"),
    # Guide, "Warp Shuffle Functions": beyond the width, the lane modulo the width.
    ("idx", 9, 8, "1 1 1 1 1 1 1 1 9 9 9 9 9 9 9 9 17 17 17 17 17 17 17 17 25 25 25 25 25 25 25 25"),
    ("idx", 33, 32, "1 " * 32),
    ("idx", -1, 16, "15 15 15 15 15 15 15 15 15 15 15 15 15 15 15 15" + " 31" * 16),
    # Guide: a segment may take from earlier ones; from later ones its lanes keep their own.
    ("xor", 8, 8, "0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 16 17 18 19 20 21 22 23"),
    ("xor", 6, 4, "0 1 2 3 2 3 0 1 8 9 10 11 10 11 8 9 16 17 18 19 18 19 16 17 24 25 26 27 26 27 24 25"),
]


@is_correct
@pytest.mark.parametrize(("kind", "operand", "width", "sources"), SHUFFLES)
def test_shuffles_take_from_the_lanes_of_the_manual(kind, operand, width, sources):
    x = torch.arange(32) * 1.5 - 7
    assert shuffled(x, operand, width)[kind] == [x[int(lane)].item() for lane in sources.split()]


def shfl(mode, lane, b, width):
    """The source lane by the pseudocode of PTX ISA, "shfl.sync", with the operand c that guide and compiler give it."""
    clamp = 0 if mode == "up" else 0x1F
    segment = 32 - width
    b &= 0x1F
    most = (lane & segment) | (clamp & ~segment & 0x1F)
    least = lane & segment
    j, taken = {
        "up": (lane - b, lane - b >= most),
        "down": (lane + b, lane + b <= most),
        "xor": (lane ^ b, (lane ^ b) <= most),
        "idx": (least | (b & ~segment & 0x1F), True),
    }[mode]
    return j if taken else lane


@is_correct
@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
def test_shuffles_agree_with_the_pseudocode_of_the_manual(width):
    x = torch.randn(32)
    for operand in (0, 1, 2, 5, 15, 17, 31):
        for mode, y in shuffled(x, operand, width).items():
            assert y == [x[shfl(mode, lane, operand, width)].item() for lane in ALL_LANES], (mode, operand)


@is_correct
def test_each_lane_may_name_another_one_to_shuffle_from():
    x, lanes = torch.randn(32), torch.randperm(32)
    assert shuffled(x, lanes, 32)["idx"] == x[lanes].tolist()


@is_correct
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("int", torch.int32), ("unsigned", torch.int32), ("double", torch.float64), ("long", torch.int64)],
)
def test_shuffles_keep_all_bits_of_every_type(kind, dtype):
    if dtype == torch.float64:
        x = torch.randn(32, dtype=dtype)
    else:
        x = torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (32,), dtype=dtype)
    y = shuffled(x, 1, 32, kind)
    assert y["idx"] == [x[1].item()] * 32
    assert y["xor"] == x[torch.arange(32) ^ 1].tolist()
    assert y["up"] == [x[0].item(), *x[:-1].tolist()]
    assert y["down"] == [*x[1:].tolist(), x[-1].item()]


@is_correct
def test_lanes_shuffle_among_those_of_their_mask_in_branches():
    x, y = torch.arange(32, dtype=torch.int32) * 3, torch.zeros(32, dtype=torch.int32)
    emulator.run("shuffle_in_branches", 1, 32, x, y)
    assert y.tolist() == [3 * ((lane - 2) % 32) + (1000 if lane % 2 == 0 else 0) for lane in ALL_LANES]


VOTES = ("ballot", "any", "all", "match_any")


def votes(kernel, predicate, x):
    y = torch.zeros(4, 32, dtype=torch.int32)
    emulator.run(kernel, 1, 32, torch.tensor(predicate).int(), torch.tensor(x).int(), y)
    return dict(zip(VOTES, y.numpy().view(np.uint32).tolist(), strict=True))


@is_correct
@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF, 1, 0x80000000, 0x7FFFFFFF, 0x12345678])
def test_votes_count_every_lane(bits):
    # Any value but zero is true; lanes 0, 4, 8 .. have x = 0, lanes 1, 5, 9 .. x = 1, and so on.
    y = votes("votes", [(-7 if bits >> lane & 1 else 0) for lane in ALL_LANES], [lane % 4 for lane in ALL_LANES])
    assert y["ballot"] == [bits] * 32
    assert y["any"] == [int(bits != 0)] * 32
    assert y["all"] == [int(bits == 0xFFFFFFFF)] * 32
    assert y["match_any"] == [0x11111111, 0x22222222, 0x44444444, 0x88888888] * 8


@is_correct
def test_votes_of_some_lanes_leave_out_the_others():
    bits = 0xFFF0FFFF
    y = votes("votes_in_a_branch", [bits >> lane & 1 for lane in ALL_LANES], [lane // 8 for lane in ALL_LANES])
    assert y["ballot"] == [0] * 16 + [0xFFF00000] * 16
    assert y["any"] == [0] * 16 + [1] * 16
    assert y["all"] == [0] * 32
    assert y["match_any"] == [0] * 16 + [0x00FF0000] * 8 + [0xFF000000] * 8
    assert votes("votes_in_a_branch", [0] * 16 + [1] * 16, [0] * 32)["all"] == [0] * 16 + [1] * 16


# Barriers and shared memory ---------------------------------------------------------------------------------------


@is_correct
def test_lanes_see_each_others_stores_after_syncwarp():
    x, y = torch.randn(64), torch.zeros(64)
    emulator.run("warp_exchange", 1, 64, x, y)
    assert torch.equal(y, x + 1)


@is_correct
def test_syncwarp_of_half_a_warp_joins_that_half():
    x, y = torch.randn(32), torch.zeros(32)
    emulator.run("half_warp_exchange", 1, 32, x, y)
    assert torch.equal(y, torch.cat([x[:16].flip(0), -x[16:].flip(0)]))


@is_correct
@pytest.mark.parametrize("threads", [1, 31, 33, 64, 1024])
def test_threads_see_each_others_stores_after_syncthreads(threads):
    x, y = torch.randn(threads), torch.zeros(threads)
    emulator.run("block_exchange", 1, threads, x, y)
    assert torch.equal(y, x.flip(0))


@is_correct
def test_named_barriers_join_the_warps_that_name_them_and_no_others():
    x, y = torch.randn(2, 64), torch.zeros(2, 64)
    emulator.run("two_barriers", 1, 128, x, y)
    assert torch.equal(y, x.flip(1))


@is_correct
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_producers_arrive_and_consumers_wait(steps):
    x, y = torch.randn(steps, 64), torch.zeros(steps, 64)
    emulator.run("producer_consumer", 1, 128, x, y, steps)
    assert torch.equal(y, x.flip(1))


@is_correct
def test_static_arrays_of_a_block_are_aligned_and_apart():
    x, y, addresses = torch.randn(3, 37), torch.zeros(3, 37), torch.full((3, 3), -1, dtype=torch.int32)
    emulator.run("static_shared", 3, 64, x, y, addresses)
    assert torch.equal(y, x)
    assert addresses.tolist() == [[0, 0, 0]] * 3


@is_correct
@pytest.mark.parametrize("n", [1, 33, 12288, 20000])
def test_dynamic_shared_memory_is_as_large_as_asked_for_and_aligned_to_128_bytes(n):
    x, y, addresses = torch.randn(2, n), torch.zeros(2, n), torch.full((2,), -1, dtype=torch.int32)
    emulator.run("dynamic_shared", 2, 64, x, y, addresses, n, shared_bytes=4 * n)
    assert torch.equal(y, x.flip(1))
    assert addresses.tolist() == [0, 0]


@pytest.mark.parametrize("kernel", ["uninitialised_shared", "uninitialised_dynamic_shared"])
def test_every_block_begins_with_poison_in_shared_memory(kernel):
    y = torch.zeros(3, 32)
    with emulator.settings(build="plain"):
        emulator.run(kernel, 3, 32, y, shared_bytes=128)
    assert (y != 0).all()
    assert (y != 42).all()  # what the block before has left


# Atomics ----------------------------------------------------------------------------------------------------------

ATOMICS = {"int": np.int32, "unsigned": np.uint32, "long": np.uint64, "float": np.float32, "double": np.float64}
PLACES = pytest.mark.parametrize("where", ["", "shared_"])


def atomics(kind, where, x, start):
    """Cells and what each thread found, of add, max, min, exchange and compare and swap."""
    cells, found = np.array(start, ATOMICS[kind]), np.zeros((5, len(x)), ATOMICS[kind])
    emulator.run(f"{where}atomics_{kind}", 1, len(x), *map(torch.from_numpy, (x, cells, found)))
    return cells, found


@is_correct
@PLACES
@pytest.mark.parametrize("kind", ATOMICS)
def test_atomics_lose_nothing_and_return_what_was_there(kind, where):
    x = np.random.default_rng(0).permutation(np.arange(1, 97)).astype(ATOMICS[kind])
    cells, (added, _, _, exchanged, _) = atomics(kind, where, x, [5, 0, 0, 7, 0])
    turns = np.argsort(added)  # each found the sum of those before it
    assert np.array_equal(added[turns], 5 + np.cumsum(x[turns]) - x[turns])
    assert cells[0] == 5 + x.sum()
    if kind != "double":  # each found what another one left, or what was there first
        assert sorted([*exchanged, cells[3]]) == sorted([*x, 7])


@is_correct
@PLACES
@pytest.mark.parametrize("kind", ["int", "unsigned", "long"])
def test_atomics_compare_as_their_type_says(kind, where):
    limits = np.iinfo(ATOMICS[kind])
    x = np.arange(1, 97).astype(ATOMICS[kind])
    x[40], x[50] = limits.max, limits.min
    cells, (_, largest, smallest, _, swapped) = atomics(kind, where, x, [0, 50, 20, 0, 0])
    assert (cells[1], cells[2]) == (limits.max, limits.min)
    assert 50 in largest
    assert 20 in smallest
    assert (largest >= 50).all()
    assert (smallest <= 20).all()
    [winner] = set(swapped[swapped != 0])  # put in place of zero by one, and found by those after it
    assert cells[4] == winner
    assert winner in x


@is_correct
def test_compare_and_swap_finds_the_largest():
    x, cell = torch.rand(4, 64), torch.zeros(1)
    emulator.run("atomic_loop", 4, 64, x, cell)
    assert cell.item() == x.max().item()


# Copies from global to shared memory ------------------------------------------------------------------------------


@is_correct
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_read_the_bytes_asked_for_and_fill_up_with_zeros(size):
    x = torch.randint(1, 256, (32 * size,), dtype=torch.uint8)
    bytes_read, y = torch.arange(32, dtype=torch.int32) % (size + 1), torch.full_like(x, 99)
    emulator.run(f"copy_{size}_bytes", 1, 32, x, bytes_read, y)
    kept = torch.arange(size) < bytes_read[:, None]
    assert torch.equal(y.view(32, size), x.view(32, size) * kept)


@is_correct
def test_groups_of_copies_land_in_order_and_empty_ones_count():
    x, y = torch.randn(4, 32), torch.zeros(4, 32)
    emulator.run("copy_groups", 1, 32, x, y)
    assert torch.equal(y, x)


@is_correct
@pytest.mark.parametrize("threads", [32, 128])
def test_copies_are_seen_by_others_after_wait_and_barrier(threads):
    x, y = torch.randn(threads, 4), torch.zeros(threads, 4)
    emulator.run("copy_for_others", 1, threads, x, y)
    assert torch.equal(y, x.flip(0))


# Fragments --------------------------------------------------------------------------------------------------------
#
# The figures of PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix Fragments for
# mma.m16n8k8" (.tf32) and "ldmatrix": a line for each row of the matrix; a word says which thread holds the next
# elements of the row, and as which of its own. Two elements of 16 bits are in a register, the first one in its lower
# half. MMA_C serves both shapes.

MMA_16816_A = """
T0:a0,a1  T1:a0,a1  T2:a0,a1  T3:a0,a1  T0:a4,a5  T1:a4,a5  T2:a4,a5  T3:a4,a5
T4:a0,a1  T5:a0,a1  T6:a0,a1  T7:a0,a1  T4:a4,a5  T5:a4,a5  T6:a4,a5  T7:a4,a5
T8:a0,a1  T9:a0,a1  T10:a0,a1 T11:a0,a1 T8:a4,a5  T9:a4,a5  T10:a4,a5 T11:a4,a5
T12:a0,a1 T13:a0,a1 T14:a0,a1 T15:a0,a1 T12:a4,a5 T13:a4,a5 T14:a4,a5 T15:a4,a5
T16:a0,a1 T17:a0,a1 T18:a0,a1 T19:a0,a1 T16:a4,a5 T17:a4,a5 T18:a4,a5 T19:a4,a5
T20:a0,a1 T21:a0,a1 T22:a0,a1 T23:a0,a1 T20:a4,a5 T21:a4,a5 T22:a4,a5 T23:a4,a5
T24:a0,a1 T25:a0,a1 T26:a0,a1 T27:a0,a1 T24:a4,a5 T25:a4,a5 T26:a4,a5 T27:a4,a5
T28:a0,a1 T29:a0,a1 T30:a0,a1 T31:a0,a1 T28:a4,a5 T29:a4,a5 T30:a4,a5 T31:a4,a5
T0:a2,a3  T1:a2,a3  T2:a2,a3  T3:a2,a3  T0:a6,a7  T1:a6,a7  T2:a6,a7  T3:a6,a7
T4:a2,a3  T5:a2,a3  T6:a2,a3  T7:a2,a3  T4:a6,a7  T5:a6,a7  T6:a6,a7  T7:a6,a7
T8:a2,a3  T9:a2,a3  T10:a2,a3 T11:a2,a3 T8:a6,a7  T9:a6,a7  T10:a6,a7 T11:a6,a7
T12:a2,a3 T13:a2,a3 T14:a2,a3 T15:a2,a3 T12:a6,a7 T13:a6,a7 T14:a6,a7 T15:a6,a7
T16:a2,a3 T17:a2,a3 T18:a2,a3 T19:a2,a3 T16:a6,a7 T17:a6,a7 T18:a6,a7 T19:a6,a7
T20:a2,a3 T21:a2,a3 T22:a2,a3 T23:a2,a3 T20:a6,a7 T21:a6,a7 T22:a6,a7 T23:a6,a7
T24:a2,a3 T25:a2,a3 T26:a2,a3 T27:a2,a3 T24:a6,a7 T25:a6,a7 T26:a6,a7 T27:a6,a7
T28:a2,a3 T29:a2,a3 T30:a2,a3 T31:a2,a3 T28:a6,a7 T29:a6,a7 T30:a6,a7 T31:a6,a7
"""
MMA_16816_B = """
T0:b0  T4:b0  T8:b0  T12:b0 T16:b0 T20:b0 T24:b0 T28:b0
T0:b1  T4:b1  T8:b1  T12:b1 T16:b1 T20:b1 T24:b1 T28:b1
T1:b0  T5:b0  T9:b0  T13:b0 T17:b0 T21:b0 T25:b0 T29:b0
T1:b1  T5:b1  T9:b1  T13:b1 T17:b1 T21:b1 T25:b1 T29:b1
T2:b0  T6:b0  T10:b0 T14:b0 T18:b0 T22:b0 T26:b0 T30:b0
T2:b1  T6:b1  T10:b1 T14:b1 T18:b1 T22:b1 T26:b1 T30:b1
T3:b0  T7:b0  T11:b0 T15:b0 T19:b0 T23:b0 T27:b0 T31:b0
T3:b1  T7:b1  T11:b1 T15:b1 T19:b1 T23:b1 T27:b1 T31:b1
T0:b2  T4:b2  T8:b2  T12:b2 T16:b2 T20:b2 T24:b2 T28:b2
T0:b3  T4:b3  T8:b3  T12:b3 T16:b3 T20:b3 T24:b3 T28:b3
T1:b2  T5:b2  T9:b2  T13:b2 T17:b2 T21:b2 T25:b2 T29:b2
T1:b3  T5:b3  T9:b3  T13:b3 T17:b3 T21:b3 T25:b3 T29:b3
T2:b2  T6:b2  T10:b2 T14:b2 T18:b2 T22:b2 T26:b2 T30:b2
T2:b3  T6:b3  T10:b3 T14:b3 T18:b3 T22:b3 T26:b3 T30:b3
T3:b2  T7:b2  T11:b2 T15:b2 T19:b2 T23:b2 T27:b2 T31:b2
T3:b3  T7:b3  T11:b3 T15:b3 T19:b3 T23:b3 T27:b3 T31:b3
"""
MMA_1688_A = """
T0:a0  T1:a0  T2:a0  T3:a0  T0:a2  T1:a2  T2:a2  T3:a2
T4:a0  T5:a0  T6:a0  T7:a0  T4:a2  T5:a2  T6:a2  T7:a2
T8:a0  T9:a0  T10:a0 T11:a0 T8:a2  T9:a2  T10:a2 T11:a2
T12:a0 T13:a0 T14:a0 T15:a0 T12:a2 T13:a2 T14:a2 T15:a2
T16:a0 T17:a0 T18:a0 T19:a0 T16:a2 T17:a2 T18:a2 T19:a2
T20:a0 T21:a0 T22:a0 T23:a0 T20:a2 T21:a2 T22:a2 T23:a2
T24:a0 T25:a0 T26:a0 T27:a0 T24:a2 T25:a2 T26:a2 T27:a2
T28:a0 T29:a0 T30:a0 T31:a0 T28:a2 T29:a2 T30:a2 T31:a2
T0:a1  T1:a1  T2:a1  T3:a1  T0:a3  T1:a3  T2:a3  T3:a3
T4:a1  T5:a1  T6:a1  T7:a1  T4:a3  T5:a3  T6:a3  T7:a3
T8:a1  T9:a1  T10:a1 T11:a1 T8:a3  T9:a3  T10:a3 T11:a3
T12:a1 T13:a1 T14:a1 T15:a1 T12:a3 T13:a3 T14:a3 T15:a3
T16:a1 T17:a1 T18:a1 T19:a1 T16:a3 T17:a3 T18:a3 T19:a3
T20:a1 T21:a1 T22:a1 T23:a1 T20:a3 T21:a3 T22:a3 T23:a3
T24:a1 T25:a1 T26:a1 T27:a1 T24:a3 T25:a3 T26:a3 T27:a3
T28:a1 T29:a1 T30:a1 T31:a1 T28:a3 T29:a3 T30:a3 T31:a3
"""
MMA_1688_B = """
T0:b0  T4:b0  T8:b0  T12:b0 T16:b0 T20:b0 T24:b0 T28:b0
T1:b0  T5:b0  T9:b0  T13:b0 T17:b0 T21:b0 T25:b0 T29:b0
T2:b0  T6:b0  T10:b0 T14:b0 T18:b0 T22:b0 T26:b0 T30:b0
T3:b0  T7:b0  T11:b0 T15:b0 T19:b0 T23:b0 T27:b0 T31:b0
T0:b1  T4:b1  T8:b1  T12:b1 T16:b1 T20:b1 T24:b1 T28:b1
T1:b1  T5:b1  T9:b1  T13:b1 T17:b1 T21:b1 T25:b1 T29:b1
T2:b1  T6:b1  T10:b1 T14:b1 T18:b1 T22:b1 T26:b1 T30:b1
T3:b1  T7:b1  T11:b1 T15:b1 T19:b1 T23:b1 T27:b1 T31:b1
"""
MMA_C = """
T0:c0,c1  T1:c0,c1  T2:c0,c1  T3:c0,c1
T4:c0,c1  T5:c0,c1  T6:c0,c1  T7:c0,c1
T8:c0,c1  T9:c0,c1  T10:c0,c1 T11:c0,c1
T12:c0,c1 T13:c0,c1 T14:c0,c1 T15:c0,c1
T16:c0,c1 T17:c0,c1 T18:c0,c1 T19:c0,c1
T20:c0,c1 T21:c0,c1 T22:c0,c1 T23:c0,c1
T24:c0,c1 T25:c0,c1 T26:c0,c1 T27:c0,c1
T28:c0,c1 T29:c0,c1 T30:c0,c1 T31:c0,c1
T0:c2,c3  T1:c2,c3  T2:c2,c3  T3:c2,c3
T4:c2,c3  T5:c2,c3  T6:c2,c3  T7:c2,c3
T8:c2,c3  T9:c2,c3  T10:c2,c3 T11:c2,c3
T12:c2,c3 T13:c2,c3 T14:c2,c3 T15:c2,c3
T16:c2,c3 T17:c2,c3 T18:c2,c3 T19:c2,c3
T20:c2,c3 T21:c2,c3 T22:c2,c3 T23:c2,c3
T24:c2,c3 T25:c2,c3 T26:c2,c3 T27:c2,c3
T28:c2,c3 T29:c2,c3 T30:c2,c3 T31:c2,c3
"""
LDMATRIX = """
T0:r0,r1  T1:r0,r1  T2:r0,r1  T3:r0,r1
T4:r0,r1  T5:r0,r1  T6:r0,r1  T7:r0,r1
T8:r0,r1  T9:r0,r1  T10:r0,r1 T11:r0,r1
T12:r0,r1 T13:r0,r1 T14:r0,r1 T15:r0,r1
T16:r0,r1 T17:r0,r1 T18:r0,r1 T19:r0,r1
T20:r0,r1 T21:r0,r1 T22:r0,r1 T23:r0,r1
T24:r0,r1 T25:r0,r1 T26:r0,r1 T27:r0,r1
T28:r0,r1 T29:r0,r1 T30:r0,r1 T31:r0,r1
"""
LDMATRIX_TRANS = """
T0:r0  T4:r0  T8:r0  T12:r0 T16:r0 T20:r0 T24:r0 T28:r0
T0:r1  T4:r1  T8:r1  T12:r1 T16:r1 T20:r1 T24:r1 T28:r1
T1:r0  T5:r0  T9:r0  T13:r0 T17:r0 T21:r0 T25:r0 T29:r0
T1:r1  T5:r1  T9:r1  T13:r1 T17:r1 T21:r1 T25:r1 T29:r1
T2:r0  T6:r0  T10:r0 T14:r0 T18:r0 T22:r0 T26:r0 T30:r0
T2:r1  T6:r1  T10:r1 T14:r1 T18:r1 T22:r1 T26:r1 T30:r1
T3:r0  T7:r0  T11:r0 T15:r0 T19:r0 T23:r0 T27:r0 T31:r0
T3:r1  T7:r1  T11:r1 T15:r1 T19:r1 T23:r1 T27:r1 T31:r1
"""


def elements(figure):
    """(row, column) -> (thread, element) of a figure."""
    found = {}
    for row, line in enumerate(figure.strip().splitlines()):
        words = [re.fullmatch(r"T(\d+):(.*)", word).groups() for word in line.split()]
        held = [(int(thread), int(name[1:])) for thread, names in words for name in names.split(",")]
        found.update({(row, column): place for column, place in enumerate(held)})
    return found


@pytest.mark.parametrize(
    ("figure", "shape", "of_a_thread"),
    [
        (MMA_16816_A, (16, 16), 8),
        (MMA_16816_B, (16, 8), 4),
        (MMA_1688_A, (16, 8), 4),
        (MMA_1688_B, (8, 8), 2),
        (MMA_C, (16, 8), 4),
        (LDMATRIX, (8, 8), 2),
        (LDMATRIX_TRANS, (8, 8), 2),
    ],
)
def test_figures_have_every_element_of_matrix_and_threads_once(figure, shape, of_a_thread):
    places = elements(figure)
    assert list(places) == list(np.ndindex(shape))
    assert sorted(places.values()) == [(thread, n) for thread in ALL_LANES for n in range(of_a_thread)]


def fragments(matrix, figure):
    """[32, elements of a thread]"""
    places = elements(figure)
    held = np.zeros((32, len(places) // 32), matrix.dtype)
    for at, place in places.items():
        held[place] = matrix[at]
    return held


@is_correct
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_the_fragments_of_the_manual(count, trans):
    generator = np.random.default_rng(count)
    memory = generator.permutation(1 << 16)[: 32 * 8].reshape(32, 8).astype(np.uint16)
    # PTX ISA, "ldmatrix": threads 0-7 have the addresses of the first matrix's rows, 8-15 of the second's, 16-23 of the
    # third's and 24-31 of the fourth's; those of further threads are not used.
    rows = generator.permutation(32).astype(np.int32)
    registers = np.zeros((32, count), np.uint32)
    kernel = f"ldmatrix_x{count}" + "_trans" * trans
    emulator.run(kernel, 1, 32, *map(torch.from_numpy, (memory.view(np.int16), rows, registers.view(np.int32))))
    for n in range(count):
        matrix = memory[rows[8 * n : 8 * n + 8]]
        expected = fragments(matrix, LDMATRIX_TRANS if trans else LDMATRIX)
        assert np.array_equal(registers.view(np.uint16).reshape(32, count, 2)[:, n], expected)


def cast(matrix, dtype):
    """fp32 numbers in this dtype, as bits: 16, or all 32 with those below tf32's set at random."""
    if dtype == "tf32":
        noise = np.random.default_rng(0).integers(0, 1 << 13, matrix.shape, dtype=np.uint32)
        return matrix.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000) | noise
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return torch.from_numpy(matrix.astype(np.float32)).to(kind).view(torch.int16).numpy().view(np.uint16)


def multiplied(dtype, a, b, c):
    """d = a b + c as the emulator multiplies fragments."""
    figures = (MMA_1688_A, MMA_1688_B) if dtype == "tf32" else (MMA_16816_A, MMA_16816_B)
    registers = [
        np.ascontiguousarray(fragments(cast(matrix, dtype), figure)).view(np.int32)
        for matrix, figure in zip((a, b), figures, strict=True)
    ]
    d = fragments(c.astype(np.float32), MMA_C)
    emulator.run(f"mma_{dtype}", 1, 32, *map(torch.from_numpy, (*registers, d)))
    result = np.zeros((16, 8), np.float32)
    for at, place in elements(MMA_C).items():
        result[at] = d[place]
    return result


MMA_DTYPES = pytest.mark.parametrize(("dtype", "k"), [("bf16", 16), ("fp16", 16), ("tf32", 8)])


@is_correct
@MMA_DTYPES
def test_mma_of_whole_numbers_is_exact(dtype, k):
    generator = np.random.default_rng(0)
    for _ in range(3):
        a, b, c = (generator.integers(-100, 100, shape) for shape in ((16, k), (k, 8), (16, 8)))
        assert np.array_equal(multiplied(dtype, a, b, c), a @ b + c)


@is_correct
@MMA_DTYPES
def test_mma_of_one_element_each_puts_the_product_where_row_and_column_meet(dtype, k):
    for row, column, inner in ((0, 0, 0), (15, 7, k - 1), (8, 3, 1), (7, 4, k // 2), (3, 6, k // 2 - 1)):
        a, b, c = np.zeros((16, k)), np.zeros((k, 8)), np.zeros((16, 8))
        a[row, inner], b[inner, column] = 3.0, 0.5
        c[row, column] = 1.0
        expected = np.zeros((16, 8))
        expected[row, column] = 2.5
        assert np.array_equal(multiplied(dtype, a, b, c), expected)


@is_correct
@MMA_DTYPES
def test_mma_accumulates_in_fp32_and_passes_on_what_is_not_finite(dtype, k):
    stored = torch.bfloat16 if dtype == "bf16" else torch.float16  # whose numbers tf32 has too
    a, b, c = (torch.randn(shape) for shape in ((16, k), (k, 8), (16, 8)))
    a, b, c = a.to(stored).double().numpy(), b.to(stored).double().numpy(), c.numpy()
    error = np.abs(multiplied(dtype, a, b, c) - (a @ b + c))
    assert (error <= (np.abs(a) @ np.abs(b) + np.abs(c)) * (k + 1) * 2.0**-23).all()
    a[2, 1], b[1, :] = np.inf, [0, 1, -1, 2, -2, 3, -3, np.nan]
    d = multiplied(dtype, a, b, c)[2]
    assert np.isnan(d[[0, 7]]).all()
    assert d[1:7].tolist() == [np.inf, -np.inf] * 3


# Arithmetic -------------------------------------------------------------------------------------------------------

FLOATS = [
    "__expf",
    "exp2_approx",
    "__logf",
    "__log2f",
    "__fdividef",
    "__frcp_rn",
    "__fsqrt_rn",
    "rsqrtf",
    "__fmul_rn",
    "__fadd_rn",
    "__fmaf_rn",
    "mul_then_add",
    "fminf",
    "fmaxf",
    "int_bits",
    "unsigned_bits",
]


def float_intrinsics(x, z):
    x, z = (np.asarray(v, np.float32) for v in (x, z))
    y = np.zeros((len(FLOATS), len(x)), np.float32)
    threads = next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if len(x) % n == 0)
    emulator.run("float_intrinsics", len(x) // threads, threads, *map(torch.from_numpy, (x, z, y)))
    return dict(zip(FLOATS, y, strict=True))


def ulps(y, exact):
    return np.abs(y.astype(np.float64) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


@is_correct
def test_fast_functions_err_no_more_than_the_manual_allows():
    generator = np.random.default_rng(0)
    n = 512
    x = generator.uniform(-80, 80, n).astype(np.float32)
    z = np.where(np.arange(n) % 2, 1, -1) * np.exp2(generator.uniform(-60, 60, n)).astype(np.float32)
    positive = np.abs(z).astype(np.float32)
    near_one = np.exp2(generator.uniform(-1, 1, n)).astype(np.float32)
    # Guide, "Mathematical Functions", table of intrinsic functions, and PTX ISA, "ex2".
    y = float_intrinsics(x, z)
    assert (ulps(y["__expf"], np.exp(x.astype(np.float64))) <= 2 + np.floor(np.abs(1.173 * x))).all()
    assert (ulps(y["exp2_approx"], np.exp2(x.astype(np.float64))) <= 2).all()
    assert (ulps(y["__fdividef"], x.astype(np.float64) / z) <= 2).all()
    y = float_intrinsics(near_one, z)
    assert (np.abs(y["__logf"] - np.log(near_one.astype(np.float64))) <= 2**-21.41).all()
    assert (np.abs(y["__log2f"] - np.log2(near_one.astype(np.float64))) <= 2**-22).all()
    outside = positive[(positive < 0.5) | (positive > 2)][:496]
    y = float_intrinsics(outside, outside)
    assert (ulps(y["__logf"], np.log(outside.astype(np.float64))) <= 3).all()
    assert (ulps(y["__log2f"], np.log2(outside.astype(np.float64))) <= 2).all()
    assert (ulps(y["rsqrtf"], 1 / np.sqrt(outside.astype(np.float64))) <= 2).all()


@is_correct
def test_rounded_functions_are_exact():
    generator = np.random.default_rng(1)
    x, z = (generator.standard_normal(512).astype(np.float32) for _ in range(2))
    x64, z64 = x.astype(np.float64), z.astype(np.float64)
    y = float_intrinsics(x, z)
    assert np.array_equal(y["__frcp_rn"], np.float32(1) / x)
    assert np.array_equal(y["__fmul_rn"], x * z)
    assert np.array_equal(y["__fadd_rn"], x + z)
    assert np.array_equal(y["__fmaf_rn"], (x64 * z64 + x64).astype(np.float32))
    assert np.array_equal(y["mul_then_add"], x * z + x)  # rounded twice: never joined to one instruction
    assert not np.array_equal(y["mul_then_add"], y["__fmaf_rn"])
    assert np.array_equal(y["int_bits"].view(np.int32), x.view(np.int32) ^ 0x40000000)
    assert np.array_equal(y["unsigned_bits"], -x)
    y = float_intrinsics(np.abs(x), z)
    assert np.array_equal(y["__fsqrt_rn"], np.sqrt(np.abs(x)))


@is_correct
def test_functions_take_infinities_and_nan_as_the_manual_says():
    inf, nan = np.inf, np.nan
    x = [0.0, -0.0, inf, -inf, nan, -130.0, 130.0, 1.0]
    z = [nan, 1.0, nan, 2.0, 3.0, nan, -inf, 2.0]
    y = {name: list(map(float, values)) for name, values in float_intrinsics(x, z).items()}

    def same(values, expected):
        return np.array_equal(values, np.array(expected, np.float32), equal_nan=True)

    # PTX ISA, "ex2": subnormal results are flushed to zero.
    assert same(y["exp2_approx"], [1, 1, inf, 0, nan, 0, inf, 2])
    assert same(y["__expf"][:5], [1, 1, inf, 0, nan])
    assert same(y["__logf"][:5], [-inf, -inf, inf, nan, nan])
    assert same(y["__log2f"][:5], [-inf, -inf, inf, nan, nan])
    assert same(y["__frcp_rn"][:5], [inf, -inf, 0, 0, nan])
    assert same(y["rsqrtf"][:5], [inf, -inf, 0, nan, nan])
    assert same(y["__fsqrt_rn"][:5], [0, -0.0, inf, nan, nan])
    # One NaN is no operand of a minimum or maximum.
    assert same(y["fminf"], [0, -0.0, inf, -inf, 3, -130, -inf, 1])
    assert same(y["fmaxf"], [0, 1, inf, 2, 3, -130, 130, 2])


@is_correct
def test_fast_division_by_huge_numbers_is_zero():
    # Guide, "Single-Precision Floating-Point Functions": for 2^126 < |y| < 2^128, __fdividef(x, y) is zero.
    y = float_intrinsics([1.0, -3.0, 1.0, 2.0**100], [2.0**127, -(2.0**127), 2.0**126, 1.5 * 2.0**126])["__fdividef"]
    assert y.tolist() == [0, 0, 2.0**-126, 0]


@is_correct
def test_int_functions_count_and_compare_bits_as_their_types_say():
    a = np.array([0, 1, -1, 2**31 - 1, -(2**31), 0x12345678, 6, -2, 80, 7, 1 << 16, 3], np.int32)
    b = np.array([0, -1, 1, -(2**31), 2**31 - 1, -559038737, 7, -3, 1 << 20, 7, 5, -4], np.int32)
    y = np.zeros((13, len(a)), np.int64)
    emulator.run("int_intrinsics", 1, len(a), *map(torch.from_numpy, (a, b, y)))
    for i, (s, t) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        u, v = s % 2**32, t % 2**32
        wide = u << 32 | v
        signed = wide - (wide >> 63 << 64)
        assert y[:, i].tolist() == [
            f"{u:b}".count("1"),
            32 - u.bit_length(),
            (u & -u).bit_length(),
            int(f"{u:032b}"[::-1], 2),
            u * v >> 32,
            f"{wide:b}".count("1"),
            64 - wide.bit_length(),
            (wide & -wide).bit_length(),
            min(s, t),
            max(s, t),
            min(u, v),
            max(u, v),
            max(signed, s),
        ]


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@is_correct
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", DTYPES)
def test_vectors_are_loaded_and_stored_element_by_element(kind, width):
    x = torch.randn(3 * 64 * width).to(DTYPES[kind])
    y = torch.zeros_like(x)
    emulator.run(f"vectors_{kind}", 3, 64, x, y, width)
    assert torch.equal(y, x * 2)


# A tensor-core kernel ---------------------------------------------------------------------------------------------

GEMM_SHAPES = [  # m, n, k
    (64, 64, 64),  # one tile
    (128, 64, 256),  # more tiles along k than buffers
    (1, 1, 1),
    (70, 130, 200),  # edges on all sides
    (33, 7, 65),  # rows that end within a piece of 16 bytes
    (65, 66, 0),  # nothing to multiply
]


def gemm(a, b, transposed=False, kernel=None):
    """a [m, k] times b [k, n], or b [n, k] if transposed. Rows are padded, and what is past their ends is NaN."""

    def padded(matrix, multiple):
        rows, cols = matrix.shape
        all_ = torch.full((rows, -(-max(cols, 1) // multiple) * multiple), float("nan"), dtype=matrix.dtype)
        all_[:, :cols] = matrix
        return all_

    (m, k), n = a.shape, b.shape[0 if transposed else 1]
    c = padded(torch.zeros(m, n), 2)
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}[a.dtype]
    a, b = padded(a, 8), padded(b, 8)
    tensors = (*map(emulator.read_only, (a, b)), c)
    numbers = (m, n, k, a.stride(0), b.stride(0), c.stride(0))
    kernel = kernel or f"gemm_{kind}" + "_transposed" * transposed
    emulator.run(kernel, (-(-n // 64), -(-m // 64)), 128, *tensors, *numbers, shared_bytes=48 << 10)
    assert c[:, n:].isnan().all()
    return c[:, :n]


@is_correct
@pytest.mark.parametrize("shape", GEMM_SHAPES, ids=str)
def test_gemm_of_whole_numbers_is_exact(shape):
    m, n, k = shape
    a, b = torch.randint(-8, 9, (m, k)), torch.randint(-8, 9, (k, n))
    expected = (a @ b).float()
    assert torch.equal(gemm(a.bfloat16(), b.bfloat16()), expected)
    assert torch.equal(gemm(a.half(), b.T.contiguous().half(), transposed=True), expected)


@pytest.mark.parametrize("landing", ["lazy", "eager"])
def test_gemm_is_exact_as_nvcc_compiled_it(landing):
    a, b = torch.randint(-8, 9, (70, 100)), torch.randint(-8, 9, (100, 66))
    with emulator.settings(build="ptx", landing=landing):
        assert torch.equal(gemm(a.bfloat16(), b.bfloat16()), (a @ b).float())
        assert torch.equal(gemm(a.half(), b.T.contiguous().half(), transposed=True), (a @ b).float())
        used = emulator.instructions(lambda: gemm(a.bfloat16(), b.bfloat16()))["gemm_bf16"]
    assert {"mma", "ldmatrix", "cp", "bar"} <= {opcode.split(".")[0] for opcode in used}


def test_gemm_is_as_precise_as_fp32_accumulation():
    for dtype, transposed in itertools.product((torch.bfloat16, torch.float16), (False, True)):
        a, b = torch.randn(70, 200).to(dtype), torch.randn(200, 66).to(dtype)
        c = gemm(a, b.T.contiguous() if transposed else b, transposed)
        bound = (a.double().abs() @ b.double().abs()) * 200 * 2.0**-24
        assert ((c - a.double() @ b.double()).abs() <= bound).all()


def gemm_results():
    torch.manual_seed(0)
    a, b = torch.randn(70, 200), torch.randn(200, 66)
    return [gemm(a.bfloat16(), b.bfloat16()), gemm(a.half(), b.T.contiguous().half(), transposed=True)]


def norm_results():
    """Outputs and gradients of the norms: narrow rows, a row of several warps, odd ones, and one in three passes."""
    torch.manual_seed(0)
    results = []
    for op, shape, dtype in [
        ("layer_norm", (5, 96), torch.float32),
        ("layer_norm", (2, 1600), torch.bfloat16),
        ("rms_norm", (9, 101), torch.float16),
        ("layer_norm", (1, 8193), torch.float32),
        ("add_layer_norm", (2, 640), torch.bfloat16),
        ("add_rms_norm", (40, 32), torch.float32),
    ]:
        x = torch.randn(shape).to(dtype).requires_grad_()
        residual = [torch.randn(shape).requires_grad_()] * op.startswith("add")
        parameters = {"weight": torch.randn(shape[-1]).requires_grad_()}
        if "layer" in op:
            parameters["bias"] = torch.randn(shape[-1]).requires_grad_()
        with fastlm.use_backend("emulator"):
            outputs = getattr(F, op)(x, *residual, shape[-1:], **parameters)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [x, *residual, *parameters.values()]
            gradients = torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])
        results += [y.detach() for y in outputs] + list(gradients)
    return results


def calls(test):
    """The arguments of a parametrized test, of each call."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        arguments = {}
        for mark, value in zip(marks, values, strict=True):
            names = mark.args[0]
            arguments.update({names: value} if isinstance(names, str) else zip(names, value, strict=True))
        yield arguments


@functools.cache
def first_results():
    with emulator.settings(**COMBINATIONS[0]):
        return [*gemm_results(), *norm_results()]


def check_correct_kernels(combination):
    """Runs the tests of correct kernels this way; the gemm's and the norms' bits are those of any other."""
    with emulator.settings(**combination):
        for test in correct:
            for arguments in calls(test):
                test(**arguments)
        for one, other in zip(first_results(), [*gemm_results(), *norm_results()], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("build", ["plain", "trace"])
@pytest.mark.parametrize("results", [gemm_results, norm_results])
def test_results_are_the_same_to_the_bit_in_a_few_orders(results, build):
    first = results()
    for combination in FEW:
        with emulator.settings(build=build, **combination):
            for one, other in zip(first, results(), strict=True):
                assert torch.equal(one, other)


@pytest.mark.proof
@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("build", ["plain", "trace"])
def test_correct_kernels_raise_nothing_and_give_the_same_bits_in_any_order(build, combination):
    with emulator.settings(build=build):
        check_correct_kernels(combination)


@pytest.mark.proof
def test_sanitizers_find_nothing_in_correct_kernels():
    report = with_sanitizers("for each in test_emulator.FEW: test_emulator.check_correct_kernels(each)")
    assert report.returncode == 0, report.stderr


def with_sanitizers(code):
    """Runs Python in a process of its own, where kernels run in the build with sanitizers."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); import test_emulator\n{code}"
    environment = emulator.environment("address")
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=TESTS, text=True, capture_output=True)


# Seeded bugs ------------------------------------------------------------------------------------------------------


class Bug(NamedTuple):
    """How to run a kernel of bugs.cu, and what is said of it.

    Args:
        words: a pattern that the error has.
        block, grid, numbers, shared_bytes: of the launch.
        tensors: its tensors, or their sizes.
        at: the block and thread, where no other one can be named.
    """

    words: str
    block: int = 32
    tensors: tuple = (32, 32)
    numbers: tuple = ()
    grid: int = 1
    shared_bytes: int = 0
    at: str = ""


def launch(kernel, bug):
    tensors = [torch.randn(tensor) if isinstance(tensor, int) else tensor for tensor in bug.tensors]
    emulator.run(kernel, bug.grid, bug.block, *tensors, *bug.numbers, shared_bytes=bug.shared_bytes)
    return tensors


def marked(file, kernel, comment="// BUG"):
    """file:line of the lines of a kernel with a comment."""
    lines = (KERNELS / file).read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(f"PROOF_KERNEL({kernel})"))
    on_one_line = lines[begin].split("//")[0].rstrip().endswith("}")
    end = begin if on_one_line else lines.index("}", begin)
    found = [f"{file}:{n + 1}" for n in range(begin, end + 1) if lines[n].endswith(comment)]
    assert found, kernel
    return found


def assert_names_its_place(message, kernel, bug):
    assert re.search(bug.words, message), message
    assert kernel in message
    assert re.search(r"block \(\d+, \d+, \d+\)", message), message
    assert re.search(r"thread \(\d+, \d+, \d+\)", message), message
    assert bug.at in message, message
    assert any(re.search(re.escape(place) + r"\b", message) for place in marked("bugs.cu", kernel)), message


THREAD_31 = "block (0, 0, 0), thread (31, 0, 0)"
ROWS = torch.zeros(32, 8, dtype=torch.int16)

# What cannot be run any further: seen by every build.
COLLECTIVES = {
    "divergent_shuffle": Bug("shfl_xor"),
    "shuffle_from_an_absent_lane": Bug("lane [0-9]+, which does not take part"),
    "shuffle_without_its_own_lane": Bug("mask lacks|does not take part"),
    "shuffles_with_two_masks": Bug("shfl_xor"),
    "shuffle_meets_vote": Bug("divergent"),
    "shuffle_after_return": Bug("lane 31|exit"),
    "divergent_mma": Bug("mma"),
    "divergent_ldmatrix": Bug("ldmatrix"),
    "divergent_syncwarp": Bug("syncwarp|exit"),
    "barrier_in_a_branch": Bug("divergent barrier"),
    "barrier_of_some": Bug("barrier", block=64, tensors=(64, 64)),
    "return_before_barrier": Bug("barrier", block=64, tensors=(64, 64)),
    "one_barrier_more": Bug("exit", block=64, tensors=()),
    "barrier_for_more": Bug("deadlock|exit", block=64, tensors=()),
    "barrier_for_half_a_warp": Bug("multiple of 32", block=64, tensors=()),
    "barrier_with_two_counts": Bug("96|exited", block=64, tensors=()),
    "barrier_out_of_range": Bug("0 to 15", block=64, tensors=(), numbers=(16,)),
    "barriers_in_two_orders": Bug("deadlock", block=64, tensors=()),
}
# What runs, and may even give the right result.
TRACED = {
    "missing_barrier": Bug("race", block=64, tensors=(64, 64)),
    "missing_syncwarp": Bug("race"),
    "syncwarp_between_warps": Bug("race", block=64, tensors=(64, 64)),
    "reused_buffer": Bug("race", block=64, tensors=(256, 256), numbers=(4,)),
    "reused_copy_buffer": Bug("race|copy in flight", block=64, tensors=(256, 256), numbers=(4,)),
    "global_race": Bug("race", block=64, tensors=(64, 64, 64)),
    "two_blocks_one_element": Bug("race.*another block", grid=2, tensors=(64, 32)),
    "block_reads_another": Bug("race.*another block", grid=2, tensors=(64, 64)),
    "store_beside_atomics": Bug("race", block=64, tensors=(64, 1)),
    "short_wait": Bug("copy in flight", tensors=(64, 64)),
    "missing_wait": Bug("copy in flight"),
    "missing_commit": Bug("copy in flight"),
    "missing_barrier_after_wait": Bug("race|in flight", block=64, tensors=(64, 64)),
    "wait_after_barrier": Bug("race|in flight", block=64, tensors=(64, 64)),
    "store_under_copy": Bug("copy in flight"),
    "shared_overrun": Bug("out of bounds", numbers=(1,), at=THREAD_31),
    "shared_underrun": Bug("out of bounds", numbers=(1,), at="block (0, 0, 0), thread (0, 0, 0)"),
    "dynamic_shared_overrun": Bug("out of bounds", numbers=(1,), shared_bytes=128, at=THREAD_31),
    "wrong_global_read": Bug("out of bounds", numbers=(1,), at=THREAD_31),
    "wrong_global_write": Bug("out of bounds", numbers=(1,), at=THREAD_31),
    "wrong_copy": Bug("out of bounds", tensors=(128, 128), numbers=(4,), at=THREAD_31),
    "wrong_copy_target": Bug("past", tensors=(128, 128), numbers=(4,), at=THREAD_31),
    "wrong_vectors": Bug("misaligned", tensors=(132, 128), numbers=(1,)),
    "wrong_vector_stores": Bug("misaligned", tensors=(128, 132), numbers=(1,)),
    "wrong_matrix_rows": Bug("aligned", tensors=(ROWS, 128), numbers=(4,)),
    "write_to_input": Bug("only given to read", tensors=(emulator.read_only(torch.ones(32)), 32)),
    "uninitialised_shared": Bug("nothing has been written", tensors=(32,)),
    "uninitialised_dynamic_shared": Bug("nothing has been written", tensors=(32,), shared_bytes=128),
    "uninitialised_global": Bug("nothing has been written", tensors=(32, emulator.uninitialised(torch.zeros(32)))),
    "uninitialised_matrix": Bug("nothing has been written", tensors=(ROWS, 128)),
}
# Other ways to go wrong of the same kernels.
VARIATIONS = [
    ("wrong_global_read", TRACED["wrong_global_read"]._replace(numbers=(-1,), at="thread (0, 0, 0)")),
    ("wrong_global_write", TRACED["wrong_global_write"]._replace(numbers=(-1,), at="thread (0, 0, 0)")),
    ("wrong_global_read", TRACED["wrong_global_read"]._replace(numbers=(10**6,), at="")),
    ("wrong_copy", TRACED["wrong_copy"]._replace(numbers=(-4,), at="thread (0, 0, 0)")),
    ("wrong_vectors", TRACED["wrong_vectors"]._replace(words="out of bounds", tensors=(128, 128), numbers=(4,))),
    (
        "wrong_vector_stores",
        TRACED["wrong_vector_stores"]._replace(words="out of bounds", tensors=(128, 128), numbers=(4,)),
    ),
]


def raised(kernel, bug):
    with pytest.raises(emulator.EmulatorError) as error:
        launch(kernel, bug)
    assert_names_its_place(str(error.value), kernel, bug)


def test_every_kernel_of_bugs_is_run_and_none_is_listed_twice():
    defined = re.findall(r"^PROOF_KERNEL\((\w+)\)", (KERNELS / "bugs.cu").read_text(), re.M)
    listed = [*COLLECTIVES, *TRACED, *UNDEFINED, "too_much_static_shared"]
    assert sorted(defined) == sorted(listed)


@pytest.mark.parametrize("build", ["plain", "trace"])
@pytest.mark.parametrize("kernel", COLLECTIVES)
def test_divergent_collectives_and_barriers_are_errors_in_any_order(kernel, build):
    for combination in FEW:
        with emulator.settings(build=build, **combination):
            raised(kernel, COLLECTIVES[kernel])


@pytest.mark.parametrize("kernel", TRACED)
def test_trace_build_sees_the_bug_in_any_order(kernel):
    for combination in FEW:
        with emulator.settings(build="trace", **combination):
            raised(kernel, TRACED[kernel])


@pytest.mark.parametrize("n", range(len(VARIATIONS)))
def test_trace_build_sees_accesses_before_and_behind_a_tensor(n):
    with emulator.settings(build="trace"):
        raised(*VARIATIONS[n])


@pytest.mark.proof
@pytest.mark.parametrize("kernel", [*COLLECTIVES, *TRACED])
def test_bugs_are_seen_in_every_order(kernel):
    for combination in COMBINATIONS:
        with emulator.settings(build="trace", **combination):
            raised(kernel, (COLLECTIVES | TRACED)[kernel])


@pytest.mark.parametrize("kernel", [name for name in TRACED if name.startswith("wrong") or name.endswith("run")])
def test_the_same_kernels_with_right_addresses_raise_nothing(kernel):
    for build in ("plain", "trace"):
        with emulator.settings(build=build):
            launch(kernel, TRACED[kernel]._replace(numbers=(0,)))


def test_the_same_copy_with_other_addresses_is_misaligned():
    for kernel in ("wrong_copy", "wrong_copy_target"):
        bug = TRACED[kernel]._replace(words="multiples of the size|misaligned", numbers=(1,), at="")
        for build in ("plain", "trace"):
            with emulator.settings(build=build):
                raised(kernel, bug)


def wrong_results(kernel, expected, **settings):
    """How many elements of the last tensor are not as they were meant to be."""
    bug = TRACED[kernel]
    with emulator.settings(build="plain", **settings):
        x, y = launch(kernel, bug)[:2]
    return (y != expected(x)).sum().item()


def same(x):
    return x


def reversed_(x):
    return x.view(-1, 64 if len(x) >= 64 else 32).flip(1).flatten()


def test_lazy_copies_show_what_was_not_waited_for():
    for kernel in ("short_wait", "missing_wait", "missing_commit"):
        assert wrong_results(kernel, same, landing="lazy") >= 32
        assert wrong_results(kernel, same, landing="eager") == 0


def test_eager_copies_show_what_they_overwrite():
    assert wrong_results("reused_copy_buffer", reversed_, landing="eager") > 0
    assert wrong_results("reused_copy_buffer", reversed_, landing="lazy") == 0
    assert wrong_results("store_under_copy", same, landing="eager") == 32
    assert wrong_results("store_under_copy", same, landing="lazy") == 0


@pytest.mark.parametrize(
    "kernel", ["missing_barrier", "missing_syncwarp", "syncwarp_between_warps", "reused_buffer", "wait_after_barrier"]
)
def test_some_schedule_shows_missing_barriers_in_the_result(kernel):
    ways = [{"schedule": "adversarial"}, {"schedule": "round_robin"}]
    ways += [{"schedule": "random", "seed": seed} for seed in range(4)]
    assert any(wrong_results(kernel, reversed_, **way) for way in ways)


def test_another_order_of_blocks_shows_that_they_depend_on_each_other():
    bug = TRACED["two_blocks_one_element"]._replace(grid=8, tensors=(256, 32))
    sums = TRACED["block_reads_another"]._replace(grid=8, tensors=(256, torch.zeros(256)))
    last, right = set(), []
    for seed in range(8):
        with emulator.settings(build="plain", blocks="random", seed=seed):
            x, y = launch("two_blocks_one_element", bug)
            last.add(int((x.view(8, 32) == y).all(1).nonzero()))
            x, y = launch("block_reads_another", sums._replace(tensors=(256, torch.zeros(256))))
            right.append(torch.equal(y.view(8, 32), torch.cumsum(x.view(8, 32), 0)))
    assert len(last) > 1
    assert not all(right)


@pytest.mark.parametrize(
    ("kernel", "words", "line"),
    [
        ("gemm_short_wait", "copy in flight", "LINE: read"),
        ("gemm_no_barrier", "race|copy in flight|nothing has been written", "LINE: "),
        ("gemm_early_refill", "race", "LINE: "),
        ("gemm_no_zero_fill", "out of bounds|nothing has been written", "LINE: copy"),
    ],
)
def test_gemm_with_a_bug_is_seen(kernel, words, line):
    lines = (KERNELS / "gemm.cu").read_text().splitlines()
    places = [f"gemm.cu:{n}" for n, text in enumerate(lines, 1) if line in text]
    a, b = torch.randn(70, 322).bfloat16(), torch.randn(322, 66).bfloat16()
    for combination in FEW:
        with emulator.settings(build="trace", **combination):
            with pytest.raises(emulator.EmulatorError, match=words) as error:
                gemm(a, b, kernel=kernel)
            message = str(error.value)
            assert kernel in message
            assert re.search(r"block \(\d+, \d+, 0\), thread \(\d+, 0, 0\)", message)
            assert any(re.search(re.escape(place) + r"\b", message) for place in places), message


@pytest.mark.parametrize("kernel", ["gemm_short_wait", "gemm_no_barrier", "gemm_early_refill"])
def test_gemm_with_a_bug_gives_a_wrong_result_in_some_order(kernel):
    a, b = torch.randint(-8, 9, (64, 512)), torch.randint(-8, 9, (512, 64))
    results = []
    for combination in FEW:
        with emulator.settings(build="plain", **combination):
            results.append(torch.equal(gemm(a.bfloat16(), b.bfloat16(), kernel=kernel), (a @ b).float()))
    assert not all(results)


# What has no meaning in C++, or is memory that no kernel has: seen by the sanitizers, which end the process.
INTS = [torch.full((32,), 2**31 - 1, dtype=torch.int32), torch.full((32,), 33, dtype=torch.int32)]
UNDEFINED = {
    "signed_overflow": Bug("signed integer overflow", tensors=(*INTS, torch.zeros(32, dtype=torch.int32))),
    "shift_out_of_range": Bug("shift exponent 33 is too large", tensors=(*INTS, torch.zeros(32, dtype=torch.int32))),
    "local_overrun": Bug("out of bounds|stack-buffer-overflow", numbers=(8,)),
}
SANITIZED = UNDEFINED | {
    name: TRACED[name]._replace(words=words)
    for name, words in {
        "shared_overrun": "buffer-overflow|out of bounds",
        "shared_underrun": "buffer-overflow|buffer-underflow|out of bounds",
        "dynamic_shared_overrun": "buffer-overflow",
        "wrong_global_read": "buffer-overflow",
        "wrong_global_write": "buffer-overflow",
        "wrong_copy": "buffer-overflow",
        "wrong_copy_target": "buffer-overflow|past the block's shared memory",
        "wrong_vectors": "misaligned",
        "wrong_vector_stores": "misaligned",
    }.items()
}
EACH_IN_A_CHILD = """
import json, os, tempfile
reports = {}
for kernel, bug in test_emulator.SANITIZED.items():
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 2)
            try:
                test_emulator.launch(kernel, bug)
            except test_emulator.emulator.EmulatorError as error:
                os.write(2, str(error).encode())
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        file.seek(0)
        reports[kernel] = (status, file.read().decode())
print(json.dumps(reports))
"""


@pytest.fixture(scope="session")
def reports_of_sanitizers():
    done = with_sanitizers(EACH_IN_A_CHILD)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.proof
@pytest.mark.parametrize("kernel", SANITIZED)
def test_sanitizers_see_the_bug(kernel, reports_of_sanitizers):
    status, message = reports_of_sanitizers[kernel]
    assert status != 0
    assert_names_its_place(message, kernel, SANITIZED[kernel])


# Rows past 2^31 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ["plain", "ptx"])
def test_dropouts_words_differ_by_both_halves_of_the_row(build):
    rng_state = torch.tensor([0x123456789ABCDEF0, 7])
    rows = torch.arange(32) * 0x123456789  # from 0 to past 2^37
    words = torch.zeros(32, 4, dtype=torch.int64)
    with emulator.settings(build=build):
        emulator.run("dropout_words", 1, 32, rng_state, rows, words)
    counter = torch.arange(32), rows & philox.WORD, rows >> 32, rng_state[1]
    key = rng_state[0] & philox.WORD, rng_state[0] >> 32
    assert torch.equal(words, torch.stack(philox.philox_4x32(counter, key), 1))


# Memory traffic ---------------------------------------------------------------------------------------------------


def traced(kernel, *arguments, grid=1, block=32, shared_bytes=0):
    return emulator.trace(lambda: emulator.run(kernel, grid, block, *arguments, shared_bytes=shared_bytes))


def line_of(trace, name, space, access):
    """The one line with this comment that accesses this space so."""
    lines = (KERNELS / "primitives.cu").read_text().splitlines()
    [number] = [n for n, line in enumerate(lines, 1) if line.endswith(f"// TRACED: {name}")]
    [line] = [
        line
        for line in trace.lines
        if (line.source, line.space, line.access) == (f"primitives.cu:{number}", space, access)
    ]
    return line


@pytest.mark.parametrize(
    ("what", "stride", "offset", "sectors", "ideal"),
    [
        ("neighbours", 1, 0, 4, 4),
        ("neighbours that begin within a sector", 1, 3, 5, 4),
        ("every second element", 2, 0, 8, 4),
        ("a column", 64, 0, 32, 4),
        ("one element", 0, 5, 1, 1),
    ],
)
def test_sectors_of_a_warp_are_counted(what, stride, offset, sectors, ideal):
    warps, blocks = 2, 3
    threads = 32 * warps * blocks
    x, y = torch.randn(max(stride, 1) * threads + 64), torch.zeros(threads)
    trace = traced("gather", x, y, stride, offset, grid=blocks, block=32 * warps)
    assert torch.equal(y, x[offset + stride * torch.arange(threads)])
    load, store = (line_of(trace, *line) for line in (("gather", "global", "load"), ("gathered", "global", "store")))
    assert (load.kernel, load.width, load.requests, load.bytes) == ("gather", 4, warps * blocks, 4 * threads)
    assert (load.sectors, load.ideal_sectors) == (sectors * warps * blocks, ideal * warps * blocks)
    assert (store.requests, store.bytes, store.sectors, store.ideal_sectors) == (6, 4 * threads, 24, 24)
    assert trace.bytes_read(x) == trace.bytes_written(y) == 4 * threads
    assert trace.bytes_written(x) == trace.bytes_read(y) == 0


@pytest.mark.parametrize(("kind", "width", "size"), [("fp32", 4, 16), ("fp32", 2, 8), ("bf16", 8, 16), ("fp16", 1, 2)])
def test_a_vector_is_one_access(kind, width, size):
    x = torch.randn(64 * width).to(DTYPES[kind])
    y = torch.zeros_like(x)
    trace = traced(f"vectors_{kind}", x, y, width, block=64)
    for access in ("load", "store"):
        [line] = [line for line in trace.lines if line.access == access]
        assert (line.space, line.width, line.requests, line.bytes) == ("global", size, 2, 64 * size)
        assert line.sectors == line.ideal_sectors == 2 * size
    assert trace.bytes_read(x) == trace.bytes_written(y) == 64 * size


def test_lanes_that_do_not_take_part_are_not_counted():
    x, y = torch.randn(32), torch.zeros(32)
    trace = traced("few_lanes", x, y)
    line = line_of(trace, "few lanes", "global", "load")
    assert (line.requests, line.bytes, line.sectors, line.ideal_sectors) == (1, 16, 4, 1)


@pytest.mark.parametrize(("kernel", "wavefronts"), [("transpose_unpadded", 32), ("transpose_padded", 1)])
def test_a_column_of_an_unpadded_tile_is_in_one_bank(kernel, wavefronts):
    x, y = torch.randn(32, 32), torch.zeros(32, 32)
    trace = traced(kernel, x, y, block=1024)
    assert torch.equal(y, x.T)
    rows, columns = line_of(trace, "rows", "shared", "store"), line_of(trace, "columns", "shared", "load")
    assert (rows.requests, rows.bytes, rows.wavefronts, rows.ideal_wavefronts) == (32, 4096, 32, 32)
    assert (columns.requests, columns.bytes) == (32, 4096)
    assert (columns.wavefronts, columns.ideal_wavefronts) == (32 * wavefronts, 32)


@pytest.mark.parametrize(("size", "wavefronts"), [(4, 1), (8, 2), (16, 4)])
def test_wide_accesses_to_shared_memory_go_in_parts_of_a_warp(size, wavefronts):
    x, y = torch.randn(32, size // 4), torch.zeros(32, size // 4)
    trace = traced(f"through_shared_{size}_bytes", x, y, shared_bytes=32 * size)
    assert torch.equal(y, x.flip(0))
    for line in (line_of(trace, "into shared", "shared", "store"), line_of(trace, "from shared", "shared", "load")):
        assert (line.width, line.requests, line.bytes) == (size, 1, 32 * size)
        assert (line.wavefronts, line.ideal_wavefronts) == (wavefronts, wavefronts)


def test_a_word_that_all_lanes_read_is_one_wavefront():
    trace = traced("shared_broadcast", torch.randn(32), torch.zeros(32), 7)
    one, two = (line_of(trace, name, "shared", "load") for name in ("one word", "two words of a bank"))
    assert (one.requests, one.wavefronts, one.ideal_wavefronts) == (1, 1, 1)
    assert (two.requests, two.wavefronts, two.ideal_wavefronts) == (1, 2, 1)


@pytest.mark.parametrize(("kernel", "wavefronts"), [("unswizzled_tile", 32), ("swizzled_tile", 4)])
def test_ldmatrix_of_a_tile_is_free_of_conflicts_if_it_is_swizzled(kernel, wavefronts):
    x, y = torch.arange(16 * 64, dtype=torch.int16).view(16, 64), torch.zeros(32, 4, dtype=torch.int32)
    trace = traced(kernel, x, y)
    read = line_of(trace, "ldmatrix", "shared", "load")
    assert (read.requests, read.bytes, read.wavefronts, read.ideal_wavefronts) == (1, 512, wavefronts, 4)
    source, target = (line_of(trace, "copy", space, "copy") for space in ("global", "shared"))
    assert (source.width, source.requests, source.bytes, source.sectors, source.ideal_sectors) == (16, 4, 2048, 64, 64)
    assert (target.width, target.requests, target.bytes) == (16, 4, 2048)
    assert (target.wavefronts, target.ideal_wavefronts) == (16, 16)
    assert trace.bytes_read(x) == x.nbytes


def test_atomics_are_counted_as_such():
    x, y = torch.ones(64), torch.zeros(4)
    trace = traced("histogram", x, y, 4, block=64)
    assert y.tolist() == [16.0] * 4
    line = line_of(trace, "atomic", "global", "atomic")
    assert (line.width, line.requests, line.bytes, line.sectors) == (4, 2, 256, 2)


def gemm_trace(kernel=None):
    a, b = torch.randn(128, 192).bfloat16(), torch.randn(192, 192).bfloat16()
    return emulator.trace(lambda: gemm(a, b, kernel=kernel))


def test_gemm_moves_what_its_note_says_and_has_no_bank_conflicts():
    trace = gemm_trace()
    assert trace.total("gemm_bf16", "global", "copy").bytes == 3 * 128 * 192 * 2 + 2 * 192 * 192 * 2
    store = trace.total("gemm_bf16", "global", "store")
    assert store.bytes == 128 * 192 * 4
    moved = trace.total("gemm_bf16", "global")
    assert moved.sectors == moved.ideal_sectors
    shared = trace.total("gemm_bf16", "shared")
    assert shared.wavefronts == shared.ideal_wavefronts > 0


def test_gemm_without_the_swizzle_has_bank_conflicts():
    trace = gemm_trace("gemm_unswizzled")
    loads = trace.total("gemm_unswizzled", "shared", "load")
    assert loads.wavefronts == 8 * loads.ideal_wavefronts


def test_totals_are_sums_of_lines():
    x, y = torch.randn(32, 32), torch.zeros(32, 32)
    trace = emulator.trace(lambda: [emulator.run(f"transpose_{p}", 1, 1024, x, y) for p in ("padded", "unpadded")])
    assert trace.result == [None, None]
    assert trace.total().bytes == sum(line.bytes for line in trace.lines) == 2 * 4 * 4096
    assert trace.total(space="shared", access="load").wavefronts == 32 * 33
    assert trace.total("transpose_padded", "shared").wavefronts == 64
    assert trace.bytes_read(x) == trace.bytes_written(y) == 2 * 4096
    assert "transpose_padded" in str(trace)
