"""How far a run has come: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_PLAIN_SECONDS = 5.0


class Progress:
    """A context manager around a run of `steps` steps; `update` may be called as often as there is something new."""

    def __init__(self, steps: int, quiet: bool = False) -> None:
        self._steps, self._quiet = steps, quiet
        self._live: Any = None
        self._printed = -_PLAIN_SECONDS
        if quiet:
            return
        from rich.console import Console
        from rich.progress import BarColumn
        from rich.progress import Progress as Live

        console = Console()
        if console.is_terminal:
            columns = ("{task.description}", BarColumn(24), "{task.fields[figures]}")
            self._live = Live(*columns, console=console, refresh_per_second=2)
            self._task = self._live.add_task("first steps", total=steps, figures="")

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, figures: str) -> None:
        name = f"step {step:,}/{self._steps:,}"
        if self._live is not None:
            self._live.update(self._task, completed=step, description=name, figures=figures)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS or step == self._steps:
            self._printed = time.monotonic()
            self.line(f"{name}   {figures}")

    def line(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, flush=True)
