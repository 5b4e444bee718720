"""Results as a file of JSON, and from that file alone a page of Markdown and charts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlm.bench.suite import COMPILED, EAGER, OURS, OURS_COMPILED, THEIRS, Result

__all__ = ["EQUAL", "Report", "slow"]

EQUAL = 0.97  # times as fast, from which on (and up to its inverse) nobody is called faster
MEMORY_SHOWN = 2**20  # bytes; less says nothing
READING = """\
Milliseconds: median (p20 to p80) of alternating runs, forward and backward unless the case says forward. Before it was
timed every side was held to the error rule against float64 (at most twice the error of eager PyTorch and 4 ulp):
FastLM strictly, the others within ten times that. Of the roof: how near FastLM comes to that copy or product of
matrices, whichever bounds the case; what stays in a cache goes beyond it."""
BLUE, ORANGE, GREY = "#4c78a8", "#f58518", "#9d9d9d"


@dataclasses.dataclass
class Report:
    """What a run found out.

    Args:
        environment: `facts` by name, `info` (that of `fastlm.info()`) and measured `peaks`.
        results: in the order of measuring.
        skipped: names of what was left out when the time was over.
    """

    environment: dict[str, Any]
    results: list[Result] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises ValueError for a file that is not such a report, and OSError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(data["environment"], [Result(**result) for result in data["results"]], data["skipped"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has no results of fastlm bench: {error!r}") from None

    @property
    def device(self) -> str:
        return self.environment["facts"]["device"]

    @property
    def stem(self) -> str:
        """The device's name as that of a file."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def write_json(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.stem}.json"
        lines = [f'{{"environment": {json.dumps(self.environment)},', '"results": [']
        lines.append(",\n".join(json.dumps(_short(dataclasses.asdict(result))) for result in self.results))
        lines.append(f'],\n"skipped": {json.dumps(self.skipped)}}}\n')
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    def write_page(self, folder: Path) -> list[Path]:
        """The page and its charts; without matplotlib the page alone, which says so."""
        folder.mkdir(parents=True, exist_ok=True)
        charts = self._draw(folder)
        page = folder / f"{self.stem}.md"
        page.write_text(self.markdown({title: path.name for title, path in charts.items()}), encoding="utf-8")
        return [page, *charts.values()]

    # The page ---------------------------------------------------------------------------------------------------

    def markdown(self, charts: dict[str, str]) -> str:
        facts = self.environment["facts"]
        lines = [f"# FastLM on {self.device}", ""]
        lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in facts.items()]
        lines += [f"- measured here: {_peaks(self.environment['peaks'])}", ""]
        lines += [READING]
        if any(result.wall for result in self.results):
            lines += [
                "Times are the GPU's own, from a cold cache; a speed-up is the lesser of that time's and the wall's."
            ]
        lines += ["", self._summary(), ""]
        lines += [line for title, file in charts.items() for line in (f"![{title}]({file})", "")]
        if not charts:
            lines += ["No charts: matplotlib is not installed (`pip install fastlm[train]`).", ""]
        lines += ["## Where FastLM loses", "", *self._losses(), ""]
        for kind, title in (("op", "Ops"), ("step", "Training steps"), ("generation", "Generation")):
            if results := [result for result in self.results if result.kind == kind and result.times]:
                lines += [f"## {title}", "", *self._table(results), ""]
        lines += ["## Errors", "", *self._errors(), ""]
        lines += ["## Not measured", "", *self._left_out(), ""]
        return "\n".join([*lines, "## The installation", "", "```", self.environment["info"], "```", ""])

    def _summary(self) -> str:
        speeds = [speed for result in self.results if (speed := result.speed_up()) is not None]
        faster = sum(speed > 1 / EQUAL for speed in speeds)
        slower = sum(speed < EQUAL for speed in speeds)
        equal = len(speeds) - faster - slower
        return (
            f"Of {len(speeds)} cases FastLM is faster than the better of eager PyTorch and torch.compile in {faster},"
            f" as fast within 3% in {equal}, slower in {slower}. Generation is held against that of transformers."
        )

    def _losses(self) -> list[str]:
        rows = []
        for result in sorted(self.results, key=lambda result: result.speed_up() or 0):
            speed = result.speed_up()
            if speed is None or speed >= EQUAL:
                continue
            named = result.best(*(side for side in result.times if side.startswith(f"{OURS} ")))
            against = result.against(named, result.other) if named else None
            best = f"{named} {against:.2f}" if against is not None else "-"
            rows.append([result.case, f"{speed:.2f}", result.other, result.chosen or result.ours, best])
        if not rows:
            return ["Nowhere among these cases."]
        heads = ["case", "times as fast", "the faster one", "FastLM ran", "its best named backend, times as fast"]
        return _table(heads, rows)

    def _table(self, results: Sequence[Result]) -> list[str]:
        sides = list(dict.fromkeys(side for result in results for side in result.times))
        walls = any(result.wall for result in results)
        heads = ["case", *(f"{side}, ms" for side in sides), "FastLM ran", "times as fast", "of the roof"]
        heads += ["wall, eager / FastLM"] if walls else []
        heads += ["peak MiB, " + " / ".join(shown := [s for s in sides if s in _MEMORY_SIDES])]
        rows = []
        for result in results:
            speed, share = result.speed_up(), self.share_of_roof(result)
            row = [result.case, *(self._cell(result, side) for side in sides), result.chosen or result.ours]
            row += ["-" if speed is None else f"{speed:.2f}", "-" if share is None else f"{share:.0%}"]
            if walls:
                wall = dataclasses.replace(result, times=result.wall)
                row.append(" / ".join(_milliseconds(wall.median(s)) if s in wall.times else "-" for s in (EAGER, OURS)))
            row.append(" / ".join(_mebibytes(result.memory.get(side)) for side in shown))
            rows.append(row)
        return _table(heads, rows)

    def _cell(self, result: Result, side: str) -> str:
        if side in result.wrong:
            return "WRONG"
        if side not in result.times:
            return ""
        low, middle, high = (_milliseconds(result.quantile(side, q)) for q in (0.2, 0.5, 0.8))
        return f"{middle} ({low} to {high})"

    def _errors(self) -> list[str]:
        worst: dict[str, tuple[float, str]] = {}
        for result in self.results:
            for side, share in result.shares.items():
                worst[side] = max(worst.get(side, (0.0, "")), (share, result.case))
        if not worst:
            return ["No case was checked."]
        rows = [[side, f"{share:.2f}", case] for side, (share, case) in worst.items()]
        return _table(["", "largest error / allowed", "in"], rows)

    def _left_out(self) -> list[str]:
        why: dict[str, list[str]] = {}
        for result in self.results:
            for side, text in result.wrong.items():
                why.setdefault(f"WRONG: {side}: {text}", []).append(result.case)
            for side, text in result.missing.items():
                why.setdefault(f"{side}: {text}", []).append(result.case)
        lines = [
            f"- {reason} ({cases[0] if len(cases) == 1 else f'{len(cases)} cases'})" for reason, cases in why.items()
        ]
        if self.skipped:
            lines.append(f"- {len(self.skipped)} cases, for the time was over: {'; '.join(self.skipped)}")
        return lines or ["Nothing was left out."]

    def share_of_roof(self, result: Result) -> float | None:
        """How near FastLM comes to what the machine reaches: the time of a copy or of a product of matrices."""
        peaks = self.environment["peaks"]
        if OURS not in result.times or not result.bytes:
            return None
        roof = max(result.bytes / peaks["copy"], result.flops / peaks.get(result.dtype, float("inf")))
        return roof / result.median(OURS)

    # The charts -------------------------------------------------------------------------------------------------

    def _draw(self, folder: Path) -> dict[str, Path]:
        """From the title of a chart to its file; empty without matplotlib."""
        try:
            import matplotlib
        except ImportError:
            return {}
        matplotlib.use("Agg")
        charts: dict[str, tuple[str, Callable[[], Any]]] = {
            "Times as fast as the better of eager PyTorch and torch.compile": ("", self._draw_speed),
            "Roofline": ("-roofline", self._draw_roofline),
            "Peak memory": ("-memory", self._draw_memory),
        }
        paths = {}
        for title, (suffix, draw) in charts.items():
            figure = draw()
            if figure is not None:
                paths[title] = folder / f"{self.stem}{suffix}.png"
                figure.suptitle(f"{title}\n{self.device}", fontsize=11)
                figure.savefig(paths[title], dpi=120)
        return paths

    def _draw_speed(self) -> Any:
        shown = [(result.case, speed) for result in self.results if (speed := result.speed_up()) is not None]
        if not shown:
            return None
        cases, speeds = zip(*sorted(shown, key=lambda pair: -pair[1]), strict=True)
        figure, (axes,) = _figure(9, 0.24 * len(shown) + 1.4)
        colours = [ORANGE if speed < EQUAL else BLUE if speed > 1 / EQUAL else GREY for speed in speeds]
        bars = axes.barh(cases, [speed - 1 for speed in speeds], left=1, color=colours)
        axes.bar_label(bars, [f"{speed:.2f}" for speed in speeds], padding=3, fontsize=8)
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.85 * min(1.0, *speeds), 1.3 * max(1.0, *speeds))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=8)
        axes.set_xlabel("times as fast; orange: slower, grey: within 3%", fontsize=9)
        axes.margins(y=0.01)
        return figure

    def _draw_roofline(self) -> Any:
        results = [r for r in self.results if r.flops and r.bytes and OURS in r.times]
        peaks = self.environment["peaks"]
        dtypes = [dtype for dtype in peaks if any(result.dtype == dtype for result in results)]
        if not dtypes:
            return None
        figure, all_axes = _figure(5 * len(dtypes) + 1, 4.6, len(dtypes))
        ops = list(dict.fromkeys(result.case.split()[0] for result in results))
        colours = dict(zip(ops, [f"C{n % 10}" for n in range(len(ops))], strict=True))
        intensity = [2 ** (n / 4) for n in range(-8, 49)]
        for axes, dtype in zip(all_axes, dtypes, strict=True):
            axes.plot(intensity, [min(peaks[dtype], peaks["copy"] * x) / 1e9 for x in intensity], color="black")
            for result in (result for result in results if result.dtype == dtype):
                x = result.flops / result.bytes
                if EAGER in result.times:
                    eager = result.flops / result.median(EAGER) / 1e9
                    axes.plot(x, eager, "o", markersize=6, markerfacecolor="none", color=GREY)
                colour = colours[result.case.split()[0]]
                axes.plot(x, result.flops / result.median(OURS) / 1e9, "o", markersize=5, color=colour)
            axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
            axes.set_title(
                f"{dtype}: copy {peaks['copy'] / 1e9:.0f} GB/s, GEMM {peaks[dtype] / 1e9:,.0f} GFLOP/s", fontsize=9
            )
            axes.grid(alpha=0.3)
        for op in ops:
            all_axes[0].plot([], [], "o", color=colours[op], label=op)
        all_axes[0].plot([], [], "o", markerfacecolor="none", color=GREY, label="eager PyTorch")
        all_axes[0].legend(fontsize=7, frameon=False)
        return figure

    def _draw_memory(self) -> Any:
        shown = [r for r in self.results if max(r.memory.values(), default=0) >= MEMORY_SHOWN]
        if not shown:
            return None
        figure, (axes,) = _figure(9, 0.36 * len(shown) + 1.4)
        sides = ((EAGER, GREY), (COMPILED, ORANGE), (OURS, BLUE))
        for n, (side, colour) in enumerate(sides):
            widths = [result.memory.get(side, 0) / 2**20 for result in shown]
            axes.barh([row + 0.27 * (n - 1) for row in range(len(shown))], widths, 0.25, color=colour, label=side)
        axes.set_yticks(range(len(shown)), [result.case for result in shown])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(left=MEMORY_SHOWN / 2**20)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize=8)
        axes.margins(y=0.01)
        axes.set_xlabel("MiB at the peak, beyond what was there before", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        return figure


def slow(results: Iterable[Result]) -> list[str]:
    """What "auto" must not be: slower than plain PyTorch, eager or both compiled, or not right; a line each."""
    lines = []
    for result in results:
        for ours, plain in ((OURS, EAGER), (OURS_COMPILED, COMPILED)):
            speed = result.against(ours, plain)
            if speed is not None and speed < EQUAL:
                lines.append(f"{result.case}: {ours} is {speed:.3f} of {plain}, at least {EQUAL} wanted")
        for side, why in (*result.wrong.items(), *result.missing.items()):
            if side in (OURS, OURS_COMPILED, "everything"):
                lines.append(f"{result.case}: {side}: {why}")
    return lines


_MEMORY_SIDES = (EAGER, COMPILED, THEIRS, OURS)


def _figure(width: float, height: float, columns: int = 1) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _short(value: Any) -> Any:
    """With five digits of every number, which is more than a time has."""
    if isinstance(value, dict):
        return {name: _short(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.{3 if value < 1 else 2 if value < 100 else 0}f}"


def _mebibytes(bytes: int | None) -> str:
    return "-" if bytes is None else f"{bytes / 2**20:,.0f}"


def _peaks(peaks: dict[str, float]) -> str:
    rates = [
        f"a product of matrices in {name} {rate / 1e12:.2f} TFLOP/s" for name, rate in peaks.items() if name != "copy"
    ]
    return ", ".join([f"a copy {peaks['copy'] / 1e9:.1f} GB/s", *rates])
