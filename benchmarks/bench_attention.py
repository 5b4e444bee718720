"""Attention: what the compilers made of the kernels, PyTorch and FastLM on the CPU, and peers on a GPU.

Four parts. Without a GPU: instructions of the kernels' inner loops beside those of their peers. On the CPU:
torch's scaled_dot_product_attention against FastLM's default and its backends; then ("sdpa") that function of torch's,
with and without fastlm.register_sdpa. On a GPU where there is one: FastLM's kernels, torch's flash, cuDNN,
memory-efficient and math kernels, FlexAttention and flash-attn. With --only one part is printed and nothing is written.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as plain
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
import fastlm.functional as F
from fastlm.bench.cases import NAMES
from fastlm.bench.harness import RESULTS, Comparison, compare, write_results
from fastlm.ops.registry import OPS

DENSE, VARLEN = "scaled_dot_product_attention", "varlen_attention"
TORCH, AUTO, REGISTERED = "torch", "FastLM auto", "registered"
Function = Callable[..., Any]
Rows = Sequence[Sequence[str]]

# The kernels -------------------------------------------------------------------------------------------------------

REPORT = Path(__file__).parents[1] / "tests" / "proof" / "kernel_report.py"
ARCHITECTURES, HEADS = (80, 90, 100, 120), (64, 128)
# Of the peers' own kernels, bf16, read in the same way: compiled by nvcc 13, the tutorial's by Triton.
PEERS = {
    ("forward", 80, 64): "FlashAttention-2 948",
    ("forward", 80, 128): "FlashAttention-2 1188",
    ("backward", 80, 64): "FlashAttention-2 1058",
    ("backward", 80, 128): "FlashAttention-2 1323",
    ("forward", 90, 64): "FlashAttention-3 1217, Triton's tutorial 966",
}


def kernel_report() -> dict[str, Any]:
    """What tests/proof/kernel_report.py tells of the kernels, or why it tells nothing under "left_out"."""
    heads = "|".join(map(str, HEADS))
    pattern = rf"^attention( causal ({heads}) bfloat16 _|_(fwd|bwd)_kernel<bf16, ({heads})>)"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.json")
        options = ["--arch", ",".join(map(str, ARCHITECTURES)), "--json", file, pattern]
        done = subprocess.run([sys.executable, REPORT, *map(str, options)], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            return {"kernels": [], "left_out": {"all": said[-1]}}
        report: dict[str, Any] = json.loads(file.read_text())
    if not report["kernels"] and not report["left_out"]:
        report["left_out"] = {"all": f"no kernel is called {pattern}"}
    return report


def backward_flop(dkdv: float | None, dq: float | None) -> float | None:
    """Useful FLOP per instruction of both loops: 4 and 3 products are computed, of which 5 are needed."""
    return 5 / (4 / dkdv + 3 / dq) if dkdv and dq else None


def static_part() -> list[str]:
    lines = ["## The kernels, read from machine code", ""]
    report = kernel_report()
    told = [f"{kind} is left out: {why}" for kind, why in report["left_out"].items()]
    if not report["kernels"]:
        return [*lines, f"`tests/proof/kernel_report.py` gave no kernels of attention ({'; '.join(told)})."]
    kernels = {}
    for kernel in report["kernels"]:
        name = re.search(r"_([a-z]+)_kernel", kernel["kernel"])[1]  # type: ignore[index]
        head = re.search(r"(causal |, )(\d+)", kernel["kernel"])[2]  # type: ignore[index]
        kernels[kernel["arch"], head, f"{'CUDA' if kernel['kind'] == 'cuda' else 'Triton'} {name}"] = kernel
    resources, flop = [], []
    for arch, head in itertools.product(ARCHITECTURES, map(str, HEADS)):
        names = ("CUDA fwd", "CUDA bwd", "Triton fwd", "Triton dkdv", "Triton dq")
        found = {name: kernels.get((arch, head, name)) for name in names}
        for name, kernel in found.items():
            if kernel:
                spill, warps = f"{kernel['spill_stores']}+{kernel['spill_loads']}", kernel["threads"] // 32
                cells = [kernel["registers"], spill, warps, _whole(kernel["flop_per_instruction"])]
                resources.append([f"sm_{arch}", head, name, *map(str, cells)])
        fwd, bwd, triton, dkdv, dq = (kernel and kernel["flop_per_instruction"] for kernel in found.values())
        for way, *figures in (("forward", fwd, triton), ("backward", bwd, backward_flop(dkdv, dq))):
            flop.append([f"sm_{arch}", head, way, *map(_whole, figures), PEERS.get((way, arch, int(head)), "-")])
    heads = ["", "head", "kernel", "registers", "spill, bytes", "warps", "FLOP"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return [
        *lines,
        "bf16, causal; nothing here was run. FLOP per instruction of a warp in the steady inner loop, on its way past"
        " what only edges and options need: what tensor cores compute, divided by all instructions that a warp issues"
        " for it. On sm_100 one thread issues Triton's product for its whole block; it is shared by the block's warps.",
        "",
        *_table(heads, resources),
        "",
        "Of backward 5 products of matrices count, those that are needed. Triton's two loops compute 7 between them,"
        " for scores and dp are formed in both.",
        "",
        *_table(["", "head", "", "CUDA", "Triton", "peers' own kernels, bf16, read in the same way"], flop),
        "",
        f"`{versions}`; `python {REPORT.relative_to(REPORT.parents[2])} attention` shows more.{' '.join(['', *told])}",
    ]  # fmt: skip


def _whole(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.0f}"


def _table(heads: Sequence[str], rows: Rows) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


# The CPU -----------------------------------------------------------------------------------------------------------


def served(op: str) -> list[str]:
    """FastLM's backends for a CPU that are timed by name; the reference is for reading, Triton would be interpreted."""
    names = [name for name in ("native", "cpu") if name in OPS[op].backends]
    return [name for name in names if not OPS[op].backends[name].available()]


