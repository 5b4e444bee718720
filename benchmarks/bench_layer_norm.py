"""The norms: PyTorch eager, torch.compile and FastLM's backends, forward and backward, against the copy bandwidth.

With --sizes small inputs, to find from which size on a backend is faster than PyTorch's own op: what
fastlm/ops/measured.json records.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as plain
from torch import Tensor

import fastlm
import fastlm.functional as F
from fastlm.bench.harness import Comparison, compare, copy_bandwidth, write_results
from fastlm.ops.registry import OPS

EAGER, COMPILED = "eager", "compile"
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def plain_add(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_norm(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return norm(residual, *rest), residual

    return add_norm


PLAIN = {
    "layer_norm": plain.layer_norm,
    "rms_norm": plain.rms_norm,
    "add_layer_norm": plain_add(plain.layer_norm),
    "add_rms_norm": plain_add(plain.rms_norm),
}


def backends(op: str, device: str) -> list[str]:
    """FastLM's own backends that can run here."""
    records = OPS[op].backends.values()
    usable = [b for b in records if b.devices is not None and device in b.devices and not b.available()]
    return [backend.name for backend in usable]


def step(function: Callable[..., Any], inputs: list[Tensor], shape: tuple[int], rest: list[Tensor], grads: Any) -> Any:
    """Forward and backward, or forward alone without upstream gradients."""

    def run() -> None:
        outputs = function(*inputs, shape, *rest)
        if grads:
            torch.autograd.backward(outputs, grads)
            for x in (*inputs, *rest):
                x.grad = None

    return run


def case(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    seconds: float,
    *,
    backward: bool = True,
    compiled: bool = True,
    number: int = 1,
) -> Comparison:
    added, rms = op.startswith("add"), "rms" in op
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaf = {"dtype": dtype, "device": device, "requires_grad": backward}
    inputs = [torch.randn(shape, **leaf) for _ in range(1 + added)]
    rest = [torch.randn(shape[1], **leaf) for _ in range(1 if rms else 2)]
    grads = [torch.randn(shape, dtype=dtype, device=device) for _ in range(1 + added)] if backward else []
    sides = {EAGER: step(PLAIN[op], inputs, shape[1:], rest, grads)}
    if compiled:
        torch.compiler.reset()
        sides[COMPILED] = step(torch.compile(PLAIN[op], dynamic=False), inputs, shape[1:], rest, grads)
    for name in backends(op, device):
        sides[name] = fastlm.use_backend(name)(step(getattr(F, op), inputs, shape[1:], rest, grads))
    passes = (4 if added else 2) + (4 if added else 3) * backward
    title = f"{op} {shape[0]}x{shape[1]} {NAMES[dtype]} {'fwd + bwd' if backward else 'fwd'}"
    moved = passes * inputs[0].nbytes
    return compare(title, sides, bytes=moved, seconds=seconds, memory=number == 1, number=number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="small inputs instead")
    parser.add_argument("--seconds", type=float, help="for each case; 5, of small inputs 0.5")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = backends("layer_norm", device)[0]
    results = []
    if arguments.sizes:
        for dtype, op, backward in itertools.product((torch.float32, torch.bfloat16), PLAIN, (False, True)):
            for rows in (16, 128, 512, 1024, 2048):
                options = {"backward": backward, "compiled": False, "number": 10}
                results.append(case(op, (rows, 768), dtype, arguments.seconds or 0.5, **options))
        title = "Norms of small inputs: from which size on a backend is faster than PyTorch's own op"
        write_results("layer_norm_sizes", title, results, [], lambda c: c.ratio(ours, EAGER), f"{ours} times as fast")
        return
    bandwidth = copy_bandwidth(device)
    for dtype in (torch.float32, torch.bfloat16):
        results += [case(op, (4096, 768), dtype, arguments.seconds or 5.0) for op in PLAIN]
        results.append(case("layer_norm", (4096, 768), dtype, arguments.seconds or 5.0, backward=False))
        results.append(case("layer_norm", (2048, 4096), dtype, arguments.seconds or 5.0))

    def peak(result: Comparison) -> str:
        return " / ".join(f"{result.memory[side] / 2**20:.0f}" for side in (EAGER, COMPILED, ours))

    columns = [
        ("GB/s", lambda c: f"{c.bytes / c.median(ours) / 1e9:.1f}"),
        ("of the copy's", lambda c: f"{c.bytes / c.median(ours) / bandwidth:.0%}"),
        (f"peak MiB, eager / compile / {ours}", peak),
    ]
    title = f"Norms: PyTorch eager, torch.compile and FastLM; a copy reaches {bandwidth / 1e9:.1f} GB/s"
    ratio_name = f"{ours} times as fast as the better of eager and compile"
    write_results("layer_norm", title, results, columns, lambda c: c.ratio(ours, EAGER, COMPILED), ratio_name)


if __name__ == "__main__":
    main()
