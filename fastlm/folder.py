"""What a folder holds: a run of the trainer, or a model and its tokenizer as Hugging Face lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastlm import models
from fastlm.data import load_tokenizer
from fastlm.models.pretrained import Pretrained, read_json
from fastlm.train import checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["model_folder", "model_type", "open_model", "tokenizer_of"]

TYPES: tuple[type[Pretrained], ...] = (
    models.GPT,
    models.BERT,
    models.BERTForMaskedLM,
    models.BERTForPreTraining,
    models.BERTForSequenceClassification,
)


def model_folder(directory: str | Path) -> Path:
    """Where the weights are: of a run its best checkpoint, or else its last; otherwise `directory` itself.

    Raises FileNotFoundError where there is no such folder, or a run without a checkpoint.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such run or model: {folder}")
    chosen = folder / "best" if (folder / "best").is_dir() else checkpoint.latest(folder)
    if chosen is None and (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    return chosen or folder


def model_type(folder: Path) -> type[Pretrained]:
    """Of the model in a folder with a config.json. Raises ValueError for one that none of ours is for."""
    values = read_json(folder / "config.json")
    names = values.get("architectures") or ["GPT" if values.get("model_type") in (None, "gpt2", "bloom") else "BERT"]
    for kind in TYPES:
        if {kind.__name__, *kind.architectures.values()} & set(names):
            return kind
    known = ", ".join(dict.fromkeys(name for kind in TYPES for name in (kind.__name__, *kind.architectures.values())))
    raise ValueError(f"{folder / 'config.json'}: architectures must be of {known}, got {', '.join(map(str, names))}")


def open_model(directory: str | Path) -> tuple[Pretrained, Tokenizer]:
    """The model of a run or a folder, in evaluation mode, and its tokenizer."""
    folder = model_folder(directory)
    return model_type(folder).from_pretrained(folder), load_tokenizer(tokenizer_of(folder))


def tokenizer_of(folder: Path) -> Path:
    """Where the tokenizer of a model's folder is: in it or, of a checkpoint, in the run."""
    places = (folder, folder.resolve().parent)
    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    return next((place for place in places if any((place / name).is_file() for name in names)), folder)
