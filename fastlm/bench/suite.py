"""The suite: every case on every side, checked against float64 before it is timed, the most important first."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlm
from fastlm.bench.cases import NAMES, Case, Problem
from fastlm.bench.check import judge
from fastlm.bench.harness import Comparison, compare, copy_bandwidth, gemm_rate
from fastlm.bench.peers import PEERS, Side
from fastlm.info import processor_name, version_of
from fastlm.ops import measured
from fastlm.ops.registry import OPS

__all__ = [
    "COMPILED",
    "EAGER",
    "OURS",
    "OURS_COMPILED",
    "THEIRS",
    "Job",
    "Result",
    "environment",
    "measure",
    "own_backends",
    "run_jobs",
]

# Times the allowed error that others may be off and still be timed: FastLM does not win by a rival's rounding.
LENIENCE = 10.0
EAGER, COMPILED, THEIRS = "eager", "torch.compile", "transformers"
OURS, OURS_COMPILED = "FastLM", "FastLM compiled"


@dataclass(frozen=True)
class Result(Comparison):
    """What was found out about a case; sides that were not timed are `wrong` or `missing`, with the reason.

    Args:
        kind: "op", "step" of training, or "generation".
        dtype: its name.
        flops: see `Problem`; 0 if that says nothing.
        chosen: the backend that "auto" chose.
        shares: from the name of a side that is right to its largest error as a share of the allowed one.
        wrong: from the name of a side to what is wrong with what it computes.
        missing: from the name of a side to why it did not run.
    """

    kind: str = "op"
    dtype: str = ""
    flops: int = 0
    chosen: str = ""
    shares: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def best(self, *sides: str) -> str:
        """The fastest of those sides that were timed, "" if none was."""
        return min((side for side in sides if side in self.times), key=self.median, default="")

    @property
    def ours(self) -> str:
        return self.best(OURS, OURS_COMPILED)

    @property
    def other(self) -> str:
        """What FastLM is held against: the better of eager and compiled PyTorch, or who else can do it."""
        return self.best(EAGER, COMPILED) or self.best(THEIRS)

    def speed_up(self) -> float | None:
        """How many times faster than `other`: on a GPU its own time, and where that is less, the wall's."""
        return self.against(self.ours, self.other)

    def against(self, ours: str, other: str) -> float | None:
        """How many times faster a side is than another; None if one of them was not timed."""
        if not (ours in self.times and other in self.times):
            return None
        ratio = self.ratio(ours, other)
        return min(ratio, dataclasses.replace(self, times=self.wall).ratio(ours, other)) if self.wall else ratio


@dataclass(frozen=True)
class Job:
    """Something to measure, by name."""

    name: str
    run: Callable[[], Result]


def run_jobs(jobs: Iterable[Job], budget: float | None = None) -> Iterator[Result | str]:
    """Results one after the other; once `budget` seconds are over, the names of those jobs that are left."""
    end = time.monotonic() + (float("inf") if budget is None else budget)
    for job in jobs:
        if time.monotonic() >= end:
            yield job.name
            continue
        try:
            yield job.run()
        except Exception as error:  # out of memory, or what a compiler did not foresee: the others still count
            print(f"{job.name}: {one_line(error)}", file=sys.stderr)
            yield Result(job.name, {}, missing={"everything": one_line(error)})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(
    case: Case,
    device: torch.device,
    backends: Sequence[str] | None = None,
    compiled: bool = True,
    seconds: float = 2.0,
) -> Result:
    """One case: eager PyTorch, compiled, FastLM as it chooses and by its backends, and the peers that are here.

    Args:
        case: the case.
        device: where.
        backends: of FastLM, besides its choice; None for its own kernels.
        compiled: whether torch.compile takes part.
        seconds: of timing, at least.
    """
    problem = case.build(device)
    chosen = _within(problem, lambda: fastlm.explain(problem.ours, *problem.inputs).backend or "")
    sides, missing = _sides(problem, backends, compiled)
    if case.option("dropout"):  # everyone drops something else: without dropout they can be checked
        same = tuple(option for option in case.options if not option.startswith("dropout"))
        without = dataclasses.replace(case, options=same).build(device)
        shares, wrong = _judged(without, _sides(without, backends, compiled)[0], missing)
    else:
        shares, wrong = _judged(problem, sides, missing)
    steps: dict[str, Callable[[], object]] = {
        name: problem.step(side.function, side.inputs)
        for name, side in sides.items()
        if not (name in wrong or name in missing)
    }
    timed = compare(str(case), steps, bytes=problem.bytes, seconds=seconds, number=0, memory=True, device=device)
    for name, text in wrong.items():
        print(f"{'WRONG':>36}  {name} {text}", flush=True)
    facts: dict[str, Any] = {"dtype": NAMES[case.dtype], "flops": problem.flops, "chosen": chosen}
    return Result(**vars(timed), **facts, shares=shares, wrong=wrong, missing=missing)


