"""From folders, files and iterables to documents, one at a time, so that a corpus may be larger than memory.

The default corpus is the source code of the running Python's standard library: real text that every machine has.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

__all__ = ["Corpus", "Document", "read_corpus", "read_rows", "utf8"]

_NOT_IN_STDLIB = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data", "site-packages", "dist-packages")
)
_PART_BYTES = 32 << 20  # a larger text file is several documents
_MAX_HASHED_BYTES = 1 << 30  # of a larger corpus the names, sizes and times stand for the content
_ROWS = (".jsonl", ".csv", ".tsv", ".parquet")
_COMPRESSED = (".txt", ".jsonl", ".csv", ".tsv")  # read through gzip when .gz follows
Columns = Mapping[str, str]  # what each is for -> its name


class Document(NamedTuple):
    """One text.

    Args:
        name: its path relative to the corpus, with forward slashes. A row's is `file.csv:17`, of the line it starts at
            (parquet: the row's number, from 1), that of a part of a large text file likewise, that of a string in an
            iterable its index.
        text: its UTF-8 bytes.
    """

    name: str
    text: bytes


class Corpus:
    """The documents of some text, in order of their files' names; every iteration reads them again.

    `skipped` counts, after an iteration, the files that were empty or not text and the rows that were blank or null;
    `done` is the share that is read, or None where that is not known.

    Args:
        source: where they come from, for people.
        root: the folder that names are relative to.
        paths: the files.
        text_column: of CSV, JSONL and parquet.
    """

    def __init__(self, source: str, root: Path, paths: list[Path], text_column: str) -> None:
        self.source = source
        self.skipped = 0
        self.done: float | None = 0.0
        self._files = sorted((p.relative_to(root).as_posix(), p) for p in paths)
        self._column = text_column

    def __iter__(self) -> Iterator[Document]:
        """Raises ValueError for a row without the text, a malformed line, a file that cannot be read, naming it."""
        self.skipped, self.done = 0, 0.0
        sizes = [path.stat().st_size if path.is_file() else 0 for _, path in self._files]
        before, total = 0, max(sum(sizes), 1)
        for (name, path), size in zip(self._files, sizes, strict=True):

            def at(position: int, before: int = before) -> None:
                self.done = (before + position) / total

            try:
                for document_name, text in _read(name, path, self._column, at):
                    encoded = _encode(text)
                    if encoded is None:
                        self.skipped += 1
                    else:
                        yield Document(document_name, encoded)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"data: {path} cannot be read: {error}") from None
            before += size
        self.done = 1.0

    def digest(self) -> bytes:
        """A hash of the files' names and contents; above 1 GiB in total of their names, sizes and times."""
        digest = blake2b(digest_size=16)
        files = [(name, path, path.stat()) for name, path in self._files if path.is_file()]
        by_content = sum(stat.st_size for _, _, stat in files) <= _MAX_HASHED_BYTES
        for name, path, stat in files:
            digest.update(utf8(f"{name}\0{stat.st_size}\0" + ("" if by_content else f"{stat.st_mtime_ns}\0")))
            if by_content and os.access(path, os.R_OK):
                with open(path, "rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.digest()


class Strings(Corpus):
    """An iterable of strings, read once; None and blank ones are skipped.

    `digest` is that of what was read, `failure` the OSError of the iterable itself that ended the reading.
    """

    def __init__(self, strings: Iterable[str | None]) -> None:
        super().__init__("an iterable of strings", Path(), [], "")
        self.done = None
        self.failure: OSError | None = None
        self._strings = strings
        self._digest = blake2b(digest_size=16)

    def __iter__(self) -> Iterator[Document]:
        """Raises TypeError for an element that is neither a string nor None."""
        try:
            for i, text in enumerate(self._strings):
                if text is not None and not isinstance(text, str):
                    raise TypeError(f"data: an iterable must hold strings, got {type(text).__name__} (element {i:,})")
                encoded = _encode(text)
                self._digest.update(b"\0" if encoded is None else b"%d " % len(encoded) + encoded)
                if encoded is None:
                    self.skipped += 1
                else:
                    yield Document(str(i), encoded)
        except OSError as error:
            self.failure = error
            raise

    def digest(self) -> bytes:
        return self._digest.digest()


def read_corpus(data: str | Path | Iterable[str] | None = None, text_column: str = "text") -> Corpus:
    """The text of `data`: a folder (recursive), one file, an iterable of strings, or None for Python's own library.

    By the end of their names, files are: `.jsonl`, an object a line, of which `text_column` is the text, or a line that
    is a JSON string; `.csv` and `.tsv`, with a header; `.parquet`, by the library pyarrow; any other: one text. Those
    of `.txt`, `.jsonl`, `.csv` and `.tsv` may be compressed (`.jsonl.gz`).

    A file is text when it decodes as UTF-8, holds no zero byte and is not blank; others are skipped and counted, and so
    are rows that are blank, null or not Unicode. Text files above 32 MiB are read as several documents of whole lines.
    Hidden files and folders and `__pycache__` are not looked at, links to folders not followed.

    Raises FileNotFoundError for a path that does not exist, TypeError for bytes, ValueError for what is neither a file
    nor a folder.
    """
    if isinstance(data, (bytes, bytearray)):
        raise TypeError("data: must be a path, an iterable of strings or None, got bytes")
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = f"the Python {sys.version_info[0]}.{sys.version_info[1]} standard library"
        paths = [p for p in _files(root, _NOT_IN_STDLIB) if p.suffix == ".py"] if root.is_dir() else []
        if not paths:
            raise FileNotFoundError(f"data: this Python has no library sources in {root}: name a folder of text")
        return Corpus(source, root, paths, text_column)
    if not isinstance(data, (str, os.PathLike)):
        if not isinstance(data, Iterable):
            raise TypeError(f"data: must be a path, an iterable of strings or None, got {type(data).__name__}")
        return Strings(data)
    root = Path(data)
    if not root.exists():
        raise FileNotFoundError(f"data: no such file or folder: {root}")
    if root.is_dir():
        return Corpus(str(root), root, list(_files(root)), text_column)
    if not root.is_file():
        raise ValueError(f"data: neither a file nor a folder: {root}")
    return Corpus(str(root), root.parent, [root], text_column)


def utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def _files(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s not in {"__pycache__", *excluded}]
        yield from (Path(folder, n) for n in names if not n.startswith("."))


def _encode(text: str | bytes | None) -> bytes | None:
    """As UTF-8; None for a text that is null, blank or not Unicode (a lone surrogate)."""
    try:
        encoded = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError:
        return None
    return encoded if encoded and not encoded.isspace() else None


def read_rows(path: str | Path, columns: Columns) -> Iterator[tuple[str, list[Any] | None]]:
    """The name (`file.csv:17`) and the values in these columns of every row of a JSONL, CSV, TSV or parquet file, or of
    those of a folder; None for a row that is blank.

    `columns` has them by what they are for, which errors say: `text_column` and `label_column`.
    Raises as `read_corpus` does, and ValueError for a file of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: no such file or folder: {path}")
    files = sorted(_files(path)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"data: there is no file in {path}")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else path.name
        if _kind(file)[0] not in _ROWS:
            raise ValueError(f"data: {file} must end in {', '.join(_ROWS)} to have {' and '.join(columns)}")
        try:
            yield from _rows(name, file, columns, lambda position: None)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"data: {file} cannot be read: {error}") from None


def _kind(path: Path) -> tuple[str, bool]:
    """The suffix that says what a file holds, and whether it is compressed."""
    kind, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return (inner, True) if kind == ".gz" and inner in _COMPRESSED else (kind, False)


def _read(name: str, path: Path, column: str, at: Callable[[int], None]) -> Iterator[tuple[str, str | bytes | None]]:
    """Names and texts of the documents of a file, None for one to be skipped. `at` is told how many bytes are read."""
    if not path.is_file() or not os.access(path, os.R_OK):  # a dangling link, a socket, a pipe that would block
        yield name, None
    elif _kind(path)[0] in _ROWS:
        empty = True
        for where, row in _rows(name, path, {"text_column": column}, at):
            empty = False
            text = None if row is None else row[0]
            if text is not None and not isinstance(text, str):
                raise ValueError(f"data: {where}: the text must be a string or null, got {type(text).__name__}")
            yield where, text
        if empty:
            yield name, None
    else:
        with _opened(path) as (raw, file):
            yield from _text_parts(name, file, lambda: at(raw.tell()))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file as it is, whose place is what has been read, and what it holds."""
    with open(path, "rb") as raw, gzip.open(raw) if _kind(path)[1] else raw as file:
        yield raw, cast("IO[bytes]", file)


def _rows(name: str, path: Path, columns: Columns, at: Callable[[int], None]) -> Iterator[tuple[str, list[Any] | None]]:
    kind = _kind(path)[0]
    if kind == ".parquet":
        yield from _parquet_rows(name, path, columns, at)
        return
    with _opened(path) as (raw, file):
        rows = _json_rows(name, file, columns) if kind == ".jsonl" else _csv_rows(name, file, columns, kind)
        for i, row in enumerate(rows):
            if i % 256 == 0:
                at(raw.tell())
            yield row


def _text_parts(name: str, file: IO[bytes], tell: Callable[[], None]) -> Iterator[tuple[str, bytes | None]]:
    if not _is_text(file):
        yield name, None
        return
    file.seek(0)
    rest, line = b"", 1
    while part := rest + file.read(_PART_BYTES - len(rest)):
        tell()
        whole = len(part) < _PART_BYTES and line == 1
        cut = len(part) if len(part) < _PART_BYTES else whole_lines(part)
        part, rest = part[:cut], part[cut:]
        yield name if whole else f"{name}:{line}", part
        line += part.count(b"\n")


def _is_text(file: IO[bytes]) -> bool:
    """Whether a file is UTF-8 without a zero byte, and not empty."""
    decoder, empty = codecs.getincrementaldecoder("utf-8")(), True
    try:
        while block := file.read(1 << 20):
            empty = False
            if b"\0" in block:
                return False
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return not empty


def whole_lines(text: bytes) -> int:
    """Where to cut a text that goes on: after its last line end, else before its last character."""
    cut = text.rfind(b"\n") + 1
    if cut == 0:
        cut = len(text) - 1
        while cut > 1 and text[cut] & 0xC0 == 0x80:
            cut -= 1
    return cut


def _json_rows(name: str, file: IO[bytes], columns: Columns) -> Iterator[tuple[str, list[Any] | None]]:
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            yield where, None
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data: {where} is not JSON: {error}") from None
        if isinstance(row, dict):
            _check_columns(where, columns, row)
            yield where, [row[column] for column in columns.values()]
        elif len(columns) == 1:  # the text itself
            yield where, [row]
        else:
            raise ValueError(f"data: {where} must be an object, got {type(row).__name__}")


def _csv_rows(name: str, file: IO[bytes], columns: Columns, kind: str) -> Iterator[tuple[str, list[Any] | None]]:
    # what is not UTF-8 becomes lone surrogates, so that the line it stands in is known
    lines = io.TextIOWrapper(cast("Any", file), "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # the whole process's
    number = 1
    try:
        header = next(rows, None)
        if header is None:
            return
        _check_columns(f"{name}:1", columns, header)
        places = [header.index(column) for column in columns.values()]
        number = rows.line_num + 1
        for row in rows:
            where, number = f"{name}:{number}", rows.line_num + 1
            if not row:
                yield where, None
                continue
            if len(row) != len(header):
                raise ValueError(f"data: {where} has {len(row)} fields, the header has {len(header)}")
            values = [row[place] for place in places]
            try:
                "".join(values).encode()
            except UnicodeEncodeError:
                raise ValueError(f"data: {where} is not UTF-8") from None
            yield where, values
    except csv.Error as error:
        raise ValueError(f"data: {name}:{number} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)
        if not lines.closed:  # the file is closed by who opened it
            lines.detach()


def _parquet_rows(
    name: str, path: Path, columns: Columns, at: Callable[[int], None]
) -> Iterator[tuple[str, list[Any] | None]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("data: the pyarrow library is missing: pip install fastlm[parquet]") from None
    size, number = path.stat().st_size, 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(name, columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[*columns.values()]):
                at(size * number // max(file.metadata.num_rows, 1))
                for values in zip(*(batch.column(column) for column in columns.values()), strict=True):
                    number += 1
                    yield f"{name}:{number}", [value.as_py() for value in values]
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"data: {name} is not parquet that can be read (row {number + 1}): {error}") from None


def _check_columns(where: str, columns: Columns, there: Collection[Any]) -> None:
    for purpose, column in columns.items():
        if column not in there:
            raise ValueError(f"data: {where} has no column {column!r} ({purpose}), it has {', '.join(map(str, there))}")
