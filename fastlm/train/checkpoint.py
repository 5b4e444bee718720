"""Checkpoints: folders `checkpoint-<step>` that appear whole or not at all; no file in them is ever unpickled.

    config.json, model.safetensors    the model, as `from_pretrained` reads it
    training/*.safetensors            state of the optimizers, a file of each process: torch.distributed.checkpoint's,
                                      which any number of processes reads, whatever their parallelism
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
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.models.pretrained import Pretrained, read_json, replacing
from fastlm.train.parallel import Processes

__all__ = ["latest", "load", "save"]

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL, _STATE = ".partial-", "training"
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
    processes: Processes,
    *,
    keep: int = 1,
    best: int | None = None,
) -> None:
    """Write `checkpoint-<step>` into `folder`; once it is whole, all but the last `keep` and that of step `best` go.

    `state` must hold JSON values. Every process calls this, and `folder` must be the same for all of them.
    """
    final = folder / f"checkpoint-{step}"
    partial = folder / f"{_PARTIAL}{final.name}"

    def clear() -> bool:
        for stale in folder.glob(f"{_PARTIAL}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        return final.exists()  # this very step was saved before

    def finish() -> None:
        shards = sorted(f"{_STATE}/{path.name}" for path in (partial / _STATE).glob("*"))
        with open(partial / "training.json", "w", encoding="utf-8") as file:
            json.dump({"step": step, "shards": shards, **state}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, final)

    if not processes.once(clear):
        try:
            whole = processes.gathered(model)
            processes.once(lambda: whole.save_pretrained(partial) if whole is not None else None)
            _write_state(_optimizer_tensors(model, optimizers), partial / _STATE, processes)
            processes.once(finish)
        finally:
            if processes.first:
                shutil.rmtree(partial, ignore_errors=True)
    processes.once(lambda: _keep(folder, step, keep, best))


def _keep(folder: Path, step: int, keep: int, best: int | None) -> None:
    if best is not None and (folder / f"checkpoint-{best}").exists():
        with replacing(folder / "best") as link:
            link.symlink_to(f"checkpoint-{best}")
    older = sorted((path for path in _checkpoints(folder) if _step(path) <= step), key=_step)
    for old in older[:-keep]:
        if _step(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def load(checkpoint: Path, model: Pretrained, optimizers: Optimizers, processes: Processes) -> dict[str, Any]:
    """Put a checkpoint into a model and optimizers like those it was saved from; return its state.

    Raises FileNotFoundError or ValueError, in every process, for a checkpoint that is not whole or not of such a model.
    """
    state = processes.once(lambda: read_json(checkpoint / "training.json"))
    place = checkpoint / _STATE if "shards" in state else checkpoint  # as it was when there was but one process
    shapes = processes.once(lambda: _shapes(checkpoint, place, state.get("shards", ["training.safetensors"])))
    shapes = {key: shape for key, shape in shapes.items() if key.partition(".")[0] in optimizers}
    try:
        _load_state(place, shapes, model, optimizers, processes)
        processes.load_folder(model, checkpoint)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint of this model: {error}") from None
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


def _write_state(tensors: dict[str, Tensor], place: Path, processes: Processes) -> None:
    """On the disk when this returns; of what several processes have, one writes it."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    with _plain_errors():
        save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True),
            no_dist=not processes.several,
        )


def _shapes(checkpoint: Path, place: Path, shards: list[str]) -> dict[str, tuple[int, ...]]:
    """Of all tensors in the files of `place`."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    for shard in shards:
        if not (checkpoint / shard).is_file():
            raise FileNotFoundError(f"no such file: {checkpoint / shard}")
    try:
        metadata = HuggingFaceStorageReader(str(place)).read_metadata()
    except Exception as error:  # safetensors raises its own kind, straight from Exception
        raise ValueError(f"{place} is damaged: {error}") from None
    return {key: tuple(each.size) for key, each in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def _load_state(
    place: Path, shapes: dict[str, tuple[int, ...]], model: Pretrained, optimizers: Optimizers, processes: Processes
) -> None:
    """The optimizers make their state by a step, since each alone knows where it wants what; the weights that it
    changes are still to be loaded."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    parameters = dict(model.named_parameters())
    for key in shapes:
        parameter = parameters[key.partition(".")[2].rpartition(".")[0]]
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    made = _optimizer_tensors(model, optimizers)
    tensors = {key: made[key] for key in shapes}
    for key, shape in shapes.items():
        if shape != tuple(tensors[key].shape):
            raise ValueError(f"{key} has shape {shape} instead of {tuple(tensors[key].shape)}")
    if tensors:
        with _plain_errors():
            load(tensors, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=not processes.several)
    for name, parameter in parameters.items():
        for kind, optimizer in optimizers.items():
            fields = optimizer.state.get(parameter, {})
            for field, value in list(fields.items()):
                key = f"{kind}.{name}.{field}"
                if key not in tensors:
                    del fields[field]
                elif not torch.is_tensor(value):
                    fields[field] = tensors[key].item()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The error itself in place of the CheckpointException of all processes, and no warning that there is but one."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
