"""Models in a folder: config.json and model.safetensors. Written whole or not at all, read with every fault named."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm.config import Config
from fastlm.models.huggingface import OTHER, Layout, Theirs

__all__ = ["Pretrained", "read_json", "read_tensors", "read_weights", "replacing", "write_tensors"]

_M = TypeVar("_M", bound="Pretrained")


class Pretrained(nn.Module):
    """A model that is built from its `config` alone.

    In a folder it is as Hugging Face writes it where one of `layouts` fits its configuration, else under its own names.
    """

    config_type: ClassVar[type[Config]]
    layouts: ClassVar[tuple[Layout, ...]] = ()
    architectures: ClassVar[dict[str, str]] = {}  # of the model types of the layouts: Hugging Face's name of the class
    body: ClassVar[str] = ""  # what the names of the body's weights begin with
    config: Config
    other_config: dict[str, Any]  # of the folder that it came from, what says nothing of the function that it is
    checkpointing: bool = False  # in training: keep the inputs of blocks only and compute the rest again in backward

    def __init__(self, config: Config) -> None:
        if not isinstance(config, self.config_type):
            need, got = self.config_type.__name__, type(config).__name__
            raise TypeError(f"{type(self).__name__}: config must be a {need}, got {got}")
        super().__init__()
        self.config, self.other_config = config, {}

    def through(self, block: nn.Module, *inputs: Any) -> Any:
        """What a block makes of its inputs."""
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of a training step for each token of a sequence: six for every weight of a matrix
        in the blocks (two forward, four backward), and the two products of attention."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if "blocks." in name and p.dim() == 2)
        return 6 * matrices + 12 * self.config.num_layers * self.config.hidden_size * seq_len  # type: ignore[attr-defined]

    @classmethod
    def read_more(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fields of ours that are in no table, of a configuration of theirs."""
        return {}

    def write_more(self) -> dict[str, Any]:
        return {}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors. Each takes its name when it is complete, the configuration last."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        values, weights, layout = self.config.to_dict(), self.state_dict(), self._layout()
        kind = type(self).__name__ if layout is None else self.architectures[layout.model_type]
        if layout is not None:
            dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
            values = {
                **self.other_config,
                **layout.write_config(values),
                **self.write_more(),
                **({"dtype": dtypes.pop()} if len(dtypes) == 1 else {}),
            }
            weights = layout.write_weights(self._table(layout), weights, self.config.num_heads)  # type: ignore[attr-defined]
        with replacing(folder / "model.safetensors") as path:
            write_tensors(weights, path)
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(values | {"architectures": [kind]}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls: type[_M], source: str | Path | nn.Module) -> _M:
        """The model of a folder, `save_pretrained`'s or Hugging Face's, or of a model of transformers; in evaluation
        mode, on the CPU, in the dtypes of its weights. Of pytorch_model.bin nothing is unpickled but tensors.

        A head that is not there at all is new, one that this model does not have is left out, both with a warning.

        Raises FileNotFoundError where a file is missing; ValueError for a configuration with unknown or unfit fields,
        weights that are missing, unexpected or of another shape, and files that are damaged.
        """
        if isinstance(source, nn.Module):
            place = faulty = type(source).__name__
            values = source.config.to_dict()  # type: ignore[union-attr, operator]
            weights = {name: weight.detach().cpu().clone() for name, weight in source.state_dict().items()}
        else:
            folder = Path(source)
            place, faulty = str(folder), str(folder / "config.json")
            values, weights = read_json(folder / "config.json"), read_weights(folder)
        try:
            layout, config, other = cls._read_config(values)
            with torch.device("meta"):
                model = cls(config)
        except ValueError as error:
            raise ValueError(f"{faulty}: {error}") from None
        model.other_config = other
        model._load(layout, weights, place)
        return model.eval()

    def load_folder(self, folder: Path) -> None:
        """The weights of a folder that this very model was saved to: nothing may be new or left out."""
        self._load(self._layout(), read_weights(folder), str(folder), whole=True)

    def _layout(self) -> Layout | None:
        values = self.config.to_dict()
        return next((layout for layout in self.layouts if layout.fits(values)), None)

    @classmethod
    def _read_config(cls, values: dict[str, Any]) -> tuple[Layout | None, Config, dict[str, Any]]:
        kind = values.get("model_type")
        if kind is None:  # ours, or of the time before there were model types
            own = cls.config_type.hints()
            count = {
                layout.model_type: sum(name in values and name not in own for name in layout.fields)
                for layout in cls.layouts
            }
            layout = max(cls.layouts, key=lambda layout: count[layout.model_type], default=None)
            if layout is None or not count[layout.model_type]:
                own_values = {name: value for name, value in values.items() if name != "architectures"}
                return None, cls.config_type.from_dict(own_values), {}
        else:
            layout = next((layout for layout in cls.layouts if layout.model_type == kind), None)
        if layout is None:
            known = " or ".join(repr(layout.model_type) for layout in cls.layouts)
            raise ValueError(f"{cls.__name__}: model_type must be {known}, got {kind!r}")
        ours = layout.read_config(values) | cls.read_more(values)
        other = {name: value for name, value in values.items() if name in OTHER and name not in layout.fields}
        return layout, cls.config_type.from_dict(ours), other

    def _table(self, layout: Layout) -> dict[str, Theirs]:
        return layout.table(self.config.num_layers, self.body)  # type: ignore[attr-defined]

    def _load(self, layout: Layout | None, weights: dict[str, Tensor], place: str, whole: bool = False) -> None:
        expected, table = self.state_dict(), {}
        if layout is not None:
            table = self._table(layout)
            weights = layout.read_weights(table, weights, self.config.num_heads)  # type: ignore[attr-defined]
        left_out = sorted(name for name in weights if not whole and name in table and name not in expected)
        weights = {name: weight for name, weight in weights.items() if name not in left_out}
        new = [
            name for name in expected if not whole and name not in weights and self._may_be_new(layout, name, weights)
        ]
        faults = [
            *(f"missing {name}" for name in expected if name not in weights and name not in new),
            *(f"unexpected {name}" for name in weights if name not in expected),
            *(
                f"{name} has shape {tuple(weight.shape)} instead of {tuple(expected[name].shape)}"
                for name, weight in weights.items()
                if name in expected and weight.shape != expected[name].shape
            ),
        ]
        if faults:
            raise ValueError(
                f"{type(self).__name__}: the weights of {place} do not fit its config.json: {'; '.join(faults)}"
            )
        dtype = next((weight.dtype for weight in weights.values()), torch.float32)
        for name in new:
            weights[name] = torch.empty(expected[name].shape, dtype=dtype)
            self.init_parameter(name, weights[name])
        self.load_state_dict(weights, assign=not whole)
        left_out = [name for name in left_out if name != "head.weight"]  # tied
        if new or left_out:
            said = [f"new: {', '.join(new)}"] * bool(new) + [f"left out: {', '.join(left_out)}"] * bool(left_out)
            warnings.warn(f"{type(self).__name__}: of {place} {'; '.join(said)}", stacklevel=3)

    def _may_be_new(self, layout: Layout | None, name: str, weights: dict[str, Tensor]) -> bool:
        """Whether a weight is of a head of which there is nothing."""
        if layout is None:
            return False
        bare = name.removeprefix(self.body)
        head = bare.split(".")[0] + "."
        heads = {ours.split(".")[0] + "." for ours in layout.heads} | {"pooler."}
        return head in heads and not any(each.removeprefix(self.body).startswith(head) for each in weights)


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
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    _safetensors().save_file(contiguous, path, metadata={"format": "pt"})  # transformers asks for it
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder: model.safetensors or pytorch_model.bin, whole or in the parts that an index names."""
    for name, read in (("model.safetensors", read_tensors), ("pytorch_model.bin", _read_pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return read(folder / name)
        if index.is_file():
            parts = read_json(index).get("weight_map")
            if not isinstance(parts, dict) or any(Path(str(part)).name != part for part in parts.values()):
                raise ValueError(f"{index} is damaged: weight_map must name files beside it")
            weights: dict[str, Tensor] = {}
            for part in sorted(set(parts.values())):
                weights |= read(folder / part)
            return weights
    raise FileNotFoundError(f"no such file: {folder / 'model.safetensors'}")


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, nothing else being unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, with advice over several lines
        raise ValueError(f"{path} is damaged, or holds more than tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{path} must hold tensors by their names")
    return weights


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