def both(function: Function, inputs: Sequence[Tensor]) -> Function:
    """Forward and backward. The upstream gradients are made by a first run."""
    output = function(*inputs)
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(function(*inputs), inputs, grad)


def alone(function: Function, inputs: Sequence[Tensor]) -> Function:
    return torch.no_grad()(lambda: function(*inputs))


def cpu_case(
    title: str,
    op: str,
    inputs: Sequence[Tensor],
    call: Callable[[Any], Function],
    torchs: tuple[Function, Sequence[Tensor]],
    seconds: float,
    *,
    backward: bool = True,
) -> list[Comparison]:
    """Forward, and forward and backward, of FastLM's `call(F)` and of torch's function with its own inputs."""
    results = []
    for name, wrap in [("fwd", alone), ("fwd + bwd", both)][: 1 + backward]:
        sides = {TORCH: wrap(*torchs), AUTO: wrap(call(F), inputs)}
        for backend in served(op):
            try:
                run = wrap(fastlm.use_backend(backend)(call(F)), inputs)
                run()
            except fastlm.BackendError as error:
                print(f"{title}: {backend} does not serve it: {' '.join(str(error).split())}")
            else:
                sides[backend] = run
        results.append(compare(f"{title} {name}", sides, seconds=seconds, least=5))
    return results


def dense_case(
    batch: int, heads: int, length: int, width: int, causal: bool, dtype: torch.dtype, seconds: float
) -> list[Comparison]:
    inputs = [torch.randn(batch, heads, length, width).to(dtype).requires_grad_() for _ in range(3)]
    title = f"B{batch} H{heads} T{length} D{width} {'causal' if causal else 'full'} {NAMES[dtype]}"

    def call(functions: Any) -> Function:
        return lambda q, k, v: functions.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return cpu_case(title, DENSE, inputs, call, (call(plain), inputs), seconds)


