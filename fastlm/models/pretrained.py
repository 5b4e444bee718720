"""Models in a folder: config.json and model.safetensors. Written whole or not at all, read with every fault named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastlm.config import Config

__all__ = ["Pretrained", "read_json", "read_tensors", "replacing", "write_tensors"]

_M = TypeVar("_M", bound="Pretrained")


class Pretrained(nn.Module):
    """A model that is built from its `config` alone."""

    config_type: ClassVar[type[Config]]
    config: Config

    def __init__(self, config: Config) -> None:
        if not isinstance(config, self.config_type):
            need, got = self.config_type.__name__, type(config).__name__
            raise TypeError(f"{type(self).__name__}: config must be a {need}, got {got}")
        super().__init__()
        self.config = config

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors. Each takes its name when it is complete, the configuration last."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as path:
            write_tensors(self.state_dict(), path)
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls: type[_M], directory: str | Path) -> _M:
        """The model that `save_pretrained` wrote, in evaluation mode, on the CPU, in the dtypes of the file.

        Raises FileNotFoundError where a file is missing; ValueError for a configuration with unknown or unfit fields,
        weights that are missing, unexpected or of another shape, and files that are damaged.
        """
        folder, name = Path(directory), cls.__name__
        values, weights = read_json(folder / "config.json"), read_tensors(folder / "model.safetensors")
        try:
            with torch.device("meta"):
                model = cls(cls.config_type.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        expected = model.state_dict()
        faults = [
            *(f"missing {key}" for key in expected if key not in weights),
            *(f"unexpected {key}" for key in weights if key not in expected),
            *(
                f"{key} has shape {tuple(weight.shape)} instead of {tuple(expected[key].shape)}"
                for key, weight in weights.items()
                if key in expected and weight.shape != expected[key].shape
            ),
        ]
        if faults:
            raise ValueError(f"{name}: the weights of {folder} do not fit its config.json: {'; '.join(faults)}")
        model.load_state_dict(weights, assign=True)
        return model.eval()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes the place of `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, on the disk when this returns."""
    path.touch()
    mode = path.stat().st_mode
    _safetensors().save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    path.chmod(mode)  # the library's own is for the owner alone
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own: not mapped, and aligned as torch aligns."""
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return {key: tensor.clone() for key, tensor in safetensors.load_file(path).items()}
    except Exception as error:  # the library raises its own kind, straight from Exception
        raise ValueError(f"{path} is damaged: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, got {type(values).__name__}")
    return values


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("the safetensors library is missing: pip install fastlm[train]") from None
    return safetensors.torch
