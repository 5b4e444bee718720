"""What every benchmark shares: alternating timings, ratios pair by pair, and a results table with its chart.

Machines are noisy, so the sides of a comparison take turns within one process, and what counts is the median of the
ratios of neighbours in time, never a ratio of two separate runs.
"""

from __future__ import annotations

import ctypes
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastlm

RESULTS = Path("benchmarks/results")
LEAST_SECONDS = 2e-3  # of one timing, where `compare` is to choose how often a side runs within it


@dataclass(frozen=True)
class Comparison:
    """Seconds of each run of every side, in the order in which they took turns.

    Args:
        case: what was run.
        times: from the name of a side to its runs.
        bytes: what must be moved to and from memory, 0 if that says nothing.
        memory: from the name of a side to the bytes it needed at most beyond what was there before; may be empty.
        unit: of the times when they are shown, "ms" or "us".
        wall: of a GPU, where `times` are its own: the same with what it costs to launch the work.
    """

    case: str
    times: dict[str, list[float]]
    bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    unit: str = "ms"
    wall: dict[str, list[float]] = field(default_factory=dict)

    def median(self, side: str) -> float:
        return statistics.median(self.times[side])

    def quantile(self, side: str, q: float) -> float:
        ordered = sorted(self.times[side])
        return ordered[round(q * (len(ordered) - 1))]

    def ratio(self, ours: str, *others: str) -> float:
        """How many times faster ours is than the best of the others: the median over neighbouring runs."""
        best = min(others or set(self.times) - {ours}, key=self.median)
        return statistics.median(b / o for b, o in zip(self.times[best], self.times[ours], strict=True))

    def cell(self, side: str) -> str:
        """Median and spread of a side's runs."""
        if side not in self.times:
            return ""
        scale = {"ms": 1e3, "us": 1e6}[self.unit]
        low, middle, high = (scale * self.quantile(side, q) for q in (0.2, 0.5, 0.8))
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def compare(
    case: str,
    sides: dict[str, Callable[[], object]],
    *,
    bytes: int = 0,
    seconds: float = 4.0,
    least: int = 7,
    number: int = 1,
    memory: bool = False,
    settle: bool = False,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Runs the sides in turn, in an order that changes each round, after a warm-up: at least `least` rounds.

    Args:
        number: how often a side runs within one timing, for what takes microseconds; 0 for as often as is needed.
        memory: whether to find out what each side needs at most.
        settle: a side runs once untimed before it is timed, for what it changes for the next.
        device: on "cuda" the times are the GPU's own, from a cold cache, and `wall` the host's.
    """
    for run in sides.values():
        run()
        run()
    number = number or max(1, min(1000, round(LEAST_SECONDS / min(seconds_of(run) for run in sides.values()))))
    on_gpu = torch.device(device).type == "cuda"
    peaks = {name: _peak_memory(run, on_gpu) for name, run in sides.items()} if memory else {}
    clock = _Clock() if on_gpu else None
    times: dict[str, list[float]] = {name: [] for name in sides}
    wall: dict[str, list[float]] = {name: [] for name in sides} if clock else {}
    order = list(sides)
    end = time.perf_counter() + seconds
    while len(times[order[0]]) < least or time.perf_counter() < end:
        for name in order:
            if settle:
                sides[name]()
            if clock:
                wall[name].append(seconds_of(sides[name], number))
                times[name].append(clock.seconds_of(sides[name]))
            else:
                times[name].append(seconds_of(sides[name], number))
        order = [*order[1:], order[0]]
    result = Comparison(case, times, bytes, peaks, "ms" if number == 1 else "us", wall)
    print(f"{case:>36}  " + "   ".join(f"{name} {result.cell(name)}" for name in sides), flush=True)
    return result


def copy_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second, read and written, of the fastest copy of 64 MiB: what a kernel bound by memory can reach.

    On a GPU of 512 MiB, which neither fit into its cache nor take less time than their launch.
    """
    source = torch.randn((16 if torch.device(device).type == "cpu" else 128) * 2**20, device=device)
    target = torch.empty_like(source).copy_(source)
    runs = [seconds_of(lambda: target.copy_(source), 1) for _ in range(30)]
    return 2 * source.nbytes / min(runs)


def gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP per second of the fastest of ten products of square matrices: what arithmetic can reach."""
    size = 2048 if torch.device(device).type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(10))


def read_bandwidth() -> float:
    """Bytes per second of sums of 512 MiB on the CPU, their median: what a kernel that reads memory once can reach."""
    source = torch.ones(128 * 2**20)
    return source.nbytes / statistics.median(seconds_of(lambda: source.sum(), 1) for _ in range(30))


Column = tuple[str, Callable[[Comparison], str]]


def write_results(
    name: str,
    title: str,
    comparisons: Sequence[Comparison],
    columns: Sequence[Column],
    ratio: Callable[[Comparison], float],
    ratio_name: str,
) -> None:
    """Writes benchmarks/results/<name>.md and .png: a table of the sides and `columns`, a chart of `ratio`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    RESULTS.mkdir(parents=True, exist_ok=True)
    sides = list(dict.fromkeys(side for comparison in comparisons for side in comparison.times))
    heads = ["case", *(f"{side}, {comparisons[0].unit}" for side in sides), *(head for head, _ in columns), ratio_name]
    lines = [f"# {title}", "", *(f"- {line}" for line in _circumstances()), ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for comparison in comparisons:
        cells = [
            *(comparison.cell(side) for side in sides),
            *(cell(comparison) for _, cell in columns),
            f"{ratio(comparison):.2f}",
        ]
        lines.append(f"| {' | '.join([comparison.case, *cells])} |")
    (RESULTS / f"{name}.md").write_text("\n".join([*lines, "", f"![{title}]({name}.png)", ""]))

    ratios = [ratio(comparison) for comparison in comparisons]
    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(comparisons) + 1.2), layout="constrained")
    bars = axes.barh([c.case for c in comparisons], ratios, color="#4c78a8")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(ratios))
    axes.set_xlabel(f"{ratio_name} (median of alternating runs)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    pyplot.close(figure)
    print(f"wrote {RESULTS / name}.md and .png")


def seconds_of(run: Callable[[], object], number: int = 1) -> float:
    """Of one call, in the mean of `number`."""
    start = time.perf_counter()
    for _ in range(number):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


class _Clock:
    """Times work on a GPU alone: its first kernel waits until the last has been launched, and finds the cache cold."""

    def __init__(self) -> None:
        self.filler = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any cache
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.filled = min(self._between(self.filler.zero_) for _ in range(5))

    def _between(self, run: Callable[[], object]) -> float:
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def seconds_of(self, run: Callable[[], object]) -> float:
        begin = time.perf_counter()
        run()
        launching = time.perf_counter() - begin
        for _ in range(1 + min(100, int(launching / self.filled))):
            self.filler.zero_()
        return self._between(run)


def _peak_memory(run: Callable[[], object], on_gpu: bool) -> int:
    """Bytes that a run needs beyond what is there before it; on a CPU as Linux counts them, 0 elsewhere."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps for later would be taken from there unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return 0
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _circumstances() -> list[str]:
    """Processor, versions, commit and command: what a figure means nothing without."""
    processor = fastlm.info().processor
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return [
        ", ".join([processor["name"], f"{torch.get_num_threads()} threads", processor["torch uses"], *gpu]),
        f"torch {torch.__version__}, Python {platform.python_version()}, FastLM {git.stdout.strip()}",
        f"`python {shlex.join(sys.argv)}`; times are medians (p20 to p80) of alternating runs",
    ]
