"""What every benchmark shares: alternating timings, ratios pair by pair, and a results table with its chart.

Machines are noisy, so the sides of a comparison take turns within one process, and what counts is the median of the
ratios of neighbours in time, never a ratio of two separate runs.
"""

from __future__ import annotations

import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import fastlm

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Seconds of each run of both sides, in the order in which they took turns."""

    case: str
    baseline: list[float]
    ours: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over neighbouring runs."""
        return statistics.median(b / o for b, o in zip(self.baseline, self.ours, strict=True))

    def row(self) -> list[str]:
        return [self.case, _milliseconds(self.baseline), _milliseconds(self.ours), f"{self.ratio:.2f}"]


def compare(
    case: str, baseline: Callable[[], object], ours: Callable[[], object], *, seconds: float = 4.0, least: int = 7
) -> Comparison:
    """Runs the two in turn, each first every other time, after a warm-up of both: at least `least` times each."""
    sides = (baseline, ours)
    for side in sides:
        side()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for side in (0, 1) if len(times[0]) % 2 else (1, 0):
            times[side].append(_seconds(sides[side]))
    result = Comparison(case, *times)
    print("  ".join(f"{cell:>28}" if n == 0 else f"{cell:>24}" for n, cell in enumerate(result.row())), flush=True)
    return result


def write_results(name: str, title: str, columns: Sequence[str], comparisons: Sequence[Comparison]) -> None:
    """Writes benchmarks/results/<name>.md and .png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    RESULTS.mkdir(exist_ok=True)
    lines = [f"# {title}", "", *(f"- {line}" for line in _circumstances()), ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(comparison.row())} |" for comparison in comparisons]
    (RESULTS / f"{name}.md").write_text("\n".join([*lines, "", f"![{title}]({name}.png)", ""]))

    figure, axes = pyplot.subplots(figsize=(8, 0.34 * len(comparisons) + 1.2), layout="constrained")
    bars = axes.barh([c.case for c in comparisons], [c.ratio for c in comparisons], color="#4c78a8")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(c.ratio for c in comparisons))
    axes.set_xlabel("times as fast as plain PyTorch (median of alternating runs)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / f"{name}.png", dpi=120)
    pyplot.close(figure)
    print(f"wrote {RESULTS / name}.md and .png")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _milliseconds(times: list[float]) -> str:
    low, middle, high = (1e3 * _quantile(times, q) for q in (0.2, 0.5, 0.8))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _quantile(times: list[float], q: float) -> float:
    ordered = sorted(times)
    return ordered[round(q * (len(ordered) - 1))]


def _circumstances() -> list[str]:
    """Processor, versions, commit and command: what a figure means nothing without."""
    processor = fastlm.info().processor
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent)
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return [
        ", ".join([processor["name"], f"{torch.get_num_threads()} threads", processor["torch uses"], *gpu]),
        f"torch {torch.__version__}, Python {platform.python_version()}, FastLM {git.stdout.strip()}",
        f"`python {shlex.join(sys.argv)}`; milliseconds as median (p20 to p80) of alternating runs",
    ]
