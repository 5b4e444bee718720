"""Models as they are and after `fastlm.accelerate`, eager and compiled: forward and backward, and inference.

Hugging Face GPT-2, BERT and BLOOM of 4 layers of the published widths, and torch.nn.TransformerEncoder. `--check` has
the exit status 1 if an accelerated model is below 0.97 of the plain one, compiled or not.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
from fastlm.bench.cases import NAMES
from fastlm.bench.harness import Comparison, compare, write_results

LEAST = 0.97
PLAIN, OURS = "plain", "accelerated"
COMPILED, OURS_COMPILED = "plain, compiled", "accelerated, compiled"


class Encoder(nn.Module):
    """What a classifier of padded sentences is in torch.nn."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        return self.encoder(x, mask, is_causal=self.causal)


def models() -> dict[str, tuple[nn.Module, Callable[[torch.dtype], dict[str, Any]]]]:
    """Name -> (model, from a dtype what it is called with)."""
    known: dict[str, tuple[nn.Module, Callable[[torch.dtype], dict[str, Any]]]] = {
        f"TransformerEncoder 4x512{', causal' * causal}, B 4, T 256": (
            Encoder(causal),
            lambda dtype: {"x": torch.randn(4, 256, 512, dtype=dtype)},
        )
        for causal in (False, True)
    }
    try:
        import transformers
    except ImportError:
        print("bench_accelerate: transformers is not installed (pip install fastlm[hf]): its models are left out")
        return known
    transformers.logging.set_verbosity_error()

    def tokens(B: int, T: int, V: int, padded: bool = False) -> Callable[[torch.dtype], dict[str, Any]]:
        ids = torch.randint(V, (B, T))
        lengths = torch.linspace(T // 8, T, B).long() if padded else torch.full((B,), T)
        mask = (torch.arange(T) < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        return lambda dtype: inputs

    off: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=4, n_positions=256, **off))
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=4, **off))
    shape: dict[str, Any] = {"vocab_size": 50304, "hidden_size": 768, "n_layer": 4, "n_head": 12, "use_cache": False}
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**shape))
    return known | {
        "GPT-2 4x768, B 2, T 256": (gpt2, tokens(2, 256, 50257)),
        "BERT 4x768, B 4, T 128": (bert, tokens(4, 128, 30522)),
        "BERT 4x768, B 4, T 128, 44% padding": (bert, tokens(4, 128, 30522, padded=True)),
        "BLOOM 4x768, B 2, T 256": (bloom, tokens(2, 256, 50304)),
    }


def case(name: str, model: nn.Module, inputs: dict[str, Any], train: bool, seconds: float) -> Comparison:
    plain, ours = (copy.deepcopy(model).train(train) for _ in range(2))
    fastlm.accelerate(ours)
    if not train:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}

    def run(module: Any) -> Callable[[], None]:
        def step() -> None:
            with torch.set_grad_enabled(train):
                result = module(**inputs)
            if train:
                loss = result.float().square().mean() if isinstance(result, Tensor) else result.loss
                loss.backward()
                for parameter in module.parameters():
                    parameter.grad = None

        return step

    sides = {PLAIN: plain, OURS: ours}
    sides |= {COMPILED: torch.compile(plain, dynamic=False), OURS_COMPILED: torch.compile(ours, dynamic=False)}
    try:
        return compare(name, {side: run(module) for side, module in sides.items()}, seconds=seconds, least=5)
    finally:
        torch._dynamo.reset()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each case, at least")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--check", action="store_true", help="fail if an accelerated model is slower than a plain one")
    arguments = parser.parse_args()

    def compiled(c: Comparison) -> float:
        return c.ratio(OURS_COMPILED, COMPILED)

    columns = [("speed, compiled", lambda c: f"{compiled(c):.2f}")]
    title = "Models before and after fastlm.accelerate"
    results = []
    for name, (model, inputs) in models().items():
        for dtype, train in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
            case_name = f"{name}, {NAMES[dtype]}, {'training' if train else 'inference'}"
            if arguments.only in case_name:
                results.append(case(case_name, model.to(dtype), inputs(dtype), train, arguments.seconds))
        if not arguments.only:  # a long run leaves what it has
            ratio_name = "accelerated / plain, speed"
            write_results("accelerate", title, results, columns, lambda c: c.ratio(OURS, PLAIN), ratio_name)
    slower = [c.case for c in results if min(c.ratio(OURS, PLAIN), compiled(c)) < LEAST]
    for c in results:
        print(f"{c.case:>60}  eager {c.ratio(OURS, PLAIN):.2f}  compiled {compiled(c):.2f}")
    print(f"slower than {LEAST}: {', '.join(slower) or 'none'}")
    return int(arguments.check and bool(slower))


if __name__ == "__main__":
    sys.exit(main())
