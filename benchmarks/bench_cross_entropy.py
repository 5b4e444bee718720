"""The losses: PyTorch eager, torch.compile, its chunked linear_cross_entropy and FastLM's backends, time and memory.

Forward and backward. Memory is the peak beyond inputs and returned gradients. `fastlm bench` has neither torch's
chunked loss nor classes that lie far apart in memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as plain
from torch import Tensor

import fastlm
import fastlm.functional as F
from fastlm.bench.cases import NAMES
from fastlm.bench.harness import Comparison, compare, write_results
from fastlm.bench.suite import COMPILED, EAGER, own_backends
from fastlm.ops.registry import OPS

CHUNKED, IN_PLACE = "torch chunked", "in place"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable(op: str) -> list[str]:
    return [name for name in own_backends(op, DEVICE) if not OPS[op].backends[name].available()]


OURS = usable("cross_entropy")[0]


class Logits(torch.autograd.Function):
    """Logits that were computed, as a model's are, in no time: a backward may take their memory."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None


def case(shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> Comparison:
    logits, anchor = torch.randn(shape, device=DEVICE).to(dtype), torch.ones((), requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=DEVICE)

    def step(function: Callable[..., Tensor], logits: Tensor = logits, **options: Any) -> Callable[[], None]:
        return lambda: function(Logits.apply(anchor, logits), target, **options).backward()

    torch.compiler.reset()
    sides = {EAGER: step(plain.cross_entropy), COMPILED: step(torch.compile(plain.cross_entropy, dynamic=False))}
    for name in usable("cross_entropy"):
        sides[name] = fastlm.use_backend(name)(step(F.cross_entropy))
        place = f"{name} {IN_PLACE}"
        sides[place] = fastlm.use_backend(name)(step(F.cross_entropy, logits.clone(), inplace_backward=True))
    title = f"cross_entropy {'x'.join(map(str, shape))} {NAMES[dtype]}"
    result = compare(title, sides, bytes=3 * logits.nbytes, seconds=seconds, memory=True, device=DEVICE)
    for side in result.memory:  # the gradient is returned, except that of whoever wrote it over the logits
        result.memory[side] = max(0, result.memory[side] - (0 if IN_PLACE in side else logits.nbytes))
    return result


def linear_case(rows: int, features: int, classes: int, dtype: torch.dtype, seconds: float) -> Comparison:
    input = torch.randn(rows, features, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (torch.randn(classes, features, device=DEVICE) / features**0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=DEVICE)

    def step(function: Callable[..., Tensor], **options: Any) -> Callable[[], None]:
        def run() -> None:
            function(input, weight, target, **options).backward()
            input.grad = weight.grad = None

        return run

    def linear_then_loss(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return plain.cross_entropy(plain.linear(input, weight), target)

    torch.compiler.reset()
    sides = {EAGER: step(linear_then_loss), COMPILED: step(torch.compile(linear_then_loss, dynamic=False))}
    slow = DEVICE.type == "cpu" and dtype != torch.float32  # 15 and 30 s a step for these rows
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and not slow:
        sides[CHUNKED] = step(plain.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())
    for name in usable("linear_cross_entropy"):
        sides[name] = fastlm.use_backend(name)(step(F.linear_cross_entropy))
    title = f"linear_cross_entropy {rows}x{features}x{classes} {NAMES[dtype]}"
    result = compare(title, sides, seconds=seconds, least=4, memory=True, device=DEVICE)
    for side in result.memory:
        result.memory[side] = max(0, result.memory[side] - input.nbytes - weight.nbytes)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each case")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seconds, results = arguments.seconds, []
    for dtype in (torch.float32, torch.bfloat16):
        results += [case((rows, 50304), dtype, seconds) for rows in (512, 1024)]
        results.append(case((8192, 1000), dtype, seconds))
        results.append(case((8, 21, 128, 128), dtype, seconds))  # classes far apart in memory: copied
        results += [linear_case(rows, 768, 50304, dtype, seconds) for rows in (512, 1024)]

    def ratio(result: Comparison) -> float:
        return result.ratio(OURS, *(set(result.times) & {EAGER, COMPILED, CHUNKED}))

    def in_place(result: Comparison) -> str:
        side = f"{OURS} {IN_PLACE}"
        return f"{result.ratio(side, EAGER, COMPILED):.2f}" if side in result.times else ""

    def peaks(result: Comparison) -> str:
        return " / ".join(f"{peak / 2**20:.0f}" for peak in result.memory.values())

    columns = [("in place", in_place), ("peak MiB beyond inputs and gradients, side by side", peaks)]
    title = "The losses: PyTorch eager, torch.compile and FastLM, forward and backward"
    write_results("cross_entropy", title, results, columns, ratio, f"{OURS} times as fast as the best of torch's")


if __name__ == "__main__":
    main()
