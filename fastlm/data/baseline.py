"""What other ways of modelling text need for the validation text of a dataset, in bits per byte.

A language model that is worth its training needs fewer. All figures are over the same bytes, `Dataset.val_text()`.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

from ..models.ngram import NGram
from .dataset import Dataset

__all__ = ["baselines"]

_VERSION = 1  # stands in the cached figures: raise it when they would come out differently
_NAMES = ("ngram", "xz", "xz_given_train")
_ORDER = 6
_CHUNK_BYTES = 1 << 18


def baselines(dataset: Dataset, progress: Callable[[str], None] | None = None) -> dict[str, float]:
    """Bits per byte of the validation text under three models, C(x) being the size of x in bytes as xz packs it:

        ngram            fastlm.models.ngram.NGram(6), trained on the training text
        xz               8 C(val) / len(val)
        xz_given_train   8 (C(train + val) - C(train)) / len(val)

    xz is at its best preset (`-9e`), its window as long as the text. The training text is `Dataset.train_text()`: its
    last 16 MiB. The first call takes some seconds; the figures are then kept beside the dataset. `progress` is
    called with a line per stage.
    """
    kept = dataset.path / "baselines.json"
    figures = _read(kept)
    if figures is None:
        tell = progress or (lambda line: None)
        train, val = dataset.train_text(), dataset.val_text()
        cancelled = Event()
        with ThreadPoolExecutor(2) as pool:
            try:
                xz = [pool.submit(_xz_bits, text, cancelled) for text in (train + val, train, val)]
                tell(f"fitting an n-gram model of order {_ORDER} to {len(train) / 1e6:.2f} MB")
                ngram = NGram(_ORDER).fit(train).bits_per_byte(val)
                tell("compressing with xz")
                both, alone_train, alone_val = (future.result() for future in xz)
            finally:
                cancelled.set()  # so that Ctrl-C does not wait for xz
        figures = dict(zip(_NAMES, (ngram, alone_val / len(val), (both - alone_train) / len(val)), strict=True))
        _write(kept, figures)
    return figures


def _xz_bits(text: bytes, cancelled: Event) -> int:
    window = min(max(1 << (len(text) - 1).bit_length(), 1 << 20), 1 << 26)
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}
    compressor = lzma.LZMACompressor(filters=[lzma2])
    size = 0
    for i in range(0, len(text), _CHUNK_BYTES):
        if cancelled.is_set():
            return 0
        size += len(compressor.compress(text[i : i + _CHUNK_BYTES]))
    return 8 * (size + len(compressor.flush()))


def _read(path: Path) -> dict[str, float] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        figures = {name: float(kept[name]) for name in _NAMES}
        return figures if kept["version"] == _VERSION and all(map(math.isfinite, figures.values())) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, figures: dict[str, float]) -> None:
    """Keep the figures for the next call, if the cache can be written: they are known either way."""
    with suppress(OSError), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        partial = Path(folder, path.name)
        partial.write_text(json.dumps({"version": _VERSION, **figures}), encoding="utf-8")
        os.replace(partial, path)
