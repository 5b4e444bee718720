"""The linear layer for few rows on the CPU against torch's: the matrices of GPT-2 small, 1 to 8 rows.

"step" is all of them, 12 layers and the logits; the others go through as many weights as make 300 MB, so that none is
in a cache. The kernel's calls are recorded, as generation makes them; torch's are eager. "read" is torch's sum of as
many bytes, in turn with the others: the last columns say which share of its bandwidth they reach.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as plain
from torch import Tensor

import fastlm.functional as F
from fastlm import use_backend
from fastlm.bench.cases import NAMES
from fastlm.bench.harness import Comparison, compare, write_results
from fastlm.ops.compiled import CPU, Recorder
from fastlm.ops.linear import op as linear
from fastlm.ops.linear.op import quantize

SHAPES = {"qkv": (2304, 768), "projection": (768, 768), "up": (3072, 768), "down": (768, 3072), "logits": (50257, 768)}
BYTES = 300 * 2**20


def recorded(x: dict[int, Tensor], weights: list[Tensor], scales: list[Tensor] | None = None) -> Callable[[], None]:
    recorder = Recorder(CPU)
    kept = [
        linear.fwd(recorder, x[weight.shape[1]], weight, None, None if scales is None else scales[n])
        for n, weight in enumerate(weights)
    ]

    def run() -> None:
        assert kept
        recorder.run()

    return run


def eager(x: dict[int, Tensor], weights: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for weight in weights:
                plain.linear(x[weight.shape[1]], weight)

    return run


def models(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The weights of each case."""
    cases = {}
    for name, (outputs, features) in SHAPES.items():
        weights = [torch.randn(outputs, features).to(dtype)]
        weights += [weights[0].clone() for _ in range(BYTES // weights[0].nbytes)]
        cases[f"{name} {outputs} x {features}"] = weights
    layers = [shape for name, shape in SHAPES.items() if name != "logits"] * 12
    step = [torch.randn(shape).to(dtype) for shape in (*layers, SHAPES["logits"])]
    return {"step": step} | cases


def many_rows(seconds: float) -> None:
    sizes = {**{name: shape for name, shape in SHAPES.items() if name != "logits"}, "small": (192, 192)}
    results = []
    for name, (outputs, features) in sizes.items():
        weight, bias = torch.randn(outputs, features, requires_grad=True), torch.randn(outputs, requires_grad=True)
        for rows in (64, 128, 512, 2048):
            x, grad = torch.randn(rows, features, requires_grad=True), torch.randn(rows, outputs)

            def run(
                backend: str, x: Tensor = x, grad: Tensor = grad, weight: Tensor = weight, bias: Tensor = bias
            ) -> None:
                with use_backend(backend):
                    F.linear(x, weight, bias).backward(grad)
                x.grad = weight.grad = bias.grad = None

            sides = {
                side: functools.partial(run, backend) for side, backend in (("torch", "native"), ("oneDNN", "onednn"))
            }
            results.append(compare(f"{name} {outputs} x {features}, {rows} rows", sides, seconds=seconds))
    title = "Linear layers in fp32, forward and backward: torch and oneDNN"
    write_results("linear_many", title, results, [], lambda c: c.ratio("oneDNN"), "oneDNN / torch, speed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--many", action="store_true", help="many rows, in place of few")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.many:
        many_rows(arguments.seconds)
        return 0
    results: list[Comparison] = []
    small: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, weights in models(dtype).items():
            int8 = [quantize(weight) for weight in weights]
            few, scales = [each[0] for each in int8], [each[1] for each in int8]
            read = torch.ones(sum(weight.nbytes for weight in weights) // 4)
            for rows in (1, 2, 4, 8):
                x = {features: torch.randn(rows, features).to(dtype) for features in (768, 3072)}
                sides = {
                    "torch": eager(x, weights),
                    "kernel": recorded(x, weights),
                    "int8": recorded(x, few, scales),
                    "read": lambda read=read: read.sum(),
                }
                title = f"{name}, {rows} rows, {NAMES[dtype]}"
                small[title] = sum(weight.nbytes for weight in few) / read.nbytes
                results.append(compare(title, sides, bytes=read.nbytes, seconds=arguments.seconds, least=3))
    columns = [
        ("torch, share of the read", lambda c: f"{c.ratio('torch', 'read'):.0%}"),
        ("kernel, share", lambda c: f"{c.ratio('kernel', 'read'):.0%}"),
        ("int8, share", lambda c: f"{c.ratio('int8', 'read') * small[c.case]:.0%}"),
    ]
    title = "Linear layers of GPT-2 small, few rows: torch and the CPU kernel"
    write_results("linear", title, results, columns, lambda c: c.ratio("kernel", "torch"), "kernel / torch, speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
