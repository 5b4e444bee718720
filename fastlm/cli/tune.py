"""`fastlm tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fastlm.cli.parser import Parser, tell
from fastlm.ops import measured


def tune(argv: list[str]) -> int:
    """measure which backend is the fastest here, for "auto" to go by; without cases the standard ones"""
    from fastlm.bench.cases import DTYPES, parse, standard
    from fastlm.bench.tune import tune as measure

    parser = Parser("tune", tune.__doc__)
    parser.add_argument("cases", metavar="CASE", nargs="*", help="as layer_norm or attention:1x12x1024x64,causal")
    parser.add_argument("--config", metavar="FILE", help="of a run (configs/*.toml, runs/*/config.toml): its shapes")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="[those the device is measured in]")
    parser.add_argument("--device", metavar="NAME", help="[cuda if there is a GPU, else cpu]")
    parser.add_argument("--seconds", metavar="X", type=float, help="of measurement for each call [0.5]")
    parser.add_argument("--again", action="store_true", help="measure what has been measured before, too")
    parser.add_argument("--show", action="store_true", help="show what has been measured, and measure nothing")
    parser.add_argument("--clear", action="store_true", help="forget all that has been measured")
    given = parser.parse(argv)
    if given.get("show"):
        print("\n".join(_lines(measured.entries())) or "nothing has been measured with these versions")
        return 0
    if given.get("clear"):
        measured.tuned_file().unlink(missing_ok=True)
        measured.forget()
        return 0
    seconds = given.get("seconds", 0.5)
    if not seconds > 0:
        raise ValueError(f"--seconds must be more than 0, got {seconds}")
    device = torch.device(given.get("device", "cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [DTYPES[name] for name in given["dtypes"]] if "dtypes" in given else None
    cases = [case for text in given.get("cases", []) for case in parse(text, device, dtypes)]
    steps: list[Callable[[], object]] = [_of_case(case, device) for case in cases]
    if "config" in given:
        steps.append(_of_run(given["config"], device))
    steps = steps or [_of_case(case, device) for case in standard(device, dtypes)]
    winners = measure(steps, seconds=seconds, again=given.get("again", False), tell=tell)
    if winners:
        changed = sum(winner.backend != "native" for winner in winners)
        print(f"{len(winners)} measured, ours the fastest in {changed}; kept in {measured.tuned_file()}")
    else:
        print("nothing to measure: each call has one backend here, or was measured before (--again)")
    return 0


def _of_case(case: Any, device: torch.device) -> Callable[[], object]:
    def step() -> None:
        problem = case.build(device)
        with torch.set_grad_enabled(case.backward):
            problem.ours(*problem.inputs)

    return step


def _of_run(file: str, device: torch.device) -> Callable[[], object]:
    """One micro-batch of the run, of random tokens."""
    from fastlm import models
    from fastlm.cli.train import objective_of, settings_of
    from fastlm.data import DataConfig
    from fastlm.data.tokenizer import import_tokenizers
    from fastlm.train import TrainConfig, Trainer

    settings = settings_of(file, {})
    of_data, model_type = DataConfig.from_dict(settings["data"]), getattr(models, settings["model"].pop("type"))
    config = TrainConfig.from_dict(settings["train"])
    micro = min(config.micro_batch_size or config.batch_size, config.batch_size)
    config = replace(config, batch_size=micro, micro_batch_size=micro, compile=False, device=str(device))
    model = model_type(model_type.config_type.from_dict({**settings["model"], "vocab_size": of_data.vocab_size}))
    ids = torch.randint(of_data.vocab_size, (max(2, micro + 1) * 2 * config.seq_len,)).numpy()
    tokenizers, names = import_tokenizers(), ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>")
    words = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    objective = objective_of(model, of_data, config.seq_len, tokenizers.Tokenizer(words), ids, 0)
    return Trainer(model, config, objective, quiet=True).train_step


def _lines(devices: dict[str, Any]) -> Iterator[str]:
    for device, ops in devices.items():
        yield device
        for op, dtypes in ops.items():
            for dtype, buckets in dtypes.items():
                for bucket, entry in buckets.items():
                    yield f"  {op} {dtype} {bucket}: {entry['backend']}, {entry['times as fast']:.2f} times as fast"
