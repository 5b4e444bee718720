"""The options of a command."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from fastlm.config import Config, nearest

__all__ = ["Parser", "called", "tell"]


class Parser(argparse.ArgumentParser):
    """`parse` gives only what was given, and raises ValueError with one line."""

    def __init__(self, command: str, description: str | None) -> None:
        super().__init__(f"fastlm {command}", description=description, allow_abbrev=False)

    def add_run(self) -> None:
        """What every run takes: CONFIG, and which run it is."""
        self.add_argument("config", metavar="CONFIG", nargs="?", help="TOML with the tables model, data and train")
        self.add_argument("--name", help="of the run [that of the data]")
        self.add_argument("--out", metavar="DIR", help="where runs are kept [runs]")
        self.add_argument("--resume", action="store_true", help="go on with a run: the latest, or the one --name says")
        self.add_argument("--profile", action="store_true", help="write a trace of three steps to trace.json")
        self.add_argument("--price-per-hour", metavar="X", type=float, help="of the machine: says what the run costs")

    def add_fields(
        self,
        table: str,
        kind: type[Config],
        defaults: Mapping[str, Any],
        leave_out: Sequence[str] = (),
        also: Mapping[str, str] | None = None,
    ) -> None:
        """An option for every field: --table.field, --field, and --table.field without a num- that it begins with."""
        group, documentation = self.add_argument_group(table), kind.documentation()
        for name, hint in kind.hints().items():
            if name in leave_out:
                continue
            default, bare = defaults.get(name, getattr(kind, name, None)), name.removeprefix("num_")
            flags = [f"--{table}.{name}", *([f"--{table}.{bare}"] if bare != name else []), f"--{name}"]
            flags = [flag.replace("_", "-") for flag in flags]
            flags[-1] = (also or {}).get(name, flags[-1])
            options: dict[str, Any] = {"help": f"{documentation[name]} [{default}]", "dest": f"{table}.{name}"}
            kinds = [part for part in get_args(hint) or (hint,) if part is not type(None)]
            if hint is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif get_origin(hint) is Literal or get_origin(kinds[0]) is Literal:
                options["choices"] = get_args(hint if get_origin(hint) is Literal else kinds[0])
            elif get_origin(hint) is dict:
                options |= {"type": json.loads, "metavar": "JSON"}
            else:
                options["type"] = kinds[0]
                options["metavar"] = {int: "N", float: "X"}.get(kinds[0], "TEXT")
            group.add_argument(*flags, **options)

    def parse(self, argv: list[str]) -> dict[str, Any]:
        for action in self._actions:
            action.default = argparse.SUPPRESS
        argv = [_dashed(argument) for argument in argv]
        options, unknown = self.parse_known_args(argv)
        for argument in unknown:
            option = argument.partition("=")[0]
            kind = "option" if option.startswith("-") else "argument"
            raise ValueError(f"unknown {kind} {option}{nearest(option, self._option_string_actions)}")
        return {name: value for name, value in vars(options).items() if value is not None}

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument ", "", message))


def _dashed(argument: str) -> str:
    """--num_layers=3 as --num-layers=3."""
    option, equals, value = argument.partition("=")
    return (option.replace("_", "-") if option.startswith("--") else option) + equals + value


def tell(line: str) -> None:
    print(line, flush=True)


def called() -> str:
    """How this command can be called again: by its name, or by its path where the name means another or nothing."""
    called, known = sys.argv[0], shutil.which("fastlm")
    by_path = Path(called).name == "fastlm" and not (known and os.path.samefile(called, known))
    return called if by_path else "fastlm"
