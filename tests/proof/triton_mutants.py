"""Breaks the Triton kernels of attention in every small way and sees whether a check fails; mutants.py is for CUDA.

    python tests/proof/triton_mutants.py [--sample N --seed S] [--jobs N] [--json FILE] [pattern]

A mutant is one change of a function under `triton.jit`, found by Python's own parser (OPERATORS has them all). It is
judged under Triton's interpreter, in a process forked for it: the module is made anew from the changed text and runs
all_checks() until one fails, every access held to lie on an element of what the kernel was given. What survives
must be in equivalent_mutants.toml, [[triton]], with the reason why it changes nothing; what is listed there must exist
and survive. `pattern` is a regular expression for a mutant's text, as it is printed.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import importlib
import json
import linecache
import multiprocessing
import os
import random
import re
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read when triton and torch are imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases
import interpreter
import numpy as np
import torch
from errors import assert_within_rule
from proof.mutants import ROOT, TABLE, Mutant, Verdict, complaints
from torch import Tensor

from fastlm.ops.attention import kernels as attention
from fastlm.ops.attention import reference

OPS = ROOT / "fastlm" / "ops"
FILES = {"attention/triton.py": (), "triton_launch.py": ("exp", "tanh", "keep_mask")}  # of these functions; (): of all
MODULES = ("fastlm.ops.attention.triton", "fastlm.ops.triton_launch")
PATIENCE = 20.0  # seconds for a check

OPERATORS = {
    "statement": "an assignment, a store or a return of nothing removed",
    "assignment": "of += and the like: the operation swapped, or dropped",
    "condition": "of if made always true or always false",
    "comparison": "< and <=, > and >=, == and != swapped",
    "logic": "and and or swapped, or one side dropped; not dropped",
    "arithmetic": "+ and -, * and /, // and *, & and | swapped; % becomes //, >> becomes <<",
    "dropped": "an operand, or a sign, dropped",
    "constant": "0.0 and 1.0, True and False swapped; other fractions doubled; whole numbers one more, one less;"
    " infinity's sign changed, or 0.0 for it",
    "call": "min and max swapped, or one side dropped; branches of where swapped, or one taken; abs dropped",
    "access": "mask= or other= of a load or a store dropped",
}
SWAPS = dict(pair.split() for pair in ("< <=", "> >=", "== !=", "+ -", "* /", "& |", "and or", "minimum maximum"))
SWAPS |= {after: before for before, after in SWAPS.items()} | {"//": "*", "%": "//", ">>": "<<", "max": "min"}
SIGN = re.compile(r"//|>>|<=|>=|==|!=|[-+*/%&|<>]|\band\b|\bor\b")
LEFT = ("+", "*", "&", "|")  # of which the left operand may be dropped too


# Mutants ----------------------------------------------------------------------------------------------------------

Change = tuple[str, int, int, str]  # operator, start, end, what is there instead


class Source:
    """Changes of the functions of a file that are under `triton.jit`."""

    def __init__(self, text: str, functions: Sequence[str] = ()) -> None:
        self.text, self.lines = text, [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        assert text.isascii()  # columns are counted in bytes
        self.functions = [
            node
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
            and (not functions or node.name in functions)
        ]

    def span(self, node: Any) -> tuple[int, int]:
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def code(self, node: ast.AST) -> str:
        start, end = self.span(node)
        code = self.text[start:end]
        return code if isinstance(node, (ast.Name, ast.Constant, ast.Call, ast.Subscript)) else f"({code})"

    def changes(self) -> Iterator[Change]:
        for function in self.functions:
            body = function.body[isinstance(function.body[0], ast.Expr) :]  # a docstring comes first
            for node in (node for statement in body for node in ast.walk(statement)):
                yield from ((operator, *self.span(at), after) for operator, at, after in self.replaced(node))
                yield from self.swapped(node)
                yield from self.without_keyword(node)

    def replaced(self, node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
        nothing = isinstance(node, ast.Return) and node.value is None
        if nothing or isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)):
            yield "statement", node, "pass"
        if isinstance(node, ast.AugAssign):
            target, value = self.code(node.target), self.text[slice(*self.span(node.value))]
            yield "assignment", node, f"{target} = {value}"
        if isinstance(node, (ast.If, ast.IfExp)):
            yield from (("condition", node.test, forced) for forced in ("True", "False"))
        if isinstance(node, ast.BoolOp):
            for n in range(len(node.values)):
                rest = [self.code(value) for value in node.values[:n] + node.values[n + 1 :]]
                yield "logic", node, "(" + f" {'and' if isinstance(node.op, ast.And) else 'or'} ".join(rest) + ")"
        if isinstance(node, ast.BinOp):
            yield "dropped", node, self.code(node.left)
            if self.sign(node.left, node.right)[0] in LEFT:
                yield "dropped", node, self.code(node.right)
        if isinstance(node, ast.UnaryOp):
            yield "logic" if isinstance(node.op, ast.Not) else "dropped", node, self.code(node.operand)
        if isinstance(node, ast.Constant):
            yield from (("constant", node, after) for after in constants(node.value))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            arguments = [self.code(argument) for argument in node.args]
            if name == "float":
                infinities = ('float("inf")', 'float("-inf")')
                yield from (("constant", node, each) for each in (*infinities, "0.0") if each != self.code(node))
            elif name in ("tl.minimum", "tl.maximum", "tl.abs"):
                yield from (("call", node, argument) for argument in arguments)
            elif name == "tl.where":
                condition, one, other = arguments
                after = f"tl.where({condition}, {other}, {one})", one, other
                yield from (("call", node, each) for each in after)
            if name in ("tl.minimum", "tl.maximum", "tl.max"):
                yield "call", node.func, "tl." + SWAPS[name[3:]]

    def sign(self, left: ast.AST, right: ast.AST) -> tuple[str, int]:
        start, end = self.span(left)[1], self.span(right)[0]
        match = SIGN.search(self.text, start, end)
        assert match, self.text[start:end]
        return match[0], match.start()

    def swapped(self, node: ast.AST) -> Iterator[Change]:
        pairs: list[tuple[str, ast.AST, ast.AST]] = []
        if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            pairs = [("comparison", node.left, node.comparators[0])]
        elif isinstance(node, ast.BoolOp):
            pairs = [("logic", *pair) for pair in zip(node.values, node.values[1:], strict=False)]
        elif isinstance(node, ast.BinOp):
            pairs = [("arithmetic", node.left, node.right)]
        elif isinstance(node, ast.AugAssign):
            pairs = [("assignment", node.target, node.value)]
        for operator, left, right in pairs:
            sign, at = self.sign(left, right)
            yield operator, at, at + len(sign), SWAPS[sign]

    def without_keyword(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
            for keyword in node.keywords:
                start, end = self.span(keyword)
                gone = keyword.arg == "mask" and any(other.arg == "other" for other in node.keywords)
                if gone:  # other= alone is an error
                    end = self.span(node)[1] - 1
                yield "access", self.text.rindex(",", 0, start), end, ""


def constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1), str(value - 1)]
    if isinstance(value, float):
        return [{0.0: "1.0", 1.0: "0.0"}.get(value, repr(2 * value))]
    return []


def mutants_of(text: str, file: str, functions: Sequence[str] = ()) -> list[Mutant]:
    source, seen, keys, found = Source(text, functions), set(), Counter[str](), []
    for operator, start, end, after in sorted(source.changes(), key=lambda change: change[1:3]):
        changed = text[:start] + after + text[end:]
        if changed in seen:
            continue
        seen.add(changed)
        line = text.count("\n", 0, start) + 1
        at = source.lines[line - 1]
        words = text[at : source.lines[line]].strip()
        mutant = Mutant(file, start, text[start:end], after, operator, line, start - at + 1, words, 1, None)
        keys[mutant.key] += 1
        found.append(mutant._replace(nth=keys[mutant.key]))
    return found


@functools.cache
def texts() -> dict[str, str]:
    """Read once: a file may change while its mutants are judged."""
    return {file: (OPS / file).read_text() for file in FILES}


def all_mutants() -> list[Mutant]:
    return [m for file, functions in FILES.items() for m in mutants_of(texts()[file], file, functions)]


# Checks -----------------------------------------------------------------------------------------------------------

NAN, SMALL = float("nan"), {"fwd": (16, 16), "decode": (16, 16), "dq": (16, 16), "dkdv": (16, 16)}
OUTPUTS = ("output", "lse", "delta", "grad_query", "grad_key", "grad_value", "parts", "part_lse")


def placed(x: Tensor, pad: int) -> Tensor:
    """The same in the middle of a storage of NaN, of which no two arguments have as much: their strides differ."""
    wide = x.new_full([n + pad for n in x.shape], NAN)
    view = wide[tuple(slice(1, 1 + n) for n in x.shape)]
    return view.copy_(x)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


class Memory:
    """Holds accesses of the interpreter to elements of what a launch was given."""

    def __init__(self) -> None:
        self.interpreter = importlib.import_module("triton.runtime.interpreter")
        self.real = self.interpreter._interpreter
        self.read = self.written = np.empty(0, np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def give(self, args: dict[str, Any]) -> None:
        tensors = {name: x for name, x in args.items() if isinstance(x, Tensor)}
        self.read = np.unique(np.concatenate([addresses(x) for x in tensors.values()]))
        self.written = np.unique(np.concatenate([addresses(x) for name, x in tensors.items() if name in OUTPUTS]))

    def hold(self, allowed: np.ndarray, places: np.ndarray, mask: np.ndarray, what: str) -> None:
        places = places[np.broadcast_to(mask, places.shape).astype(bool)].astype(np.uint64)
        at = np.minimum(np.searchsorted(allowed, places), len(allowed) - 1)
        assert (allowed[at] == places).all(), f"{what} out of bounds"

    def load(self, places: np.ndarray, mask: np.ndarray, *rest: Any) -> np.ndarray:
        self.hold(self.read, places, mask, "read")
        return self.real.load(places, mask, *rest)

    def store(self, places: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        self.hold(self.written, places, mask, "write")
        self.real.store(places, value, mask)


def addresses(x: Tensor) -> np.ndarray:
    places = torch.tensor(x.storage_offset())
    for size, stride in zip(x.shape, x.stride(), strict=True):
        places = places[..., None] + torch.arange(size) * stride
    return (x.untyped_storage().data_ptr() + places.flatten() * x.itemsize).numpy().astype(np.uint64)


class Check:
    """One call: output, lse and gradients within the error rule of the reference, of float64.

    Args:
        options: of kernels.dense or kernels.packed.
        unseen: for each sequence of the batch, keys (start, stop) that lie in tiles which nobody sees, or are not
            filled: they are NaN.
        tiles: (BLOCK_M, BLOCK_N) of kernels, where not 16.
        factor: of query: makes scores large.
        subsets: of the gradients, one backward for each.
        told: cu_seqlens or key_lengths as the kernel gets them, wrong ones.
    """

    def __init__(
        self, name: str, queries: int, keys: int, *, batch: int = 1, heads: int = 1, kv_heads: int = 1, dim: int = 16,
        value_dim: int = 16, dtype: torch.dtype = torch.float32, cu: tuple[list[int], list[int]] | None = None,
        max_seqlens: tuple[int, int] = (0, 0), unseen: Sequence[tuple[int, int, int]] = (), splits: int = 1,
        tiles: dict[str, tuple[int, int]] | None = None, factor: float = 1.0, subsets: Sequence[str] = ("qkv",),
        told: dict[str, list[int]] | None = None, transposed: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        self.name, self.subsets, self.told, self.splits, self.dtype = name, subsets, told or {}, splits, dtype
        self.tiles = SMALL | (tiles or {})
        plain: dict[str, Any] = {"is_causal": False, "scale": 0.3, "window_left": -1, "window_right": -1}
        plain |= {"alibi_slopes": None, "softcap": 0.0, "dropout_p": 0.0, "rng_state": None}
        plain |= {"attn_mask": None, "key_lengths": None} if cu is None else {}
        self.options = plain | options
        if self.options["dropout_p"]:
            self.options["rng_state"] = torch.tensor([0x123456789ABCDEF, 77])
        lead = (batch, heads, kv_heads) if cu is None else (1, heads, kv_heads)
        shapes = ((lead[0], heads, queries, dim), (lead[0], kv_heads, keys, dim), (lead[0], kv_heads, keys, value_dim))
        inputs = [normal(*shape, seed=n).to(dtype) for n, shape in enumerate(shapes)]
        inputs[0] *= factor
        self.upstream = normal(lead[0], heads, queries, value_dim, seed=9).to(dtype)
        for b, start, stop in unseen:
            inputs[1][b, :, start:stop] = inputs[2][b, :, start:stop] = 0.0
        if cu is not None:
            lengths = [torch.tensor(each, dtype=torch.int32) for each in cu]
            longest = [max(int(x.diff().max()), most) for x, most in zip(lengths, max_seqlens, strict=True)]
            self.options |= dict(
                zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*lengths, *longest), strict=True)
            )
        self.packed = cu is not None
        self.torchs, self.exact = (self.answers(inputs, kind) for kind in (dtype, torch.float64))
        poisoned = [x.clone() for x in inputs]
        for b, start, stop in unseen:
            poisoned[1][b, :, start:stop] = poisoned[2][b, :, start:stop] = NAN
        if transposed:
            poisoned = [x.transpose(1, 2).contiguous() for x in poisoned]
        self.inputs = [placed(x, 3 + n) for n, x in enumerate(poisoned)]
        if transposed:
            self.inputs = [x.transpose(1, 2) for x in self.inputs]

    def answers(self, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """output, lse, gradients of query, key and value; in 16 bits of torch's own operations."""
        options: dict[str, Any] = self.options | {"return_lse": True}
        mask = options.get("attn_mask")
        if mask is not None and dtype == torch.float64 and mask.is_floating_point():
            options["attn_mask"] = mask.double()
        leaves: Any = [x.to(dtype).requires_grad_() for x in inputs]
        if self.packed:
            output, lse = reference.varlen_attention_fwd(*(x[0].transpose(0, 1) for x in leaves), **options)
            output, lse = output.transpose(0, 1)[None], lse[None]
        elif dtype.itemsize > 2:
            output, lse = reference.scaled_dot_product_attention_fwd(*leaves, **options)
        else:
            assert options.pop("rng_state") is None, "torch draws another mask"
            sizes = options.pop("window_left"), options.pop("window_right")
            options |= {"window": None if sizes == (-1, -1) else sizes, "enable_gqa": True}
            output, lse = cases.TORCH["scaled_dot_product_attention"](*leaves, **options)
        grads = torch.autograd.grad(output, leaves, self.upstream.to(dtype))
        return [x.detach() for x in (output, lse, *grads)]

    def problem(self) -> attention.Problem:
        query, key, value = self.inputs
        options = dict(self.options)
        slopes = options["alibi_slopes"]
        options["alibi_slopes"] = slopes if slopes is None else placed(slopes[..., None], 2)[..., 0]
        options |= {name: torch.tensor(wrong, dtype=torch.int32) for name, wrong in self.told.items()}
        if self.packed:
            query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
            return attention.packed(query, key, value, **options)
        mask = options["attn_mask"]
        if mask is not None and mask.is_floating_point():
            options["attn_mask"] = placed(mask.mT, 5).mT
        return attention.dense(query, key, value, **options)

    def run(self, module: ModuleType) -> None:
        memory = Memory()
        memory.interpreter._interpreter, run = memory, module.run  # type: ignore[attr-defined]

        def watched(launches: Any, device: torch.device) -> None:
            for launch in launches:
                memory.give(launch.args)
                run([launch], device)

        module.run = watched  # type: ignore[attr-defined]
        module.tiles = lambda kernel, *_: module.Tiles(*self.tiles[kernel], 4, 2)  # type: ignore[attr-defined]
        attention.splits = lambda *_: self.splits
        try:
            self.compare(module)
        finally:
            memory.interpreter._interpreter, module.run = memory.real, run  # type: ignore[attr-defined]

    def compare(self, module: ModuleType) -> None:
        problem = self.problem()
        output, lse, *grads = (x.to(x.dtype) for x in self.torchs)
        names = ("output", "lse", "grad_query", "grad_key", "grad_value")

        def hold(n: int, ours: Tensor) -> None:
            if not self.told:
                assert_within_rule(ours, self.torchs[n], self.exact[n], names[n])

        ours, our_lse = placed(torch.full_like(output, NAN), 8), torch.full_like(lse, NAN)
        module.fwd(problem, ours, our_lse)
        hold(0, ours)
        hold(1, our_lse)
        upstream = placed(self.upstream, 9)
        for subset in self.subsets:
            some = [
                placed(torch.full_like(x, NAN), 10 + n) if name in subset else None
                for n, (name, x) in enumerate(zip("qkv", grads, strict=True))
            ]
            module.bwd(problem, upstream, placed(output, 7), lse, *some)
            for n, grad in enumerate(some):
                if grad is not None:
                    hold(2 + n, grad)


