"""The curves of a run as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.models.pretrained import replacing

__all__ = ["plot_confusion", "plot_loss"]


def plot_loss(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    bytes_per_token: float | None = None,
    baselines: Mapping[str, float] | None = None,
) -> None:
    """Training loss, validation loss and baselines over the steps, the learning rate below, as a PNG.

    Args:
        records: the lines of metrics.jsonl.
        bytes_per_token: of the validation text; with it the axis on the right is in bits per byte of that text.
        baselines: name to bits per byte, drawn as lines; they need `bytes_per_token`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.set(ylabel="loss (nats)", yscale="log")
    rates = [(record["step"], record["lr"]) for record in records if "lr" in record]
    below.plot(*zip(*rates, strict=True) if rates else ((), ()), color="C2", linewidth=1.2)
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    below.grid(alpha=0.3)
    for key, name, color, marker in (("loss", "training", "C0", ""), ("val_loss", "validation", "C3", "o")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            label = f"{name}, {points[-1][1]:.3f} at the end"
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linewidth=1.2, label=label)
    if bytes_per_token is not None:
        nats = math.log(2) * bytes_per_token  # nats per token that make one bit per byte
        for (name, bits), style in zip((baselines or {}).items(), ("--", "-.", ":"), strict=False):
            label = f"{name}, {bits:.3f} bits per byte"
            axes.axhline(bits * nats, color="0.4", linestyle=style, linewidth=1.0, label=label)
        right = axes.secondary_yaxis("right", functions=(lambda y: np.divide(y, nats), lambda y: np.multiply(y, nats)))
        right.set_ylabel("bits per byte of the validation text")
        right.yaxis.set_major_formatter(ScalarFormatter())
        right.yaxis.set_minor_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def plot_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """How often each class (row) was taken for each (column), and the share of its row as the colour, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = np.asarray(counts, dtype=np.float64)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    side = min(14.0, 2.6 + 0.55 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [name if len(name) <= 20 else name[:19] + "…" for name in classes]
    few = len(classes) <= 30  # else names and numbers would run into each other
    axes.set(xlabel="predicted", ylabel="label")
    places = range(len(classes)) if few else []
    axes.set_xticks(places, names if few else [], rotation=45 if len(classes) > 3 else 0)
    axes.set_yticks(places, names if few else [])
    for (row, column), count in np.ndenumerate(table if few else np.empty((0, 0))):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,.0f}", ha="center", va="center", color=color)
    figure.colorbar(image, label="share of the label's texts")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
