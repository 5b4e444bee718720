"""The PTX executor: opcodes against other implementations of them, misuse it must find, and our kernels through it."""

import ctypes
import hashlib
import itertools
import math
import operator
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import formulas
import numpy as np
import pytest
import torch
import torch.nn.functional as T
from errors import assert_within_rule
from proof import ptx, toolkit

from fastlm.ops.philox import keep_mask

# One kernel for each opcode -----------------------------------------------------------------------------------------

C_TYPES = {"h": "unsigned short", "r": "unsigned", "l": "unsigned long long", "f": "float", "d": "double"}
DTYPES = {"h": np.uint16, "r": np.uint32, "l": np.uint64, "f": np.float32, "d": np.float64}
BITS = {"h": 16, "r": 32, "l": 64}


def signed(function, bits=32, shifts=0):
    """A function of signed integers; the last `shifts` arguments stay unsigned."""

    def of_unsigned(*args):
        last = len(args) - shifts
        return function(*(x - (x >> bits - 1 << bits) if n < last else x for n, x in enumerate(args)))

    return of_unsigned


def truncated(a, b):
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a - truncated(a, b) * b


def bfe_signed(bits):
    def extract(a, start, length):
        start, length = start & 255, length & 255
        taken = [a >> min(n, bits - 1) & 1 for n in range(start, start + length)]  # past the end: the sign
        return sum(bit << n for n, bit in enumerate(taken)) - (taken[-1] << length if taken else 0)

    return extract


def bfe_unsigned(a, start, length):
    return a >> (start & 255) & ((1 << (length & 255)) - 1)


def bfi(a, b, start, length):
    mask = ((1 << (length & 255)) - 1) << (start & 255)
    return b & ~mask | a << (start & 255) & mask


def prmt(a, b, selector):
    data, result = (b << 32 | a).to_bytes(8, "little"), 0
    for n in range(4):
        nibble = selector >> 4 * n & 15
        byte = data[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * n
    return result


def f32(x):
    return np.float32(x)


def half_pairs(function, dtype):
    """A function of torch tensors, for words of two 16-bit floats."""

    def of_words(*words):
        halves = [torch.tensor([w & 0xFFFF, w >> 16]).to(torch.uint16).view(dtype) for w in words]
        low, high = function(*halves).view(torch.uint16).tolist()
        return high << 16 | low

    return of_words


def of_halves(function, dtype):
    of_words = half_pairs(function, dtype)
    return lambda *words: of_words(*words) & 0xFFFF


def narrowed(x, dtype):
    if math.isnan(x) and dtype == BF16:
        return 0x7FFF  # as the ISA says; other implementations keep a NaN's sign
    return torch.tensor(float(x), dtype=torch.float32).to(dtype).view(torch.uint16).item()


fmaf = ctypes.CDLL("libm.so.6").fmaf
fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float


def flushed(x):
    return np.copysign(f32(0), x) if abs(x) < 2.0**-126 else f32(x)


def with_flush(function):
    return lambda *args: flushed(function(*map(flushed, args)))


def rounded_to_int(how, bits, is_signed):
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)

    def convert(x):
        if math.isnan(x):
            return 0
        return (high if x > 0 else low) if math.isinf(x) else max(low, min(high, how(float(x))))

    return convert


def tf32(x):
    bits = int(np.float32(x).view(np.uint32))
    return bits + 0x1000 & 0xFFFFE000


