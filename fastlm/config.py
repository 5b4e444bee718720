"""Configurations: frozen dataclasses whose fields are checked against their annotations, to and from JSON values."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["Config", "nearest", "read_toml", "to_toml"]

_C = TypeVar("_C", bound="Config")


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of the configurations. A subclass checks ranges in its `__post_init__`, after this one, with `_need`.

    Fields are int, float (an int will do, and becomes one), bool, str, a `Literal` of strings, one of these | None, or
    a dict from names to JSON values.
    A value of another type raises ValueError with the field, what it needs and what it got.
    """

    def __post_init__(self) -> None:
        for name, hint in self.hints().items():
            value = getattr(self, name)
            if float in (hint, *get_args(hint)) and type(value) is int:
                object.__setattr__(self, name, value := float(value))
            self._need(_is_a(value, hint), name, _described(hint))

    def _need(self, ok: bool, name: str, need: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}: {name} must be {need}, got {getattr(self, name)!r}")

    @classmethod
    def hints(cls) -> dict[str, Any]:
        """The type of every field."""
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """What the docstring's `Args:` say about every field."""
        lines = dict(re.findall(r"^ +(\w+): (.+)$", cls.__doc__ or "", re.MULTILINE))
        return {name: lines.get(name, "") for name in cls.hints()}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_C], values: Mapping[str, Any]) -> _C:
        """Raises ValueError for a name that is not a field, with the nearest that is, and for fields left out."""
        for name in values:
            if name not in cls.hints():
                raise ValueError(f"{cls.__name__}: unknown field {name!r}{nearest(name, cls.hints())}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{cls.__name__}: {', '.join(missing)} must be given")
        return cls(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: `; did you mean ...?` where one of the known is like it."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises FileNotFoundError, and ValueError for what is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of strings, numbers, booleans, and tables of these, as TOML; None, which it has not, is left out."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{json.dumps(name)} = {text(part)}" for name, part in value.items()) + "}"
        return json.dumps(value)  # of the rest TOML's notation is JSON's

    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{name} = {text(value)}" for name, value in values.items() if value is not None), ""]
    return "\n".join(lines)


def _is_a(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (types.UnionType, Union):
        return any(_is_a(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return type(value) is hint


def _described(hint: Any) -> str:
    if get_origin(hint) in (types.UnionType, Union):
        return " or ".join(_described(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is dict:
        return "a table of names and values"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(hint, "None")
