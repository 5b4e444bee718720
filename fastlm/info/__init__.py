"""What this installation is: versions, processor, GPUs, what was built, and which backends every op has here."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import fastlm

PACKAGE = Path(__file__).parent.parent
# What the CPU kernels look for, under the names of /proc/cpuinfo.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


@dataclass(frozen=True)
class BackendStatus:
    """One backend of one op: the devices it serves, and why it cannot run on this machine ("" if it can)."""

    devices: str
    missing: str


@dataclass(frozen=True, repr=False)
class Info:
    """What `info` found; `str()` of it is the report.

    Attributes:
        versions: package name to version, or why there is none.
        processor: name, cores, features.
        gpu: CUDA runtime, driver and devices.
        build: for each of "cpu" and "cuda" what was built, or why not; the toolchains, flags and revision.
        ops: op name to backend name to the devices it serves here, or why it cannot run here.
    """

    versions: dict[str, str]
    processor: dict[str, str]
    gpu: dict[str, str]
    build: dict[str, str]
    ops: dict[str, dict[str, BackendStatus]]

    def __str__(self) -> str:
        sections = {"versions": self.versions, "processor": self.processor, "gpu": self.gpu, "built": self.build}
        lines = [line for title, rows in sections.items() for line in (title, *_aligned(list(rows.items())), "")]
        return "\n".join([*lines, *_table(self.ops)])

    __repr__ = __str__


def info() -> Info:
    """Says what this installation has and lacks, and why; `print(fastlm.info())` is for reading and for bug reports.

    Returns:
        Info: versions, processor, GPUs, what was built for which architectures, and a table of ops and backends.
    """
    from fastlm.ops import registry

    ops = {
        op.name: {
            backend.name: BackendStatus(", ".join(sorted(backend.devices or ["any"])), backend.available())
            for backend in op.backends.values()
        }
        for op in registry.OPS.values()
    }
    return Info(_versions(), _processor(), _gpu(), _build(), ops)


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    return _processor()["name"]


def _versions() -> dict[str, str]:
    return {
        "fastlm": fastlm.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": version_of("triton"),
    }


def _processor() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    features = {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "threads": f"{torch.get_num_threads()} used by torch, {os.cpu_count()} in the machine",
        "features": " ".join(name for name in CPU_FEATURES if name in flags) or "none of those the kernels look for",
        "torch uses": torch.backends.cpu.get_cpu_capability(),
    }
    missing = [name for name in CPU_FEATURES if name not in flags]
    return features | ({"lacks": " ".join(missing)} if missing else {})


def _gpu() -> dict[str, str]:
    driver = Path("/sys/module/nvidia/version")
    found = {
        "cuda runtime": torch.version.cuda or "none, this torch was built without CUDA",
        "driver": driver.read_text().strip() if driver.exists() else "not loaded",
    }
    if not torch.cuda.is_available():  # asks the driver how many devices there are, and initialises none of them
        return found | {"devices": "none"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} multiprocessors"
        found[f"device {index}"] = f"{device.name}, compute capability {device.major}.{device.minor}, {memory}"
    return found


def _build() -> dict[str, str]:
    path = PACKAGE / "_build_info.json"
    if not path.exists():
        return {"nothing": f"{PACKAGE} was not installed; `pip install -e .` or `make setup` builds it"}
    recorded = json.loads(path.read_text())
    rows = {"revision": recorded["revision"] or "unknown"}
    for part in ("cpu", "cuda"):
        rows |= _built_part(part, recorded[part])
    if recorded["cpu"]["built"]:
        try:
            importlib.import_module("fastlm._C")
        except ImportError as error:
            rows["fastlm._C"] = f"built, but does not import: {error}"
    return rows


def _built_part(part: str, toolchain: dict[str, Any]) -> dict[str, str]:
    if not toolchain["built"]:
        return {part: f"not built: {toolchain['reason']}"}
    rows = {part: f"built with {toolchain['compiler']}"}
    if part == "cuda":
        rows["cuda architectures"] = " ".join(toolchain["architectures"])
        if toolchain["architectures_skipped"]:
            rows["cuda skipped"] = f"{' '.join(toolchain['architectures_skipped'])}, which this nvcc does not know"
    options = [flag for flag in toolchain["flags"] if not flag.startswith("-gencode")]
    return rows | {f"{part} flags": " ".join(options)}


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of equal length as indented lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _table(ops: dict[str, dict[str, BackendStatus]]) -> list[str]:
    """Ops by backends: devices served, "no" with the reason below, "-" where the op has no such backend."""
    backends = list(dict.fromkeys(name for row in ops.values() for name in row))
    rows: list[tuple[str, ...]] = [("op", *backends)]
    reasons: dict[str, None] = {}
    for op, row in ops.items():
        cells = ["-" if name not in row else "no" if row[name].missing else row[name].devices for name in backends]
        rows.append((op, *cells))
        reasons |= {f"  no {name}: {status.missing}": None for name, status in row.items() if status.missing}
    return ["ops", *_aligned(rows), *reasons]
