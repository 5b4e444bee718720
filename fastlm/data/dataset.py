"""From a corpus to token ids on disk.

`prepare` cleans the documents and spools them to one file, splits them, trains a vocabulary on the training part,
encodes both parts and keeps the tokens in one folder of the cache, named by a hash of the text and the settings, so
that a second call only maps it. Nothing of the size of the corpus is ever in memory, and after a kill the next call
goes on where it stopped: `state.json` in the partial folder says what is finished.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastlm import cache

from .clean import Cleaner
from .corpus import Corpus, Document, Strings, read_corpus
from .split import Ranges, Spool, rows, split
from .tokenizer import TRAINED, import_tokenizers, load_tokenizer, separator, tokenizer_files, train_tokenizer
from .tokens import Tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Dataset", "prepare"]

_FORMAT = 2  # part of the cache key: raise it when the same text and settings give something else
_MANIFEST = "manifest.json"
_STATE = "state.json"
_PARTIAL = ".partial-"
_STALE_SECONDS = 24 * 3600  # a partial folder this long untouched belongs to a process that was killed
_PROGRESS_SECONDS = 3.0
_SHARD_TOKENS = 1 << 27
_PIECE_BYTES = 1 << 18  # a document is encoded in pieces of whole lines, in parallel
_BATCH_BYTES = min(max(os.cpu_count() or 1, 4), 32) << 20  # of text encoded at once: takes 40 times as much memory
_MAX_LEARNT_BYTES = 1 << 30  # a vocabulary is trained on at most this much
_KEPT_BYTES = 16 << 20
_HASHED_BYTES = 64 << 20  # of a larger file only this many pieces of this size are hashed
_HASHED_PIECES, _HASHED_PIECE_BYTES = 16, 1 << 16
_MIN_VOCAB_SIZE = 257
_MAX_VOCAB_SIZE = 1 << 20
_16_BIT_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class Dataset:
    """A tokenised corpus in the cache.

    Both sequences of tokens hold, for each document, the separator's id and then the document; so the first byte of a
    document is predicted too, and with byte-level BPE decoding without that token gives the text back exactly. Bits per
    byte are the summed loss of `val_tokens` (every token after the first) / ln 2 / `val_bytes`.

    Args:
        path: the folder in the cache.
        source: where the text came from, for people.
        train_tokens, val_tokens: memory-mapped, uint16, or uint32 for vocabularies above 65,536.
        train_bytes, val_bytes: bytes of text after cleaning, the separators not counted.
        vocab_size: as trained: less than was asked for when the text is small.
        eos_id: of the separator: `<|endoftext|>`, `</s>` or `[SEP]`, whichever the tokenizer has, in this order.
        train_documents, val_documents: how many there are.
        dropped_documents: left out of validation: too much of them stands in the training part.
        skipped_documents: files that are empty or not text, rows that are blank or null, before or after cleaning.
        cleaned: for each step of cleaning asked for, the documents it changed; `deduplicate`: removed.
    """

    path: Path
    source: str
    train_tokens: Tokens
    val_tokens: Tokens
    train_bytes: int
    val_bytes: int
    vocab_size: int
    eos_id: int
    train_documents: int
    val_documents: int
    dropped_documents: int
    skipped_documents: int
    cleaned: dict[str, int]

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json`, in the format of the `tokenizers` library."""
        return self.path / "tokenizer.json"

    @property
    def summary(self) -> str:
        """One line for people."""
        left_out = [f"{self.dropped_documents:,} too like the training text"] if self.dropped_documents else []
        left_out += [f"{self.skipped_documents:,} empty or not UTF-8"] if self.skipped_documents else []
        cleaned = ", ".join(f"{step} {count:,}" for step, count in self.cleaned.items())
        return (
            f"{self.source}: {self.train_bytes / 1e6:.2f} MB in {_count(self.train_documents, 'document')} to train on "
            f"({len(self.train_tokens):,} tokens, {self.train_bytes / len(self.train_tokens):.2f} bytes each), "
            f"{self.val_bytes / 1e6:.2f} MB in {_count(self.val_documents, 'document')} to validate on; "
            f"vocabulary of {self.vocab_size:,}"
            + (f"; left out: {', '.join(left_out)}" if left_out else "")
            + (f"; cleaned: {cleaned}" if cleaned else "")
        )

    def train_text(self) -> bytes:
        """The training documents, one after the other with nothing between: the last 16 MiB of them at most."""
        return (self.path / "train.txt").read_bytes()

    def val_text(self) -> bytes:
        """The validation documents, one after the other with nothing between."""
        return (self.path / "val.txt").read_bytes()

    def tokenizer(self) -> Tokenizer:
        """See `load_tokenizer`."""
        return load_tokenizer(self.tokenizer_path)


