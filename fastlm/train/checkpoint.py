"""Checkpoints: folders `checkpoint-<step>` that appear whole or not at all; no file in them is ever unpickled.

    config.json, model.safetensors    the model, as `from_pretrained` reads it
    training.safetensors              state of the optimizers and of the random generators
    training.json                     step, configuration, everything else

A folder is written under another name and renamed when all of it is on the disk; only then do older ones go. So a kill
at any moment leaves the last one, and the one with the highest step is always whole. `best` is a link to the one whose
evaluation had the lowest loss.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.models.pretrained import Pretrained, read_json, read_tensors, replacing, write_tensors

__all__ = ["latest", "load", "save"]

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"
Optimizers = dict[str, torch.optim.Optimizer]


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`."""
    return max(_checkpoints(folder), key=_step, default=None)


def save(
    folder: Path,
    step: int,
    model: Pretrained,
    optimizers: Optimizers,
    state: dict[str, Any],
    *,
    keep: int = 1,
    best: int | None = None,
) -> None:
    """Write `checkpoint-<step>` into `folder`; once it is whole, all but the last `keep` and that of step `best` go.

    `state` must hold JSON values.
    """
    final = folder / f"checkpoint-{step}"
    partial = folder / f"{_PARTIAL}{final.name}"
    for stale in folder.glob(f"{_PARTIAL}*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    try:
        if not final.exists():  # else this very step was saved before
            model.save_pretrained(partial)
            write_tensors(_optimizer_tensors(model, optimizers) | _random_state(), partial / "training.safetensors")
            with open(partial / "training.json", "w", encoding="utf-8") as file:
                json.dump({"step": step, **state}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if best is not None and (folder / f"checkpoint-{best}").exists():
        with replacing(folder / "best") as link:
            link.symlink_to(f"checkpoint-{best}")
    older = sorted((path for path in _checkpoints(folder) if _step(path) <= step), key=_step)
    for old in older[:-keep]:
        if _step(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def load(checkpoint: Path, model: Pretrained, optimizers: Optimizers) -> dict[str, Any]:
    """Put a checkpoint into a model, optimizers and random generators like those it was saved from; return its state.

    Raises FileNotFoundError or ValueError for a checkpoint that is not whole or not of such a model.
    """
    state = read_json(checkpoint / "training.json")
    tensors = read_tensors(checkpoint / "training.safetensors")
    random = {key: tensors.pop(key) for key in [*tensors] if key.startswith("random.")}
    try:
        model.load_folder(checkpoint)
        parameters = dict(model.named_parameters())
        for key, tensor in tensors.items():
            optimizer, _, rest = key.partition(".")
            name, _, field = rest.rpartition(".")
            parameter = parameters[name]
            # A count of steps stays where the optimizer wants it: on the CPU unless it is fused or capturable.
            on_device = tensor.dim() or optimizers[optimizer].defaults.get("fused")
            optimizers[optimizer].state[parameter][field] = tensor.to(parameter.device) if on_device else tensor
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of this model: {error}") from None
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["random.cuda"])
    return state


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _optimizer_tensors(model: Pretrained, optimizers: Optimizers) -> dict[str, Tensor]:
    """`<optimizer>.<parameter>.<field>`: tensors, but for numbers that NAdam and ASGD keep as such."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[parameter]}.{field}": torch.as_tensor(value)
        for kind, optimizer in optimizers.items()
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
        if value is not None
    }


def _random_state() -> dict[str, Tensor]:
    cuda = {"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"random.cpu": torch.get_rng_state(), **cuda}
