"""A run's folder and its settings."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.cli.parser import called
from fastlm.config import nearest, read_toml

__all__ = ["RunAskedFor", "existing_run", "how_to_go_on", "new_run", "tables_of"]

TABLES = ("model", "data", "train")


@dataclass(frozen=True)
class RunAskedFor:
    """What the options of `Parser.add_run` say.

    Args:
        folder: of the run to go on with; None: a new one.
        file: its configuration, or the one that was named.
        options: of the Trainer.
    """

    out: Path
    name: str | None
    folder: Path | None
    file: Path | None
    options: dict[str, Any]

    @classmethod
    def of(cls, given: dict[str, Any]) -> RunAskedFor:
        """Takes them out of what was given."""
        out, name, file = Path(given.pop("out", "runs")), given.pop("name", None), given.pop("config", None)
        options: dict[str, Any] = {key: given.pop(key) for key in ("profile", "price_per_hour") if key in given}
        if not given.pop("resume", False):
            return cls(out, name, None, None if file is None else Path(file), options)
        folder = existing_run(out, name)
        if file is not None:
            raise ValueError("--resume takes the configuration of the run, and no other")
        return cls(out, name, folder, folder / "config.toml", options)


def tables_of(file: str | Path | None, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says about a run, and over it what options say, named `table.field`."""
    tables = {} if file is None else read_toml(Path(file))
    for table, values in tables.items():
        if table not in TABLES or not isinstance(values, dict):
            raise ValueError(f"{file}: unknown table {table!r}{nearest(table, TABLES)}")
    said: dict[str, dict[str, Any]] = {table: dict(tables.get(table, {})) for table in TABLES}
    for key, value in given.items():
        table, _, field = key.partition(".")
        said[table][field] = value
    return said


def new_run(out: Path, name: str | None, data: str | None) -> Path:
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise ValueError(f"--name must be the name of a folder, got {name!r}")
    if name is not None and (out / name).exists():
        raise FileExistsError(
            f"{out / name} exists: --resume --name {name} goes on with it, another --name starts anew"
        )
    base = "stdlib" if data is None else Path(data).resolve().stem or "root"
    names = (base if n == 1 else f"{base}-{n}" for n in itertools.count(1))
    return out / (name or next(name for name in names if not (out / name).exists()))


def how_to_go_on(command: str, folder: Path, step: int, several: bool) -> str:
    """What to say of a run that was stopped."""
    torchrun = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", ""), "-m", "fastlm"]
    where = [] if folder.parent == Path("runs") else ["--out", str(folder.parent)]
    line = [*(torchrun if several else [called()]), command, "--resume", "--name", folder.name, *where]
    return f"stopped and saved at step {step:,}; to go on:\n  {shlex.join(line)}"


def existing_run(out: Path, name: str | None) -> Path:
    runs = [path.parent for path in out.glob("*/config.toml") if name in (None, path.parent.name)]
    if not runs:
        raise FileNotFoundError(f"there is no run to resume in {out}" if name is None else f"no such run: {out / name}")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)