def own_backends(op: str, device: torch.device) -> list[str]:
    """FastLM's own backends for such a device, whether they can run here or not; those for any are torch's."""
    return [b.name for b in OPS[op].backends.values() if b.devices is not None and device.type in b.devices]


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) < 300 else f"{text[:300]} ..."


def _within(problem: Problem, call: Callable[[], Any]) -> Any:
    with torch.set_grad_enabled(problem.case.backward):
        return call()


def _sides(problem: Problem, backends: Sequence[str] | None, compiled: bool) -> tuple[dict[str, Side], dict[str, str]]:
    """Who can run it, and why others cannot."""
    op, device = problem.case.op, problem.inputs[0].device
    sides, missing = {EAGER: Side(problem.plain)}, {}
    if compiled:
        torch.compiler.reset()
        sides[COMPILED] = Side(torch.compile(problem.plain, dynamic=False))

    def own() -> list[Tensor] | None:
        return problem.copies() if problem.overwrites else None

    sides[OURS] = Side(problem.ours, own())
    for name in own_backends(op, device) if backends is None else backends:
        with fastlm.use_backend(name):
            explanation = _within(problem, lambda: fastlm.explain(problem.ours, *problem.inputs))
        if explanation.backend == name:
            sides[f"{OURS} {name}"] = Side(fastlm.use_backend(name)(problem.ours), own())
        else:
            missing[f"{OURS} {name}"] = "; ".join(explanation.reasons[name])
    for peer in PEERS:
        if op in peer.adapters:
            try:
                sides[peer.name] = peer.side(problem)
            except Exception as error:
                missing[peer.name] = one_line(error)
    return sides, missing


def _judged(
    problem: Problem, sides: dict[str, Side], missing: dict[str, str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Shares of the allowed error and what is wrong, by side; who raises is put among the missing."""
    exact = problem.run(problem.reference, problem.copies(torch.float64))
    torchs = problem.run(problem.plain, problem.inputs)
    names = [f"output {n}" for n in range(len(exact[0]))] + [f"gradient {n}" for n in range(len(exact[1]))]
    shares, wrong = {}, {}
    for side, (function, inputs) in ((name, (s.function, s.inputs)) for name, s in sides.items() if name != EAGER):
        try:
            got = problem.run(function, problem.inputs if inputs is None else inputs)
            if len(got[0]) != len(exact[0]):
                raise ValueError(f"gives {len(got[0])} outputs, not {len(exact[0])}")
        except Exception as error:
            missing[side] = one_line(error)
            continue
        given = [*got[0], *got[1]]
        if not side.startswith(OURS):  # a peer may give its loss in fp32
            given = [x.to(like.dtype) for x, like in zip(given, [*torchs[0], *torchs[1]], strict=True)]
        tensors = zip(given, [*torchs[0], *torchs[1]], [*exact[0], *exact[1]], names, strict=True)
        verdicts = [judge(*each) for each in tensors]
        share = max(share for share, _ in verdicts)
        if share > (1.0 if side.startswith(OURS) else LENIENCE):
            wrong[side] = "; ".join(text for _, text in verdicts if text)
        else:
            shares[side] = share
    return shares, wrong


# Circumstances --------------------------------------------------------------------------------------------------

NVIDIA_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def environment(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """What a figure means nothing without, and what this machine can reach at all."""
    facts = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["fastlm", *sys.argv[1:]]),
        "fastlm": f"{fastlm.__version__}, {revision()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": f"{processor_name()}, {torch.get_num_threads()} threads",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"{properties.major}.{properties.minor}"
        facts["gpu"] = f"compute capability {capability}, {properties.multi_processor_count} SMs, {memory}"
        facts["cuda"] = str(torch.version.cuda)
        facts |= _nvidia_smi(device.index or 0)
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    own = measured.entries().get(measured.device_name(device, threads), {})
    facts["fastlm tune"] = f"{sum(len(found) for dtypes in own.values() for found in dtypes.values())} measurements"
    for peer in PEERS:
        there = importlib.util.find_spec(peer.module) is not None
        facts[peer.name] = version_of(peer.name) if there else "not installed"
    return {"facts": facts, "info": str(fastlm.info()), "peaks": peaks(device, dtypes)}


def peaks(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """Bytes per second of a copy, and FLOP per second of a product of matrices by dtype."""
    return {"copy": copy_bandwidth(device)} | {NAMES[dtype]: gemm_rate(dtype, device) for dtype in dtypes}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def revision() -> str:
    """Of the checkout this is, or of what was built."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return fastlm.info().build.get("revision", "unknown revision")
    return git.stdout.strip()


def _nvidia_smi(index: int) -> dict[str, str]:
    query = [f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader", f"--id={index}"]
    try:
        done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(NVIDIA_SMI, (value.strip() for value in done.stdout.split(",")), strict=False))