def prepare(
    data: str | Path | Iterable[str] | None = None,
    vocab_size: int = 4096,
    *,
    tokenizer: str | Path = "bpe",
    text_column: str = "text",
    strip_html: bool = False,
    strip_control: bool = False,
    normalize: str | None = None,
    deduplicate: bool = False,
    val_fraction: float = 0.08,
    split_seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Read, clean, split and tokenise `data`, or open what an earlier call made.

    Args:
        data: what `read_corpus` reads: a folder, a file, an iterable of strings, or None for Python's own library.
        vocab_size: of the vocabulary to train; a tokenizer that is loaded keeps its own.
        tokenizer: `bpe` or `wordpiece`, trained on the training part alone (of more than 1 GiB on documents drawn at
            random that hold as much; see `train_tokenizer`), or where `load_tokenizer` finds one.
        text_column: of the rows of JSONL, CSV and parquet files.
        strip_html, normalize, strip_control, deduplicate: the steps of cleaning, in this order (see `Cleaner`).
        val_fraction, split_seed: of the validation part (see `split`).
        progress: called with a line per stage, and in long ones every few seconds.

    The cache is `$FASTLM_CACHE`, else `$XDG_CACHE_HOME/fastlm`, else `~/.cache/fastlm`; while it works it needs as much
    room as the text takes and once more for the tokens. A dataset appears there whole or not at all. A call that was
    killed is gone on with by the next one with the same text and settings; other processes wait for the one at work. A
    dataset that was damaged since is made again: hashes of its files are compared, those of files above 64 MiB being
    of their size and 16 evenly spaced pieces. A folder of more than 1 GiB is known again by its files' names, sizes and
    times, anything else by its content.

    Raises FileNotFoundError or ValueError for text or a tokenizer that is missing, malformed or too small and for
    settings out of range, TypeError for an iterable of other things than strings, ImportError without the libraries
    `tokenizers` (and pyarrow, for parquet), OSError when the cache cannot be written.
    """
    if not _MIN_VOCAB_SIZE <= vocab_size <= _MAX_VOCAB_SIZE:
        raise ValueError(
            f"data: vocab_size must be from {_MIN_VOCAB_SIZE} (256 bytes and a separator) to {_MAX_VOCAB_SIZE:,}, "
            f"got {vocab_size}"
        )
    if not 0 < val_fraction <= 0.5:
        raise ValueError(f"data: val_fraction must be above 0 and at most 0.5, got {val_fraction}")
    steps: dict[str, Any] = {
        "strip_html": strip_html,
        "normalize": normalize,
        "strip_control": strip_control,
        "deduplicate": deduplicate,
    }
    cleaner = Cleaner(**steps)
    corpus = read_corpus(data, text_column)
    settings = {
        **({"tokenizer": tokenizer, "vocab_size": vocab_size} if tokenizer in TRAINED else _identity(tokenizer)),
        **steps,
        "text_column": text_column,
        "val_fraction": val_fraction,
        "split_seed": split_seed,
    }
    tell = progress or (lambda line: None)
    parent = cache.folder() / "data"
    with ExitStack() as stack:
        stack.enter_context(_naming(parent, corpus))
        spooled = None
        if isinstance(corpus, Strings):  # its content is known when it has been read, and it can be read but once
            import_tokenizers()
            spooled = stack.enter_context(_temporary_folder(parent))
            counts = _spool(spooled, corpus, cleaner, split_seed, _Progress(tell, spooled, f"reading {corpus.source}"))
        final = parent / _hash(repr((_FORMAT, settings)).encode() + corpus.digest())
        found = _open(final, corpus.source)
        if found is not None:
            return found
        import_tokenizers()
        parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_locked(parent / f".lock-{final.name}", tell))
        found = _open(final, corpus.source)  # by the process that was waited for
        if found is not None:
            return found
        partial = parent / f"{_PARTIAL}{final.name}"
        _remove_stale(parent, partial)
        partial.mkdir(exist_ok=True)
        try:
            if not (partial / _MANIFEST).exists():
                state = _read_state(partial)
                if "corpus" not in state:
                    if spooled is None:
                        counts = _spool(
                            partial, corpus, cleaner, split_seed, _Progress(tell, partial, f"reading {corpus.source}")
                        )
                    else:
                        for file in spooled.iterdir():
                            os.replace(file, partial / file.name)
                    _save_state(partial, state, corpus=counts)
                _build(partial, state, corpus.source, settings, tokenizer, tell)
        except (ValueError, ImportError):  # the next call would fail again
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _publish(partial, final)
    found = _open(final, corpus.source)
    if found is None:
        raise OSError(f"data: what was written to the cache {final} does not read back")
    return found


class _Progress:
    """Tells that a stage begins and then, every few seconds, how far it is."""

    def __init__(self, tell: Callable[[str], None], folder: Path, stage: str, details: str = "") -> None:
        self._tell, self._folder, self._stage = tell, folder, stage
        self._begun = self._told = time.monotonic()
        tell(stage + details)

    def __call__(self, done: float | None) -> None:
        """`done`: the share of the stage that is done, where it is known."""
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            os.utime(self._folder)  # not stale
            left = (now - self._begun) * (1 / done - 1) if done else None
            self._tell(f"{self._stage}: {done or 0:.0%}" + ("" if left is None else f", about {left:.0f} s left"))


def _spool(folder: Path, corpus: Corpus, cleaner: Cleaner, seed: int, progress: _Progress) -> dict[str, Any]:
    """Write the cleaned documents to `folder`; the counts of what was left out or changed."""
    documents = blank = 0

    def cleaned() -> Iterator[Document]:
        nonlocal documents, blank
        for name, original in corpus:
            progress(corpus.done)
            text = cleaner(original)
            if text is None:
                continue
            if text and not text.isspace():
                documents += 1
                yield Document(name, text)
            else:
                blank += 1

    Spool.write(folder / "spool", cleaned(), seed)
    skipped = corpus.skipped + blank
    if documents == 0:
        raise ValueError(f"data: no text in {corpus.source} (files or rows empty or not UTF-8 text: {skipped})")
    return {"skipped": skipped, "cleaned": cleaner.counts}


def _build(
    folder: Path,
    state: dict[str, Any],
    source: str,
    settings: dict[str, Any],
    tokenizer_name: str | Path,
    tell: Callable[[str], None],
) -> None:
    """From the spool in `folder` to a whole dataset, going on from `state`."""
    spool = Spool(folder / "spool")
    try:
        if "dropped" not in state:
            tell("splitting")
            try:
                parts = split(spool, settings["val_fraction"])
            except ValueError as error:
                size = int(spool.ranges[-1, 1])
                raise ValueError(
                    f"data: no validation part can be split from {source} ({size:,} bytes): {error}"
                ) from None
            for name, ranges in (("train", parts.train), ("val", parts.val)):
                np.save(folder / f"{name}.npy", ranges)
                (folder / f"{name}.txt").write_bytes(_last(spool, ranges, _KEPT_BYTES))
            _save_state(folder, state, dropped=parts.dropped)
        ranges_of = {name: np.load(folder / f"{name}.npy") for name in ("train", "val")}
        if "tokenizer" not in state:
            tokenizer = _make_tokenizer(folder, spool, ranges_of["train"], settings, tokenizer_name, tell)
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            _save_state(folder, state, tokenizer=True)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        dtype = np.dtype(np.uint16 if vocab_size <= _16_BIT_VOCABULARY else np.uint32)
        for name, ranges in ranges_of.items():
            progress = _Progress(tell, folder, f"encoding {name}", f": {_count(len(ranges), 'document')}")
            _encode_part(folder, state, name, spool, ranges, tokenizer, dtype, progress)
    finally:
        spool.close()
    kept = ["tokenizer.json", *(f"{name}.txt" for name in ranges_of)]
    kept += [_shard(folder, name, i).name for name in ranges_of for i in range(len(state[name]["shards"]))]
    manifest = {
        "settings": settings,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "eos_id": separator(tokenizer),
        "tokenizer_hash": _hash((folder / "tokenizer.json").read_bytes()),
        "dropped_documents": state["dropped"],
        "skipped_documents": state["corpus"]["skipped"],
        "cleaned": state["corpus"]["cleaned"],
        **{
            name: {
                "documents": len(ranges),
                "bytes": _size(ranges),
                "tokens": sum(state[name]["shards"]),
                "shards": state[name]["shards"],
            }
            for name, ranges in ranges_of.items()
        },
        "hashes": {name: _file_hash(folder / name) for name in sorted(kept)},
    }
    text = json.dumps(manifest, indent=2)
    _write(folder / _MANIFEST, f"{_hash(text.encode())}\n{text}\n")


def _publish(partial: Path, final: Path) -> None:
    """Give a finished folder its name, without what was needed to make it."""
    for path in (*partial.glob("spool.*"), *partial.glob("*.npy"), partial / _STATE):
        path.unlink(missing_ok=True)
    if final.exists():
        with _temporary_folder(final.parent) as damaged:
            os.rename(final, damaged / "old")
    os.rename(partial, final)


def _make_tokenizer(
    folder: Path,
    spool: Spool,
    ranges: Ranges,
    settings: dict[str, Any],
    name: str | Path,
    tell: Callable[[str], None],
) -> Tokenizer:
    if name not in TRAINED:
        tokenizer = load_tokenizer(name)
        separator(tokenizer)
        return tokenizer
    sample = _sample(ranges, settings["split_seed"])
    vocab_size, size = settings["vocab_size"], _size(sample)
    progress = _Progress(tell, folder, f"training a vocabulary of {vocab_size:,}", f" on {size / 1e6:.2f} MB")

    def texts() -> Iterator[str]:
        done = 0
        for piece in _pieces(spool, sample):
            progress(done / size)
            done += len(piece.text)
            yield piece.text.decode()

    return train_tokenizer(str(name), vocab_size, texts)


def _sample(ranges: Ranges, seed: int) -> Ranges:
    """Documents drawn at random until they hold what a vocabulary is trained on at most, in their own order.

    Drawn by the raw words of Philox, which numpy keeps the same in all its versions.
    """
    if _size(ranges) <= _MAX_LEARNT_BYTES:
        return ranges
    order = np.argsort(np.random.Philox(key=seed % 2**64).random_raw(len(ranges)), kind="stable")
    sizes = (ranges[:, 1] - ranges[:, 0])[order]
    return ranges[np.sort(order[np.cumsum(sizes) - sizes < _MAX_LEARNT_BYTES])]


class _Piece(NamedTuple):
    document: int
    start: int  # in the spool
    first: bool  # of the document
    text: bytes


def _pieces(spool: Spool, ranges: Ranges, document: int = 0, begin: int | None = None) -> Iterator[_Piece]:
    """The documents, from the one given on (and in it from `begin` on), in pieces to encode."""
    for i, (start, stop) in enumerate(rows(ranges[document:]), document):
        if begin is None:
            begin = start
        for at, text in spool.blocks(begin, stop, _PIECE_BYTES):
            yield _Piece(i, at, at == start, text)
        begin = None


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 64  # an empty encoding takes memory too
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_part(
    folder: Path,
    state: dict[str, Any],
    name: str,
    spool: Spool,
    ranges: Ranges,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    progress: _Progress,
) -> None:
    """Write the shards of a part that are not finished yet.

    `state[name]`: the tokens in each finished shard, and where the next one starts: the document, the piece's place in
    the spool, and how many of the piece's tokens are in finished shards; or None when there is no next one.
    """
    shards, place = list(state.get(name, {}).get("shards", [])), state.get(name, {}).get("next", (0, None, 0))
    if place is None:
        return
    document, begin, skip = place
    eos_id = separator(tokenizer)
    total, done = _size(ranges), _size(ranges[:document])
    with ExitStack() as stack:
        out, room = None, 0
        for batch in _batches(_pieces(spool, ranges, document, begin)):
            ids, ends = _encode(tokenizer, batch, eos_id, dtype)
            at, skip = skip, 0
            while at < len(ids):
                if out is None:
                    out, room = stack.enter_context(open(_shard(folder, name, len(shards)), "wb")), _SHARD_TOKENS
                stop = min(at + room, len(ids))
                ids[at:stop].tofile(out)
                at, room = stop, room - (stop - at)
                if room == 0:
                    _finish(out)
                    out = None
                    shards.append(_SHARD_TOKENS)
                    i = min(int(np.searchsorted(ends, stop, side="right")), len(batch) - 1)
                    used = stop - (int(ends[i - 1]) if i else 0)
                    _save_state(folder, state, **{name: {"shards": shards, "next": (*batch[i][:2], used)}})
            done += sum(len(piece.text) for piece in batch)
            progress(done / total)
        if out is not None:
            _finish(out)
            shards.append(_SHARD_TOKENS - room)
    _save_state(folder, state, **{name: {"shards": shards, "next": None}})


def _encode(
    tokenizer: Tokenizer, batch: list[_Piece], eos_id: int, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The ids of all pieces, (N,), the separator before each document, and where each piece ends, (len(batch),)."""
    ids: list[int] = []
    ends: list[int] = []
    encodings = tokenizer.encode_batch_fast([piece.text.decode() for piece in batch], add_special_tokens=False)
    for piece, encoding in zip(batch, encodings, strict=True):
        if piece.first:
            ids.append(eos_id)
        ids += encoding.ids
        ends.append(len(ids))
    return np.array(ids, dtype), np.array(ends, np.int64)


def _finish(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())
    out.close()


def _shard(folder: Path, name: str, index: int) -> Path:
    return folder / f"{name}-{index:05}.bin"


def _last(spool: Spool, ranges: Ranges, limit: int) -> bytes:
    """The last bytes of the documents, at most `limit`, from the start of a character on."""
    parts: list[bytes] = []
    for start, stop in rows(ranges[::-1]):
        parts.append(spool.read(max(start, stop - limit), stop))
        limit -= len(parts[-1])
        if limit <= 0:
            break
    text = b"".join(reversed(parts))
    begin = 0
    while text[begin] & 0xC0 == 0x80:
        begin += 1
    return text[begin:]


def _open(folder: Path, source: str) -> Dataset | None:
    """The dataset in `folder`, or None where there is none or one that does not match its manifest."""
    try:
        digest, text = (folder / _MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if digest != _hash(text.rstrip("\n").encode()):
            return None
        manifest = json.loads(text)
        if any(_file_hash(folder / name) != expected for name, expected in manifest["hashes"].items()):
            return None
        dtype = np.dtype(manifest["dtype"])
        tokens = {
            name: Tokens([np.memmap(_shard(folder, name, i), dtype, "r") for i in range(len(manifest[name]["shards"]))])
            for name in ("train", "val")
        }
        return Dataset(
            path=folder,
            source=source,
            train_tokens=tokens["train"],
            val_tokens=tokens["val"],
            train_bytes=manifest["train"]["bytes"],
            val_bytes=manifest["val"]["bytes"],
            train_documents=manifest["train"]["documents"],
            val_documents=manifest["val"]["documents"],
            **{
                name: manifest[name]
                for name in ("vocab_size", "eos_id", "dropped_documents", "skipped_documents", "cleaned")
            },
        )
    except (OSError, ValueError):
        return None


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _save_state(folder: Path, state: dict[str, Any], **finished: Any) -> None:
    state.update(finished)
    _write(folder / _STATE, json.dumps(state))


def _write(path: Path, text: str) -> None:
    """Write a file that other calls trust: whole or not at all."""
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _naming(parent: Path, corpus: Corpus) -> Iterator[None]:
    """Name the cache in an OSError that does not come from the iterable itself."""
    try:
        yield
    except OSError as error:
        if isinstance(corpus, Strings) and error is corpus.failure:
            raise
        raise OSError(f"data: cannot write the cache {parent} (FASTLM_CACHE names another): {error}") from None


@contextmanager
def _locked(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Alone with the dataset. The empty file stays: to remove it would let two processes hold a lock of one name."""
    from filelock import FileLock, Timeout  # torch needs it too

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell("waiting for another process that prepares the same text")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder beside the datasets that is gone afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path, own: Path) -> None:
    for stale in parent.glob(_PARTIAL + "*"):
        with suppress(FileNotFoundError):
            if stale != own and time.time() - stale.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)


def _identity(tokenizer: str | Path) -> dict[str, str]:
    """What the settings say of a tokenizer that is loaded: its files' names and content, not where they are."""
    content = b"".join(f"{file.name}\0".encode() + file.read_bytes() for file in tokenizer_files(tokenizer))
    return {"tokenizer": f"files {_hash(content)}"}


def _file_hash(path: Path) -> str:
    """Of the whole file, or of the size and evenly spaced pieces of one above 64 MiB."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _HASHED_BYTES:
            digest = blake2b(digest_size=16)
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        digest = blake2b(str(size).encode(), digest_size=16)
        for i in range(_HASHED_PIECES):
            file.seek(i * (size - _HASHED_PIECE_BYTES) // (_HASHED_PIECES - 1))
            digest.update(file.read(_HASHED_PIECE_BYTES))
        return digest.hexdigest()


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _size(ranges: Ranges) -> int:
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
