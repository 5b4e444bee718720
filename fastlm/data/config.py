"""The configuration of the data of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastlm.config import Config

__all__ = ["DataConfig", "LabelledConfig"]


@dataclass(frozen=True)
class DataConfig(Config):
    """Where text comes from, what becomes of it, and how it is cut into examples.

    Args:
        path: a folder, a text file, or JSONL, CSV or parquet; None is Python's own library
        vocab_size: of the vocabulary to train
        tokenizer: bpe or wordpiece, trained on the text; or a tokenizer.json, GPT-2's files or BERT's vocab.txt
        text_column: of JSONL, CSV and parquet
        strip_html: drop tags, scripts and styles
        normalize: to a normal form of Unicode
        strip_control: drop control characters
        deduplicate: drop documents that are there already
        val_fraction: of the text, to validate on
        split_seed: of the draw of what to validate on
        separate_documents: tokens see those of their own document alone; GPT
        mask_probability: of the tokens, those that are to be predicted; BERT
    """

    path: str | None = None
    vocab_size: int = 4096
    tokenizer: str = "bpe"
    text_column: str = "text"
    strip_html: bool = False
    normalize: Literal["NFC", "NFD", "NFKC", "NFKD"] | None = None
    strip_control: bool = False
    deduplicate: bool = False
    val_fraction: float = 0.08
    split_seed: int = 0
    separate_documents: bool = False
    mask_probability: float = 0.15


@dataclass(frozen=True)
class LabelledConfig(Config):
    """Where labelled texts come from, and which of them a classifier is measured on.

    Args:
        path: JSONL, CSV, TSV or parquet
        text_column: of its rows
        label_column: of its rows
        val_path: what to validate on, a file; None draws val_fraction
        test_path: what to measure on at the end, a file; None draws test_fraction
        val_fraction: of each class, to choose the best checkpoint by
        test_fraction: of each class, to measure that on
        split_seed: of the draws
        deduplicate: keep a text once, and not at all where its labels differ
    """

    path: str
    text_column: str = "text"
    label_column: str = "label"
    val_path: str | None = None
    test_path: str | None = None
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    deduplicate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("val_fraction", "test_fraction"):
            self._need(0 <= getattr(self, name) <= 0.5, name, "from 0 to 0.5")
