"""`fastlm evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastlm import data
from fastlm.cli.finetune import encoded
from fastlm.cli.parser import Parser, tell
from fastlm.cli.runs import tables_of
from fastlm.cli.train import objective_of, prepared
from fastlm.data.tokenizer import separator
from fastlm.models import BERTForSequenceClassification
from fastlm.models.pretrained import Pretrained

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastlm.train import Evaluation, TrainConfig

    Measured = tuple[Evaluation, int, list[str]]  # the measures, of how many, and for people

__all__ = ["evaluate"]


def evaluate(argv: list[str]) -> int:
    """measure a model on the texts that its run kept for that, or on others"""
    from fastlm.folder import model_folder, open_model
    from fastlm.train import TrainConfig

    parser = Parser("evaluate", evaluate.__doc__)
    parser.add_argument("directory", metavar="RUN_OR_DIR", help="a run, or a folder with a model and its tokenizer")
    parser.add_argument("--data", metavar="PATH", help="text, or labelled texts, to measure it on, all of it")
    parser.add_argument("--part", choices=["val", "test"], help="of the run's own texts [test of a classifier's]")
    parser.add_argument("--text-column", metavar="TEXT", help="of the rows of --data [the run's, or text]")
    parser.add_argument("--label-column", metavar="TEXT", help="of the rows of --data [the run's, or label]")
    parser.add_argument("--out", metavar="DIR", help="write report.md and confusion.png of a classifier there")
    parser.add_argument("--seq-len", metavar="N", type=int, help="tokens in a sequence [the run's]")
    parser.add_argument("--batch-size", metavar="N", type=int, help="sequences at once [32]")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], help="of the arithmetic [auto]")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.parse(argv)

    directory = Path(given["directory"])
    model, tokenizer = open_model(directory)
    run = next((folder for folder in (directory, model_folder(directory).resolve().parent) if _is_run(folder)), None)
    tables = tables_of(run / "config.toml" if run else None, {})
    longest = getattr(model.config, "max_seq_len", 512)
    config = TrainConfig(
        seq_len=given.get("seq_len", tables["train"].get("seq_len", longest)),
        batch_size=given.get("batch_size", 32),
        dtype=given.get("dtype", "auto"),
    )
    if "data" not in given and run is None:
        raise ValueError(f"--data must be given: {directory} is no run that kept texts to measure it on")
    if "data" in given and "part" in given:
        raise ValueError("--part is of the run's own texts, and --data other ones")
    of_data = tables["data"] | {name: given[name] for name in ("text_column", "label_column") if name in given}
    measure = _classifier if isinstance(model, BERTForSequenceClassification) else _language_model
    evaluation, count, lines = measure(model, tokenizer, config, of_data, given)
    if given.get("json"):
        print(json.dumps({"texts" if measure is _classifier else "tokens": count, **evaluation.to_dict()}))
    else:
        print("\n".join(lines))
    return 0


def _is_run(folder: Path) -> bool:
    return (folder / "config.toml").is_file()


def _classifier(
    model: Any, tokenizer: Tokenizer, config: TrainConfig, of_data: dict[str, Any], given: dict[str, Any]
) -> Measured:
    from fastlm.train import classify

    names = model.other_config.get("id2label") or {}
    classes = [names.get(str(n), f"LABEL_{n}") for n in range(model.config.num_labels)]
    if "data" in given:
        source = str(given["data"])
        columns = (of_data.get("text_column", "text"), of_data.get("label_column", "label"))
        texts = data.read_labelled(source, *columns, classes=classes)
    else:
        part = given.get("part", "test")
        source = f"{of_data['path']}, {part}"
        texts = data.split_labelled(data.LabelledConfig.from_dict(of_data))[part]
        if not len(texts):
            raise ValueError(f"the run kept no texts for {part}: --part val, or --data")
        if texts.classes != classes:
            raise ValueError(f"{of_data['path']} has changed: its labels are {texts.classes}, the model's {classes}")
    examples = encoded(texts, tokenizer, config.seq_len)
    log_p, labels = classify.log_probabilities(model, examples, config), torch.tensor(texts.labels)
    lines = [f"{source}: {texts}", *classify.summary(log_p, labels, classes)]
    if "out" in given:
        facts = {"model": given["directory"], "texts": f"{source}: {texts}"}
        report = classify.write_report(
            Path(given["out"]), f"{given['directory']} on {source}", facts, texts.texts, labels, log_p, classes
        )
        lines.append(f"Report in {report}.")
    return classify.evaluate_classifier(log_p, labels), len(texts), lines


def _language_model(
    model: Pretrained, tokenizer: Tokenizer, config: TrainConfig, of_data: dict[str, Any], given: dict[str, Any]
) -> Measured:
    from fastlm.train import Trainer

    if wrong := {"label_column", "out"} & given.keys():
        raise ValueError(f"--{min(wrong).replace('_', '-')} is for a classifier, and this is a {type(model).__name__}")
    if given.get("part") == "test":
        raise ValueError("--part test: a language model's run keeps texts to validate on, and no others")
    data_config = data.DataConfig.from_dict(of_data)
    if "data" in given:
        source = str(given["data"])
        tokens: Any
        tokens, size = _tokens(source, data_config.text_column, tokenizer)
    else:
        dataset = prepared(data_config, tell if not given.get("json") else None)
        source, tokens, size = f"{dataset.source}, val", dataset.val_tokens, dataset.val_bytes
    objective = objective_of(model, data_config, config.seq_len, tokenizer, tokens, size)
    evaluation = Trainer(model, config, objective, objective, quiet=True).evaluate()
    lines = [f"{source}: {len(tokens):,} tokens, {size / 1e6:.2f} MB", str(evaluation)]
    return evaluation, len(tokens), lines


def _tokens(path: str, text_column: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Of all documents, as they are, and the bytes of their text."""
    corpus, start = data.read_corpus(path, text_column), separator(tokenizer)
    ids: list[np.ndarray] = []
    size = 0
    for document in corpus:
        encoding = tokenizer.encode(document.text.decode(), add_special_tokens=False)
        ids.append(np.array([start, *encoding.ids], np.int64))
        size += len(document.text)
    if not ids:
        raise ValueError(f"data: no text in {path}")
    return np.concatenate(ids), size
