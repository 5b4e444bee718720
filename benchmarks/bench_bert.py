"""BERT against transformers' with the same weights: inference and a step of fine-tuning on batches of real lengths.

Lengths are drawn so that padded batches are filled to 45%. Both get the same batches: of random sentences, padded to
the longest, and of sentences of like lengths (bucketed). transformers runs with its default attention, torch's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastlm.bench.cases import NAMES
from fastlm.bench.harness import Comparison, compare, write_results
from fastlm.models import BERTForSequenceClassification

THEIRS, OURS = "transformers", "FastLM"
Batch = dict[str, Tensor]


def lengths(batches: int, size: int, longest: int, generator: torch.Generator) -> list[Tensor]:
    """Log-normal, as those of sentences are; the same ones in random order and sorted."""
    drawn = torch.empty(batches * size).log_normal_(mean=3.9, std=0.5, generator=generator)
    return list(drawn.round().clamp(8, longest).long().split(size))


def batch_of(lengths: Tensor, vocab_size: int, generator: torch.Generator) -> Batch:
    longest = int(lengths.max())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = torch.randint(1, vocab_size, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def cases(size: int, batches: int, vocab_size: int) -> dict[str, list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    drawn = lengths(batches, size, 256, generator)
    ordered = torch.cat(drawn).sort().values.split(size)
    return {
        name: [batch_of(each, vocab_size, generator) for each in some]
        for name, some in (("padded", drawn), ("bucketed", list(ordered)))
    }


def run(model: torch.nn.Module, batches: list[Batch], training: bool) -> Callable[[], None]:
    labels = torch.arange(len(batches[0]["input_ids"])) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    turn = iter(())

    def step() -> None:
        nonlocal turn
        batch = next(turn, None)
        if batch is None:
            turn = iter(batches)
            batch = next(turn)
        if not training:
            with torch.no_grad():
                model(**batch)
            return
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def all_batches() -> None:
        for _ in batches:
            step()

    return all_batches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each case")
    arguments = parser.parse_args()
    try:
        import transformers
    except ImportError:
        print("bench_bert: transformers is not installed: pip install fastlm[hf]")
        return 0
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    results: list[Comparison] = []
    for dtype in (torch.float32, torch.bfloat16):
        config = transformers.BertConfig(hidden_size=384, num_attention_heads=12, intermediate_size=1536)
        config.num_hidden_layers = 6
        theirs = transformers.BertForSequenceClassification(config).to(dtype)
        ours = BERTForSequenceClassification.from_pretrained(theirs)
        for name, batches in cases(16, 8, config.vocab_size).items():
            fill = sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)
            for training in (False, True):
                sides = {}
                for side, model in ((THEIRS, theirs), (OURS, ours)):
                    model.train(training)
                    sides[side] = run(model, batches, training)
                title = f"{name}, filled to {fill:.0%}, {'fine-tuning' if training else 'inference'}, {NAMES[dtype]}"
                results.append(compare(title, sides, seconds=arguments.seconds, least=3))
    title = "BERT, 6 layers of 384 (MiniLM's shape), 8 batches of 16: transformers and FastLM"
    write_results("bert", title, results, [], lambda c: c.ratio(OURS, THEIRS), "FastLM / transformers, speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