def least(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else min(a, b)


def greatest(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else max(a, b)


LIMIT16, LIMIT32, LIMIT64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
BF16, F16 = torch.bfloat16, torch.float16
NAN = math.nan


def exactly(a, b, c):
    """a * b + c of bf16 rounded once, by way of rationals."""
    results = []
    for x, y, z in zip(a.double().tolist(), b.double().tolist(), c.double().tolist(), strict=True):
        if not all(map(math.isfinite, (x, y, z))):
            results.append(float(np.float64(x) * y + z))
            continue
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = torch.tensor(float(exact)).bfloat16()
        steps = near.view(torch.int16) + torch.tensor([0, -1, 1], dtype=torch.int16)
        near_by = [v for v in steps.view(BF16).double().tolist() if math.isfinite(v)]
        even = {v: torch.tensor(v).bfloat16().view(torch.int16).item() & 1 for v in near_by}
        results.append(min(near_by, key=lambda v: (abs(Fraction(v) - exact), even[v])))
    return torch.tensor(results, dtype=torch.float64).to(BF16)


# opcode or asm, result and arguments as asm calls them, what it must give; exact unless a relative error follows.
OPCODES = [
    ("add.s32", "rrr", operator.add),
    ("add.u64", "lll", operator.add),
    ("add.s16", "hhh", operator.add),
    ("sub.s32", "rrr", operator.sub),
    ("sub.s64", "lll", operator.sub),
    ("mul.lo.s32", "rrr", operator.mul),
    ("mul.lo.u64", "lll", operator.mul),
    ("mul.lo.u16", "hhh", operator.mul),
    ("mul.hi.u32", "rrr", lambda a, b: a * b >> 32),
    ("mul.hi.s32", "rrr", signed(lambda a, b: a * b >> 32)),
    ("mul.hi.u64", "lll", lambda a, b: a * b >> 64),
    ("mul.hi.s64", "lll", signed(lambda a, b: a * b >> 64, 64)),
    ("mul.wide.u16", "rhh", operator.mul),
    ("mul.wide.s16", "rhh", signed(operator.mul, 16)),
    ("mul.wide.u32", "lrr", operator.mul),
    ("mul.wide.s32", "lrr", signed(operator.mul)),
    ("mad.lo.s32", "rrrr", lambda a, b, c: a * b + c),
    ("mad.lo.u64", "llll", lambda a, b, c: a * b + c),
    ("mad.hi.u32", "rrrr", lambda a, b, c: (a * b >> 32) + c),
    ("mad.wide.u32", "lrrl", lambda a, b, c: a * b + c),
    ("mad.wide.s32", "lrrl", lambda a, b, c: signed(operator.mul)(a, b) + c),
    ("div.u32", "rrr", operator.floordiv),
    ("div.s32", "rrr", signed(truncated)),
    ("div.s64", "lll", signed(truncated, 64)),
    ("div.u64", "lll", operator.floordiv),
    ("rem.u32", "rrr", operator.mod),
    ("rem.s32", "rrr", signed(remainder)),
    ("rem.s64", "lll", signed(remainder, 64)),
    ("min.s32", "rrr", signed(min)),
    ("max.s64", "lll", signed(max, 64)),
    ("min.u64", "lll", min),
    ("max.u32", "rrr", max),
    ("neg.s32", "rr", operator.neg),
    ("abs.s32", "rr", signed(abs)),
    ("abs.s64", "ll", signed(abs, 64)),
    ("and.b32", "rrr", operator.and_),
    ("or.b64", "lll", operator.or_),
    ("xor.b16", "hhh", operator.xor),
    ("not.b64", "ll", operator.invert),
    ("shl.b32", "rrr", lambda a, n: a << min(n, 99)),
    ("shl.b64", "llr", lambda a, n: a << min(n, 99)),
    ("shl.b16", "hhr", lambda a, n: a << min(n, 99)),
    ("shr.u32", "rrr", lambda a, n: a >> n),
    ("shr.s32", "rrr", signed(lambda a, n: a >> n, 32, 1)),
    ("shr.u64", "llr", lambda a, n: a >> n),
    ("shr.s64", "llr", signed(lambda a, n: a >> n, 64, 1)),
    ("shr.s16", "hhr", signed(lambda a, n: a >> n, 16, 1)),
    ("shf.l.wrap.b32", "rrrr", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32),
    ("shf.l.clamp.b32", "rrrr", lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32),
    ("shf.r.wrap.b32", "rrrr", lambda a, b, n: (b << 32 | a) >> (n & 31)),
    ("shf.r.clamp.b32", "rrrr", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
    ("bfe.u32", "rrrr", bfe_unsigned),
    ("bfe.s32", "rrrr", signed(bfe_signed(32), 32, 2)),
    ("bfe.u64", "llrr", bfe_unsigned),
    ("bfe.s64", "llrr", signed(bfe_signed(64), 64, 2)),
    ("bfi.b32", "rrrrr", bfi),
    ("bfi.b64", "lllrr", bfi),
    ("prmt.b32", "rrrr", prmt),
    ("lop3.b32 %0, %1, %2, %3, 0xE8", "rrrr", lambda a, b, c: a & b | a & c | b & c),
    ("lop3.b32 %0, %1, %2, %3, 0x1D", "rrrr", lambda a, b, c: ~a & (b | ~c) | a & ~b & ~c),
    ("popc.b32", "rr", lambda a: a.bit_count()),
    ("popc.b64", "rl", lambda a: a.bit_count()),
    ("clz.b32", "rr", lambda a: 32 - a.bit_length()),
    ("clz.b64", "rl", lambda a: 64 - a.bit_length()),
    ("bfind.u32", "rr", lambda a: a.bit_length() - 1),
    ("bfind.s32", "rr", signed(lambda a: (~a if a < 0 else a).bit_length() - 1)),
    ("bfind.u64", "rl", lambda a: a.bit_length() - 1),
    ("brev.b32", "rr", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("brev.b64", "ll", lambda a: int(f"{a:064b}"[::-1], 2)),
    ("mov.b64 %0, {%1, %2}", "lrr", lambda a, b: b << 32 | a),
    ("{.reg .b32 low; mov.b64 {low, %0}, %1;}", "rl", lambda a: a >> 32),
    ("mov.b64 {%0, _}, %1", "rl", lambda a: a & LIMIT32),
    ("mov.b32 %0, {%1, %2}", "rhh", lambda a, b: b << 16 | a),
    ("{.reg .b16 a, b; mov.b32 {a, b}, %1; mov.b32 %0, {b, a};}", "rr", lambda a: (a << 16 | a >> 16) & LIMIT32),
    # floats
    ("add.f32", "fff", operator.add),
    ("add.rn.f32", "fff", operator.add),
    ("add.ftz.f32", "fff", with_flush(operator.add)),
    ("sub.f32", "fff", operator.sub),
    ("mul.f32", "fff", operator.mul),
    ("mul.ftz.f32", "fff", with_flush(operator.mul)),
    ("add.sat.f32", "fff", lambda a, b: min(max(a + b, f32(0)), f32(1)) if not math.isnan(a + b) else 0),
    ("add.f64", "ddd", operator.add),
    ("mul.f64", "ddd", operator.mul),
    ("fma.rn.f32", "ffff", fmaf),
    ("fma.rn.ftz.f32", "ffff", with_flush(fmaf)),
    ("mad.rn.f32", "ffff", fmaf),
    ("div.rn.f32", "fff", operator.truediv),
    ("div.full.f32", "fff", operator.truediv, 2.0**-22),
    ("div.approx.f32", "fff", operator.truediv, 2.0**-22),
    ("rcp.rn.f32", "ff", lambda a: f32(1) / a),
    ("rcp.approx.ftz.f32", "ff", with_flush(lambda a: f32(1) / a), 2.0**-22),
    ("sqrt.rn.f32", "ff", np.sqrt),
    ("rsqrt.approx.f32", "ff", lambda a: 1 / np.sqrt(np.float64(a)), 2.0**-22),
    ("rsqrt.approx.ftz.f32", "ff", with_flush(lambda a: f32(1 / np.sqrt(np.float64(a)))), 2.0**-22),
    ("ex2.approx.f32", "ff", lambda a: np.exp2(np.float64(a)), 2.0**-22),
    ("ex2.approx.ftz.f32", "ff", with_flush(lambda a: f32(np.exp2(np.float64(a)))), 2.0**-22),
    ("lg2.approx.f32", "ff", lambda a: np.log2(np.float64(a)), 2.0**-22),
    ("tanh.approx.f32", "ff", np.tanh, 2.0**-11),
    ("neg.f32", "ff", operator.neg),
    ("abs.f32", "ff", abs),
    ("min.f32", "fff", least),
    ("max.f32", "fff", greatest),
    ("min.NaN.f32", "fff", lambda a, b: NAN if math.isnan(a) or math.isnan(b) else min(a, b)),
    ("max.NaN.f32", "fff", lambda a, b: NAN if math.isnan(a) or math.isnan(b) else max(a, b)),
    ("copysign.f32", "fff", lambda a, b: np.copysign(b, a)),
    # 16-bit floats
    ("add.f16x2", "rrr", half_pairs(torch.add, F16)),
    ("mul.f16x2", "rrr", half_pairs(torch.mul, F16)),
    ("fma.rn.f16x2", "rrrr", half_pairs(lambda a, b, c: (a.double() * b.double() + c.double()).to(F16), F16)),
    ("add.f16", "hhh", of_halves(torch.add, F16)),
    ("fma.rn.bf16x2", "rrrr", half_pairs(exactly, BF16)),
    ("fma.rn.bf16", "hhhh", of_halves(exactly, BF16)),
    ("max.bf16x2", "rrr", half_pairs(torch.fmax, BF16)),
    ("neg.bf16x2", "rr", half_pairs(torch.neg, BF16)),
    ("abs.f16x2", "rr", half_pairs(torch.abs, F16)),
    # conversions
    ("cvt.u32.u64", "rl", lambda a: a),
    ("cvt.s64.s32", "lr", signed(lambda a: a)),
    ("cvt.u64.u32", "lr", lambda a: a),
    ("cvt.u16.u32", "hr", lambda a: a),
    ("cvt.u32.u16", "rh", lambda a: a),
    ("cvt.s32.s16", "rh", signed(lambda a: a, 16)),
    ("cvt.s32.s8", "rr", lambda a: signed(lambda b: b, 8)(a & 255)),
    ("cvt.u32.u8", "rr", lambda a: a & 255),
    ("cvt.sat.u8.s32", "rr", signed(lambda a: max(0, min(255, a)))),
    ("cvt.sat.s16.s32", "rr", signed(lambda a: max(-32768, min(32767, a)))),
    ("cvt.rn.f32.s32", "fr", signed(lambda a: f32(a))),
    ("cvt.rn.f32.u32", "fr", f32),
    ("cvt.rn.f32.s64", "fl", signed(lambda a: f32(a), 64)),
    ("cvt.rn.f32.u64", "fl", lambda a: np.uint64(a).astype(np.float32)),
    ("cvt.rn.f64.s64", "dl", signed(float, 64)),
    ("cvt.rn.f16.s32", "hr", signed(lambda a: int(np.float16(np.float64(a)).view(np.uint16)))),
    ("cvt.rzi.s32.f32", "rf", rounded_to_int(math.trunc, 32, True)),
    ("cvt.rni.s32.f32", "rf", rounded_to_int(round, 32, True)),
    ("cvt.rmi.s32.f32", "rf", rounded_to_int(math.floor, 32, True)),
    ("cvt.rpi.u32.f32", "rf", rounded_to_int(math.ceil, 32, False)),
    ("cvt.rzi.u32.f32", "rf", rounded_to_int(math.trunc, 32, False)),
    ("cvt.rzi.ftz.s32.f32", "rf", rounded_to_int(math.trunc, 32, True)),
    ("cvt.rzi.u64.f64", "ld", rounded_to_int(math.trunc, 64, False)),
    ("cvt.rmi.f32.f32", "ff", np.floor),
    ("cvt.rni.f32.f32", "ff", np.rint),
    ("cvt.sat.f32.f32", "ff", lambda a: min(max(a, f32(0)), f32(1)) if not math.isnan(a) else 0),
    ("cvt.rn.f32.f64", "fd", f32),
    ("cvt.f64.f32", "df", float),
    ("cvt.rn.f16.f32", "hf", lambda a: narrowed(a, F16)),
    ("cvt.rn.bf16.f32", "hf", lambda a: narrowed(a, BF16)),
    ("cvt.f32.f16", "fh", lambda a: np.uint16(a).view(np.float16)),
    ("cvt.rn.f16x2.f32", "rff", lambda a, b: narrowed(a, F16) << 16 | narrowed(b, F16)),
    ("cvt.rn.bf16x2.f32", "rff", lambda a, b: narrowed(a, BF16) << 16 | narrowed(b, BF16)),
    ("cvt.rna.tf32.f32", "rf", tf32),
    ("set.lt.u32.f32", "rff", lambda a, b: LIMIT32 if a < b else 0),
    ("set.geu.f32.f32", "fff", lambda a, b: 0 if a < b else 1),
]
ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def unordered(a, b):
    return a != a or b != b


def comparison(name):
    if name in ("num", "nan"):
        return lambda a, b: unordered(a, b) == (name == "nan")
    if name in ORDERED:
        return lambda a, b: ORDERED[name](a, b) and not unordered(a, b)
    return lambda a, b: ORDERED[name[:-1]](a, b) or unordered(a, b)


SETP = "{{ .reg .pred p, q; setp.{} p, %1, %2; selp.u32 %0, 1, 0, p; }}"
OPCODES += [
    (SETP.format(f"{n}.f32"), "rff", comparison(n)) for n in (*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan")
]
OPCODES += [(SETP.format(f"{n}.s32"), "rrr", signed(ORDERED[n])) for n in ORDERED]
OPCODES += [(SETP.format(f"{n}.u64"), "rll", ORDERED[n]) for n in ORDERED]
OPCODES += [
    (SETP.format(f"{n}.u32"), "rrr", ORDERED[m]) for n, m in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge"))
]
OPCODES += [(SETP.format("ltu.ftz.f32"), "rff", lambda a, b: comparison("ltu")(flushed(a), flushed(b)))]
OPCODES += [
    (
        f"{{ .reg .pred p, q, r; .reg .u32 a, b; setp.ne.u32 r, %3, 0; setp.lt.{name}.s32 p|q, %1, %2, !r;"
        " selp.u32 a, 1, 0, p; selp.u32 b, 2, 0, q; or.b32 %0, a, b; }",
        "rrrr",
        lambda a, b, c, f=function: (
            int(f(signed(operator.lt)(a, b), c == 0)) | 2 * int(f(not signed(operator.lt)(a, b), c == 0))
        ),
    )
    for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor))
]


def opcode_of(asm):
    """The one that an asm text is about."""
    found = re.findall(r"\b[a-z]\w*\.[\w.]+", asm)
    return next((opcode for opcode in reversed(found) if opcode.startswith("setp")), found[0])


def opcode_kernels():
    kernels = []
    for n, (asm, letters, *_) in enumerate(OPCODES):
        places = ", ".join(f"%{m}" for m in range(len(letters)))
        text = asm if "%0" in asm else f"{asm} {places}"
        arguments = ", ".join(f"const {C_TYPES[c]}* x{m}" for m, c in enumerate(letters[1:]))
        inputs = ", ".join(f'"{c}"(x{m}[i])' for m, c in enumerate(letters[1:]))
        kernels.append(
            f'extern "C" __global__ void opcode_{n}({C_TYPES[letters[0]]}* y, {arguments}) {{\n'
            f"  const int i = blockIdx.x * 32 + threadIdx.x;\n  {C_TYPES[letters[0]]} d;\n"
            f'  asm("{text}{"" if text[0] == "{" else ";"}" : "={letters[0]}"(d) : {inputs});\n  y[i] = d;\n}}'
        )
    return "\n".join(kernels)


SOURCE = r"""
#include "common/device.cuh"
using namespace fastlm;
#define KERNEL extern "C" __global__ void

KERNEL vectors(const float4* x, const float2* small, float4* y, float2* z) {
  const float4 a = x[threadIdx.x];
  y[threadIdx.x] = make_float4(a.w, a.z, a.y, a.x);
  const float2 b = small[threadIdx.x];
  z[threadIdx.x] = make_float2(b.y, b.x);
}

KERNEL bytes(const signed char* x, const unsigned char* u, const short* s, int* y) {
  const int i = threadIdx.x;
  y[i] = x[i] + 1000 * u[i] + 1000000 * s[i];
}

__constant__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ int counter = 40;

KERNEL spaces(int* y, const int* where) {
  extern __shared__ int dynamic[];
  __shared__ int fixed[32];
  int own[8];
  for (int i = 0; i < 8; ++i) own[i] = table[i] * (threadIdx.x + 1);
  own[where[threadIdx.x] % 8] += 1000;
  dynamic[threadIdx.x] = own[(where[threadIdx.x] + threadIdx.x) % 8];
  fixed[31 - threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int* generic = threadIdx.x % 2 ? dynamic : where[threadIdx.x] > 4 ? fixed : where;
  y[threadIdx.x] = generic[threadIdx.x] + counter;
}

KERNEL local_across_barrier(int* y, const int* where) {
  int own[8];
  for (int i = 0; i < 8; ++i) own[where[i]] = 100 * threadIdx.x + i;
  __syncthreads();
  for (int i = 0; i < 8; ++i) y[threadIdx.x * 8 + i] = own[where[i]];
}

KERNEL fresh_shared(int* y) {
  __shared__ volatile int tile[32];
  y[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x];
  tile[threadIdx.x] = 5;
}

struct Big { int n; double d; char c; int* p; };
KERNEL parameters(Big b, short s, const __grid_constant__ Big other, unsigned char c) {
  const Big* generic = threadIdx.x % 2 ? &other : nullptr;
  b.p[threadIdx.x] = b.n + int(b.d) + b.c + s + c + (generic ? generic->n : 0);
}

KERNEL indices(int* y) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned at[6] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z};
  for (int i = 0; i < 6; ++i) y[(block * blockDim.x * blockDim.y * blockDim.z + thread) * 6 + i] = at[i];
}

// Warps

template <int kWay>
__device__ int shuffle(int x, int by, int width) {
  return kWay == 0 ? __shfl_sync(~0u, x, by, width) : kWay == 1 ? __shfl_up_sync(~0u, x, by, width)
       : kWay == 2 ? __shfl_down_sync(~0u, x, by, width) : __shfl_xor_sync(~0u, x, by, width);
}
KERNEL shuffles(const int* x, const int* by, int width, int* y) {
  const int i = threadIdx.x;
  y[i] = shuffle<0>(x[i], by[i], width);
  y[i + 32] = shuffle<1>(x[i], by[0], width);
  y[i + 64] = shuffle<2>(x[i], by[0], width);
  y[i + 96] = shuffle<3>(x[i], by[0], width);
}
KERNEL shuffle_inside(int* y) {
  int x, in;
  asm volatile("{.reg .pred p; shfl.sync.down.b32 %0|p, %2, 5, 0x101f, -1; selp.s32 %1, 1, 0, p;}"
               : "=r"(x), "=r"(in) : "r"(threadIdx.x));
  y[threadIdx.x] = 2 * x + in;
}
KERNEL votes(const int* x, unsigned* y) {
  const int i = threadIdx.x;
  y[i] = __ballot_sync(~0u, x[i]);
  y[i + 32] = __all_sync(~0u, x[i]) + 2 * __any_sync(~0u, x[i]) + 4 * __uni_sync(~0u, x[i]);
  if (i % 3 == 0) y[i + 64] = __activemask();
  if (i < 16) y[i + 96] = __ballot_sync(0xFFFFu, x[i]); else y[i + 96] = __ballot_sync(0xFFFF0000u, x[i]);
}
KERNEL subset_shuffle(int* y) {
  const unsigned members = threadIdx.x % 2 ? 0xAAAAAAAAu : 0x55555555u;
  y[threadIdx.x] = __shfl_xor_sync(members, int(threadIdx.x) * 10, 2);
}
KERNEL late_lanes(int* y) {
  int x = threadIdx.x;
  if (x % 4 == 0) { for (int i = 0; i < int(threadIdx.x); ++i) x = x * 3 + 1; }
  __syncwarp();
  y[threadIdx.x] = __shfl_xor_sync(~0u, x, 1);
}

// Divergence

KERNEL collatz(const int* x, int* y) {
  int n = x[blockIdx.x * blockDim.x + threadIdx.x], steps = 0;
  while (n != 1) {
    n = n % 2 ? 3 * n + 1 : n / 2;
    if (++steps > 100) break;
  }
  y[blockIdx.x * blockDim.x + threadIdx.x] = steps;
}
KERNEL early_exit(const int* x, int* y) {
  const int i = threadIdx.x;
  if (x[i] < 0) return;
  int sum = 0;
  for (int j = 0; j < x[i]; ++j) {
    if (j % 5 == 3) continue;
    for (int k = j; k < i; k += 2) {
      if (k > 17) { sum += 1000; break; }
      sum += k;
    }
    if (sum > 5000) { y[i] = -sum; return; }
  }
  y[i] = sum;
}
KERNEL switches(const int* x, int* y) {
  int r = 0;
  switch (x[threadIdx.x]) {
    case 0: r += 1;
    case 1: r += 10; break;
    case 2: r = y[threadIdx.x]; break;
    case 5: if (threadIdx.x % 2) { r = 7; break; }
    default: r -= 100;
  }
  y[threadIdx.x] = r;
}

// Barriers

KERNEL block_sum(const int* x, int* y) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  for (int n = blockDim.x / 2; n > 0; n /= 2) {
    if (threadIdx.x < n) dynamic[threadIdx.x] += dynamic[threadIdx.x + n];
    __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = dynamic[0];
}
KERNEL missing_barrier(int* y) {
  __shared__ int seen[128];
  seen[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = seen[127 - threadIdx.x];
}
// Warps 0 and 1 make, warps 2 and 3 use; barriers 1 and 2 hand two buffers over, 3 and 4 hand them back.
KERNEL producer_consumer(const int* x, int* y, int turns) {
  __shared__ int buffer[2][64];
  const int lane = threadIdx.x % 64;
  for (int turn = 0; turn < turns; ++turn) {
    const int b = turn % 2;
    if (threadIdx.x < 64) {
      if (turn >= 2) barrier_sync(3 + b, 128);
      buffer[b][lane] = x[turn * 64 + lane];
      barrier_arrive(1 + b, 128);
    } else {
      barrier_sync(1 + b, 128);
      y[turn * 64 + lane] = buffer[b][63 - lane];
      if (turn + 2 < turns) barrier_arrive(3 + b, 128);
    }
  }
}

// Atomics

KERNEL atomics(int* i, unsigned* u, unsigned long long* l, float* f, int* old) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  const int t = threadIdx.x;
  old[t] = atomicAdd(&i[0], t);
  atomicMin(&i[1], -t);
  atomicMax(&u[0], t * 7u % 31u);
  atomicAdd(&l[0], 1ull << 40);
  atomicAdd(&f[0], 0.5f);
  atomicAdd(&sum, t);
  old[t + 64] = atomicExch(&u[1], t + 1u);
  atomicCAS(&i[2], t, t + 1);
  __syncthreads();
  if (t == 0) i[3] = sum;
}

// Copies and matrices

template <int kBytes>
__device__ void copy(const char* x, char* y, const int* sizes) {
  __shared__ __align__(16) char tile[32 * 16];
  const int i = threadIdx.x;
  cp_async<kBytes>(tile + i * kBytes, x + i * kBytes, sizes[i]);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const int other = (i + 5) % 32;
  for (int b = 0; b < kBytes; ++b) y[i * kBytes + b] = tile[other * kBytes + b];
}
KERNEL copy_4(const char* x, char* y, const int* sizes) { copy<4>(x, y, sizes); }
KERNEL copy_8(const char* x, char* y, const int* sizes) { copy<8>(x, y, sizes); }
KERNEL copy_16(const char* x, char* y, const int* sizes) { copy<16>(x, y, sizes); }

// Three stages of copies; when one is used, the next may be under way. With kPending 2, the one that is used may be.
template <int kPending>
__device__ void pipeline(const float4* x, float4* y, int turns) {
  __shared__ float4 tile[3][32];
  const int i = threadIdx.x;
  for (int n = 0; n < 2; ++n) { cp_async<16>(&tile[n][i], x + n * 32 + i); cp_async_commit(); }
  for (int n = 0; n < turns; ++n) {
    cp_async_wait<kPending>();
    __syncthreads();
    if (n + 2 < turns) cp_async<16>(&tile[(n + 2) % 3][i], x + (n + 2) * 32 + i);
    cp_async_commit();
    y[n * 32 + i] = tile[n % 3][31 - i];
  }
}
KERNEL pipeline_1(const float4* x, float4* y, int turns) { pipeline<1>(x, y, turns); }
KERNEL pipeline_2(const float4* x, float4* y, int turns) { pipeline<2>(x, y, turns); }

// d [16, 8] = a [16, 16] b + c, with b as [16, 8] or as its transpose [8, 16]; a warp for each of the products.
template <typename T, bool kTransposed>
__device__ void product(const T* a, const T* b, const float* c, float* d) {
  __shared__ __align__(16) T tiles[4][16 * 16 + 16 * 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T* const tile = tiles[warp];
  for (int i = lane; i < 256; i += 32) tile[i] = a[warp * 256 + i];
  for (int i = lane; i < 128; i += 32) tile[256 + i] = b[warp * 128 + i];
  __syncwarp();
  uint32_t x[4], y[2];
  ldmatrix(x, tile + (lane % 16) * 16 + lane / 16 * 8);
  if (kTransposed) ldmatrix(y, tile + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  else ldmatrix_trans(y, tile + 256 + (lane % 16) * 8);
  const int row = lane / 4, column = lane % 4 * 2;
  float z[4];
  for (int i = 0; i < 4; ++i) z[i] = c[warp * 128 + (row + i / 2 * 8) * 8 + column + i % 2];
  mma_16816<T>(z, x, y);
  for (int i = 0; i < 4; ++i) d[warp * 128 + (row + i / 2 * 8) * 8 + column + i % 2] = z[i];
}
#define PRODUCT(name, T, transposed) \
  KERNEL name(const T* a, const T* b, const float* c, float* d) { product<T, transposed>(a, b, c, d); }
PRODUCT(product_bf16, __nv_bfloat16, false)
PRODUCT(product_bf16_t, __nv_bfloat16, true)
PRODUCT(product_f16, __half, false)
PRODUCT(product_f16_t, __half, true)

// a [16, 8], b [8, 8] in tf32 or bf16, by the tables of the ISA.
KERNEL product_tf32(const uint32_t* a, const uint32_t* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t x[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  const uint32_t y[2] = {b[t * 8 + g], b[(t + 4) * 8 + g]};
  float z[4] = {};
  mma_1688_tf32(z, x, y);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = z[i];
}
KERNEL product_1688(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  __shared__ __align__(16) __nv_bfloat16 tile[192];
  const int lane = threadIdx.x;
  for (int i = lane; i < 192; i += 32) tile[i] = i < 128 ? a[i] : b[i - 128];
  __syncwarp();
  uint32_t x[2], y[1];
  float z[4] = {};
  ldmatrix(x, tile + lane % 16 * 8);
  ldmatrix_trans(y, tile + 128 + lane % 8 * 8);
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(z[0]), "+f"(z[1]), "+f"(z[2]), "+f"(z[3]) : "r"(x[0]), "r"(x[1]), "r"(y[0]));
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = z[i];
}
// Four matrices of 8 x 8, plain and transposed.
KERNEL matrices(const uint16_t* x, uint16_t* y, uint16_t* yt) {
  __shared__ __align__(16) uint16_t tile[256];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t d[4], t[4];
  ldmatrix(d, tile + lane * 8);
  ldmatrix_trans(t, tile + lane * 8);
  for (int m = 0; m < 4; ++m) {
    uint16_t* const out = y + m * 64 + lane / 4 * 8 + lane % 4 * 2;
    uint16_t* const out_t = yt + m * 64 + lane / 4 * 8 + lane % 4 * 2;
    out[0] = d[m] & 0xFFFF, out[1] = d[m] >> 16;
    out_t[0] = t[m] & 0xFFFF, out_t[1] = t[m] >> 16;
  }
}

// Misuse

KERNEL reads_past(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
KERNEL writes_past(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }
KERNEL reads_shared_past(int n, int* y) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x] = 1;
  __syncwarp();
  y[threadIdx.x] = dynamic[(threadIdx.x + n) % 64];
}
KERNEL reads_vector(const float* x, float* y) {
  const float4 a = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
  y[threadIdx.x] = a.x + a.y + a.z + a.w;
}
KERNEL misses_barrier(int* y) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
KERNEL different_barriers(int* y) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1;"); else asm volatile("bar.sync 2;");
  y[threadIdx.x] = 1;
}
KERNEL divergent_barrier(int* y) {
  if (threadIdx.x < 20) asm volatile("bar.sync 0;");
  y[threadIdx.x] = 1;
}
KERNEL divergent_shuffle(int* y) {
  if (threadIdx.x % 2) y[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}
KERNEL exited_shuffle(int* y) {
  if (threadIdx.x == 3) return;
  y[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
}
KERNEL reads_outside_mask(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0xFFFFu, int(threadIdx.x), 16);
}
KERNEL not_in_mask(int* y) {
  y[threadIdx.x] = __shfl_xor_sync(0xFFFFu, int(threadIdx.x), 1);
}
KERNEL divergent_product(float* y) {
  float z[4] = {};
  const uint32_t x[4] = {}, w[2] = {};
  if (threadIdx.x < 31) mma_16816<__half>(z, x, w);
  y[threadIdx.x] = z[0];
}
KERNEL misaligned_matrix(uint32_t* y) {
  __shared__ __align__(16) char tile[1024];
  uint32_t d[4];
  ldmatrix(d, tile + threadIdx.x * 16 + (threadIdx.x == 9) * 8);
  y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
KERNEL unknown_opcode(int* y) {
  if (threadIdx.x == 99) asm volatile("nanosleep.u32 5;");
  int z;
  asm volatile("dp4a.s32.s32 %0, %1, %1, %1;" : "=r"(z) : "r"(threadIdx.x));
  y[threadIdx.x] = z;
}
KERNEL unknown_modifier(float* y) {
  float z;
  asm volatile("add.rz.f32 %0, %1, %1;" : "=f"(z) : "f"(float(threadIdx.x)));
  y[threadIdx.x] = z;
}
KERNEL endless(int* y) {
  while (*reinterpret_cast<volatile int*>(y) == 0) {}
}
"""


@pytest.fixture(scope="session")
def module():
    ptx.CACHE.mkdir(parents=True, exist_ok=True)
    text = SOURCE + opcode_kernels()
    path = ptx.CACHE / f"test_ptx_{hashlib.sha256(text.encode()).hexdigest()[:16]}.cu"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(path)
    return ptx.compile_cuda(path)


def packed(values):
    """Bytes of the parameter space, which is laid out like a C structure."""
    data = b""
    for value in values:
        value = value if isinstance(value, (ctypes.Structure, ctypes._SimpleCData)) else ctypes.c_int(value)
        data += bytes(-len(data) % ctypes.alignment(value)) + bytes(value)
    return data


def address(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data


def launch(module, name, *arguments, grid=1, block=32, read_only=(), **options):
    """Arrays and tensors become pointers, and regions of memory."""
    memory, values = ptx.Memory(), []
    for argument in arguments:
        if hasattr(argument, "nbytes"):
            memory.add(address(argument), argument.nbytes, writable=not any(argument is x for x in read_only))
            argument = ctypes.c_void_p(address(argument))
        values.append(argument)
    grid, block = (sizes if isinstance(sizes, tuple) else (sizes,) for sizes in (grid, block))
    return ptx.run(module, name, grid, block, packed(values), memory, **options)


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -2.5,
    math.inf,
    -math.inf,
    NAN,
    1e-40,
    -3e-39,
    2.0**-126,
    3.4e38,
    65504.0,
]


def integers(letter, generator, count):
    bits = BITS[letter]
    ends = [0, 1, 2, 3, 31, 32, 33, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1, 2**bits - 2]
    picks = [generator.choice(ends) if generator.random() < 0.4 else generator.getrandbits(bits) for _ in range(count)]
    return np.array(picks, DTYPES[letter])


def floats(letter, generator, count):
    numbers = (generator.gauss(0, 2.0 ** generator.randint(-30, 30)) for _ in range(count))
    picks = [generator.choice(SPECIAL) if generator.random() < 0.3 else x for x in numbers]
    return np.array(picks, DTYPES[letter])


@pytest.mark.parametrize("n", range(len(OPCODES)), ids=lambda n: opcode_of(OPCODES[n][0]))
def test_opcode_gives_what_another_implementation_gives(module, n):
    asm, letters, function, *tolerance = OPCODES[n]
    generator, count = random.Random(n), 128
    arguments = [(floats if c in "fd" else integers)(c, generator, count) for c in letters[1:]]
    if "f16" in asm and "cvt" not in asm:  # without NaNs, whose bits differ from one implementation to the next
        halves = torch.randn(len(arguments), 4 * count) * torch.tensor([1e-3, 1.0, 100.0, 1e-2]).repeat(count)
        words = halves.to(BF16 if "bf16" in asm else F16).view(torch.int16).numpy().view(np.uint16)
        arguments = [w[: 2 * count].copy().view(np.uint32) if letters[1] == "r" else w[:count].copy() for w in words]
    if re.match(r"(div|rem)\.[us]\d", asm):
        arguments[1][arguments[1] == 0] = 3
    result = np.zeros(count, DTYPES[letters[0]])
    launch(module, f"opcode_{n}", result, *arguments, grid=count // 32)
    with np.errstate(all="ignore"):
        for got, *given in zip(result, *arguments, strict=True):
            expected = function(*(x if isinstance(x, np.floating) else int(x) for x in given))
            if letters[0] in "fd":
                expected = np.asarray(expected, np.float64).astype(DTYPES[letters[0]])
                same = got == expected or (np.isnan(got) and np.isnan(expected))
                near = tolerance and abs(np.float64(got) - expected) <= tolerance[0] * max(
                    abs(np.float64(expected)), 2.0**-126
                )
            else:
                same, near = int(got) == int(expected) % (1 << BITS[letters[0]]), False
            assert same or near, f"{asm} of {given}: {got}, expected {expected}"


# Memory and parameters ----------------------------------------------------------------------------------------------


def arange(*shape, dtype=np.float32):
    return np.arange(math.prod(shape), dtype=dtype).reshape(shape)


def test_vectors_are_loaded_and_stored_in_order(module):
    x, small = arange(32, 4), arange(32, 2)
    y, z = np.zeros_like(x), np.zeros_like(small)
    counts = launch(module, "vectors", x, small, y, z, read_only=(x, small))
    assert (y == x[:, ::-1]).all()
    assert (z == small[:, ::-1]).all()
    assert counts.warps["ld.global.v4.f32"] == counts.warps["st.global.v2.f32"] == 1
    assert counts.threads["ld.global.v2.f32"] == 32
    assert counts.bytes_read == counts.bytes_written == x.nbytes + small.nbytes


def test_narrow_loads_are_extended_by_their_sign(module):
    x, u, s = (np.array([-3, 5, -128, 127] * 8).astype(dtype) for dtype in ("i1", "u1", "i2"))
    y = np.zeros(32, np.int32)
    launch(module, "bytes", x, u, s, y)
    assert (y == x.astype(int) + 1000 * u.astype(int) + 1000000 * s.astype(int)).all()


def test_constant_global_local_shared_and_generic_addresses_lead_to_their_memory(module):
    lane, table = np.arange(32), np.array([3, 1, 4, 1, 5, 9, 2, 6])
    where = np.arange(32, dtype=np.int32) * 5 % 9
    y = np.zeros(32, np.int32)
    launch(module, "spaces", y, where, shared_bytes=128)
    at = (where + lane) % 8
    dynamic = table[at] * (lane + 1) + 1000 * (at == where % 8)
    assert (y == np.where(lane % 2, dynamic, np.where(where > 4, 31 - lane, where)) + 40).all()


@pytest.mark.parametrize("together", [1, 2, 3])
def test_local_memory_belongs_to_its_thread(module, together):
    y, where = np.zeros((96, 8), np.int32), np.array([3, 1, 4, 0, 5, 7, 2, 6], np.int32)
    launch(module, "local_across_barrier", y, where, block=96, together=together)
    assert (y == 100 * np.arange(96)[:, None] + np.arange(8)).all()


def test_shared_memory_is_poisoned_in_every_block(module):
    y = np.zeros(96, np.int32)
    launch(module, "fresh_shared", y, grid=3)
    assert (y == -1).all()


class Big(ctypes.Structure):
    _fields_ = (("n", ctypes.c_int), ("d", ctypes.c_double), ("c", ctypes.c_char), ("p", ctypes.c_void_p))


def test_parameters_are_read_as_c_lays_them_out(module):
    y, memory = np.zeros(32, np.int32), ptx.Memory()
    memory.add(y.ctypes.data, y.nbytes)
    big, other = Big(1000, 200.5, b"\x07", y.ctypes.data), Big(50000, 0, b"\0", 0)
    data = packed((big, ctypes.c_short(-3), other, ctypes.c_ubyte(250)))
    ptx.run(module, "parameters", (1,), (32,), data, memory)
    assert (y == 1000 + 200 + 7 - 3 + 250 + np.where(np.arange(32) % 2, 50000, 0)).all()
    with pytest.raises(ptx.PtxError, match="bytes of parameters"):
        ptx.run(module, "parameters", (1,), (32,), data[:-1], memory)


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("block", [(5, 3, 4), (32, 2, 1), (100,)])
def test_threads_and_blocks_know_their_places(module, block, together):
    grid = (2, 3, 2)
    sizes = (*block, 1, 1)[:3]
    y = np.full((math.prod(grid), math.prod(sizes), 6), -1, np.int32)
    launch(module, "indices", y, grid=grid, block=block, together=together)
    order = [range(n) for n in (*grid[::-1], *sizes[::-1])]
    expected = [(*place[:2:-1], *place[2::-1]) for place in itertools.product(*order)]
    assert y.reshape(-1, 6).tolist() == [list(p) for p in expected]


def test_atomics_act_one_after_another(module):
    i, u, n = np.zeros(4, np.int32), np.zeros(2, np.uint32), np.zeros(1, np.uint64)
    f, old = np.zeros(1, np.float32), np.zeros(128, np.int32)
    counts = launch(module, "atomics", i, u, n, f, old)
    assert i.tolist() == [sum(range(32)), -31, 32, sum(range(32))]
    assert (u[0], n[0], f[0]) == (30, 32 << 40, 16)
    assert old[:32].tolist() == [sum(range(t)) for t in range(32)]
    assert [*old[64:96].tolist(), int(u[1])] == list(range(33))
    assert counts.threads["atom.global.add.u32"] == 32


# Warps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffles_move_values_between_lanes(module, width):
    x, by = arange(32, dtype=np.int32) * 3 + 1, np.random.default_rng(width).integers(0, width, 32, dtype=np.int32)
    y = np.zeros((4, 32), np.int32)
    launch(module, "shuffles", x, by, width, y)
    lane, start, n = np.arange(32), np.arange(32) // width * width, by[0]
    sources = start + by, lane - n, lane + n, lane ^ n
    for got, source in zip(y, sources, strict=True):
        assert (got == x[np.where(source // width == lane // width, source, lane)]).all()


def test_shuffle_tells_whether_its_source_is_inside(module):
    y = np.zeros(32, np.int32)  # segments of 16 lanes: clamp 31, mask 16 in the upper byte
    launch(module, "shuffle_inside", y)
    inside = np.arange(32) % 16 + 5 < 16
    assert (y == np.where(inside, 2 * (np.arange(32) + 5) + 1, 2 * np.arange(32))).all()


@pytest.mark.parametrize("votes", [0, 1, 0x80000001, 0xFFFFFFFF, 0x12345678])
def test_votes_and_active_masks(module, votes):
    x, y = np.array([votes >> n & 1 for n in range(32)], np.int32), np.zeros(128, np.uint32)
    launch(module, "votes", x, y)
    assert (y[:32] == votes).all()
    every, some = votes == 0xFFFFFFFF, votes != 0
    assert (y[32:64] == every + 2 * some + 4 * (every or not some)).all()
    assert (y[64:96][::3] == sum(1 << n for n in range(0, 32, 3))).all()
    assert (y[96:] == np.where(np.arange(32) < 16, votes & 0xFFFF, votes & 0xFFFF0000)).all()


def test_collectives_of_part_of_a_warp_take_only_its_lanes(module):
    y = np.zeros(32, np.int32)
    launch(module, "subset_shuffle", y)
    assert (y == (np.arange(32) ^ 2) * 10).all()


def test_lanes_that_are_late_are_waited_for(module):
    y = np.zeros(64, np.int32)
    launch(module, "late_lanes", y, block=64, together=2)
    x = []
    for t in range(64):
        value = t
        for _ in range(t if t % 4 == 0 else 0):
            value = value * 3 + 1
        x.append((value + 2**31) % 2**32 - 2**31)
    assert (y == np.array(x)[np.arange(64) ^ 1]).all()


# Divergence and barriers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 3, 4])
def test_loops_of_different_lengths_end_for_each_lane_by_itself(module, together):
    x = np.random.default_rng(0).integers(1, 200, 256, dtype=np.int32)
    y = np.zeros_like(x)
    launch(module, "collatz", x, y, grid=2, block=128, together=together)
    for n, steps in zip(x.tolist(), y.tolist(), strict=True):
        count = 0
        while n != 1 and count <= 100:
            n, count = 3 * n + 1 if n % 2 else n // 2, count + 1
        assert steps == count


def test_early_exits_continues_and_breaks_in_nested_loops(module):
    x = np.random.default_rng(1).integers(-5, 40, 64, dtype=np.int32)
    y = np.full(64, 12345, np.int32)
    launch(module, "early_exit", x, y, block=64, together=2)

    def of_thread(i, n):
        total = 0
        for j in range(n):
            if j % 5 == 3:
                continue
            for k in range(j, i, 2):
                if k > 17:
                    total += 1000
                    break
                total += k
            if total > 5000:
                return -total
        return total

    assert y.tolist() == [12345 if n < 0 else of_thread(i, n) for i, n in enumerate(x.tolist())]


def test_switches_that_fall_through(module):
    x, y = np.arange(32, dtype=np.int32) % 7, np.full(32, 77, np.int32)
    launch(module, "switches", x, y)
    plain = {0: 11, 1: 10, 2: 77}
    assert y.tolist() == [7 if v == 5 and n % 2 else plain.get(v, -100) for n, v in enumerate(x.tolist())]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("together", [1, 2, 8])
def test_block_sums_meet_at_every_barrier(module, together, reverse):
    x, y = np.random.default_rng(2).integers(-99, 99, (3, 256), dtype=np.int32), np.zeros(3, np.int32)
    launch(module, "block_sum", x, y, grid=3, block=256, shared_bytes=1024, together=together, reverse=reverse)
    assert (y == x.sum(1)).all()


def test_a_missing_barrier_shows_in_the_result(module):
    y = np.zeros(128, np.int32)
    launch(module, "missing_barrier", y, block=128)
    assert (y != 127 - np.arange(128)).any()
    launch(module, "missing_barrier", y, block=128, together=4)  # in step, it does not
    assert (y == 127 - np.arange(128)).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("together", [1, 2])
def test_named_barriers_hand_buffers_over(module, together, reverse):
    x, turns = np.random.default_rng(3).integers(0, 99, (7, 64), dtype=np.int32), 7
    y = np.zeros_like(x)
    launch(module, "producer_consumer", x, y, turns, block=128, together=together, reverse=reverse)
    assert (y == x[:, ::-1]).all()


# Copies and matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_land_and_are_filled_with_zeros(module, size, eager):
    generator = np.random.default_rng(size)
    x, y = generator.integers(1, 100, (32, size), dtype=np.uint8), np.zeros((32, size), np.uint8)
    sizes = generator.integers(0, size + 1, 32).astype(np.int32)
    sizes[-1] = 0
    counts = launch(module, f"copy_{size}", x, y, sizes, eager=eager)
    filled = np.where(np.arange(size) < sizes[:, None], x, 0)
    assert (y == np.roll(filled, -5, 0)).all()
    assert counts.bytes_read == sizes.sum() + sizes.nbytes


def test_a_copy_reads_nothing_past_its_source_size(module):
    x, y, sizes = np.ones(31 * 16, np.uint8), np.zeros(512, np.uint8), np.full(32, 16, np.int32)
    sizes[31] = 0
    launch(module, "copy_16", x, y, sizes, read_only=(x,))
    sizes[31] = 1
    with pytest.raises(ptx.PtxError, match=r"reads 1 bytes"):
        launch(module, "copy_16", x, y, sizes)


def test_copies_land_no_sooner_than_they_are_waited_for(module):
    x, y = arange(6, 32, 4), np.zeros((6, 32, 4), np.float32)
    for name, eager, right in (("1", False, True), ("1", True, True), ("2", True, True), ("2", False, False)):
        launch(module, f"pipeline_{name}", x, y, 6, eager=eager)
        assert np.array_equal(y, x[:, ::-1]) == right, (name, eager)


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_products_are_those_of_matrices(module, dtype, transposed, together):
    a, b, c = torch.randn(4, 16, 16).to(dtype), torch.randn(4, 16, 8).to(dtype), torch.randn(4, 16, 8)
    d = torch.zeros(4, 16, 8)
    name = f"product_{'bf16' if dtype == BF16 else 'f16'}{'_t' if transposed else ''}"
    launch(module, name, a, b.mT.contiguous() if transposed else b, c, d, block=128, together=together)
    exact = a.double() @ b.double() + c.double()
    assert (d - exact).abs().max() <= 2.0**-24 * exact.abs().max()


def test_products_in_tf32_see_the_upper_bits(module):
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    launch(module, "product_tf32", a, b, d)
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    assert (d - cut[0] @ cut[1]).abs().max() <= 2.0**-24 * d.abs().max()


def test_products_of_half_the_depth(module):
    a, b, d = torch.randn(16, 8).to(BF16), torch.randn(8, 8).to(BF16), torch.zeros(16, 8)
    launch(module, "product_1688", a, b, d)
    assert (d - a.double() @ b.double()).abs().max() <= 2.0**-24 * d.abs().max()


def test_matrices_are_loaded_plain_and_transposed(module):
    x = np.random.default_rng(4).integers(0, 65536, (4, 8, 8), dtype=np.uint16)
    y, yt = np.zeros_like(x), np.zeros_like(x)
    launch(module, "matrices", x, y, yt)
    assert (y == x).all()
    assert (yt == x.swapaxes(1, 2)).all()


# Misuse -------------------------------------------------------------------------------------------------------------


def failing(module, name, *arguments, message, together=1, **options):
    with pytest.raises(ptx.PtxError, match=message) as raised:
        launch(module, name, *arguments, together=together, **options)
    text = str(raised.value)
    assert name in text
    assert "block (0, 0, 0)" in text
    assert re.search(r"line \d+ \(\S+\.(cu|cuh|h|hpp):\d+\): ", text), text
    return text


def test_accesses_out_of_bounds_name_the_thread(module):
    x, y = arange(64), arange(64)
    text = failing(module, "reads_past", x[:32], y, message="reads 4 bytes at 0x.*outside of every region")
    assert "thread (31, 0, 0)" in text
    assert "ld.global" in text
    text = failing(module, "writes_past", x, y[:32], message="writes 4 bytes at 0x.*outside of every region")
    assert "thread (31, 0, 0)" in text
    failing(module, "writes_past", x, y, read_only=(y,), message="writes 4 bytes at 0x.*which may only be read")
    launch(module, "writes_past", x, y)


def test_accesses_past_shared_memory_are_found(module):
    y = np.zeros(32, np.int32)
    launch(module, "reads_shared_past", 0, y, shared_bytes=128)
    text = failing(module, "reads_shared_past", 1, y, shared_bytes=128, message="reads 4 bytes at 128 of 128 of shared")
    assert "thread (31, 0, 0)" in text


def test_misaligned_vectors_are_found(module):
    x, y = arange(200), arange(32)
    start = -x.ctypes.data // 4 % 4
    launch(module, "reads_vector", x[start:], y)
    failing(module, "reads_vector", x[start + 1 :], y, message="reads 16 bytes at .*not aligned")
    failing(module, "misaligned_matrix", np.zeros(32, np.uint32), message="reads 16 bytes at .*not aligned")


@pytest.mark.parametrize("together", [1, 2])
def test_barriers_that_are_never_complete_are_deadlocks(module, together):
    y = np.zeros(64, np.int32)
    message = "waits for ever: 32 of 64 threads at barrier 0; 32 threads have exited"
    failing(module, "misses_barrier", y, block=64, together=together, message=message)
    failing(module, "different_barriers", y, block=64, together=together, message="waits for ever")
    failing(module, "divergent_barrier", y, together=together, message="by 20 lanes of a warp only; 12 of the others")


def test_collectives_without_all_of_their_lanes_are_found(module):
    y = np.zeros(32, np.int32)
    failing(module, "divergent_shuffle", y, message="by 16 lanes of a warp only; 16 of the others")
    failing(module, "exited_shuffle", y, message="by 31 lanes of a warp only; 1 of the others")
    failing(module, "reads_outside_mask", y, message="reads lane 16, which does not take part")
    failing(module, "not_in_mask", y, message="executes it that is not in its mask")
    failing(module, "divergent_product", y.view(np.float32), message="by 31 lanes of a warp only")


def test_what_is_not_known_is_an_error_when_it_is_reached(module):
    y = np.zeros(128, np.int32)
    failing(module, "unknown_opcode", y, message=r"dp4a\.s32\.s32 is not known here")
    failing(module, "unknown_opcode", y, block=128, reverse=True, message=r"nanosleep\.u32 is not known here")
    failing(module, "unknown_modifier", y.view(np.float32), message=r"add\.rz\.f32 is not known here")


def test_a_kernel_that_does_not_end_is_stopped(module):
    failing(module, "endless", np.zeros(32, np.int32), limit=10_000, message="seems not to end")


def test_launches_are_held_to_the_kernels_bounds():
    text = ".visible .entry k(.param .u32 k_0)\n.reqntid 64\n{\n.reg .b32 %r<2>;\nld.param.b32 %r1, [k_0];\nret;\n}\n"
    bounded = ptx.parse(text)
    assert ptx.run(bounded, "k", (1,), (64,), bytes(4), ptx.Memory()).warps == {"ld.param.b32": 2, "ret": 2}
    with pytest.raises(ptx.PtxError, match="32 threads"):
        ptx.run(bounded, "k", (1,), (32,), bytes(4), ptx.Memory())
    truncated_text = ptx.parse(text[:-2])
    with pytest.raises(ptx.PtxError, match="ends before"):
        ptx.run(truncated_text, "k", (1,), (64,), bytes(4), ptx.Memory())


# The norms of csrc --------------------------------------------------------------------------------------------------

Four, Pointer = ctypes.c_int64 * 4, ctypes.c_void_p
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
DROPOUT = (("threshold", ctypes.c_uint64), ("scale", ctypes.c_float))
KINDS = tuple((name, ctypes.c_int) for name in ("dtype", "residual_dtype", "parameter_dtype"))


def structure(pointers, strides, *rest):
    """LayerNormFwdParams or LayerNormBwdParams of layer_norm.h, and the Dropout that follows it."""
    fields = (
        [(name, Pointer) for name in pointers.split()] + [("rows", Four)] + [(name, Four) for name in strides.split()]
    )
    fields += [("cols", ctypes.c_int64), *rest]
    outer = type("Params", (ctypes.Structure,), {"_fields_": fields})
    return type("Kernel", (ctypes.Structure,), {"_anonymous_": ("p",), "_fields_": (("p", outer), *DROPOUT)})


P = ("dropout_p", ctypes.c_double), ("rms", ctypes.c_bool), *KINDS
Fwd = structure(
    "input residual weight bias rng_state output new_residual stats", "input_strides residual_strides",
    ("eps", ctypes.c_double), *P,
)  # fmt: skip
Bwd = structure(
    "grad_output grad_new_residual normalized weight stats rng_state grad_input grad_residual grad_weight grad_bias"
    " partials",
    "grad_output_strides grad_new_residual_strides normalized_strides", *P, ("partial_rows", ctypes.c_int64),
)  # fmt: skip


@pytest.fixture(scope="session")
def norms():
    return {way: ptx.compile_cuda(ptx.CSRC / f"layer_norm/layer_norm_{way}.cu") for way in ("fwd", "bwd")}


def start(module, name, kind, tensors, written, grid, block, rows, cols, **values):
    """Fills in a structure: tensors by the names of their pointers, strides of their rows."""
    memory, parameters = ptx.Memory(), kind(cols=cols, rows=Four(rows, 1, 1, 1), **values)
    for key, tensor in tensors.items():
        if tensor is not None:
            memory.add(tensor.data_ptr(), tensor.nbytes, writable=key in written)
            setattr(parameters, key, tensor.data_ptr())
            if hasattr(parameters, f"{key}_strides"):
                setattr(parameters, f"{key}_strides", Four(tensor.stride(0), 0, 0, 0))
    entry = module.find(f"fastlm::(anonymous namespace)::{name}(fastlm::(anonymous namespace)::{kind.__name__})")
    return ptx.run(module, entry, grid, block, bytes(parameters), memory, together=4)


def block_of(cols):
    threads = -(-cols // 512) * 32
    return (threads, max(1, 256 // threads)) if threads <= 512 else (512, 1)


@pytest.mark.parametrize(
    ("rows", "cols", "variant"),
    [(11, 768, "vectors"), (5, 70, "scalars"), (3, 2051, "scalars"), (3, 1100, "long")],
)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (BF16, BF16), (BF16, torch.float32), (F16, F16)], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "rms_norm"])
def test_cuda_norms_are_within_the_error_rule(norms, op, dtypes, rows, cols, variant):
    dtype, residual_dtype = dtypes if op == "add_layer_norm" else (dtypes[0],) * 2
    if op == "rms_norm" and (dtype != residual_dtype or variant == "long"):
        return
    added, rms, p = op == "add_layer_norm", op == "rms_norm", 0.25 if op == "add_layer_norm" else 0.0
    x, weight = torch.randn(rows, cols).to(dtype), torch.randn(cols).to(dtype)
    residual = torch.randn(rows, cols).to(residual_dtype) if added else None
    bias = None if rms else torch.randn(cols).to(dtype)
    rng_state = torch.tensor([1234567890123, 77]) if added else None
    output, new_residual = (
        torch.full_like(x, math.nan),
        None if residual is None else torch.full_like(residual, math.nan),
    )
    stats = torch.full((2 - rms, rows), math.nan)
    block = block_of(cols)
    common = {
        "rms": rms, "dropout_p": p, "threshold": round(p * 2**32), "scale": 1 / (1 - p), "dtype": CODES[dtype],
        "residual_dtype": CODES[residual_dtype], "parameter_dtype": CODES[dtype],
    }  # fmt: skip
    width = 16 // max(dtype.itemsize, residual_dtype.itemsize) if variant == "vectors" else 1
    types = f"{NAMES[dtype]}, {NAMES[residual_dtype]}"
    suffix = f"long_kernel<{types}>" if variant == "long" else f"kernel<{types}, {width}>"
    tensors = {
        "input": x, "residual": residual, "weight": weight, "bias": bias, "rng_state": rng_state, "output": output,
        "new_residual": new_residual, "stats": stats,
    }  # fmt: skip
    written = ("output", "new_residual", "stats")
    grid = (-(-rows // block[1]),)
    counts = start(
        norms["fwd"], f"layer_norm_fwd_{suffix}", Fwd, tensors, written, grid, block, rows, cols, eps=1e-5, **common
    )  # fmt: skip
    if variant == "vectors":
        assert counts.bytes_written == sum(tensors[name].nbytes for name in written if tensors[name] is not None)

    grad, grad_new = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(residual_dtype) if added else None
    grad_x, grad_weight = torch.full_like(x, math.nan), torch.full_like(weight, math.nan)
    grad_residual = torch.full_like(residual, math.nan) if added else None
    grad_bias = None if rms else torch.full_like(bias, math.nan)
    partial_rows = min(rows, 3)
    partials = torch.full((2, partial_rows, cols), math.nan)
    tensors = {
        "grad_output": grad, "grad_new_residual": grad_new, "normalized": new_residual if added else x,
        "weight": weight, "stats": stats, "rng_state": rng_state, "grad_input": grad_x, "grad_residual": grad_residual,
        "grad_weight": grad_weight, "grad_bias": grad_bias, "partials": partials,
    }  # fmt: skip
    written = ("grad_input", "grad_residual", "grad_weight", "grad_bias", "partials")
    common |= {"partial_rows": partial_rows}
    for name, grid, block_ in (
        (f"layer_norm_bwd_{suffix}", (partial_rows,), block),
        ("layer_norm_bwd_sum_kernel", (-(-cols // 32), 2), (32, 16)),
    ):
        start(norms["bwd"], name, Bwd, tensors, written, grid, block_, rows, cols, **common)

    keep = keep_mask(rng_state, torch.arange(rows), cols, p) if added else torch.ones(rows, cols, dtype=torch.bool)
    parameters = (weight,) if rms else (weight, bias)

    def answers(of, wide):
        """Outputs and gradients in float64, or in torch's way."""
        leaves = [None if t is None else of(t).detach().requires_grad_() for t in (x, residual, *parameters)]
        stream = leaves[0]
        if added:
            stream = (torch.where(keep, leaves[0] / (1 - p), 0.0).to(leaves[1].dtype) + leaves[1]).to(leaves[1].dtype)
        cast = [leaf.to(stream.dtype) for leaf in leaves[2:]]
        norm = (formulas.rms_norm if rms else formulas.layer_norm) if wide else (T.rms_norm if rms else T.layer_norm)
        y = norm(stream, (cols,), *cast, eps=1e-5).to(leaves[0].dtype)
        outputs, upstream = ([y, stream], [grad, grad_new]) if added else ([y], [grad])
        wanted = [leaf for leaf in leaves if leaf is not None]
        return outputs + list(
            torch.autograd.grad(outputs, wanted, [of(g).to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
        )

    ours = [output, new_residual, grad_x, grad_residual, grad_weight, grad_bias]
    names = ["output", "new_residual", "grad_input", "grad_residual", "grad_weight", "grad_bias"]
    named = [(name, value) for name, value in zip(names, ours, strict=True) if value is not None]
    expected = zip(named, answers(lambda t: t, False), answers(lambda t: t.double(), True), strict=True)
    for (name, value), torchs, exact in expected:
        assert_within_rule(value, torchs.detach(), exact.detach(), name)


# Triton's kernels ---------------------------------------------------------------------------------------------------

TRITON = r"""
import sys

import torch
import triton
import triton.language as tl

sys.path.insert(0, sys.argv[1])
from cases import call
from errors import assert_within_rule
from proof import ptx, triton_ptx

import fastlm


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, 32)
    total = tl.zeros([M, N], tl.float32)
    for k in range(0, K, 32):
        left = tl.load(a + rows * K + k + inner[None, :])
        total = tl.dot(left, tl.load(b + (k + inner[:, None]) * N + columns), total)
    tl.store(c + rows * N + columns, total)


for dtype in (torch.bfloat16, torch.float16, torch.float32):
    a, b, c = torch.randn(32, 96).to(dtype), torch.randn(96, 64).to(dtype), torch.zeros(32, 64)
    for triton_ptx.OPTIONS in ({"together": 4}, {"together": 1, "eager": True}):
        product[1,](a, b, c.zero_(), 32, 64, 96, num_stages=3)
        error = (c - a.double() @ b.double()).abs().max().item()
        assert error < (5e-2 if dtype == torch.float32 else 1e-5), (dtype, error)
used = {opcode.split(".")[0] for opcode in triton_ptx.COUNTS}
assert {"mma", "ldmatrix", "cp"} <= used, used

triton_ptx.OPTIONS = {"together": 32}
for name, dtype in (line.rsplit(" ", 1) for line in sys.argv[2:]):
    expected = call(name, getattr(torch, dtype), "cpu")
    with fastlm.use_backend("triton_ptx"):
        outputs, gradients = expected.ours()
    for ours, torchs, exact in zip(outputs, expected.torch_outputs, expected.outputs, strict=True):
        assert_within_rule(ours, torchs, exact, name)
    for argument, exact in expected.gradients.items():
        assert_within_rule(gradients[argument], expected.torch_gradients[argument], exact, f"{name}: {argument}")

extent = triton_ptx._extent
triton_ptx._extent = lambda x: extent(x) - 4  # as if tensors ended sooner
try:
    with fastlm.use_backend("triton_ptx"):
        fastlm.functional.layer_norm(torch.randn(4, 64), (64,))
except ptx.PtxError as error:
    assert "_fwd_kernel" in str(error) and "layer_norm/triton.py:" in str(error), error
else:
    raise AssertionError("a read past a tensor was not found")
print("all within the rule")
"""


@pytest.mark.skipif(toolkit.TRITON_TOOLS is None, reason="no triton")
def test_triton_norms_and_products_are_right_as_ptx(tmp_path):
    (tmp_path / "run.py").write_text(TRITON)  # Triton reads the source of its kernels
    calls = [
        "layer_norm-plain float32",
        "layer_norm-odd sizes bfloat16",
        "rms_norm-wider than a tile float16",
        "layer_norm-wider than every tile float32",
        "add_layer_norm-fp32 residual bfloat16",
        "add_rms_norm-misaligned float32",
        "layer_norm-many rows bfloat16",
        "layer_norm-strides past 2^31 float32",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(tmp_path / "run.py"), str(Path(__file__).parent), *calls]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all within the rule" in done.stdout
