"""From a corpus to token ids on disk, and from those to batches.

`prepare` splits the corpus, trains a byte-level BPE vocabulary on the training part, encodes both parts and keeps
everything in one folder of the cache, named by a hash of the text and the settings, so a second call only maps it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from .corpus import Corpus, Document, read_corpus

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["EOS_TOKEN", "Dataset", "batch", "eval_batches", "load_tokenizer", "prepare"]

EOS_TOKEN = "<|endoftext|>"

_FORMAT = 1  # part of the cache key: raise it when the same text and settings give something else
_MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_STALE_SECONDS = 24 * 3600  # a partial folder this old belongs to a process that was killed
_PIECE_BYTES = 1 << 20
_MAX_VOCAB_SIZE = 1 << 20
_16_BIT_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class Dataset:
    """A tokenised corpus in the cache.

    Both token arrays hold, for each document, the id of `<|endoftext|>` and then the document; so the first byte of
    a document is predicted too, and decoding without that token gives the text back exactly. Bits per byte are the
    summed loss of `val_tokens` (every token after the first) / ln 2 / `val_bytes`.
    """

    path: Path  # the folder in the cache
    source: str  # where the text came from, for people
    train_tokens: npt.NDArray[Any]  # memory-mapped, uint16, or uint32 for vocabularies above 65,536
    val_tokens: npt.NDArray[Any]
    train_bytes: int  # bytes of text, the special tokens not counted
    val_bytes: int
    vocab_size: int  # as trained: less than was asked for when the text is small
    eos_id: int
    train_files: int
    val_files: int
    dropped_files: int  # left out of validation: too much of them stands in the training part
    skipped_files: int  # empty or not text

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json`, in the format of the `tokenizers` library."""
        return self.path / "tokenizer.json"

    @property
    def summary(self) -> str:
        """One line for people."""
        left_out = [f"{self.dropped_files} too like the training text"] if self.dropped_files else []
        left_out += [f"{self.skipped_files} empty or not UTF-8"] if self.skipped_files else []
        return (
            f"{self.source}: {self.train_bytes / 1e6:.2f} MB in {_count(self.train_files, 'file')} to train on "
            f"({len(self.train_tokens):,} tokens, {self.train_bytes / len(self.train_tokens):.2f} bytes each), "
            f"{self.val_bytes / 1e6:.2f} MB in {_count(self.val_files, 'file')} to validate on; "
            f"vocabulary of {self.vocab_size:,}" + (f"; left out: {', '.join(left_out)}" if left_out else "")
        )

    def train_text(self) -> bytes:
        """The training documents, one after the other with nothing between."""
        return (self.path / "train.txt").read_bytes()

    def val_text(self) -> bytes:
        """The validation documents, one after the other with nothing between."""
        return (self.path / "val.txt").read_bytes()

    def tokenizer(self) -> Tokenizer:
        """See `load_tokenizer`."""
        return load_tokenizer(self.tokenizer_path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json` so that text is only ever text: `<|endoftext|>` in it is thirteen characters.

    Then `decode(encode(text).ids, skip_special_tokens=False) == text` for every text. Raises FileNotFoundError for a
    missing file, ValueError for one that is not a tokenizer, ImportError without the `tokenizers` library.
    """
    tokenizers = _import_tokenizers()
    if not Path(path).is_file():
        raise FileNotFoundError(f"data: no tokenizer at {path}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"data: {path} is not a tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def prepare(
    data: str | Path | None = None,
    vocab_size: int = 4096,
    *,
    val_fraction: float = 0.08,
    split_seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Read, split and tokenise `data` (see `read_corpus` and `Corpus.split`), or open what an earlier call made.

    The vocabulary is byte-level BPE with GPT-2's splitting of words (Radford et al. 2019), no normalisation, all 256
    bytes in it: no text is unknown or changed. It is trained on the training part alone.

    The cache is `$FASTLM_CACHE`, else `$XDG_CACHE_HOME/fastlm`, else `~/.cache/fastlm`; a dataset appears in it whole
    or not at all, and one that was damaged since is made again. `progress` is called with a line per stage.

    Raises FileNotFoundError or ValueError for text that is missing or too small and for settings out of range,
    ImportError without the `tokenizers` library, OSError when the cache cannot be written.
    """
    if not 257 <= vocab_size <= _MAX_VOCAB_SIZE:
        raise ValueError(
            f"data: vocab_size must be from 257 (256 bytes and {EOS_TOKEN}) to {_MAX_VOCAB_SIZE:,}, got {vocab_size}"
        )
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"data: val_fraction must be above 0 and at most 0.5, got {val_fraction}")
    tell = progress or (lambda line: None)
    corpus = read_corpus(data)
    final = _cache_folder() / "data" / _key(corpus.documents, _FORMAT, vocab_size, val_fraction, split_seed)
    found = _open(final, corpus.source)
    if found is None:
        split = corpus.split(val_fraction, split_seed)
        tokenizers = _import_tokenizers()
        try:
            with suppress(FileNotFoundError), _partial_folder(final.parent) as damaged:
                os.rename(final, damaged / "old")
            with _partial_folder(final.parent) as partial:
                _build(partial, tokenizers, corpus, split, vocab_size, tell)
                _publish(partial, final)
        except OSError as error:
            raise OSError(f"data: cannot write the cache {final} (FASTLM_CACHE names another): {error}") from None
        found = _open(final, corpus.source)
        if found is None:
            raise OSError(f"data: what was written to the cache {final} does not read back")
    return found


def batch(
    tokens: npt.NDArray[Any], step: int, *, batch_size: int, seq_len: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (the inputs one token later), int64, (batch_size, seq_len) each: random windows of `tokens`.

    They depend on (seed, step) alone, so going on from a step needs nothing but its number. The starts are raw words
    of Philox 4x64 with key `seed` and counter `step`, modulo the number of windows: numpy keeps those words the same
    in all its versions.

    Raises ValueError when the text is shorter than one window.
    """
    _check_windows(tokens, batch_size, seq_len)
    words = np.random.Philox(key=seed % 2**64, counter=step << 64).random_raw(batch_size)
    starts = (words % np.uint64(len(tokens) - seq_len)).astype(np.int64)
    return _windows(tokens, starts, seq_len)


def eval_batches(
    tokens: npt.NDArray[Any], *, batch_size: int, seq_len: int, overlap: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, int64, (at most batch_size, seq_len) each, that score every token after the first once.

    Windows follow each other, each starting with the last `overlap` inputs of the one before as context: more
    context, a better figure, more work. The last window ends with the text, however much it must overlap for that.
    Targets already scored by an earlier window are -100, the `ignore_index` of the losses.

    Raises ValueError when the text is shorter than one window or the overlap not below seq_len.
    """
    _check_windows(tokens, batch_size, seq_len)
    if not 0 <= overlap < seq_len:
        raise ValueError(f"data: overlap must be from 0 to seq_len - 1 = {seq_len - 1}, got {overlap}")
    last = len(tokens) - 1 - seq_len
    starts = np.append(np.arange(0, last, seq_len - overlap), last)
    scored = np.concatenate(([0], starts[:-1] + seq_len))  # targets before this index were in an earlier window

    def windows() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(0, len(starts), batch_size):
            rows = slice(i, i + batch_size)
            x, y = _windows(tokens, starts[rows], seq_len)
            repeated = torch.from_numpy(scored[rows] - starts[rows])[:, None]
            yield x, y.masked_fill(torch.arange(seq_len) < repeated, -100)

    return windows()


def _check_windows(tokens: npt.NDArray[Any], batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"data: batch_size and seq_len must be at least 1, got {batch_size} and {seq_len}")
    if len(tokens) <= seq_len:
        raise ValueError(
            f"data: the text is too small: {len(tokens):,} tokens, seq_len {seq_len:,} needs at least {seq_len + 1:,}"
        )


def _windows(
    tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _build(
    folder: Path,
    tokenizers: Any,
    corpus: Corpus,
    split: tuple[list[Document], list[Document], int],
    vocab_size: int,
    tell: Callable[[str], None],
) -> None:
    """Write a whole dataset into `folder`."""
    train, val, dropped = split
    tell(f"training a vocabulary of {vocab_size:,} on {sum(len(d.text) for d in train) / 1e6:.2f} MB")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for d in train for piece in _pieces(d)), trainer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokenizer.encode_special_tokens = True
    eos_id = tokenizer.token_to_id(EOS_TOKEN)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= _16_BIT_VOCABULARY else np.uint32)
    for name, documents in (("train", train), ("val", val)):
        tell(f"encoding {name}: {_count(len(documents), 'file')}")
        (folder / f"{name}.txt").write_bytes(b"".join(d.text for d in documents))
        with open(folder / f"{name}.bin", "wb") as out:
            for document in documents:
                np.array([eos_id], dtype).tofile(out)
                for encoding in tokenizer.encode_batch_fast(list(_pieces(document))):
                    np.array(encoding.ids, dtype).tofile(out)
    manifest = {
        "dtype": dtype.name,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_id": eos_id,
        "train_files": len(train),
        "val_files": len(val),
        "dropped_files": dropped,
        "skipped_files": corpus.skipped,
        "hashes": {p.name: _hash(p.read_bytes()) for p in sorted(folder.iterdir())},
    }
    text = json.dumps(manifest, indent=2)
    (folder / _MANIFEST).write_text(f"{_hash(text.encode())}\n{text}\n", encoding="utf-8")


def _pieces(document: Document) -> Iterator[str]:
    """The document in pieces of whole lines, of 1 MiB or a little more, so that a huge file is encoded in parallel."""
    lines, size = [], 0
    for line in document.text.decode().splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _PIECE_BYTES:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _open(folder: Path, source: str) -> Dataset | None:
    """The dataset in `folder`, or None where there is none or one that does not match its manifest."""
    try:
        digest, text = (folder / _MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if digest != _hash(text.rstrip("\n").encode()):
            return None
        manifest = json.loads(text)
        if any(_hash((folder / name).read_bytes()) != expected for name, expected in manifest.pop("hashes").items()):
            return None
        dtype = np.dtype(manifest.pop("dtype"))
        return Dataset(
            path=folder,
            source=source,
            train_tokens=np.memmap(folder / "train.bin", dtype, mode="r"),
            val_tokens=np.memmap(folder / "val.bin", dtype, mode="r"),
            train_bytes=(folder / "train.txt").stat().st_size,
            val_bytes=(folder / "val.txt").stat().st_size,
            **manifest,
        )
    except (OSError, ValueError):
        return None


def _publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name. One that is there already is another process's, made from the same text."""
    try:
        os.rename(partial, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextmanager
def _partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder beside the datasets that is gone afterwards, whatever happens, unless it was renamed."""
    parent.mkdir(parents=True, exist_ok=True)
    for stale in parent.glob(_PARTIAL + "*"):
        with suppress(FileNotFoundError):
            if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cache_folder() -> Path:
    if named := os.environ.get("FASTLM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def _key(documents: list[Document], *settings: object) -> str:
    digest = blake2b(repr(settings).encode(), digest_size=12)
    for name, text in documents:
        digest.update(f"{len(text)} {name}\0".encode("utf-8", "surrogateescape"))
        digest.update(text)
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError("data: the tokenizers library is missing: pip install fastlm[train]") from None
    return tokenizers
