"""`fastlm finetune`."""

from __future__ import annotations

import math
import shlex
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlm import data
from fastlm.cli.parser import Parser, called, tell
from fastlm.cli.runs import RunAskedFor, how_to_go_on, new_run, tables_of
from fastlm.config import Config
from fastlm.models import BERT, GPT, BERTConfig, BERTForSequenceClassification

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastlm.train import TrainConfig

__all__ = ["encoded", "finetune"]

DEFAULTS: dict[str, Any] = {"batch_size": 32, "seq_len": 256, "optimizer": "adamw", "weight_decay": 0.01}
EPOCHS = 3.0
EVALUATIONS = 2  # in an epoch
LR_TIMES_WIDTH = 0.04  # 5e-5 for BERT base; what is narrower takes more
# What follows from the texts and the model where it is not said.
FOLLOWS = {
    "steps": f"{EPOCHS:g} epochs",
    "warmup_steps": "a tenth of the steps",
    "lr": f"{LR_TIMES_WIDTH} / width",
    "eval_every": "half an epoch",
    "save_every": "half an epoch",
    "best_by": "accuracy",
}


@dataclass(frozen=True)
class StartConfig(Config):
    """What a classifier starts from.

    Args:
        path: a run, or a folder with a BERT and its tokenizer
        from_scratch: take its shape and tokenizer and none of its weights
        dropout: of the whole classifier; None is the BERT's own
    """

    path: str
    from_scratch: bool = False
    dropout: float | None = None


def finetune(argv: list[str]) -> int:
    """make a classifier of texts from a BERT, and measure it on texts that it has not seen"""
    from fastlm.train.parallel import process_group

    with process_group():
        return _finetune(argv)


def _finetune(argv: list[str]) -> int:
    from fastlm.folder import model_folder
    from fastlm.train import TrainConfig, Trainer, classify
    from fastlm.train.parallel import Processes

    parser = Parser("finetune", finetune.__doc__)
    parser.add_run()
    parser.add_argument("--epochs", metavar="X", type=float, help="passes over the texts, instead of --steps")
    parser.add_fields("model", StartConfig, {}, also={"path": "--model"})
    parser.add_fields("data", data.LabelledConfig, {}, also={"path": "--data"})
    parser.add_fields("train", TrainConfig, DEFAULTS | FOLLOWS)
    given = parser.parse(argv)

    asked = RunAskedFor.of(given)
    resume, folder, options = asked.folder is not None, asked.folder, asked.options
    if "epochs" in given:
        given["train.epochs"] = given.pop("epochs")
    settings = tables_of(asked.file, given)
    for table, option in (("model", "--model"), ("data", "--data")):
        if "path" not in settings[table]:
            raise ValueError(f"{option} must be given")
    shape = {name: settings["model"].pop(name) for name in _SHAPE if name in settings["model"]}
    start, of_data = StartConfig.from_dict(settings["model"]), data.LabelledConfig.from_dict(settings["data"])
    said = dict(settings["train"])
    epochs = said.pop("epochs", EPOCHS)
    config = TrainConfig.from_dict(DEFAULTS | said)
    torch.manual_seed(config.seed)
    processes = Processes()
    say = tell if processes.first else lambda line: None
    if folder is None:
        folder = processes.once(lambda: new_run(asked.out, asked.name, of_data.path))
        model_from = model_folder(start.path)  # what is wrong with it is said before the texts are read
    parts = data.split_labelled(of_data)
    say("\n".join(f"{part}: {parts[part]}" for part in ("train", "val", "test")))
    if resume:
        fields = {name: value for name, value in shape.items() if name != "type"}
        model = BERTForSequenceClassification(BERTConfig.from_dict(fields | {"dropout": start.dropout}))
        model.other_config = _names(parts["train"].classes)
        tokenizer = data.load_tokenizer(folder / "tokenizer.json")
    else:
        model, tokenizer = _classifier(model_from, start, parts["train"].classes, say)
    config = replace(config, **_following(said, epochs, config, parts, model.config))
    examples = {part: encoded(texts, tokenizer, config.seq_len) for part, texts in parts.items() if len(texts)}
    lengths = torch.tensor([len(each["input_ids"]) for each in examples["train"].examples])
    cut = (lengths == config.seq_len).float().mean().item()
    say(f"{lengths.float().mean():.0f} tokens in a text; {cut:.1%} of them end at seq_len, {config.seq_len}")

    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(str(path := Path(temporary) / "tokenizer.json"))
        trainer = Trainer(
            model, config, examples["train"], examples.get("val"), folder=folder, source=of_data.to_dict(),
            start={**start.to_dict(), "dropout": model.config.dropout}, tokenizer=path, **options,
        )  # fmt: skip
        if resume:
            trainer.resume()
        say(f"{folder}: from step {trainer.step:,} to {config.steps:,}")
        trainer.train()
    if trainer.interrupted:
        say(how_to_go_on("finetune", folder, trainer.step, processes.several))
        return 130
    if not processes.first:
        return 0
    print()
    if "test" in examples:
        best = BERTForSequenceClassification.from_pretrained(model_folder(folder))
        facts = {
            "model": f"{start.path}{', its weights not used' if start.from_scratch else ''}; {best.config.num_layers} "
            f"layers of {best.config.hidden_size}",
            "texts": f"{of_data.path}: {', '.join(f'{len(texts):,} {part}' for part, texts in parts.items())}",
            "training": f"{config.steps:,} steps of {config.batch_size} texts in {trainer.seconds:.0f} s, lr "
            f"{config.lr:.2g}; the checkpoint of step {trainer.best[0] if trainer.best else trainer.step:,}",
        }
        texts = parts["test"]
        log_p, labels = classify.log_probabilities(best, examples["test"], config), torch.tensor(texts.labels)
        report = classify.write_report(
            folder, f"{folder.name}: texts kept for the test", facts, texts.texts, labels, log_p, texts.classes
        )
        print("\n".join(classify.summary(log_p, labels, texts.classes)))
        print(f"Report in {report}, confusion matrix and curves beside it. ", end="")
    print(f"Next:\n  {shlex.join([called(), 'serve', str(folder)])}")
    return 0


