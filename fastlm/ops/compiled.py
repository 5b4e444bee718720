"""Kernels that are compiled: whether those of `fastlm._C` and of Triton can run here, and how `fastlm._C` is called."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Launchers:
    """The launchers of one backend; attributes are functions of `fastlm._C`, under the names without `suffix`.

    Args:
        suffix: "_cpu" for the CPU kernels, "" for CUDA.
        extra: from a tensor, what a launcher takes after its parameters.
        missing: "" or why there are none.
        load: gives the extension module.
    """

    def __init__(
        self,
        suffix: str,
        extra: Callable[[Tensor], tuple[int, ...]],
        missing: Callable[[], str],
        load: Callable[[], Any],
    ) -> None:
        self.suffix, self.extra, self.missing, self.load = suffix, extra, missing, load

    def __getattr__(self, name: str) -> Any:  # the first time only
        value = self.dtypes() if name == "codes" else getattr(self.load(), name + self.suffix)
        setattr(self, name, value)
        return value

    def dtypes(self) -> dict[torch.dtype, int]:
        """The numbers by which launchers know dtypes."""
        return {getattr(torch, name): code for name, code in self.load().DTYPES.items()}


class Recorder(Launchers):
    """Launchers that launch nothing yet: `run` makes all the launches, in order, as often as it is called.

    What the launches read and write must live as long as this.
    """

    def __init__(self, launchers: Launchers) -> None:
        super().__init__(launchers.suffix, launchers.extra, launchers.missing, launchers.load)
        self.launches: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if name == "codes":
            return super().__getattr__(name)
        later = getattr(self.load(), f"{name}{self.suffix}_later")
        return lambda *args: self.launches.append(later(*args))

    def run(self) -> None:
        self.load().run_all(self.launches)


def extension() -> ModuleType:
    return importlib.import_module("fastlm._C")


@functools.cache
def cpu_missing() -> str:
    """Why there are no CPU kernels; "" if there are."""
    try:
        extension()
    except ImportError as error:
        return f"fastlm._C is not built: {_reason('cpu') or error}"
    return ""


@functools.cache
def cuda_missing() -> str:
    """Why CUDA kernels cannot run; "" if they can."""
    if missing := cpu_missing():
        return missing
    if not hasattr(extension(), "layer_norm_fwd"):
        return f"fastlm._C has no CUDA kernels: {_reason('cuda')}"
    return "" if torch.cuda.is_available() else "no CUDA device is available"


def _reason(part: str) -> str:
    recorded = Path(__file__).parent.parent / "_build_info.json"
    return json.loads(recorded.read_text())[part]["reason"] if recorded.exists() else "fastlm was never built"


def cpu_launchers(target: str | None = None) -> Launchers:
    """The CPU kernels in the best variant that the processor runs, or in the one named, of `_C.CPU_TARGETS`."""

    @functools.cache
    def number() -> tuple[int]:
        targets = extension().CPU_TARGETS
        return (targets[target or list(targets)[-1]],)

    return Launchers("_cpu", lambda tensor: number(), cpu_missing, extension)


def _device_and_stream(tensor: Tensor) -> tuple[int, int]:
    device = tensor.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


CPU = cpu_launchers()
CUDA = Launchers("", _device_and_stream, cuda_missing, extension)


def triton_devices() -> set[str]:
    """Devices that Triton kernels serve; under its interpreter (TRITON_INTERPRET=1) also the CPU."""
    return {"cuda", "cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda"}


@functools.cache
def triton_missing() -> str:
    """Why Triton kernels cannot run; "" if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if torch.cuda.is_available() or "cpu" in triton_devices() else "no CUDA device is available"
