"""The configuration of the data of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastlm.config import Config

__all__ = ["DataConfig"]


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