def varlen_case(dtype: torch.dtype, seconds: float) -> list[Comparison]:
    """Eight sequences that fill 45% of a padded batch, which torch's op has a mask for."""
    lengths = torch.tensor([512, 384, 256, 192, 192, 128, 128, 51])
    longest, total = int(lengths.max()), int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    packed = [torch.randn(total, 12, 64).to(dtype).requires_grad_() for _ in range(3)]
    padded = [torch.randn(8, 12, longest, 64).to(dtype).requires_grad_() for _ in range(3)]
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]

    def call(functions: Any) -> Function:
        return lambda q, k, v: functions.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    def padded_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain.scaled_dot_product_attention(q, k, v, mask)

    title = f"8 sequences of 51 to 512, H12 D64 {NAMES[dtype]}"
    return cpu_case(title, VARLEN, packed, call, (padded_call, padded), seconds)


def decode_case(dtype: torch.dtype, seconds: float) -> list[Comparison]:
    """One query against a cache of 4,096 that is filled in part; torch's op has a mask for it."""
    lengths = torch.tensor([4096, 3000, 1500, 700], dtype=torch.int32)
    inputs = [torch.randn(4, 12, length, 64).to(dtype) for length in (1, 4096, 4096)]

    def call(functions: Any) -> Function:
        return lambda q, k, v: functions.scaled_dot_product_attention(q, k, v, is_causal=True, key_lengths=lengths)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (torch.arange(4096, dtype=torch.int32) < lengths[:, None])[:, None, None]
        return plain.scaled_dot_product_attention(q, k, v, mask)

    title = f"decode B4 H12 T1 cache 4096 D64 {NAMES[dtype]}"
    return cpu_case(title, DENSE, inputs, call, (masked, inputs), seconds, backward=False)


def beside_gemm(dtype: torch.dtype, seconds: float) -> str:
    """FLOP per second of causal attention, forward and backward, and of a GEMM that takes turns with it."""
    length, heads, width, rows, inner, columns = 1024, 12, 64, 1024, 768, 3072
    inputs = [torch.randn(1, heads, length, width).to(dtype).requires_grad_() for _ in range(3)]
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    sides = {
        AUTO: both(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs),
        "GEMM": alone(plain.linear, (x, weight)),
    }
    result = compare(f"beside a GEMM, {NAMES[dtype]}", sides, seconds=seconds)
    flop = {AUTO: 7 * heads * width * length * (length + 1), "GEMM": 2 * rows * inner * columns}
    ours, gemm = (flop[side] / result.median(side) / 1e9 for side in sides)
    case, shape = f"B1 H{heads} T{length} D{width} causal forward and backward", f"{rows} x {inner} x {columns}"
    rates = f"{ours:.0f} GFLOP/s; a GEMM of {shape} in turns with it: {gemm:.0f} ({ours / gemm:.2f})"
    return f"- {case}, {NAMES[dtype]}: {rates}"


def cpu_part(seconds: float) -> list[Comparison]:
    shapes = [
        (1, 12, 1024, 64, True),
        (1, 12, 1024, 64, False),
        (8, 12, 128, 64, True),
        (8, 12, 128, 64, False),
        (2, 12, 512, 64, True),
        (1, 12, 1024, 32, True),
        (1, 12, 1024, 32, False),
        (1, 12, 1024, 128, True),
        (1, 12, 1024, 128, False),
        (1, 4, 2048, 128, True),
        (1, 2, 4096, 64, True),
        (1, 2, 4096, 64, False),
    ]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            results += dense_case(*shape, dtype, seconds)
        results += varlen_case(dtype, seconds)
        results += decode_case(dtype, seconds)
    return results


# torch's own function, registered ----------------------------------------------------------------------------------


