"""The default never makes a model slower: every op under "auto" against plain PyTorch, and a whole GPT step.

Forward and backward at realistic sizes. With --check the exit status is 1 if any case is below 0.97 of plain PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as plain
from torch import Tensor

import fastlm.functional as F
from fastlm.bench.harness import Comparison, compare, write_results
from fastlm.models import gpt

LEAST = 0.97
PLAIN_SIDE, OURS = "plain PyTorch", "FastLM"


def plain_add_norm(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_norm(x: Tensor, residual: Tensor, *args: Any, dropout_p: float = 0.0, training: bool = True) -> Any:
        residual = residual + plain.dropout(x, dropout_p, training)
        return norm(residual, *args), residual

    return add_norm


def plain_linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    return plain.cross_entropy(plain.linear(x, weight, linear_bias), target, **options)


def plain_attention(*args: Any, alibi_slopes: None = None, **options: Any) -> Tensor:
    return plain.scaled_dot_product_attention(*args, **options)


PLAIN = SimpleNamespace(
    add_layer_norm=plain_add_norm(plain.layer_norm),
    add_rms_norm=plain_add_norm(plain.rms_norm),
    cross_entropy=plain.cross_entropy,
    layer_norm=plain.layer_norm,
    linear=plain.linear,
    linear_cross_entropy=plain_linear_cross_entropy,
    rms_norm=plain.rms_norm,
    scaled_dot_product_attention=plain_attention,
)


def step(function: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> Callable[[], None]:
    """Forward and backward with fixed upstream gradients, which the first run fills in and both sides share."""

    def run() -> None:
        for x in inputs:
            x.grad = None
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not grads:
            grads.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, grads)

    return run


def op_cases(dtype: torch.dtype) -> dict[str, tuple[Callable[[Any], Callable[..., Any]], list[Tensor]]]:
    """Name -> (from a namespace of functions to the function that is timed, its inputs)."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    x, residual, weight, bias = leaf(4096, 768), leaf(4096, 768), leaf(768), leaf(768)
    q, k, v = (leaf(1, 12, 1024, 64) for _ in range(3))
    mask = (torch.arange(128) < torch.linspace(30, 128, 8)[:, None])[:, None, None]
    target = torch.randint(50304, (1024,))
    head = (torch.randn(50304, 768) * 0.02).to(dtype).requires_grad_()
    return {
        "layer_norm 4096x768": (lambda f: lambda *a: f.layer_norm(a[0], (768,), *a[1:]), [x, weight, bias]),
        "rms_norm 4096x768": (lambda f: lambda *a: f.rms_norm(a[0], (768,), a[1]), [x, weight]),
        "add_layer_norm 4096x768": (
            lambda f: lambda *a: f.add_layer_norm(a[0], a[1], (768,), *a[2:]),
            [x, residual, weight, bias],
        ),
        "add_rms_norm 4096x768": (
            lambda f: lambda *a: f.add_rms_norm(a[0], a[1], (768,), a[2]),
            [x, residual, weight],
        ),
        "cross_entropy 512x50304": (lambda f: lambda a: f.cross_entropy(a, target[:512]), [leaf(512, 50304)]),
        "linear_cross_entropy 1024x768x50304": (
            lambda f: lambda *a: f.linear_cross_entropy(*a, target),
            [leaf(1024, 768), head],
        ),
        "attention B1 H12 T1024 D64 causal": (
            lambda f: lambda *a: f.scaled_dot_product_attention(*a, is_causal=True),
            [q, k, v],
        ),
        "attention B96 H8 T16 D64": (
            lambda f: lambda *a: f.scaled_dot_product_attention(*a),
            [leaf(96, 8, 16, 64) for _ in range(3)],
        ),
        "attention B8 H12 T128 D64 masked": (
            lambda f: lambda *a: f.scaled_dot_product_attention(*a, attn_mask=mask),
            [leaf(8, 12, 128, 64) for _ in range(3)],
        ),
    }


def varlen_case(dtype: torch.dtype) -> Comparison:
    """Eight sequences that fill 45% of a padded batch, against torch's op on that batch with a mask."""
    lengths = torch.tensor([512, 384, 256, 192, 192, 128, 128, 51])
    longest, total = int(lengths.max()), int(lengths.sum())
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
    packed = [torch.randn(total, 12, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    padded = [torch.randn(8, 12, longest, 64, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]
    sides = {
        PLAIN_SIDE: step(lambda q, k, v: plain.scaled_dot_product_attention(q, k, v, mask), padded, []),
        OURS: step(lambda q, k, v: F.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest), packed, []),
    }
    return compare(f"varlen_attention 8 sequences {_name(dtype)}", sides)


def gpt_case(dtype: torch.dtype, compiled: bool = False) -> Comparison:
    """A whole training step of one model, its functions FastLM's or plain PyTorch's."""
    config = gpt.GPTConfig(vocab_size=50304, max_seq_len=256, hidden_size=768, num_layers=4, num_heads=12)
    model = gpt.GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(config.vocab_size, (2, 256))
    # Each side compiles for itself: what it traces differs by the module of functions that the model sees.
    forwards = {name: torch.compile(model.forward, dynamic=False) if compiled else model for name in (PLAIN_SIDE, OURS)}

    def run(side: str, functions: Any) -> None:
        with mock.patch.object(gpt, "F", functions), torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16):
            loss = forwards[side](tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    sides = {PLAIN_SIDE: lambda: run(PLAIN_SIDE, PLAIN), OURS: lambda: run(OURS, F)}
    name = f"{'compiled ' if compiled else ''}GPT step 4x768 B2 T256 {_name(dtype)}"
    return compare(name, sides, seconds=12.0)


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"fail if any case is below {LEAST}")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (function, inputs) in op_cases(dtype).items():
            grads: list[Tensor] = []
            sides = {side: step(function(f), inputs, grads) for side, f in ((PLAIN_SIDE, PLAIN), (OURS, F))}
            results.append(compare(f"{name} {_name(dtype)}", sides))
        results += [varlen_case(dtype), gpt_case(dtype), gpt_case(dtype, compiled=True)]
    title = "The default against plain PyTorch, forward and backward"
    write_results("default", title, results, [], lambda result: result.ratio(OURS), "times as fast")
    slow = [result for result in results if result.ratio(OURS) < LEAST]
    for result in slow:
        print(f"{result.case}: {result.ratio(OURS):.3f} of plain PyTorch, at least {LEAST} wanted", file=sys.stderr)
    return 1 if slow and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
