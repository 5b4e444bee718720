"""Microseconds that one eager call costs before any arithmetic: FastLM's functions against torch's own, on tiny inputs.

Forward with autograd recording, forward alone, and forward and backward. "auto" is what a user gets; the named backends
show what their path costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as plain
from torch import Tensor

import fastlm
import fastlm.functional as F
from fastlm.bench.harness import Comparison, compare, write_results
from fastlm.ops.registry import OPS

TORCH, AUTO = "torch", "FastLM auto"
ROWS, COLS = 4, 64


def plain_add_layer_norm(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return plain.layer_norm(residual, *rest), residual


def calls(device: str) -> dict[str, tuple[Callable[..., Any], list[Tensor], Callable[[Any], Callable[..., Any]]]]:
    """Op -> (torch's function of the tensors, the tensors, from a namespace to FastLM's function of them)."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    shape = (COLS,)
    target = torch.randint(COLS, (ROWS,), device=device)
    x, residual, weight, bias = leaf(ROWS, COLS), leaf(ROWS, COLS), leaf(COLS), leaf(COLS)
    q, k, v = (leaf(1, 1, ROWS, COLS) for _ in range(3))
    return {
        "layer_norm": (lambda f: lambda *a: f.layer_norm(a[0], shape, *a[1:]), [x, weight, bias]),
        "rms_norm": (lambda f: lambda *a: f.rms_norm(a[0], shape, a[1]), [x, weight]),
        "add_layer_norm": (lambda f: lambda *a: f.add_layer_norm(*a[:2], shape, *a[2:]), [x, residual, weight, bias]),
        "cross_entropy": (lambda f: lambda a: f.cross_entropy(a, target), [x]),
        "linear": (lambda f: lambda *a: f.linear(*a), [x, leaf(COLS, COLS), bias]),
        "scaled_dot_product_attention": (lambda f: lambda *a: f.scaled_dot_product_attention(*a), [q, k, v]),
    }


class Plain:
    layer_norm, rms_norm, cross_entropy = plain.layer_norm, plain.rms_norm, plain.cross_entropy
    linear = plain.linear
    scaled_dot_product_attention, add_layer_norm = plain.scaled_dot_product_attention, plain_add_layer_norm


def sides(op: str, make: Any, device: str, wrap: Callable[[Any], Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    named = [
        backend.name
        for backend in OPS[op].backends.values()
        if backend.devices and device in backend.devices and not backend.available()
    ]
    result = {TORCH: wrap(make(Plain)), AUTO: wrap(make(F))}
    return result | {name: fastlm.use_backend(name)(wrap(make(F))) for name in named}


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: list[Comparison] = []
    for op, (make, tensors) in calls(device).items():
        with torch.no_grad():
            outputs = make(Plain)(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.randn_like(output) for output in outputs]

        def recorded(function: Any, tensors: Any = tensors) -> Callable[[], Any]:
            return lambda: function(*tensors)

        def alone(function: Any, tensors: Any = tensors) -> Callable[[], Any]:
            detached = [x.detach() for x in tensors]
            return lambda: function(*detached)

        def both(function: Any, tensors: Any = tensors, grads: Any = grads) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(function(*tensors), tensors, grads)

        for name, wrap in (("fwd, recorded", recorded), ("fwd", alone), ("fwd + bwd", both)):
            results.append(compare(f"{op} {name}", sides(op, make, device, wrap), seconds=2.0, number=200))
    columns = [("named / torch", lambda c: ", ".join(f"{s} {1 / c.ratio(s, TORCH):.2f}" for s in list(c.times)[2:]))]
    title = "Overhead of an eager call on tiny inputs"
    write_results("overhead", title, results, columns, lambda c: 1 / c.ratio(AUTO, TORCH), "FastLM auto / torch, time")


if __name__ == "__main__":
    main()