def registered_case(
    batch: int, length: int, causal: bool, models: bool, dtype: torch.dtype, seconds: float
) -> list[Comparison]:
    """torch's scaled_dot_product_attention before and after `register_sdpa`, in turns.

    Args:
        models: the heads of a token lie side by side, as a model's projections leave them.
    """
    shape = (batch, length, 12, 64) if models else (batch, 12, length, 64)
    inputs = [torch.randn(shape).to(dtype) for _ in range(3)]
    inputs = [(x.transpose(1, 2) if models else x).requires_grad_() for x in inputs]
    handles: list[Any] = []

    def side(register: bool, run: Function) -> Function:
        def switched() -> object:
            if register and not handles:
                handles.append(fastlm.register_sdpa(cpu=True))
            elif handles and not register:
                handles.pop().remove()
            return run()

        return switched

    title = f"B{batch} H12 T{length} D64 {'causal' if causal else 'full'} {'BTHD' if models else 'BHTD'} {NAMES[dtype]}"
    results = []
    for name, wrap in (("fwd", alone), ("fwd + bwd", both)):
        run = wrap(lambda q, k, v: plain.scaled_dot_product_attention(q, k, v, is_causal=causal), inputs)
        sides = {TORCH: side(False, run), REGISTERED: side(True, run)}
        number = max(1, 1024 // (batch * length))
        results.append(compare(f"{title} {name}", sides, seconds=seconds, number=number, settle=True))
    for handle in handles:
        handle.remove()
    return results


def registered_part(seconds: float) -> list[str]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, length in ((1, 1), (1, 16), (1, 64), (1, 128), (8, 128), (2, 512), (1, 1024)):
            for causal, models in itertools.product((True, False), (True, False)):
                results += registered_case(batch, length, causal, models, dtype, seconds)
    rows = [
        [r.case, *(f"{r.cell(side)} {r.unit}" for side in (TORCH, REGISTERED)), f"{r.ratio(REGISTERED, TORCH):.2f}"]
        for r in results
    ]
    return [
        "## torch's own function after `fastlm.register_sdpa(cpu=True)`",
        "",
        *_table(["", TORCH, REGISTERED, "times as fast"], rows),
    ]


# A GPU -------------------------------------------------------------------------------------------------------------

TORCHS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch math": SDPBackend.MATH,
}
OURS = {"FastLM triton": "triton", "FastLM cuda": "cuda"}
FLEX, FLASH_ATTN = "FlexAttention", "flash-attn"
SIDES = [*OURS, *TORCHS, FLEX, FLASH_ATTN]


def gpu_function(side: str, length: int, causal: bool, device: str) -> Function:
    """A side's function of query, key and value, (B, H, T, D) and for flash-attn (B, T, H, D)."""
    if side in OURS:
        name = OURS[side]
        if name not in OPS[DENSE].backends:
            raise LookupError(f"there is no backend {name!r}")
        return fastlm.use_backend(name)(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    if side in TORCHS:
        kernel = TORCHS[side]
        if kernel == SDPBackend.MATH and length > 4096:
            raise MemoryError("not run: it keeps B H T^2 scores")

        def restricted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return plain.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return restricted
    if side == FLEX:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key

        mask = create_block_mask(sees, None, None, length, length, device=device) if causal else None
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    return lambda q, k, v: flash_attn_func(q, k, v, causal=causal)


def gpu_case(
    batch: int, heads: int, length: int, width: int, causal: bool, seconds: float, device: str, missing: dict[str, str]
) -> list[list[str]]:
    """Rows of TFLOP/s of forward and of backward; why a side has none is added to `missing`."""
    torch.compiler.reset()
    shape = batch, heads, length, width
    inputs = [torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3)]
    swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    grad = torch.randn(shape, device=device).bfloat16()
    title = f"B{batch} H{heads} T{length} D{width} {'causal' if causal else 'full'}"
    forward: dict[str, Function] = {}
    backward: dict[str, Function] = {}
    for side in SIDES:
        own, upstream = (swapped, grad.transpose(1, 2).contiguous()) if side == FLASH_ATTN else (inputs, grad)
        # Each step may find that a side does not serve this: it is not installed, not for this GPU, out of memory.
        try:
            function = gpu_function(side, length, causal, device)
            run = alone(function, own)
            run()
            forward[side] = run
            output = function(*own)
            run = _gradients(output, own, upstream)
            run()
            backward[side] = run
        except Exception as error:
            text = " ".join(str(error).split())[:300] or repr(error)
            missing.setdefault(side, f"{title}, {'backward' if side in forward else 'forward'}: {text}")
    flop = 4 * batch * heads * length**2 * width / (2 if causal else 1)
    rows = []
    for name, sides, work in (("fwd", forward, flop), ("bwd", backward, 2.5 * flop)):
        times = compare(f"{title} {name}", sides, seconds=seconds, number=5) if sides else None
        cells = [f"{work / times.median(s) / 1e12:.1f}" if times and s in sides else "-" for s in SIDES]
        rows.append([f"{title} {name}", *cells])
    return rows


