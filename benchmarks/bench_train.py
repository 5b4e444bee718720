"""Training steps of a GPT and a BERT: FastLM's trainer against plain PyTorch, torch.compile and transformers.

The same weights, AdamW, clipping and batches of the same shape; forward, backward and update. Each side runs once
untimed before it is timed: freed memory stays with the process while FastLM runs, and goes back before the others do.
Then the losses of a trainer and of a loop in plain PyTorch from the same seed over 200 steps.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import nn

from fastlm import data
from fastlm.bench.cases import NAMES
from fastlm.bench.harness import RESULTS, Comparison, compare, write_results
from fastlm.bench.models import Loop
from fastlm.models import GPT, BERTForMaskedLM, GPTConfig, bert, gpt
from fastlm.train import TrainConfig, Trainer
from fastlm.train.memory import kept_memory

EAGER, COMPILED, THEIRS, OURS = "PyTorch eager", "torch.compile", "transformers", "FastLM"
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


def models() -> dict[str, tuple[nn.Module, Any, data.Objective]]:
    """Name -> (transformers' model, our class, what it learns); 4 layers of GPT-2's and of BERT's width."""
    import transformers

    transformers.logging.set_verbosity_error()
    random = np.random.default_rng(0)
    sizes: dict[str, Any] = {"vocab_size": 50304, "n_layer": 4, "n_positions": 256}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off))
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=4, **off))
    return {
        "GPT 4x768, V 50304, B 2, T 256": (gpt2, GPT, data.CausalLM(random.integers(50304, size=99999), 256)),
        "BERT 4x768, V 30522, B 4, T 128": (
            base,
            BERTForMaskedLM,
            data.MaskedLM(random.integers(5, 30522, size=99999), 128, special=SPECIAL, vocab_size=30522),
        ),
    }


def case(name: str, theirs: nn.Module, kind: Any, objective: data.Objective, dtype: str, seconds: float) -> Comparison:
    batch_size, seq_len = (2, 256) if kind is GPT else (4, 128)
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-4, "warmup_steps": 0, "weight_decay": 0.01}
    config = TrainConfig(steps=10**6, batch_size=batch_size, seq_len=seq_len, dtype=dtype, device="cpu", **settings)
    inputs = objective.batch(0, batch_size, 0)
    ours, module = kind.from_pretrained(theirs), gpt if kind is GPT else bert
    trainer = Trainer(copy.deepcopy(ours), config, objective, quiet=True)
    loops = {EAGER: Loop(copy.deepcopy(ours), config, module), COMPILED: Loop(ours, config, module, compiled=True)}
    shared = {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"] if kind is GPT else inputs["labels"]}
    loops[THEIRS] = Loop(copy.deepcopy(theirs), config)

    kept, keeps = ExitStack(), False

    def plain(side: str, given: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            nonlocal keeps
            kept.close()
            keeps = False
            loops[side].step(given)

        return run

    def fast() -> None:
        nonlocal keeps
        if not keeps:
            kept.enter_context(kept_memory(torch.device("cpu")))
            keeps = True
        trainer.train_step()

    sides = {side: plain(side, shared if side == THEIRS else inputs) for side in loops} | {OURS: fast}
    with kept:
        return compare(f"{name}, {dtype}", sides, seconds=seconds, least=5, memory=True, settle=True)


def curves(steps: int) -> float:
    """Draw the losses of both over so many steps on Python's library; the largest difference of the two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dataset = data.prepare()
    settings: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.0, "dtype": "fp32", "log_every": 1}
    config = TrainConfig(steps=steps, schedule="cosine", device="cpu", eval_every=0, save_every=0, **settings)
    torch.manual_seed(0)
    size = {"hidden_size": 192, "num_layers": 3, "num_heads": 3, "max_seq_len": 256}
    model = GPT(GPTConfig(vocab_size=dataset.vocab_size, **size))
    loop = Loop(copy.deepcopy(model), config, gpt)
    trainer = Trainer(model, config, dataset.train_tokens, quiet=True)
    trainer.train()
    ours = [record["loss"] for record in trainer.metrics.records]
    batches = (trainer.train_data.batch(8 * step, 8 * step + 8, config.seed) for step in range(steps))
    plain = [loop.step(inputs, config.lr * config.lr_factor(step)).item() for step, inputs in enumerate(batches)]
    figure, axes = pyplot.subplots(figsize=(7.2, 4), layout="constrained")
    axes.plot(plain, label="plain PyTorch", linewidth=3, alpha=0.4)
    axes.plot(ours, label="FastLM", linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "train_curves.png", dpi=120)
    pyplot.close(figure)
    return max(abs(a - b) for a, b in zip(ours, plain, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each case, at least")
    parser.add_argument("--steps", type=int, default=200, help="of the loss curves")
    arguments = parser.parse_args()
    try:
        known = models()
    except ImportError:
        print("bench_train: transformers is not installed: pip install fastlm[hf]")
        return 0
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (theirs, kind, objective) in known.items():
            results.append(case(name, theirs, kind, objective, NAMES[dtype], arguments.seconds))

    def tokens(side: str) -> Callable[[Comparison], str]:
        return lambda c: f"{512 / c.median(side):,.0f}"

    def memory(side: str) -> Callable[[Comparison], str]:
        return lambda c: f"{c.memory[side] / 2**20:,.0f}"

    sides = (EAGER, COMPILED, THEIRS, OURS)
    columns = [
        *((f"{side}, tokens/s", tokens(side)) for side in sides),
        *((f"{side}, peak MiB beyond weights and optimizer", memory(side)) for side in sides),
        *((f"FastLM / {side}, speed", lambda c, side=side: f"{c.ratio(OURS, side):.2f}") for side in sides[:3]),
    ]
    title = "Training steps: FastLM, plain PyTorch, torch.compile with autocast, transformers"
    write_results("train", title, results, columns, lambda c: c.ratio(OURS), "FastLM / the best other")
    apart = curves(arguments.steps)
    line = f"Losses of {arguments.steps} steps in fp32 from one seed, at most {apart:.1e} apart:\n\n"
    with open(RESULTS / "train.md", "a", encoding="utf-8") as file:
        file.write(f"\n{line}![Losses of both](train_curves.png)\n")
    print(line.strip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
