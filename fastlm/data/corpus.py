"""From a folder of text to a training part and a validation part that do not share their text.

The default corpus is the source code of the running Python's standard library: real text that every machine has.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

__all__ = ["Corpus", "Document", "read_corpus"]

_NOT_IN_STDLIB = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "pydoc_data", "site-packages", "dist-packages")
)
_LONG_LINE = 20  # bytes after stripping; shorter lines (`return None`) are shared by any two texts
_MAX_SHARED = 0.2
_MAX_VALIDATION_BYTES = 8 << 20  # more than this makes every evaluation slower and the figure hardly steadier


class Document(NamedTuple):
    """One text: its path relative to the corpus, with forward slashes, and its UTF-8 bytes."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Documents sorted by name, where they came from, and how many files were empty or not text."""

    source: str
    documents: list[Document]
    skipped: int

    def split(self, fraction: float, seed: int) -> tuple[list[Document], list[Document], int]:
        """(training documents, validation documents, number of documents dropped from validation).

        Whole files are drawn for validation in an order given by a hash of (seed, name), whatever the order the
        folder is read in, until they hold `fraction` of the bytes, at most 8 MiB. Files above an eighth of that are
        drawn only when the small ones do not suffice, so that no single file decides the score. Where files are too
        few or too large to draw from, the last lines of each are the validation part.

        A validation document is dropped when over 20% of its long lines (20 bytes or more) stand in the training
        part too; one without any long line counts as a single line. Raises ValueError when nothing is left.
        """
        total = sum(len(d.text) for d in self.documents)
        target = min(int(fraction * total), _MAX_VALIDATION_BYTES)
        order = sorted(self.documents, key=lambda d: blake2b(_utf8(f"{seed}\0{d.name}")).digest())
        for largest in (target // 8, target):
            val = _draw(order, target, largest)
            if 2 * sum(len(d.text) for d in val) >= target > 0:
                drawn = {d.name for d in val}
                train = [d for d in self.documents if d.name not in drawn]
                break
        else:
            cuts = [_cut(d, 1 - target / total) for d in self.documents]
            train = [head for head, _ in cuts if head.text]
            val = [tail for _, tail in cuts if tail.text.strip()]
        kept = _without_shared(train, val)
        if not kept:
            why = "its files repeat each other" if val else "too small"
            raise ValueError(f"data: no validation part can be split from {self.source} ({total:,} bytes): {why}")
        return train, kept, len(val) - len(kept)


def read_corpus(data: str | Path | None = None) -> Corpus:
    """Read the text under `data`: a folder (recursive), one text file, or None for Python's standard library.

    A file is text when it decodes as UTF-8, holds no zero byte and is not blank; others are skipped and counted.
    Hidden files and folders and `__pycache__` are not looked at, links to folders not followed.

    Raises FileNotFoundError for a path that does not exist and ValueError where there is no text.
    """
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        source = f"the Python {sys.version_info[0]}.{sys.version_info[1]} standard library"
        paths = [p for p in _files(root, _NOT_IN_STDLIB) if p.suffix == ".py"] if root.is_dir() else []
        if not paths:
            raise FileNotFoundError(f"data: this Python has no library sources in {root}: name a folder of text")
    else:
        root = Path(data)
        source = str(root)
        if not root.exists():
            raise FileNotFoundError(f"data: no such file or folder: {root}")
        if root.is_dir():
            paths = list(_files(root))
        elif root.is_file():
            paths, root = [root], root.parent
        else:
            raise ValueError(f"data: neither a file nor a folder: {source}")
    texts = [(p.relative_to(root).as_posix(), _read_text(p)) for p in paths]
    documents = sorted(Document(name, text) for name, text in texts if text is not None)
    if not documents:
        raise ValueError(f"data: no text in {source} (files that are empty or not UTF-8 text: {len(texts)})")
    return Corpus(source, documents, len(texts) - len(documents))


def _files(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s not in {"__pycache__", *excluded}]
        yield from (Path(folder, n) for n in names if not n.startswith("."))


def _read_text(path: Path) -> bytes | None:
    if not path.is_file():  # a dangling link, a socket, a pipe that would block
        return None
    try:
        text = path.read_bytes()
        text.decode()
    except (PermissionError, UnicodeDecodeError):
        return None
    return text if text.strip() and b"\0" not in text else None


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def _draw(order: list[Document], target: int, largest: int) -> list[Document]:
    drawn, size = [], 0
    for document in order:
        if len(document.text) <= min(largest, target - size):
            drawn.append(document)
            size += len(document.text)
    return sorted(drawn)


def _cut(document: Document, share: float) -> tuple[Document, Document]:
    """Cut after the line that contains the given share of the text, or inside it where it is the last."""
    text = document.text.decode()
    middle = round(share * len(text))
    end_of_line = text.find("\n", middle) + 1
    cut = end_of_line if 0 < end_of_line < len(text) else middle
    return Document(document.name, text[:cut].encode()), Document(document.name, text[cut:].encode())


def _long_lines(document: Document) -> list[bytes]:
    stripped = [line.strip() for line in document.text.splitlines()]
    return [line for line in stripped if len(line) >= _LONG_LINE] or [document.text.strip()]


def _without_shared(train: list[Document], val: list[Document]) -> list[Document]:
    lines_of = {d: _long_lines(d) for d in val}
    wanted = {line for lines in lines_of.values() for line in lines}
    shared = {line for d in train for line in _long_lines(d) if line in wanted}
    return [d for d, lines in lines_of.items() if sum(line in shared for line in lines) <= _MAX_SHARED * len(lines)]