@functools.cache
def all_checks() -> list[Check]:
    """Those that kill most first."""
    inf, fp32, bf16 = float("inf"), torch.float32, torch.bfloat16
    lengths = lambda *n: torch.tensor(n, dtype=torch.int32)  # noqa: E731
    slopes, slopes_2d = torch.tensor([0.5, 0.2]), torch.tensor([[0.5, 0.1], [0.3, 0.7]])
    wide, flat = dict.fromkeys(SMALL, (32, 16)), dict.fromkeys(SMALL, (16, 32))
    seen = normal(1, 2, 1, 37, seed=4) > 0
    one_dead = normal(2, 1, 20, 37, seed=4).to(fp32)
    one_dead[0, 0, 3] = one_dead[1, 0, :, :17] = -inf
    few = normal(2, 1, 3, 70, seed=4) > 0
    few[0, 0, 1] = False
    checks = [
        Check("dense", 17, 36, batch=2, heads=2, factor=2.0),
        Check("causal", 40, 40, dim=12, value_dim=20, is_causal=True, factor=-2.0, subsets=("qkv", "q", "k", "v")),
        Check("decode", 3, 40, batch=2, heads=4, kv_heads=2, dim=12, key_lengths=lengths(40, 21), splits=3,
              is_causal=True, unseen=[(1, 21, 40)]),
        Check("window", 40, 96, batch=2, key_lengths=lengths(90, 45), window_left=20, window_right=3,
              unseen=[(0, 0, 16), (0, 90, 96), (1, 45, 96)], factor=2.0),
        Check("varlen", 37, 51, heads=2, kv_heads=2, cu=([0, 18, 18, 37], [0, 9, 30, 51]), max_seqlens=(50, 50),
              is_causal=True, alibi_slopes=normal(3, 2).abs().to(fp32)),
        Check("bf16", 37, 40, heads=2, kv_heads=2, dtype=bf16, alibi_slopes=slopes, is_causal=True, factor=2.0),
        Check("alibi", 20, 37, batch=2, heads=2, dim=12, alibi_slopes=slopes_2d, scale=-0.3, softcap=5.0, factor=8.0,
              transposed=True, key_lengths=lengths(37, 11), unseen=[(1, 11, 37)]),
        Check("bool mask", 20, 37, batch=2, heads=2, attn_mask=seen.expand(2, 2, 20, 37)),
        Check("dropout", 17, 8, batch=2, heads=2, dropout_p=0.5),
        Check("dropout of keys", 17, 18, heads=1, dropout_p=0.5),
        Check("float mask", 20, 37, batch=2, heads=2, kv_heads=2, attn_mask=one_dead, is_causal=True, factor=2.0),
        Check("window of few", 50, 60, window_left=4, window_right=-1, tiles=wide, factor=2.0),
        Check("slopes of either sign", 20, 37, heads=2, alibi_slopes=torch.tensor([-9.0, 9.0])),
        Check("window to the right", 20, 70, window_left=-1, window_right=3, tiles=flat, unseen=[(0, 32, 70)]),
        Check("window of none", 40, 20, window_left=2, window_right=0, tiles=flat),
        Check("longer queries", 40, 30, batch=2, key_lengths=lengths(30, 0), is_causal=True, tiles=wide,
              unseen=[(1, 0, 30)]),
        Check("decode bf16", 2, 70, batch=2, heads=2, dtype=bf16, splits=3, alibi_slopes=slopes,
              window_left=40, window_right=-1, key_lengths=lengths(70, 30), unseen=[(0, 0, 16), (1, 30, 70)]),
        Check("decode masked", 3, 36, batch=2, heads=2, attn_mask=few[..., :36], splits=2, softcap=3.0, value_dim=40),
        Check("decode varlen", 5, 40, heads=2, cu=([0, 2, 2, 5], [0, 20, 25, 40]), is_causal=True),
        Check("decode far", 1, 48, heads=2, splits=3, attn_mask=150.0 * (torch.arange(48) // 16).expand(1, 2, 1, 48)),
        Check("decode dropout", 2, 8, batch=2, heads=4, kv_heads=2, dropout_p=0.3),
        Check("varlen dropout", 22, 8, heads=2, cu=([0, 3, 22], [0, 5, 8]), dropout_p=0.3),
        Check("mask bf16", 20, 37, dtype=bf16, attn_mask=one_dead[:1], softcap=5.0, window_left=9, window_right=5),
        Check("plain bf16", 17, 36, dtype=bf16, factor=2.0),
        Check("groups", 40, 20, heads=2),
        Check("longer queries, window", 40, 30, key_lengths=lengths(30), window_left=14, window_right=17),
        Check("decode in tiles", 9, 17, heads=8, subsets=()),
        Check("decode window", 2, 40, window_left=0),
        Check("decode window to the right", 2, 40, window_right=15),
        *(
            Check(f"window ({left}, {right})", 40, 40, window_left=left, window_right=right)
            for left, right in ((16, 1), (15, 14), (14, 15), (1, 16))  # one less or one more is another tile
        ),
        Check("all dropped", 17, 20, dropout_p=1.0, key_lengths=lengths(20)),
        Check("wrong lengths", 20, 37, batch=2, key_lengths=lengths(37, 0), told={"key_lengths": [99, -9]}),
        Check("wrong cu_seqlens", 20, 37, cu=([0, 20, 20], [0, 37, 37]),
              told={"cu_seqlens_q": [-9, 99, 30], "cu_seqlens_k": [-9, 99, 50]}),
    ]  # fmt: skip
    return checks


# Judging ----------------------------------------------------------------------------------------------------------


def module_of(name: str, text: str) -> ModuleType:
    """Of a module's own name; the interpreter reads its source again."""
    file = f"<mutant of {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    module = ModuleType(name)
    module.__file__ = file
    exec(compile(text, file, "exec"), module.__dict__)
    return module


def kernels(mutant: Mutant | None) -> ModuleType:
    """fastlm.ops.attention.triton with one change; in a process of its own, whose modules it replaces."""
    changed = dict(texts())
    if mutant is not None:
        changed[mutant.file] = mutant.apply(changed[mutant.file])
    attention, launch = MODULES
    sys.modules[launch] = module_of(launch, changed["triton_launch.py"])
    return module_of(attention, changed["attention/triton.py"])


class Judge:
    """Runs checks that reach a mutant, first the one that killed the last mutant, which lies close by, then by time."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self.last, self.checks = "", checks
        self.statements = {file: statements(text) for file, text in texts().items()}
        verdict, told = self.fork(None, checks, 120.0)
        assert verdict == "survived", f"the checks fail for the kernels as they are: {told[-2:]}"
        self.reached = {name: (seconds, set(lines)) for name, seconds, *lines in map(json.loads, told[1::2])}

    def checks_for(self, mutant: Mutant) -> list[Check]:
        around = [span for span in self.statements[mutant.file] if span[0] <= mutant.line <= span[1]]
        start, stop = min(around, key=lambda span: span[1] - span[0])
        places = {f"{mutant.file}:{line}" for line in range(start, stop + 1)}
        checks = [check for check in self.checks if places & self.reached[check.name][1]]
        return sorted(checks, key=lambda check: (check.name != self.last, self.reached[check.name][0]))

    def __call__(self, mutant: Mutant) -> Verdict:
        began = time.monotonic()
        status, told = self.fork(mutant, self.checks_for(mutant), PATIENCE)
        if status == "killed" and told[-1] != "making the module":
            self.last = told[-2] if len(told) > 1 else told[-1]
        return Verdict(mutant, status, ": ".join(told[-2:]), round(time.monotonic() - began, 2))

    def fork(self, mutant: Mutant | None, checks: Sequence[Check], patience: float) -> tuple[str, list[str]]:
        """Status, and what was told: names of checks, and why one failed; of no mutant, what each check reaches."""
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(send, b"making the module\n" * (mutant is not None))
                gc.disable()
                module = kernels(mutant)
                for check in checks:
                    os.write(send, f"{check.name}\n".encode())
                    if mutant is None:
                        os.write(send, (json.dumps(reached(check, module)) + "\n").encode())
                    else:
                        check.run(module)
                os.write(send, b"survived\n")
            except BaseException as error:
                os.write(send, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].encode() + b"\nfailed\n")
            finally:
                os._exit(0)
        os.close(send)
        told, status = b"", "timed out"
        while select.select([receive], [], [], patience)[0]:
            part = os.read(receive, 1 << 16)
            told += part
            if not part:
                status = "killed"
                break
        os.close(receive)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        *lines, last = told.decode(errors="replace").splitlines()
        if last == "survived":
            return "survived", lines if mutant is None else []
        return (status, lines) if last == "failed" else (status, [*lines, last, "crashed"[: 9 * (status == "killed")]])


def statements(text: str) -> list[tuple[int, Any]]:
    """Their first and last lines; of one that holds others, up to these."""
    spans = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt):
            inner = getattr(node, "body", None)
            spans.append((node.lineno, max(node.lineno, inner[0].lineno - 1) if inner else node.end_lineno))
    return spans


def reached(check: Check, module: ModuleType) -> list[Any]:
    """Its name, how long it takes, and the lines of the kernels that it runs."""
    files = {f"<mutant of {name}>": file for name, file in zip(MODULES, FILES, strict=True)}
    lines = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        file = files.get(frame.f_code.co_filename)
        if file is None:
            return None
        lines.add(f"{file}:{frame.f_lineno}")
        return trace

    began = time.monotonic()
    sys.settrace(trace)
    check.run(module)
    sys.settrace(None)
    return [check.name, round(time.monotonic() - began, 2), *sorted(lines)]


_judge: Judge


def _work(mutant: Mutant) -> Verdict:
    return _judge(mutant)


def judge_all(
    mutants: Sequence[Mutant], jobs: int, json_lines: Path | None = None, checks: Sequence[Check] = ()
) -> list[Verdict]:
    torch.set_num_threads(1)  # those of OpenMP would be missing after a fork
    global _judge
    importlib.import_module("fastlm.ops.attention.triton")  # here, not in every child: it imports triton
    interpreter.correct()
    np.seterr(all="ignore")
    gc.collect()
    gc.freeze()
    _judge = Judge(checks or all_checks())
    verdicts, shown = [], time.monotonic()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for verdict in pool.imap(_work, mutants):
            verdicts.append(verdict)
            if json_lines:
                row = verdict._asdict() | {"mutant": str(verdict.mutant), "key": verdict.mutant.key}
                with json_lines.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if time.monotonic() > shown + 30:
                shown, count = time.monotonic(), Counter(verdict.status for verdict in verdicts)
                print(f"{len(verdicts)} of {len(mutants)}", dict(count), file=sys.stderr, flush=True)
    return verdicts


# The table --------------------------------------------------------------------------------------------------------


def listed() -> dict[str, str]:
    """Mutants that change nothing, by their key, and why."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore
    reasons: dict[str, str] = {}
    for entry in tomllib.loads(TABLE.read_text()).get("triton", []):
        for key in entry["mutants"]:
            assert key not in reasons, f"{TABLE.name}: listed twice: {key}"
            reasons[key] = entry["reason"]
    return reasons


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="a regular expression for mutants, as they are printed")
    parser.add_argument("--sample", type=int, help="so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    parser.add_argument("--json", type=Path, help="file that every verdict is added to, a line for each")
    args = parser.parse_args(arguments)
    every = all_mutants()
    chosen = [mutant for mutant in every if re.search(args.pattern, str(mutant))]
    if args.sample is not None:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        print(*chosen, sep="\n")
        return 0
    verdicts = judge_all(chosen, args.jobs, args.json)
    count, seconds = Counter(verdict.status for verdict in verdicts), sum(verdict.seconds for verdict in verdicts)
    print(f"{len(verdicts)} mutants:", ", ".join(f"{n} {status}" for status, n in count.items()), f"in {seconds:.0f} s")
    wrong = complaints(verdicts, listed(), {mutant.key for mutant in every})
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