def _gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> Function:
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def gpu_part(seconds: float, device: str = "cuda", tokens: int = 16384, channels: int = 2048) -> list[str]:
    lines = ["## On a GPU", ""]
    if device == "cuda" and not torch.cuda.is_available():
        told = (
            "The GPU columns were not run, for there was no GPU: FastLM's GPU kernels are executed and checked, never"
        )
        return [*lines, f"{told} timed on a GPU."]
    rows, missing = [], dict[str, str]()
    a = torch.randn(tokens // 2, tokens // 2, device=device).bfloat16()
    peak = 2 * len(a) ** 3 / compare("a product of matrices", {"torch": lambda: a @ a}, seconds=seconds).median("torch")
    # FlexAttention's graph is kept from one run of backward to the next, so that it must not give its memory away.
    with functorch.patch(donated_buffer=False):
        for width, causal, parts in itertools.product((64, 128), (True, False), (16, 4, 1)):
            shape = parts, channels // width, tokens // parts, width
            rows += gpu_case(*shape, causal, seconds, device, missing)
    return [
        *lines,
        f"bf16, TFLOP/s from medians of alternating runs. Forward counts 4 B H T^2 D, half of it where causal, backward"
        f" 2.5 times that. A product of {len(a)} x {len(a)} matrices reaches {peak / 1e12:.1f} TFLOP/s.",
        "",
        *_table(["case", *SIDES], rows),
        "",
        *(f"- {side}: {why}" for side, why in missing.items()),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("static", "cpu", "sdpa", "gpu"), help="one part, printed and not written")
    parser.add_argument("--seconds", type=float, help="for each case; 2, on a GPU 1")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = cpu_part(arguments.seconds or 2.0) if arguments.only in (None, "cpu") else []
    rates = (
        [beside_gemm(dtype, arguments.seconds or 2.0) for dtype in (torch.float32, torch.bfloat16)] if results else []
    )
    parts = [rates] if rates else []
    parts += [registered_part(arguments.seconds or 1.0)] if arguments.only in (None, "sdpa") else []
    parts += [static_part()] if arguments.only in (None, "static") else []
    parts += [gpu_part(arguments.seconds or 1.0)] if arguments.only in (None, "gpu") else []
    text = "\n\n".join("\n".join(part).rstrip() for part in parts)
    print(text)
    if arguments.only:
        return

    def named(result: Comparison) -> str:
        return ", ".join(f"{side} {result.ratio(side, TORCH):.2f}" for side in list(result.times)[2:])

    title = "Attention on the CPU: torch's scaled_dot_product_attention and FastLM"
    columns = [("named, times as fast as torch", named)]
    write_results("attention", title, results, columns, lambda c: c.ratio(AUTO, TORCH), "default / torch, speed")
    file = RESULTS / "attention.md"
    file.write_text(f"{file.read_text()}\n{text}\n")


if __name__ == "__main__":
    main()
