"""Documents on disk, and their split into a training part and a validation part that do not share their text."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .corpus import Document, utf8

__all__ = ["Ranges", "Split", "Spool", "rows", "split"]

Ranges = npt.NDArray[np.int64]  # (N, 2): the first byte of each document and the one after its last

_LONG_LINE = 20  # bytes after stripping; shorter lines (`return None`) are shared by any two texts
_MAX_SHARED = 0.2
_MAX_VALIDATION_BYTES = 8 << 20  # more than this makes every evaluation slower and the figure hardly steadier
_BLOCK_BYTES = _MAX_VALIDATION_BYTES  # so that no line that a validation document can hold is cut


class Spool:
    """The texts of documents one after the other in a file; in memory, 16 bytes of each.

    `ranges` (N, 2) says where each stands; `order` (N,) is the order to draw them in for validation: that of a hash of
    (seed, name), whatever the order they came in.
    """

    def __init__(self, path: Path) -> None:
        """Open what `Spool.write` wrote to `path` (the files' name without its suffix)."""
        self._file = open(path.with_suffix(".text"), "rb")  # noqa: SIM115 - closed by `close`
        ends = np.fromfile(path.with_suffix(".ends"), np.int64)
        self.ranges: Ranges = np.stack([np.append(0, ends[:-1]), ends], axis=1) if len(ends) else ends.reshape(0, 2)
        self.order = np.argsort(np.fromfile(path.with_suffix(".order"), np.uint64), kind="stable")

    @classmethod
    def write(cls, path: Path, documents: Iterable[Document], seed: int) -> None:
        """Write the documents, to be opened by `Spool(path)`."""
        ends, hashes, end = array("q"), array("Q"), 0
        with open(path.with_suffix(".text"), "wb") as file:
            for name, text in documents:
                file.write(text)
                end += len(text)
                ends.append(end)
                hashes.append(int.from_bytes(blake2b(utf8(f"{seed}\0{name}")).digest()[:8], "big"))
            file.flush()
            os.fsync(file.fileno())
        for suffix, values in ((".ends", ends), (".order", hashes)):
            with open(path.with_suffix(suffix), "wb") as file:
                values.tofile(file)
                file.flush()
                os.fsync(file.fileno())

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from start to stop: with `read`, not mapped, so that they do not count as this process's memory."""
        self._file.seek(start)
        return self._file.read(stop - start)

    def blocks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, bytes]]:
        """The text from start to stop, in blocks of about `size` bytes of whole lines, and where each stands.

        A block ends after the first line end from `size` bytes on; a line that goes on to twice the size is cut
        between two characters.
        """
        while start < stop:
            block = self.read(start, min(stop, start + 2 * size))
            if len(block) > size:
                end = block.find(b"\n", size - 1) + 1
                if end == 0 and start + len(block) < stop:
                    end = len(block) - 1
                    while block[end] & 0xC0 == 0x80:
                        end -= 1
                block = block[: end or None]
            yield start, block
            start += len(block)

    def close(self) -> None:
        self._file.close()


def rows(values: Ranges) -> Iterator[list[int]]:
    """The rows of an array of any length: as lists, which take much more memory, only a few at a time."""
    for i in range(0, len(values), 4096):
        yield from values[i : i + 4096].tolist()


class Split(NamedTuple):
    """The parts, and how many documents were dropped from validation."""

    train: Ranges
    val: Ranges
    dropped: int


def split(spool: Spool, fraction: float) -> Split:
    """Draw a validation part from the documents of a spool.

    Whole documents are drawn, in the spool's order, until they hold `fraction` of the bytes, at most 8 MiB. Documents
    above an eighth of that are drawn only when the small ones do not suffice, so that no single one decides the score.
    Where documents are too few or too large to draw from, the last lines of each are the validation part.

    A validation document is dropped when over 20% of its long lines (20 bytes or more) stand in the training part too;
    one without any long line counts as a single line. Raises ValueError when nothing is left.
    """
    sizes = spool.ranges[:, 1] - spool.ranges[:, 0]
    total = int(sizes.sum())
    target = min(int(fraction * total), _MAX_VALIDATION_BYTES)
    for largest in (target // 8, target):
        drawn = _draw(sizes, spool.order, target, largest)
        if 2 * int(sizes[drawn].sum()) >= target > 0:
            train, val = spool.ranges[~drawn], spool.ranges[drawn]
            break
    else:
        cuts = np.array([_cut(spool, start, stop, 1 - target / total) for start, stop in rows(spool.ranges)])
        heads, tails = np.stack([spool.ranges[:, 0], cuts], axis=1), np.stack([cuts, spool.ranges[:, 1]], axis=1)
        train = heads[cuts > spool.ranges[:, 0]]
        val = np.array(
            [(start, stop) for start, stop in rows(tails) if spool.read(start, stop).strip()], np.int64
        ).reshape(-1, 2)
    kept = _without_shared(spool, train, val)
    if not len(kept) or not len(train):
        raise ValueError("its documents repeat each other" if len(val) and len(train) else "too small")
    return Split(train, kept, len(val) - len(kept))


def _draw(sizes: Ranges, order: Ranges, target: int, largest: int) -> npt.NDArray[np.bool_]:
    drawn = np.zeros(len(sizes), np.bool_)
    order = order[sizes[order] <= largest]
    smallest, room = int(sizes.min()), target
    for i, size in rows(np.stack([order, sizes[order]], axis=1)):
        if size <= room:
            drawn[i] = True
            room -= size
        elif room < smallest:
            break
    return drawn


def _cut(spool: Spool, start: int, stop: int, share: float) -> int:
    """Cut after the line that contains the given share of the text, or inside it where it is the last."""
    text = spool.read(start, stop).decode()
    middle = round(share * len(text))
    end_of_line = text.find("\n", middle) + 1
    cut = end_of_line if 0 < end_of_line < len(text) else middle
    return stop - len(text[cut:].encode())


def _long_lines(text: bytes) -> list[bytes]:
    stripped = [line.strip() for line in text.splitlines()]
    return [line for line in stripped if len(line) >= _LONG_LINE]


def _without_shared(spool: Spool, train: Ranges, val: Ranges) -> Ranges:
    texts = [spool.read(start, stop) for start, stop in rows(val)]
    lines_of = [_long_lines(text) or [text.strip()] for text in texts]
    wanted = {line for lines in lines_of for line in lines}
    shared: set[bytes] = set()
    for start, stop in rows(train):
        short = True
        for _, block in spool.blocks(start, stop, _BLOCK_BYTES):
            lines = _long_lines(block)
            short = short and not lines
            shared.update(line for line in lines if line in wanted)
        if short and (text := spool.read(start, stop).strip()) in wanted:
            shared.add(text)
    few = [sum(line in shared for line in lines) <= _MAX_SHARED * len(lines) for lines in lines_of]
    return val[np.array(few, np.bool_)]
