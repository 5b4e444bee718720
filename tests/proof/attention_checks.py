"""What the kernels of attention must do, in little time: run for every mutant until one check fails.

A check gives the launchers of the emulator tensors that lie in the middle of others full of NaN, of which nothing may
be read and nothing overwritten. Expected answers are the reference's, in the same dtype and in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from errors import assert_within_rule
from proof import emulator
from proof.checks import BF16, FP16, FP32, ORDERS, Check
from torch import Tensor

import fastlm
import fastlm.functional as F
from fastlm.ops.attention import kernels, launch, reference
from fastlm.ops.compiled import Launchers

NAMES = ("output", "lse", "grad_query", "grad_key", "grad_value")
OPEN: dict[str, Any] = {"is_causal": False, "window_left": -1, "window_right": -1, "alibi_slopes": None, "softcap": 0.0}
LAUNCHERS = Launchers("", lambda _: (0, 0), emulator.missing, emulator._Module)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def lengths_of(*lengths: int) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def packing(lengths: Sequence[Sequence[int]], slack: int = 0) -> dict[str, Any]:
    """Arguments of packed sequences of so many queries and keys."""
    arguments: dict[str, Any] = {}
    for name, each in zip("qk", lengths, strict=True):
        arguments[f"cu_seqlens_{name}"] = lengths_of(0, *itertools.accumulate(each))
        arguments[f"max_seqlen_{name}"] = max(each) + slack
    return arguments


def divided_among(blocks: int) -> Callable[[int, int], int]:
    """launch.splits_bwd for so many blocks."""
    return lambda keys, heads: min(-(-keys // launch.KEY_TILE_BWD), -(-blocks // heads))


class Place:
    """A tensor in the middle of one of NaN, rows at multiples of 16 bytes; no two arguments have the same strides."""

    def __init__(self, x: Tensor, pad: int, transposed: bool = False) -> None:
        x = x.transpose(1, 2) if transposed else x
        self.wide = x.new_full([*(n + 2 + pad for n in x.shape[:-1]), -(-x.shape[-1] // 8) * 8 + 16], torch.nan)
        inside = (*(slice(1, 1 + n) for n in x.shape[:-1]), slice(8, 8 + x.shape[-1]))
        self.inside, self.view = inside, self.wide[inside].copy_(x)
        self.view = self.view.transpose(1, 2) if transposed else self.view

    def take(self, what: str) -> Tensor:
        """What is in it, after nothing else was written."""
        found = self.view.clone()
        self.wide[self.inside] = torch.nan
        assert self.wide.isnan().all(), f"{what}: written out of bounds"
        return found


class Call:
    """Queries, keys and values with their answers.

    Args:
        lengths: of packed sequences, queries and keys, instead of the batch.
        slack: by how much more the longest sequence is said to be.
        unseen: of an element of the batch keys (start, stop) that nothing may read: they are NaN.
        factor: of query, makes scores large.
        change: sets some of query, key and value.
        wanted: subsets of the gradients, one backward for each.
        told: key_lengths or cu_seqlens as the kernel gets them, wrong ones; then only bounds are held.
        blocks: of backward, among which the keys are divided.
        splits: of the keys of decoding.
        transposed: (B, T, H, D) in memory.
        options: of kernels.dense or kernels.packed.
    """

    def __init__(
        self,
        queries: int = 0,
        keys: int = 0,
        *,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        dim: int = 32,
        value_dim: int | None = None,
        dtype: torch.dtype = FP16,
        lengths: tuple[Sequence[int], Sequence[int]] | None = None,
        slack: int = 0,
        unseen: Sequence[tuple[int, int, int]] = (),
        factor: float = 1.0,
        change: Callable[[Tensor, Tensor, Tensor], object] | None = None,
        wanted: Sequence[str] = ("qkv",),
        told: dict[str, Sequence[int]] | None = None,
        blocks: int | None = None,
        splits: int | None = None,
        transposed: bool = False,
        **options: Any,
    ) -> None:
        self.wanted, self.told, self.blocks, self.splits = wanted, told or {}, blocks, splits
        self.packed, self.dtype = lengths is not None, dtype
        if lengths is not None:
            queries, keys = map(sum, lengths)
        self.options = OPEN | {"scale": dim**-0.5, "dropout_p": 0.0, "rng_state": None} | options
        if self.options["dropout_p"]:
            self.options["rng_state"] = torch.tensor([0x123456789ABCDEF, 77])
        if lengths is None:
            self.options = {"attn_mask": None, "key_lengths": None} | self.options
        else:
            self.options |= packing(lengths, slack)
        kv_heads, value_dim = kv_heads or heads, value_dim or dim
        shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
        inputs = [normal(batch, *shape, seed=n).to(dtype) for n, shape in enumerate(shapes)]
        inputs[0] *= factor
        if change is not None:
            change(*inputs)
        upstream = normal(batch, heads, queries, value_dim, seed=9).to(dtype)
        for b, start, stop in unseen:
            inputs[1][b, :, start:stop] = inputs[2][b, :, start:stop] = 0.0
        self.rounded, self.exact = (self.answers(inputs, upstream, kind) for kind in (dtype, torch.float64))
        for b, start, stop in unseen:
            inputs[1][b, :, start:stop] = inputs[2][b, :, start:stop] = torch.nan
        self.transposed = transposed or self.packed
        self.inputs, self.upstream = [self.place(x, 3 + n) for n, x in enumerate(inputs)], self.place(upstream, 6)
        self.output = self.place(self.rounded[0], 7)

    def place(self, x: Tensor, pad: int) -> Place:
        return Place(x, pad, self.transposed)

    def answers(self, inputs: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """By NAMES."""
        tensors, upstream, options = [x.to(dtype) for x in inputs], upstream.to(dtype), dict(self.options)
        if self.packed:
            tensors, upstream = [x[0].transpose(0, 1) for x in tensors], upstream[0].transpose(0, 1)
            output, lse = reference.varlen_attention_fwd(*tensors, **options, return_lse=True)
            grads = reference.varlen_attention_bwd(
                upstream, *tensors, output=output, lse=lse, **options, needs_grad=[True] * 3
            )
            output, *grads = (x.transpose(0, 1)[None] for x in (output, *grads))
            return [output, lse[None], *grads]
        output, lse = reference.scaled_dot_product_attention_fwd(*tensors, **options, return_lse=True)
        *grads, _ = reference.scaled_dot_product_attention_bwd(
            upstream, *tensors, output=output, lse=lse, **options, needs_grad=[True, True, True, False]
        )
        return [output, lse, *grads]

    def problem(self) -> kernels.Problem:
        options = self.options | {name: lengths_of(*wrong) for name, wrong in self.told.items()}
        views = [x.view for x in self.inputs]
        if self.packed:
            return kernels.packed(*(x[0].transpose(0, 1) for x in views), **options)
        return kernels.dense(*views, **options)

    def hold(self, n: int, ours: Tensor) -> None:
        if self.told:
            return
        assert_within_rule(ours, self.rounded[n], self.exact[n], NAMES[n])
        if self.options["dropout_p"] and NAMES[n] in ("output", "grad_value"):
            assert not ours[self.exact[n] == 0.0].any(), f"{NAMES[n]}: something is left where all is dropped"

    def run(self) -> None:
        before = launch.splits_bwd, launch.splits
        launch.splits_bwd = before[0] if self.blocks is None else divided_among(self.blocks)
        launch.splits = before[1] if self.splits is None else lambda *_: self.splits
        try:
            self.compare()
        finally:
            launch.splits_bwd, launch.splits = before

    def compare(self) -> None:
        functions, problem = launch.kernels(LAUNCHERS), self.problem()
        output = self.place(torch.full_like(self.rounded[0], torch.nan), 8)
        around = torch.full((self.rounded[1].numel() + 16,), torch.nan)
        lse = around[8:-8].view(self.rounded[1].shape)
        functions.fwd(problem, output.view, lse)
        self.hold(1, lse)
        self.hold(0, output.take("output"))
        lse.fill_(torch.nan)
        assert around.isnan().all(), "lse: written out of bounds"
        for wanted in self.wanted:
            grads = [
                self.place(torch.full_like(x, torch.nan), 9 + n) if name in wanted else None
                for n, (name, x) in enumerate(zip("qkv", self.rounded[2:], strict=True))
            ]
            views = [None if grad is None else grad.view for grad in grads]
            functions.bwd(problem, self.upstream.view, self.output.view, self.rounded[1], *views)
            for n, grad in enumerate(grads, 2):
                if grad is not None:
                    self.hold(n, grad.take(NAMES[n]))


def attention_checks() -> list[Check]:
    """Those that kill most first; each in one of two orders."""
    orders, checks = itertools.cycle(ORDERS), []

    def limit(name: str, *args: Any, **kwargs: Any) -> None:
        checks.append(Check(f"attention {name}", Call(*args, **kwargs).run, next(orders)))

    slopes, by_sequence = torch.tensor([0.02, 0.1]), torch.tensor([[0.02, 0.1], [0.3, 0.01], [0.05, 0.2]])

    limit("dense", 37, 70, batch=2, heads=2, factor=3.0)
    limit(
        "decode",
        3,
        200,
        batch=3,
        heads=4,
        kv_heads=2,
        splits=2,
        key_lengths=lengths_of(200, 70, 0),
        is_causal=True,
        factor=3.0,
        unseen=[(1, 70, 200), (2, 0, 200)],
        wanted=(),
    )
    limit("causal", 150, 150, dim=40, value_dim=24, is_causal=True, factor=3.0)
    limit("dropout", 37, 72, batch=2, heads=2, dropout_p=0.3)
    limit(
        "packed",
        lengths=((20, 0, 45), (40, 9, 33)),
        heads=2,
        kv_heads=1,
        dim=24,
        is_causal=True,
        slack=70,
        alibi_slopes=by_sequence,
        factor=3.0,
    )
    limit("width 128", 70, 140, dim=128, factor=2.0)
    limit("width 96", 70, 140, dim=96, dtype=BF16, factor=2.0)
    limit("width 64", 140, 140, dim=64, dtype=BF16, factor=2.0)
    limit("softcap", 37, 70, heads=2, dim=24, softcap=2.0, factor=3.0, alibi_slopes=slopes, scale=-0.3)
    limit(
        "window",
        100,
        300,
        batch=2,
        key_lengths=lengths_of(290, 100),
        window_left=20,
        window_right=3,
        unseen=[(0, 0, 128), (0, 290, 300), (1, 100, 300)],
        factor=3.0,
    )
    limit("blocks", 200, 300, heads=2, kv_heads=1, blocks=1, is_causal=True, factor=3.0)
    limit("two blocks", 100, 600, blocks=2, window_left=-1, window_right=300, factor=3.0)
    limit("many blocks", 200, 400, window_left=40, window_right=150, factor=3.0)
    limit("queries", 70, 70, batch=2, wanted=("q", "k", "v", "kv", ""))
    limit("many sequences", 70, 40, batch=3, heads=2, dim=16)
    limit("dropout in one block", 70, 300, heads=4, kv_heads=2, blocks=1, dropout_p=0.4, is_causal=True, dtype=BF16)
    limit("dropout of packed", lengths=((20, 0, 70, 40), (40, 9, 133, 3)), heads=2, dropout_p=0.5, softcap=2.0)
    limit("dropout of decode", 3, 200, batch=2, heads=4, kv_heads=2, splits=2, dropout_p=0.3, dim=40, wanted=())
    limit("dropout of all", 20, 40, dropout_p=1.0)
    limit("dropout of width 128", 40, 140, heads=2, dim=128, dropout_p=0.3)
    limit("scale of 0", 37, 70, scale=0.0, key_lengths=lengths_of(60), unseen=[(0, 60, 70)], is_causal=True)
    limit("negative scale", 37, 70, scale=-0.5, window_left=9, window_right=5)
    limit(
        "ALiBi by sequence",
        20,
        150,
        batch=3,
        heads=2,
        alibi_slopes=by_sequence,
        dim=72,
        value_dim=40,
        factor=3.0,
        key_lengths=lengths_of(150, 30, 0),
        unseen=[(1, 30, 150), (2, 0, 150)],
        transposed=True,
    )
    limit("softcap of width 128", 40, 140, dim=104, value_dim=128, softcap=3.0, factor=3.0, is_causal=True, dtype=BF16)
    limit("softcap and edges", 150, 150, softcap=1.0, window_left=70, window_right=9, factor=3.0, blocks=1)
    limit("values wider", 40, 70, dim=24, value_dim=104, is_causal=True, heads=2, kv_heads=1)
    limit("keys wider", 40, 70, dim=104, value_dim=8, window_left=30)
    limit("few keys", 150, 20, window_left=30, window_right=0)
    limit("few keys at the end", 150, 20, key_lengths=lengths_of(20), window_left=30, window_right=9)
    limit(
        "few keys of a cache",
        150,
        40,
        batch=2,
        key_lengths=lengths_of(30, 0),
        is_causal=True,
        unseen=[(0, 30, 40), (1, 0, 40)],
    )
    limit("groups", 40, 200, batch=2, heads=6, kv_heads=2, is_causal=True, factor=3.0)
    limit(
        "packed in one block",
        lengths=((70, 3, 1, 129), (270, 1, 3, 140)),
        heads=2,
        kv_heads=1,
        blocks=1,
        is_causal=True,
        factor=3.0,
    )
    limit("packed wide", lengths=((33, 31, 0, 40), (50, 20, 7, 130)), heads=2, dim=128, window_left=60, factor=2.0)
    limit(
        "packed decode",
        lengths=((1, 0, 3, 16, 2), (200, 30, 0, 1, 257)),
        heads=4,
        kv_heads=2,
        splits=3,
        slack=7,
        is_causal=True,
        wanted=(),
        factor=3.0,
    )
    limit("decode in many rows", 16, 70, heads=12, kv_heads=1, is_causal=True, wanted=(), factor=3.0, splits=1)
    limit(
        "decode in many rows, ALiBi",
        15,
        200,
        batch=2,
        heads=22,
        kv_heads=2,
        wanted=(),
        factor=3.0,
        splits=2,
        dtype=BF16,
        alibi_slopes=torch.linspace(0.01, 0.5, 22),
        window_left=100,
        dim=64,
        key_lengths=lengths_of(200, 64),
    )
    limit("decode at an edge", 3, 65, key_lengths=lengths_of(65), is_causal=True, wanted=(), factor=3.0)
    limit("decode at a window's edge", 3, 200, key_lengths=lengths_of(200), window_left=134, wanted=(), factor=3.0)
    limit("decode in more parts than tiles", 2, 130, heads=2, splits=5, wanted=(), dim=72, value_dim=96)
    limit(
        "decode from parts unseen",
        1,
        600,
        batch=2,
        splits=3,
        wanted=(),
        window_left=150,
        window_right=0,
        key_lengths=lengths_of(600, 40),
        unseen=[(0, 0, 448), (1, 40, 600)],
        dtype=BF16,
        dim=128,
        factor=2.0,
    )

    def rises(by: float) -> Callable[[Tensor, Tensor, Tensor], None]:
        def change(query: Tensor, key: Tensor, value: Tensor) -> None:
            rows = query.shape[:3].numel() if query.shape[2] < 4 else 1
            query[..., 0] = 1.0 + torch.arange(query.shape[:3].numel()).view(query.shape[:3]) % rows
            key[..., 0] = by * torch.arange(key.shape[2]) / key.shape[2]

        return change

    for by in (600.0, -600.0, 3000.0):
        limit(f"scores that rise by {by}", 20, 200, change=rises(by), scale=1.0, dim=16, wanted=("v",))
        limit(
            f"decode, scores that rise by {by}",
            2,
            200,
            change=rises(by),
            scale=1.0,
            splits=3,
            wanted=(),
            heads=4,
            kv_heads=1,
        )
    limit(
        "scores that rise in the window",
        140,
        200,
        change=rises(300.0),
        scale=0.5,
        window_left=30,
        window_right=30,
        wanted=("v",),
    )

    def far_below(query: Tensor, key: Tensor, value: Tensor) -> None:
        query[..., 0], key[..., 0] = 100.0, -100.0

    limit("scores far below 0", 20, 100, change=far_below, is_causal=True, scale=0.5, wanted=("v",))

    def not_numbers(query: Tensor, key: Tensor, value: Tensor) -> None:
        query[..., 3, :], value[..., 9, 1] = torch.nan, torch.inf

    limit("not a number", 20, 100, change=not_numbers)

    def infinite(query: Tensor, key: Tensor, value: Tensor) -> None:
        query[..., 0] = 1.0 - 2.0 * (torch.arange(query.shape[2]) % 2)
        key[..., 70, 0] = torch.inf

    limit("infinite scores", 20, 150, change=infinite, wanted=())
    limit("decode, infinite scores", 3, 200, change=infinite, wanted=(), splits=2)

    def would_look_at_key_0(query: Tensor, key: Tensor, value: Tensor) -> None:
        query[..., 63, :] = key[..., 0, :]  # the last of a tile

    for left, right in (
        (63, 0),
        (64, 0),
        (0, 63),
        (0, 64),
        (0, 0),
        (127, 1),
        (128, 64),
        (1, 127),
        (127, 62),
        (62, 127),
    ):
        limit(
            f"window {left}, {right}",
            129,
            193,
            window_left=left,
            window_right=right,
            factor=3.0,
            change=would_look_at_key_0,
            blocks=1 + left % 2,
        )
    for left, right in ((31, 0), (32, 127), (0, 32), (127, 31)):
        limit(f"wide window {left}, {right}", 65, 129, dim=128, window_left=left, window_right=right, factor=2.0)
    for queries, keys in ((64, 128), (65, 129), (128, 64), (129, 65), (1, 1), (32, 1), (200, 128)):
        limit(f"{queries}x{keys}", queries, keys, heads=2, key_lengths=lengths_of(keys), is_causal=True, factor=3.0)
    limit("one key less than a tile", 64, 128, key_lengths=lengths_of(127), unseen=[(0, 127, 128)])
    limit("one query of a tile's last key", 193, 192, window_left=1, window_right=9, blocks=1)
    limit("a block without keys", 33, 500, key_lengths=lengths_of(500), window_left=10, window_right=0, blocks=2)
    limit("wrong key_lengths", 20, 70, batch=3, key_lengths=lengths_of(70, 0, 0), told={"key_lengths": (999, -9, 71)})
    limit(
        "wrong cu_seqlens",
        lengths=((20, 0, 0), (70, 0, 0)),
        heads=2,
        slack=50,
        told={"cu_seqlens_q": (-9, 99, 21, 30), "cu_seqlens_k": (-9, 999, 71, 90)},
    )
    limit(
        "wrong cu_seqlens of decode",
        lengths=((9, 0, 0), (70, 0, 0)),
        heads=2,
        slack=5,
        splits=2,
        told={"cu_seqlens_q": (-9, 99, 10, 30), "cu_seqlens_k": (-9, 999, 71, 90)},
    )
    for dtype, dim in itertools.product((FP16, BF16), (32, 64, 96, 128)):
        limit(f"{dtype} of {dim}", 20, 40, heads=2, dim=dim, dtype=dtype, factor=2.0)
        limit(f"decode, {dtype} of {dim}", 1, 100, dim=dim, dtype=dtype, factor=2.0, splits=2, wanted=())
    checks += [
        Check("attention launchers", refused_launches, ORDERS[0]),
        Check("attention traffic of decode", decode_traffic, ORDERS[0], ("trace",)),
        *(attention_traffic(dim) for dim in (32, 64, 96, 128)),
        *(attention_traffic(32, 129, 257, window=window) for window in ((64, 63), (0, 0), (63, 127), (127, 64))),
        attention_traffic(32, 136, 70, window=(58, 9)),
        attention_traffic(32, 136, 200, length=128, window=(-1, 100)),
        *(traced(name, case, next(orders)) for name, case in TRACED.items()),
    ]
    return checks


TRACED: dict[str, dict[str, Any]] = {
    "tiles of one block": {"queries": 70, "keys": 300, "heads": 2, "kv_heads": 1, "blocks": 1, "is_causal": True},
    "causal": {"queries": 70, "keys": 150, "is_causal": True, "dim": 24},
    "groups": {"queries": 40, "keys": 150, "heads": 4, "kv_heads": 2, "dropout_p": 0.3, "window": (70, 9), "dim": 72},
    "wide": {"queries": 40, "keys": 140, "softcap": 2.0, "dim": 128},
    "decode": {
        "queries": 3,
        "keys": 600,
        "heads": 4,
        "kv_heads": 2,
        "dim": 40,
        "is_causal": True,
        "alibi_slopes": [0.1] * 4,
    },
    "lengths": {"queries": 20, "keys": 150, "key_lengths": [100], "alibi_slopes": [0.1, 0.2], "heads": 2, "dim": 64},
    "packed": {"packed": ((64, 70, 1), (70, 9, 1))},
}


def traced(name: str, case: dict[str, Any], order: dict[str, str]) -> Check:
    """Races, memory never written and accesses out of bounds, of a call through fastlm.functional."""
    options = dict(case)
    queries, keys, dim, heads = (
        options.pop(each, n) for each, n in (("queries", 0), ("keys", 0), ("dim", 32), ("heads", 1))
    )
    blocks = options.pop("blocks", 128)
    kv_heads = options.pop("kv_heads", heads)
    for each, dtype in (("key_lengths", torch.int32), ("alibi_slopes", FP32)):
        if each in options:
            options[each] = torch.tensor(options[each], dtype=dtype)
    shapes: Sequence[tuple[int, ...]] = (1, heads, queries, dim), *[(1, kv_heads, keys, dim)] * 2
    attention: Callable[..., Any] = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    if "packed" in options:
        attention, lengths = F.varlen_attention, options.pop("packed")
        shapes = (sum(lengths[0]), heads, dim), *[(sum(lengths[1]), kv_heads, dim)] * 2
        options |= packing(lengths)
    inputs = [normal(*shape, seed=n).to(FP16) for n, shape in enumerate(shapes)]

    def answers(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        torch.manual_seed(0)
        with fastlm.use_backend(backend):
            output = attention(*leaves, **options)
            return [output, *torch.autograd.grad(output, leaves, normal(*output.shape, seed=9).to(FP16).to(dtype))]

    rounded, exact = answers("reference", FP16), answers("reference", torch.float64)

    def run() -> None:
        before, launch.splits_bwd = launch.splits_bwd, divided_among(blocks)
        try:
            ours = answers("emulator", FP16)
        finally:
            launch.splits_bwd = before
        for each in zip(ours, rounded, exact, strict=True):
            assert_within_rule(*each)

    return Check(f"attention {name}, traced", run, order, ("trace",))


def attention_traffic(
    dim: int, queries: int = 136, keys: int = 200, *, length: int | None = None, window: tuple[int, int] = (-1, 0)
) -> Check:
    """What is read and written is what the tiles of which some pair sees each other need, without bank conflicts."""
    heads, filled = 2, keys if length is None else length
    inputs = [normal(1, heads, n, dim, seed=n).to(FP16) for n in (queries, keys, keys)]
    lengths = None if length is None else lengths_of(length)
    offset = 0 if length is None else length - queries
    seen = reference.visible(queries, filled, offset, False, *window, inputs[0].device)
    assert seen is not None
    row, width, query_tile = 2 * dim, -(-dim // 32) * 32, 64 if dim <= 96 else 32

    def pairs(query_size: int, key_size: int) -> list[tuple[int, int]]:
        """Of tiles that meet, queries and keys that exist."""
        both = itertools.product(range(0, queries, query_size), range(0, filled, key_size))
        met = [(i, j) for i, j in both if seen[i : i + query_size, j : j + key_size].any()]
        return [(min(query_size, queries - i), min(key_size, filled - j)) for i, j in met]

    met = pairs(query_tile, 128)
    fwd_bytes = queries * (2 * row + 4) + sum(2 * row * k for _, k in pairs(128, 64))
    bwd_bytes = queries * (2 * row + 4 + 8) + 2 * (filled + keys) * row + sum(q * (2 * row + 8) for q, _ in met)
    bwd_bytes += 2 * 4 * query_tile * width * len(met) + queries * row

    def run() -> None:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with fastlm.use_backend("emulator"):
            fwd = emulator.trace(lambda: F.scaled_dot_product_attention(*leaves, key_lengths=lengths, window=window))
            bwd = emulator.trace(lambda: torch.autograd.grad(fwd.result, leaves, fwd.result.detach().clone()))
        for name, trace, expected in (("fwd", fwd, fwd_bytes), ("bwd", bwd, bwd_bytes)):
            got = trace.total(space="global").bytes - (0 if lengths is None else trace.bytes_read(lengths))
            assert got == heads * expected, f"{name}: {got} bytes, {heads * expected} expected"
        for line in fwd.lines + bwd.lines:
            assert line.width != 16 or line.sectors == line.ideal_sectors, (
                f"{line.source}: {line.sectors} of {line.ideal_sectors} sectors"
            )
            assert "stats" in line.kernel or line.kernel.endswith(f", {width}>"), line.kernel
            assert line.wavefronts == line.ideal_wavefronts, f"{line.source}: bank conflicts"

    return Check(f"attention traffic of {dim} {window}", run, ORDERS[0], ("trace",))


def decode_traffic() -> None:
    """Of parts only sums are written, each once, and keys are read once for all heads that share them."""
    heads, kv_heads, keys, dim = 6, 2, 600, 32
    query, key, value = (normal(1, *shape, dim).to(FP16) for shape in ((heads, 1), (kv_heads, keys), (kv_heads, keys)))

    def call() -> Tensor:
        with fastlm.use_backend("emulator"):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    trace, parts = emulator.trace(call), 3
    assert trace.bytes_read(key) == key.nbytes
    assert trace.bytes_read(value) == value.nbytes
    assert trace.bytes_read(query) == parts * query.nbytes
    rows = parts * heads * (4 * dim + 4)
    assert trace.total("attention_fwd", "global", "store").bytes == rows
    assert trace.total("attention_combine", "global", "store").bytes == trace.result.nbytes + 4 * heads


def refused_launches() -> None:
    """What the launchers do not serve, and launches that fail, are told of."""
    module, call = emulator._configured(), Call(2, 3)
    fields = list(launch._problem(LAUNCHERS, call.problem())[0])
    names = (
        "batch",
        "sequences",
        "heads",
        "kv_heads",
        "queries",
        "keys",
        "max_queries",
        "max_keys",
        "dim",
        "value_dim",
    )
    zeros = torch.zeros(1 << 16)

    def told(direction: str, splits: int = 1, **changes: int) -> str:
        given = list(fields)
        for name, value in changes.items():
            if name == "dtype":
                given[-1] = value
            else:
                given[11 + names.index(name)] = value
        try:
            if direction == "fwd":
                module.attention_fwd(*given, *[zeros.data_ptr()] * 4, (0,) * 4, splits, False, 0, 0)
            else:
                module.attention_bwd(*given, *[zeros.data_ptr()] * 8, *[(0,) * 4] * 5, splits, 0, 0)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    for direction in ("fwd", "bwd"):
        for name, code in module.DTYPES.items():
            served = name in ("float16", "bfloat16")
            assert ("bf16 and fp16" in told(direction, dtype=code)) != served, f"{direction} of {name}"
        for name in ("dim", "value_dim"):
            assert "up to 128" in told(direction, **{name: 136}), direction
        for wide in (32, 64, 96, 128):
            assert told(direction, dim=wide) == "nothing", direction
    assert "than a grid can have" in told("fwd", heads=2, sequences=2**30)
    assert "than a grid can have" in told("fwd", heads=1, sequences=2**30, max_queries=129)
    assert "than a grid can have" in told("bwd", kv_heads=2, sequences=2**30)
    assert "than a grid can have" in told("bwd", 2, sequences=2**30)
    assert "than a grid can have" in told("bwd", max_queries=65, sequences=2**30)
    assert "than a grid can have" in told("bwd", batch=2**20, queries=2**17 + 1)
    for changes in ({"splits": 0}, {"max_queries": 0}):
        assert told("fwd", **changes) != "nothing", changes
    for changes in ({"splits": 0}, {"max_queries": 0}, {"queries": 0}):
        assert told("bwd", **changes) != "nothing", changes
