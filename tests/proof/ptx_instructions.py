"""What PTX instructions do: a decoder for each opcode, which makes a function over the lanes of registers.

A decoder is called with the code that it is part of, with the opcode's modifiers, all of which it must take, and with
the operands. It gives a step, a function of a mask: True for all lanes, or which ones. Steps write in place.

Source: PTX ISA 9.0. What it leaves open is done in one way: approximations and sums of mma are rounded once, and NaNs
keep the bits that numpy gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from proof.ptx import Code

WARP = 32
TYPES = {"pred": np.dtype(bool), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u2"), "f16x2": np.dtype("f2")} | {
    f"{letter}{8 * size}": np.dtype(f"{kind}{size}")
    for letter, kind in (("b", "u"), ("u", "u"), ("s", "i"), ("f", "f"))
    for size in (1, 2, 4, 8)
    if letter != "f" or size > 1
}
WIDTHS = {name: dtype.itemsize for name, dtype in TYPES.items()} | {"bf16x2": 4, "f16x2": 4}


class Fault(Exception):
    """What is wrong with an instruction, and in which of the lanes that run it; becomes a PtxError."""

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane


ORIGIN = 1 << 16  # numpy refuses an array at address 0


@functools.cache
def everything(dtype: str) -> np.ndarray:
    """All of this process's memory from ORIGIN on, as one array."""
    size = np.dtype(dtype).itemsize
    interface = {"shape": ((1 << 47) // size,), "typestr": f"<{dtype}", "data": (ORIGIN, False), "version": 3}
    return np.asarray(type("Everything", (), {"__array_interface__": interface})())


# Arithmetic -------------------------------------------------------------------------------------------------------

TINY = np.float32(2.0**-126)


def _fused(a: np.ndarray, b: Any, c: Any) -> np.ndarray:
    """a * b + c in fp64, of operands whose product is exact there, rounded to odd: rounding it again is then right.

    Source: Boldo and Melquiond, "When double rounding is odd", 2005; the error of the sum is Knuth's.
    """
    product = a * b
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    change = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    outwards = np.signbit(error) == np.signbit(total)
    return np.where(change, bits + np.where(outwards, 1, -1), bits).view(np.float64)


def _fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    total = np.multiply(a, b, dtype=np.float64)
    total += c
    result = total.astype(np.float32)
    ties = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
    tiny = np.count_nonzero(np.abs(result) < TINY)
    if np.count_nonzero(ties) or (tiny and tiny > np.count_nonzero(total == 0)):  # else rounding twice does no harm
        return _fused(a.astype(np.float64), b, c.astype(np.float64)).astype(np.float32)
    return result


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, from fp32 or fp64; every NaN becomes 0x7FFF."""
    y = x.astype(np.float32)
    bits = y.view(np.uint32).copy()
    if x.dtype == np.float64:  # to odd first
        bits -= (np.abs(y) > np.abs(x)).astype(np.uint32)
        bits |= (y != x).astype(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _widened(x: np.ndarray, kind: str) -> np.ndarray:
    """Floats of 16 bits in fp64; others as they are."""
    return x if kind not in HALVES else (_from_bf16(x) if kind[0] == "b" else x).astype(np.float64)


def _narrowed(x: np.ndarray, kind: str) -> np.ndarray:
    return x if kind not in HALVES else _to_bf16(x) if kind[0] == "b" else x.astype(np.float16)


def _flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _saturate(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers, towards zero."""
    if a.dtype.kind == "u":
        return a // b
    unsigned = np.dtype(f"u{a.itemsize}")
    quotient = (np.abs(a).view(unsigned) // np.abs(b).view(unsigned)).view(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _clamped(x: np.ndarray, target: np.dtype) -> np.ndarray:
    """As an integer, to the nearest that there is; NaN becomes 0."""
    limits = np.iinfo(target)
    inside = np.where((x > limits.min) & (x < limits.max), x, 0).astype(target)
    return np.where(x >= limits.max, limits.max, np.where(x <= limits.min, limits.min, inside)).astype(target)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    if a.itemsize < 8:
        return np.multiply(a, b, dtype=f"{a.dtype.kind}8") >> (8 * a.itemsize)
    return ((a.astype(object) * b.astype(object)) >> 64).astype(a.dtype)


def _bit_length(x: np.ndarray) -> np.ndarray:
    x = x.astype(f"u{x.itemsize}")
    high, low = (np.frexp(part.astype(np.float64))[1] for part in (x >> 32, x & 0xFFFFFFFF))
    return np.where(high, high + 32, low)


def _field(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe."""
    wide = x.astype(f"{x.dtype.kind}8") >> np.minimum(start & 0xFF, 63).astype(np.uint8)
    spare = np.clip(64 - (length & 0xFF).astype(np.int64), 0, 63).astype(np.uint8)
    if x.dtype.kind == "u":
        wide = np.where(start & 0xFF > 63, 0, wide)
    return np.where(length & 0xFF == 0, 0, wide << spare >> spare)


def _insert(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi."""
    start, length, one = (start & 0xFF).astype(np.uint64), (length & 0xFF).astype(np.uint64), np.uint64(1)
    mask = ((one << length) - one) << start
    return (b & ~mask) | (a.astype(np.uint64) << start & mask)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt without a mode."""
    data = np.stack([a, b], 1).view(np.uint8).reshape(-1, 8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, np.uint32) & 15
    chosen = np.take_along_axis(data, (nibbles & 7).astype(np.int64), 1)
    signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
    return np.ascontiguousarray(np.where(nibbles & 8, signs, chosen)).view(np.uint32)[:, 0]


def _reverse(x: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0]


def _logic(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """lop3."""
    terms = (
        np.where(n & 4, a, ~a) & np.where(n & 2, b, ~b) & np.where(n & 1, c, ~c) for n in range(8) if table >> n & 1
    )
    return functools.reduce(np.bitwise_or, terms, a * 0)


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "lg": lambda a, b: (a < b) | (a > b),  # ne of floats, which is false of NaN
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}
BOOLEANS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _layouts() -> dict[str, tuple[np.ndarray, ...]]:
    """Rows and columns of the elements of mma's fragments, [lane, element]: PTX ISA, "Matrix Fragments for mma"."""
    lane = np.arange(WARP)[:, None]
    group, member = lane >> 2, lane & 3

    def half(k: int) -> tuple[np.ndarray, ...]:
        i, j = np.arange(k // 2), np.arange(k // 4)
        a = group + 8 * (i >> 1 & 1), 2 * member + (i & 1) + 8 * (i >> 2)
        b = 2 * member + (j & 1) + 8 * (j >> 1), group + 0 * j
        return *a, *b

    i, j = np.arange(4), np.arange(2)
    tf32 = group + 8 * (i & 1), member + 4 * (i >> 1), member + 4 * j, group + 0 * j
    accumulator = group + 8 * (i >> 1), 2 * member + (i & 1)
    return {"m16n8k16": half(16), "m16n8k8": half(8), "tf32": tf32, "accumulator": accumulator}


LAYOUTS = _layouts()


# Instructions -----------------------------------------------------------------------------------------------------

Mask = Any  # True: all lanes; or which ones
Step = Callable[[Mask], None]
DECODERS: dict[str, Callable[..., Step]] = {}

SCOPES = ("cta", "gpu", "sys")
ORDERS = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", *SCOPES)
EVICTIONS = ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", *(f"L{n}::{how}" for n in (1, 2) for how in EVICTIONS))
PREFETCHES = ("L2::64B", "L2::128B", "L2::256B")
SPACES = ("global", "shared", "shared::cta", "local", "param", "param::entry", "const")


class Modifiers:
    """Of an opcode; each must be taken by someone who knows what it means."""

    def __init__(self, opcode: str) -> None:
        self.opcode = opcode
        self.name, *self.left = opcode.split(".")

    def take(self, *names: str) -> str:
        """The first of these that is there, or ""."""
        found = next((name for name in self.left if name in names), "")
        if found:
            self.left.remove(found)
        return found

    def drop(self, *names: str) -> None:
        while self.take(*names):
            pass

    def need(self, *names: str) -> str:
        return self.take(*names) or self.unknown()

    def type(self, *only: str) -> str:
        return self.need(*(only or TYPES))

    def space(self) -> str:
        return self.take(*SPACES).split("::")[0]

    def done(self) -> None:
        if self.left:
            self.unknown()

    def unknown(self) -> Any:
        raise Fault(f"{self.opcode} is not known here")


def instruction(*names: str) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
    def register(decode: Callable[..., Step]) -> Callable[..., Step]:
        DECODERS.update(dict.fromkeys(names, decode))
        return decode

    return register


def put(d: np.ndarray, value: Any, m: Mask) -> None:
    if m is True:
        d[...] = value
    else:
        np.copyto(d, value, where=m, casting="unsafe")


def computed(d: np.ndarray, function: Callable[..., Any], *sources: np.ndarray) -> Step:
    if not isinstance(function, np.ufunc):
        return lambda m: put(d, function(*sources), m)

    def step(m: Mask) -> None:
        if m is True:
            function(*sources, out=d)
        else:
            function(*sources, out=d, where=m)

    return step


def elementwise(c: Code, mods: Modifiers, kind: str, function: Callable[..., Any], d: str, *sources: str) -> Step:
    """d = function(*sources), all of one type. 16-bit floats are computed in fp64, exactly or to odd, and rounded."""
    ftz, sat = mods.take("ftz") if kind == "f32" else "", mods.take("sat") if kind in FLOATS else ""
    mods.done()
    out, inputs = c.write(d, kind), [c.read(source, kind) for source in sources]
    if not (ftz or sat or kind in HALVES):
        return computed(out, function, *inputs)

    def step(m: Mask) -> None:
        result = function(*(_flush(x) if ftz else _widened(x, kind) for x in inputs))
        result = _saturate(_flush(result) if ftz else result) if sat else _flush(result) if ftz else result
        put(out, _narrowed(result, kind), np.repeat(m, 2) if m is not True and len(m) < len(out) else m)

    return step


HALVES = ("f16", "bf16", "f16x2", "bf16x2")
FLOATS = ("f32", "f64", *HALVES)
INTEGERS = tuple(f"{letter}{bits}" for letter in "us" for bits in (16, 32, 64))
BITS = ("b16", "b32", "b64")
SUMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # and what rounds to odd in fp64
    "add": (np.add, lambda x, y: _fused(x, 1.0, y)),
    "sub": (np.subtract, lambda x, y: _fused(x, 1.0, -y)),
    "mul": (np.multiply, lambda x, y: _fused(x, y, -0.0)),
}
EXTREMES = {"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@instruction("add", "sub", "mul")
def _arithmetic(c: Code, mods: Modifiers, d: str, a: str, b: str) -> Step:
    part, kind = mods.take("lo", "hi", "wide"), mods.type(*FLOATS, *INTEGERS)
    plain, to_odd = SUMS[mods.name]
    if kind in FLOATS:
        mods.take("rn")
    if part != "wide":
        return elementwise(c, mods, kind, _high if part == "hi" else to_odd if kind in HALVES else plain, d, a, b)
    mods.done()
    out = c.write(d, _doubled(kind))
    return computed(out, lambda x, y: np.multiply(x, y, dtype=out.dtype), c.read(a, kind), c.read(b, kind))


@instruction("mad", "fma")
def _multiply_add(c: Code, mods: Modifiers, d: str, x: str, y: str, z: str) -> Step:
    part, kind = mods.take("lo", "hi", "wide"), mods.type("f32", *HALVES, *INTEGERS)
    if kind in FLOATS:
        mods.need("rn")
        return elementwise(c, mods, kind, _fma32 if kind == "f32" else _fused, d, x, y, z)
    mods.done()
    sum_kind = _doubled(kind) if part == "wide" else kind
    out, a, b, addend = c.write(d, sum_kind), c.read(x, kind), c.read(y, kind), c.read(z, sum_kind)
    if part == "hi":
        return computed(out, lambda a, b, c: _high(a, b).astype(c.dtype) + c, a, b, addend)
    return computed(out, lambda a, b, c: np.multiply(a, b, dtype=c.dtype) + c, a, b, addend)


def _doubled(kind: str) -> str:
    return f"{kind[0]}{2 * int(kind[1:])}"


@instruction("div", "rem")
def _division(c: Code, mods: Modifiers, d: str, a: str, b: str) -> Step:
    kind = mods.type(*(("f32", "f64") if mods.name == "div" else ()), *INTEGERS)
    if kind in FLOATS:
        mods.need("rn", "full", "approx")
        return elementwise(c, mods, kind, np.divide, d, a, b)
    return elementwise(c, mods, kind, _divide if mods.name == "div" else _remainder, d, a, b)


@instruction("min", "max")
def _extremum(c: Code, mods: Modifiers, d: str, a: str, b: str) -> Step:
    kind = mods.type(*FLOATS, *INTEGERS)
    nan = kind not in FLOATS or mods.take("NaN")
    return elementwise(c, mods, kind, EXTREMES[f"{mods.name}.NaN" if nan else mods.name], d, a, b)


@instruction("neg", "abs")
def _sign(c: Code, mods: Modifiers, d: str, a: str) -> Step:
    kind = mods.type(*FLOATS, *INTEGERS)
    return elementwise(c, mods, kind, np.negative if mods.name == "neg" else np.absolute, d, a)


@instruction(*FUNCTIONS)
def _function(c: Code, mods: Modifiers, d: str, a: str) -> Step:
    mods.need("approx")
    function = FUNCTIONS[mods.name]
    return elementwise(c, mods, mods.type(*FLOATS), lambda x: function(x.astype(np.float64)).astype(x.dtype), d, a)


@instruction("rcp", "sqrt")
def _root(c: Code, mods: Modifiers, d: str, a: str) -> Step:
    mods.need("rn", "approx")
    return elementwise(c, mods, mods.type("f32", "f64"), np.reciprocal if mods.name == "rcp" else np.sqrt, d, a)


@instruction("copysign")
def _copysign(c: Code, mods: Modifiers, d: str, sign: str, value: str) -> Step:
    return elementwise(c, mods, mods.type("f32", "f64"), np.copysign, d, value, sign)


@instruction(*BITWISE)
def _bitwise(c: Code, mods: Modifiers, d: str, *sources: str) -> Step:
    return elementwise(c, mods, mods.type("pred", *BITS), BITWISE[mods.name], d, *sources)


@instruction("lop3")
def _lop3(c: Code, mods: Modifiers, d: str, x: str, y: str, z: str, table: str) -> Step:
    return elementwise(c, mods, mods.type("b32"), functools.partial(_logic, int(table, 0)), d, x, y, z)


@instruction("prmt", "brev")
def _rearranged(c: Code, mods: Modifiers, d: str, *sources: str) -> Step:
    kinds, function = (("b32",), _permute) if mods.name == "prmt" else (("b32", "b64"), _reverse)
    return elementwise(c, mods, mods.type(*kinds), function, d, *sources)


@instruction("shl", "shr", "bfe", "bfi")
def _shift(c: Code, mods: Modifiers, d: str, *sources: str) -> Step:
    wide, function = {  # as many operands are of the type; numpy knows amounts past the width, as PTX does
        "shl": (1, np.left_shift),
        "shr": (1, np.right_shift),
        "bfe": (1, _field),
        "bfi": (2, _insert),
    }[mods.name]
    kind = mods.type(*BITS, *INTEGERS)
    mods.done()
    return computed(
        c.write(d, kind), function, *(c.read(x, kind if n < wide else "u32") for n, x in enumerate(sources))
    )


@instruction("shf")
def _funnel(c: Code, mods: Modifiers, d: str, a: str, b: str, amount: str) -> Step:
    left, wrap = mods.need("l", "r") == "l", mods.need("wrap", "clamp") == "wrap"

    def shift(low: np.ndarray, high: np.ndarray, n: np.ndarray) -> np.ndarray:
        both = high.astype(np.uint64) << np.uint64(32) | low
        n = n & 31 if wrap else np.minimum(n, 32)
        return both << n >> np.uint64(32) if left else both >> n

    return elementwise(c, mods, mods.type("b32"), shift, d, a, b, amount)


@instruction("popc", "clz", "bfind")
def _bit_counts(c: Code, mods: Modifiers, d: str, a: str) -> Step:
    kind = mods.type(*(("u32", "s32", "u64", "s64") if mods.name == "bfind" else ("b32", "b64")))
    mods.done()
    functions = {
        "popc": np.bitwise_count,
        "clz": lambda x: 8 * x.itemsize - _bit_length(x),
        "bfind": lambda x: _bit_length(np.where(x < 0, ~x, x)) - 1,
    }
    return computed(c.write(d, "u32"), functions[mods.name], c.read(a, kind))


@instruction("setp", "set")
def _compare(c: Code, mods: Modifiers, targets: str, a: str, b: str, *third: str) -> Step:
    kind = mods.type("u32", "s32", "f32") if mods.name == "set" else "pred"
    name, combine = mods.need(*COMPARISONS), BOOLEANS[mods.need(*BOOLEANS)] if third else None
    of = mods.type("f32", "f64", "f16", "bf16", *BITS, *INTEGERS)
    ftz = mods.take("ftz") if of == "f32" else ""
    mods.done()
    both, x, y = [c.write(target, kind) for target in targets.split("|")], c.read(a, of), c.read(b, of)
    compare = COMPARISONS["lg" if name == "ne" and of in FLOATS else name]
    if len(both) == 1 and kind == "pred" and not (third or ftz or of in HALVES):
        return computed(both[0], compare, x, y)
    other = c.predicate(*third) if third else None

    def step(m: Mask) -> None:
        found = compare(*(_flush(v) if ftz else _widened(v, of) for v in (x, y)))
        results = [found, ~found] if other is None else [combine(v, other()) for v in (found, ~found)]
        for target, result in zip(both, results, strict=False):
            put(target, result if kind == "pred" else np.where(result, 1 if kind == "f32" else -1, 0), m)

    return step


@instruction("selp")
def _select(c: Code, mods: Modifiers, d: str, a: str, b: str, p: str) -> Step:
    kind = mods.type()
    mods.done()
    return computed(c.write(d, kind), np.where, c.read(p, "pred"), c.read(a, kind), c.read(b, kind))


@instruction("mov")
def _move(c: Code, mods: Modifiers, d: str, a: str) -> Step:
    kind = mods.type()
    mods.done()

    def parts(get: Callable[[str, str], np.ndarray], operand: str, count: int) -> list[np.ndarray | None]:
        """`count` equal parts of an operand, each None if it is not wanted."""
        small, names = f"b{8 * WIDTHS[kind] // count}" if count > 1 else kind, _elements(operand)
        if len(names) == count:
            return [None if name == "_" else get(name, small) for name in names]
        return list(get(operand, kind).view(TYPES[small]).reshape(c.lanes, count).T)

    count = max(len(_elements(d)), len(_elements(a)))
    pairs = zip(parts(c.write, d, count), parts(c.read, a, count), strict=True)
    pairs = [pair for pair in pairs if pair[0] is not None]
    if len(pairs) == 1:
        ((target, source),) = pairs
        return lambda m: put(target, source, m)

    def step(m: Mask) -> None:
        sources = [source.copy() for _, source in pairs]  # a register may be on both sides
        for (target, _), source in zip(pairs, sources, strict=True):
            put(target, source, m)

    return step


@instruction("cvt")
def _convert(c: Code, mods: Modifiers, d: str, *sources: str) -> Step:
    to, of = mods.type("tf32", *TYPES), mods.type()
    integral, nearest, ftz, sat = mods.take(*ROUNDINGS), mods.take("rn", "rna"), mods.take("ftz"), mods.take("sat")
    mods.done()
    of_float, to_float = of in FLOATS, to in (*FLOATS, "tf32")
    narrows = to_float and not (of_float and WIDTHS[of] <= WIDTHS.get(to, 2))  # so that a rounding must be named
    must = "rna" if to == "tf32" else "rn" if narrows or to in HALVES else ""
    bad = (to.endswith("x2") and of != "f32") or (to in ("tf32", "bf16", "bf16x2") and (of != "f32" or sat or integral))
    if bad or (nearest or must) != must or (of_float and not (to_float or integral)) or (ftz and "f32" not in (to, of)):
        mods.unknown()
    out, inputs = c.write(d, "b32" if to in ("tf32", "f16x2", "bf16x2") else to), [c.read(x, of) for x in sources]
    target = TYPES.get(to, out.dtype)

    def load(x: np.ndarray) -> np.ndarray:
        x = _widened(x, of) if of in HALVES else _flush(x) if ftz and of == "f32" else x
        return ROUNDINGS[integral](x) if integral else x

    def convert(x: np.ndarray) -> np.ndarray:
        x = load(x)
        if to == "tf32":  # to nearest, ties away from zero
            return (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        if to in HALVES:
            return _narrowed(_saturate(x) if sat else x, to)
        if to_float:
            x = x.astype(target)
            x = _flush(x) if ftz and to == "f32" else x
            return _saturate(x) if sat else x
        return _clamped(x, target) if of_float or sat else x.astype(target)

    if len(sources) == 2:
        halves = np.dtype(np.uint16)
        return lambda m: put(
            out, convert(inputs[0]).view(halves).astype(np.uint32) << 16 | convert(inputs[1]).view(halves), m
        )
    return computed(out, convert, *inputs)


@instruction("cvta")
def _convert_address(c: Code, mods: Modifiers, d: str, a: str) -> Step:
    back, base = mods.take("to"), c.windows(mods.space())
    kind = mods.type("u64")
    mods.done()
    return computed(c.write(d, kind), np.subtract if back else np.add, c.read(a, kind), base)


@instruction("isspacep")
def _is_in_space(c: Code, mods: Modifiers, p: str, a: str) -> Step:
    space = mods.need("shared", "local", "global")
    mods.done()
    windows = {"shared": c.shared, "local": c.local}

    def inside(x: np.ndarray) -> np.ndarray:
        found = {name: x - np.uint64(window.ctypes.data) < window.nbytes for name, window in windows.items()}
        return found[space] if space in found else ~(found["shared"] | found["local"])

    return computed(c.write(p, "pred"), inside, c.read(a, "u64"))


@instruction("activemask")
def _active(c: Code, mods: Modifiers, d: str) -> Step:
    out = c.write(d, mods.type("b32"))
    mods.done()
    return lambda m: put(out, np.repeat(c.packed(c.all if m is True else m), WARP), m)


@instruction("membar", "fence")
def _fence(c: Code, mods: Modifiers) -> Step:
    mods.drop("sc", "acq_rel", "cta", "gl", "gpu", "sys")
    mods.done()
    return lambda m: None


@instruction("createpolicy")
def _policy(c: Code, mods: Modifiers, d: str, *_: str) -> Step:
    mods.drop("fractional", "b64", *HINTS)
    mods.done()
    return lambda m: None


# Loads, stores, copies --------------------------------------------------------------------------------------------


def _elements(operand: str) -> list[str]:
    return operand[1:-1].split(",") if operand[0] == "{" else [operand]


def _accessed(mods: Modifiers) -> tuple[str, str, int]:
    """Space, type and length of vectors of a load or store."""
    mods.drop(*ORDERS, *HINTS, *PREFETCHES, "L2::cache_hint")
    space, count, kind = mods.space(), int(mods.take("v2", "v4")[1:] or 1), mods.type()
    mods.done()
    return space, kind, count


@instruction("ld")
def _load(c: Code, mods: Modifiers, d: str, place: str, *_: str) -> Step:
    space, kind, count = _accessed(mods)
    dtype = TYPES[kind]
    targets = [c.write(name, kind) for name in _elements(d)]
    if len(targets) != count:
        raise Fault(f"{count} elements are loaded into {len(targets)} registers")
    if space == "param" and (values := c.parameter(place, dtype, count)) is not None:

        def from_parameters(m: Mask) -> None:
            for target, value in zip(targets, values[:, None], strict=True):
                put(target, value, m)

        return from_parameters
    size = dtype.itemsize * count
    at, memory, shift = c.address(place, space, size), everything(dtype.str[1:]), dtype.itemsize.bit_length() - 1
    counted = space in ("", "global")

    def step(m: Mask) -> None:
        index = at(m) >> shift
        if counted:
            c.counts.bytes_read += size * len(index)
        for n, target in enumerate(targets):
            target[... if m is True else m] = memory[index + n if n else index]

    return step


@instruction("st")
def _store(c: Code, mods: Modifiers, place: str, a: str, *_: str) -> Step:
    space, kind, count = _accessed(mods)
    dtype = TYPES[kind]
    sources = [c.read(name, kind) for name in _elements(a)]
    if len(sources) != count:
        raise Fault(f"{count} elements are stored from {len(sources)} registers")
    size = dtype.itemsize * count
    at, shift = c.address(place, space, size, write=True), dtype.itemsize.bit_length() - 1
    memory, counted = everything(dtype.str[1:]), space in ("", "global")

    def step(m: Mask) -> None:
        index = at(m) >> shift
        if counted:
            c.counts.bytes_written += size * len(index)
        for n, source in enumerate(sources):
            memory[index + n if n else index] = source if m is True else source[m]

    return step


ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: c if old == b else old,
}


@instruction("atom", "red")
def _atomic(c: Code, mods: Modifiers, *operands: str) -> Step:
    d, place, *sources = operands if mods.name == "atom" else ("_", *operands)
    mods.drop(*ORDERS)
    space, name = mods.space(), mods.need(*ATOMICS)
    kind = mods.type("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64")
    mods.done()
    dtype, out, values = TYPES[kind], c.write(d, kind), [c.read(source, kind) for source in sources]
    at, memory, shift = (
        c.address(place, space, dtype.itemsize, write=True),
        everything(dtype.str[1:]),
        dtype.itemsize.bit_length() - 1,
    )

    def step(m: Mask) -> None:
        lanes = np.flatnonzero(c.all if m is True else m)
        for lane, index in zip(lanes, at(m) >> shift, strict=True):
            old = memory[index]
            memory[index] = ATOMICS[name](old, *(value[lane] for value in values))
            out[lane] = old
        if space in ("", "global"):
            c.counts.bytes_read += dtype.itemsize * len(lanes)
            c.counts.bytes_written += dtype.itemsize * len(lanes)

    return step


@instruction("cp")
def _copy_async(c: Code, mods: Modifiers, *operands: str) -> Step:
    mods.need("async")
    what = mods.take("commit_group", "wait_group", "wait_all")
    if what:
        mods.done()
        if what == "commit_group":
            return lambda m: c.team.commit(c.all if m is True else m)
        left = int(operands[0], 0) if operands else -1
        return lambda m: c.team.land(c.all if m is True else m, left)
    through = mods.need("ca", "cg")
    mods.need("shared", "shared::cta")
    mods.need("global")
    hint = mods.take("L2::cache_hint")
    mods.drop(*PREFETCHES)
    mods.done()
    to, of, text, *given = operands[: -1 if hint else None]
    size, limited = int(text, 0), c.read(given[0], "u32") if given and not c.is_predicate(given[0]) else None
    ignored = c.predicate(given[0]) if given and limited is None else None
    if size not in ((4, 8, 16) if through == "ca" else (16,)):
        raise Fault(f"cp.async.{through} copies no {size} bytes")
    target, source = c.address(to, "shared", size, write=True), c.address(of, "global", size)

    def step(m: Mask) -> None:
        lanes = np.flatnonzero(c.all if m is True else m)
        sizes = np.full(len(lanes), size) if limited is None else limited[lanes].astype(np.int64)
        sizes = sizes if ignored is None else np.where(ignored()[lanes], 0, sizes)
        if np.count_nonzero(sizes > size):
            raise Fault(f"reads {sizes.max()} bytes for a copy of {size}")
        sources = source(m, sizes)
        c.counts.bytes_read += int(sizes.sum())
        c.team.copy(lanes, target(m), sources, size, sizes)

    return step


# Of whole warps. A step is called when all the lanes that take part are there.


@instruction("shfl")
def _shuffle(c: Code, mods: Modifiers, d: str, a: str, b: str, clamp: str, members: str) -> Step:
    mods.need("sync")
    mode, kind = mods.need("up", "down", "bfly", "idx"), mods.type("b32")
    mods.done()
    target, _, p = d.partition("|")
    out, valid = c.write(target, kind), c.write(p or "_", "pred")
    x, amount, bounds, members = c.read(a, kind), c.read(b, "u32"), c.read(clamp, "u32"), c.read(members, "u32")
    lane = (np.arange(c.lanes) % WARP).astype(np.int64)
    first = np.arange(c.lanes) - lane

    def source() -> tuple[np.ndarray, np.ndarray]:
        n, limit, segment = amount & 31, bounds & 31, bounds >> 8 & 31
        last = (lane & segment) | (limit & ~segment)
        other = {
            "up": lane - n,
            "down": lane + n,
            "bfly": lane ^ n,
            "idx": (lane & segment) | (n & ~segment & 31),
        }[mode]
        inside = other >= last if mode == "up" else other <= last
        return inside, first + np.where(inside, other, lane)

    known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def step(m: Mask) -> None:
        key = amount.tobytes() + bounds.tobytes()  # mostly the same every time
        if key not in known:
            known[key] = source()
        inside, other = known[key]
        if m is not True or members.tobytes() != c.everyone:
            reached = (members >> (other % WARP).astype(np.uint32) & 1 == 1) & c.team.exist[other]
            if outside := np.flatnonzero(~reached & (c.all if m is True else m)).tolist():
                raise Fault(f"reads lane {other[outside[0]] % WARP}, which does not take part", outside[0])
        put(out, x[other], m)
        if p:
            put(valid, inside, m)

    return step


@instruction("vote")
def _vote(c: Code, mods: Modifiers, d: str, a: str, members: str) -> Step:
    mods.need("sync")
    mode, kind = mods.need("all", "any", "uni", "ballot"), mods.type("pred", "b32")
    mods.done()
    out, value, members = c.write(d, kind), c.predicate(a), c.read(members, "u32")

    def step(m: Mask) -> None:
        votes = np.repeat(c.packed(value() & (c.all if m is True else m)), WARP) & members
        all_agree = votes == members
        put(out, {"all": all_agree, "any": votes != 0, "uni": all_agree | (votes == 0), "ballot": votes}[mode], m)

    return step


@instruction("bar.warp")
def _warp_barrier(c: Code, mods: Modifiers, members: str) -> Step:
    mods.need("warp")
    mods.need("sync")
    mods.done()
    return lambda m: None


@instruction("ldmatrix")
def _load_matrix(c: Code, mods: Modifiers, d: str, place: str) -> Step:
    for needed in ("sync", "aligned", "m8n8", "b16"):
        mods.need(needed)
    mods.need("shared", "shared::cta")
    count, transposed = int(mods.need("x1", "x2", "x4")[1:]), mods.take("trans")
    mods.done()
    targets = [c.write(name, "b32").reshape(-1, WARP) for name in _elements(d)]
    at, memory = c.address(place, "shared", 16), everything("u2")
    points = np.arange(c.lanes) % WARP < 8 * count  # lanes whose addresses count
    if len(targets) != count:
        raise Fault(f"{count} matrices are loaded into {len(targets)} registers")

    def step(m: Mask) -> None:
        rows = memory[(at(points if m is True else points & m) >> 1)[:, None] + np.arange(8)].reshape(-1, count, 8, 8)
        rows = np.ascontiguousarray(rows.swapaxes(2, 3)) if transposed else rows
        pairs, warps = rows.view(np.uint32).reshape(-1, count, WARP), c.warps(m)
        for n, target in enumerate(targets):
            target[warps] = pairs[:, n]

    return step


@instruction("mma")
def _multiply_matrices(c: Code, mods: Modifiers, d: str, a: str, b: str, addend: str) -> Step:
    for needed in ("sync", "aligned", "row", "col", "f32", "f32"):
        mods.need(needed)
    shape = mods.need("m16n8k16", "m16n8k8")
    kind = mods.need("bf16", "f16", "tf32")
    mods.need(kind)
    mods.done()
    layout = "tf32" if kind == "tf32" else shape
    k, (a_row, a_col, b_row, b_col), (row, col) = int(shape[5:].lstrip("k")), LAYOUTS[layout], LAYOUTS["accumulator"]
    if kind == "tf32" and k != 8:
        mods.unknown()
    loaded = {  # tensor cores see the upper 19 bits of fp32
        "tf32": lambda x: (x & np.uint32(0xFFFFE000)).view(np.float32),
        "bf16": lambda x: _from_bf16(x.view(np.uint16)),
        "f16": lambda x: x.view(np.float16),
    }[kind]
    registers = [[c.read(name, "b32").reshape(-1, WARP) for name in _elements(operand)] for operand in (a, b)]
    sums = [c.read(name, "f32").reshape(-1, WARP) for name in _elements(addend)]
    targets = [c.write(name, "f32").reshape(-1, WARP) for name in _elements(d)]
    sizes = [shape_.shape[1] // (1 if kind == "tf32" else 2) for shape_ in (a_row, b_row)]
    if [*map(len, registers), len(sums), len(targets)] != [*sizes, 4, 4]:
        raise Fault("the fragments have other numbers of registers")

    def fragment(parts: list[np.ndarray], warps: Any) -> np.ndarray:
        values = np.stack([part[warps] for part in parts], -1)  # [warp, lane, register]
        return loaded(values).astype(np.float64)

    def step(m: Mask) -> None:
        warps = c.warps(m)
        x, y = (fragment(parts, warps) for parts in registers)
        left, right, total = np.empty((len(x), 16, k)), np.empty((len(x), k, 8)), np.empty((len(x), 16, 8))
        left[:, a_row, a_col], right[:, b_row, b_col] = x, y
        total[:, row, col] = np.stack([part[warps] for part in sums], -1)
        result = (left @ right + total).astype(np.float32)[:, row, col]
        for n, target in enumerate(targets):
            target[warps] = result[..., n]

    return step
