"""What measurements say of "auto": which backend is the fastest for an op on a kind of device.

The committed table is measured.json: class of device -> op -> dtype -> [backend, elements of the first input from which
on]. The class of a CPU is "cpu" and what torch makes of it ("cpu AVX512"), of a GPU its name. What is not in the table
has not been measured, and is left to the order of the op. Attention with key_lengths, or of one query, goes by the
elements of the keys, the linear layer by those of the weight, for few rows.

A user's own measurements come before it: `fastlm tune` writes them to tuned.json in the cache's folder. versions ->
device -> op -> dtype -> bucket of sizes -> what was found. Only what the versions that run now have measured on the
device that is asked for counts.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import cache

TABLE = json.loads(Path(__file__).with_suffix(".json").read_text())
NOTHING = ("", 0)

Sizes = tuple[int | str, ...]  # what the fastest backend of an op depends on: numbers, and names of options ("" if off)


def device_class(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _entry(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, int]:
    dtypes = TABLE.get(device_class(device), {}).get(op, {})
    return tuple(dtypes.get(_name(dtype), NOTHING))


def fastest(op: str, tensor: Tensor) -> str:
    """The backend that is fastest for such a first input; "" if nothing is known."""
    backend, elements = _entry(op, tensor.device, tensor.dtype)
    return backend if backend and tensor.numel() >= elements else ""


# The user's own -------------------------------------------------------------------------------------------------------


def tuned(op: str, tensor: Tensor, sizes: Sizes) -> str:
    """The backend that `fastlm tune` found to be the fastest on this device for such sizes; "" if it was not asked."""
    threads = torch.get_num_threads() if tensor.is_cpu else 0
    try:
        return _winner(op, tensor.device, tensor.dtype, threads, torch.is_grad_enabled(), sizes)
    except TypeError:  # a size that a compiler does not know yet has no hash
        return ""


@functools.lru_cache(maxsize=2**16)
def _winner(op: str, device: torch.device, dtype: torch.dtype, threads: int, training: bool, sizes: Sizes) -> str:
    found = entries().get(device_name(device, threads), {}).get(op, {}).get(_name(dtype), {})
    return found.get(bucket(sizes, training), {}).get("backend", "")


def bucket(sizes: Sizes, training: bool) -> str:
    """Sizes between the same two powers of two are measured once: ((4096, 768, ""), True) is "4096 1024 training"."""
    parts = [str(1 << (size - 1).bit_length() if size else 0) if isinstance(size, int) else size for size in sizes]
    return " ".join([*filter(None, parts), "training" if training else "inference"])


def device_name(device: torch.device, threads: int) -> str:
    """The device as the user's measurements name it: a CPU by its model and torch's threads."""
    if device.type != "cpu":
        return device_class(device)
    from fastlm.info import processor_name

    return f"{device_class(device)}, {processor_name()}, {threads} threads"


def versions() -> str:
    """Of all that decides how fast a backend is."""
    import fastlm
    from fastlm.info import version_of

    build = Path(__file__).parents[1] / "_build_info.json"
    revision = json.loads(build.read_text())["revision"] if build.exists() else ""
    parts = [f"fastlm {fastlm.__version__}", revision, f"torch {torch.__version__}", f"triton {version_of('triton')}"]
    return ", ".join(filter(None, parts))


def tuned_file() -> Path:
    return cache.folder() / "tuned.json"


@functools.cache
def entries() -> dict[str, Any]:
    """The user's measurements by the versions that run now, device -> op -> dtype -> bucket -> found."""
    return _read().get(versions(), {}) if tuned_file().exists() else {}


def _read() -> dict[str, Any]:
    """The whole file; nothing of one that is not ours."""
    try:
        content = json.loads(tuned_file().read_text())
        if not all(
            isinstance(entry.get("backend"), str)
            for devices in content.values()
            for ops in devices.values()
            for dtypes in ops.values()
            for buckets in dtypes.values()
            for entry in buckets.values()
        ):
            raise ValueError("an entry without a backend")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        warnings.warn(f"tune: what was measured is not used, {tuned_file()} cannot be read: {error}", stacklevel=2)
        return {}
    return content


def keep(found: dict[tuple[str, str, str, str], dict[str, Any]]) -> Path:
    """Adds measurements of (device, op, dtype, bucket) to the user's file, and "auto" knows them from then on.

    Raises OSError where the file cannot be written; it is then as it was.
    """
    path, content = tuned_file(), _read()
    for keys, entry in found.items():
        place = content.setdefault(versions(), {})
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tuned")
    try:
        with open(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    forget()
    return path


def forget() -> None:
    """The file is read anew at the next call."""
    entries.cache_clear()
    _winner.cache_clear()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
