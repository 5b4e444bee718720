"""What a run measured: metrics.jsonl, a line of JSON for every log point and evaluation, and TensorBoard's files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastlm.models.pretrained import replacing

__all__ = ["METRICS", "Metrics"]

METRICS = "metrics.jsonl"


class Metrics:
    """The records of a run, in memory and, with a folder, in its files."""

    def __init__(self, folder: Path | None) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = None if folder is None else folder / METRICS
        self._board: Any = None

    def begin(self) -> None:
        """Start the file, in a folder that must not hold a run."""
        if self._path is not None:
            self._path.touch()

    def restore(self, step: int) -> None:
        """Go on after `step`: read what was recorded up to there, and drop the rest, and a line that a kill cut off."""
        if self._path is None:
            return
        self.records = [record for record in _read(self._path) if record["step"] <= step]
        with replacing(self._path) as path:
            path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")

    def open_tensorboard(self, step: int) -> None:
        """Write to the folder `tensorboard` too, from the step after this one on."""
        if self._path is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("the tensorboard library is missing: pip install fastlm[tensorboard]") from None
        self._board = SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, figures: dict[str, Any]) -> None:
        self.records.append({"step": step, **figures})
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.records[-1]) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)
            self._board.flush()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            yield json.loads(line)