_SHAPE = {"type", *BERTConfig.hints()} - {"dropout"}


def encoded(texts: data.LabelledTexts, tokenizer: Tokenizer, seq_len: int) -> data.Labelled:
    """As a classifier takes them."""
    ids = data.encode_texts(tokenizer, texts.texts, seq_len)
    examples = [{"input_ids": each, "labels": label} for each, label in zip(ids, texts.labels, strict=True)]
    pad = tokenizer.token_to_id("[PAD]") or 0
    return data.Labelled(examples, num_classes=len(texts.classes), pad_token_id=pad)


def _classifier(
    folder: Path, start: StartConfig, classes: Sequence[str], say: Callable[[str], None]
) -> tuple[BERTForSequenceClassification, Tokenizer]:
    """A BERT with a classifier on it: a new one, or that of the folder where that has the very same classes."""
    from fastlm.folder import model_type, tokenizer_of

    kind = model_type(folder)
    if kind is GPT:
        raise ValueError(f"--model must be a BERT, got the GPT in {folder}")
    with warnings.catch_warnings():  # of heads that are new or left out
        warnings.simplefilter("ignore")
        source: Any = BERT.from_pretrained(folder)
        if kind is BERTForSequenceClassification:
            whole = kind.from_pretrained(folder)
            names = whole.other_config.get("id2label") or {}
            source = whole if [names.get(str(n)) for n in range(len(names))] == list(classes) else source
    new = start.from_scratch or isinstance(source, BERT)
    config = replace(
        source.config,
        num_labels=len(classes),
        problem_type=None,
        dropout=source.config.dropout if start.dropout is None else start.dropout,
    )
    model = BERTForSequenceClassification(config)
    model.other_config = source.other_config | _names(classes)
    if not start.from_scratch:
        (model.bert if new else model).load_state_dict(source.float().state_dict())
    weights = "no weights" if start.from_scratch else "the weights of BERT" if new else "all weights"
    say(f"{folder}: {weights}{', a new classifier' if new else ''}")
    return model, data.load_tokenizer(tokenizer_of(folder))


def _names(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": {str(n): name for n, name in enumerate(classes)}}


def _following(
    said: Mapping[str, Any],
    epochs: Any,
    config: TrainConfig,
    parts: Mapping[str, data.LabelledTexts],
    shape: BERTConfig,
) -> dict[str, Any]:
    """Fields that are not said, from the number of texts and the shape of the model."""
    if isinstance(epochs, bool) or not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be above 0 and finite, got {epochs!r}")
    in_epoch = len(parts["train"]) / config.batch_size
    steps = config.steps if "steps" in said else max(1, round(epochs * in_epoch))
    every = max(1, round(in_epoch / EVALUATIONS))
    follows = {
        "steps": steps,
        "warmup_steps": steps // 10,
        "lr": LR_TIMES_WIDTH / shape.hidden_size,
        "eval_every": every,
        "save_every": every,
        "best_by": "accuracy" if len(parts["val"]) else "loss",
        "seq_len": min(config.seq_len, shape.max_seq_len),
    }
    return {name: value for name, value in follows.items() if name not in said}
