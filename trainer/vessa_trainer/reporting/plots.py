"""Draw the curves of a run and of a comparison from metrics.jsonl."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vessa import atomic_write
from vessa.masks.colors import CHART_COLORS, class_hex

mpl.use("Agg")

_INK, _GRID = "#1c2430", "#dfe4ea"
_SMOOTH = 15  # rows of metrics.jsonl over which a noisy curve is averaged


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; a line that a kill cut is left out."""
    rows = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_metrics(run: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a run's metrics.jsonl."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(run: Path, step: int) -> None:
    """Drop the rows after a step, and a line that a kill cut: the resumed run writes them again."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    atomic_write.write_text(run / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_progress(run: Path, title: str) -> None:
    """Draw a run's progress.png."""
    with atomic_write.replacing(run / "progress.png") as fresh:
        progress_figure(read_metrics(run), title).savefig(fresh, format="png", dpi=110)


def progress_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw one run: losses, validation Dice, VESSA's labels, weights of the sources, learning rate."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(title, color=_INK, fontsize=12)
    _curves(axes[0, 0], rows, {k: k.removeprefix("loss_") for k in _LOSSES}, smooth=True)
    _finish(axes[0, 0], "loss", bottom=0)
    for key, name, color in (
        ("val_teacher", "teacher", CHART_COLORS[1]),
        ("val_student", "student", CHART_COLORS[2]),
        ("val_vessa", "VESSA", CHART_COLORS[3]),
    ):
        points = validation_dice(rows, key)
        if points:
            axes[0, 1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=color)
    _finish(axes[0, 1], "validation Dice", bottom=0, top=1)
    for color, (name, points) in zip(map(class_hex, count(1)), _class_curves(rows), strict=False):
        axes[0, 2].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, color=color)
    _finish(axes[0, 2], "validation Dice of the teacher", bottom=0, top=1)
    _curves(axes[1, 0], rows, _SHARES, smooth=True)
    _finish(axes[1, 0], "share", bottom=0, top=1)
    _curves(axes[1, 1], rows, {"agreement": "teacher and VESSA"}, smooth=True)
    _curves(axes[1, 1], [{"step": r["step"], **r["feed"]} for r in rows if r.get("feed")], _LABELS)
    _finish(axes[1, 1], "Dice of VESSA's labels", bottom=0, top=1)
    axes[1, 1].set_visible(bool(axes[1, 1].lines))
    _curves(axes[1, 2], rows, {"lr": ""})
    _finish(axes[1, 2], "learning rate", bottom=0)
    return figure


_LOSSES = ("loss_sup", "loss_unsup", "loss_teacher", "loss_vessa")
_SHARES = {
    "eta": "teacher's weight (eta)",
    "confident": "confident pixels, teacher",
    "vessa_confident": "confident pixels, VESSA",
}
_LABELS = {
    "label_dice": "against the truth",
    "echo_before": "against the prompts, before",
    "echo_after": "against the prompts, after",
}


def comparison_figure(runs: Mapping[str, Sequence[Path]]) -> Figure:
    """Draw the teacher's validation Dice of methods, one thin line a seed and their mean."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, (name, paths) in enumerate(runs.items()):
        color = CHART_COLORS[index % len(CHART_COLORS)]
        curves = [dict(validation_dice(read_metrics(p), "val_teacher")) for p in paths]
        for curve in curves:
            axis.plot(list(curve), list(curve.values()), color=color, linewidth=0.8, alpha=0.45)
        steps = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
        mean = [np.mean([c[s] for c in curves]) for s in steps]
        axis.plot(steps, mean, color=color, linewidth=2, marker="o", markersize=3, label=name)
    _finish(axis, "validation Dice", bottom=0, top=1)
    return figure


def bars_figure(
    methods: Mapping[str, Sequence[Sequence[float]]], classes: Sequence[str], label: str
) -> Figure:
    """Draw one metric as bars: a group a class, a bar a method, a dot a seed.

    methods: name to one list of seeds' values for each class
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / max(1, len(methods))
    for index, (name, by_class) in enumerate(methods.items()):
        left = np.arange(len(classes)) + (index - (len(methods) - 1) / 2) * width
        heights = [float(np.mean(v)) if len(v) else 0.0 for v in by_class]
        axis.bar(
            left, heights, width * 0.92, color=CHART_COLORS[index % len(CHART_COLORS)], alpha=0.85, label=name
        )
        for x, values in zip(left, by_class, strict=True):
            if len(values) > 1:
                axis.plot([x] * len(values), values, ".", color=_INK, markersize=4)
    axis.set_xticks(range(len(classes)), [c.replace(" ", "\n", 1) for c in classes], fontsize=8)
    axis.margins(y=0.1 + 0.08 * len(methods))  # room for the legend above the highest bar
    _finish(axis, label, bottom=0, x_label="")
    axis.grid(axis="x", visible=False)
    axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
    return figure


def budgets_figure(methods: Mapping[str, Sequence[tuple[float, Sequence[float]]]], label: str) -> Figure:
    """Draw a metric over the label budget (Fig. 1): a line a method, a dot a seed.

    methods: name to (percent labeled, the values of its seeds), in the order of the budgets
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    percents = sorted({p for points in methods.values() for p, _ in points})
    places = {p: i for i, p in enumerate(percents)}  # 1, 5, 10 and 100 % side by side
    for index, (name, points) in enumerate(methods.items()):
        color = CHART_COLORS[index % len(CHART_COLORS)]
        known = [(places[p], v) for p, v in points if len(v)]
        axis.plot(
            [x for x, _ in known], [float(np.mean(v)) for _, v in known],
            color=color, linewidth=2, marker="o", markersize=5, label=name,
        )  # fmt: skip
        for x, values in known:
            axis.plot([x] * len(values), values, ".", color=color, markersize=4, alpha=0.5)
    axis.set_xticks(range(len(percents)), [f"{p:g} %" for p in percents])
    _finish(axis, label, bottom=0, top=1, x_label="labeled training patients")
    return figure


def validation_dice(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return steps and mean Dice of a model's validations; those without a score are left out."""
    return [(r["step"], dice) for r in rows if key in r and (dice := r[key]["mean"]["dice"]) is not None]


def _class_curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    seen = [r for r in rows if "val_teacher" in r]
    for name in seen[0]["val_teacher"]["by_class"] if seen else []:
        scores = [(r["step"], r["val_teacher"]["by_class"][name]["dice"]) for r in seen]
        if points := [(step, dice) for step, dice in scores if dice is not None]:
            yield name, points


def _curves(
    axis: Axes, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], *, smooth: bool = False
) -> None:
    for key, name in names.items():
        points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
        if not points:
            continue
        steps, values = (np.array(v, float) for v in zip(*points, strict=True))
        color = CHART_COLORS[1 + _drawn(axis) % (len(CHART_COLORS) - 1)]
        if smooth and len(points) > 2 * _SMOOTH:
            axis.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
            sums = np.convolve(values, np.ones(_SMOOTH), "same")
            values = sums / np.convolve(np.ones_like(values), np.ones(_SMOOTH), "same")
        axis.plot(steps, values, label=name or "_", linewidth=1.4, color=color)


def _drawn(axis: Axes) -> int:
    return sum(not str(line.get_label()).startswith("_") for line in axis.lines)


def _finish(
    axis: Axes, label: str, *, bottom: float | None = None, top: float | None = None, x_label: str = "step"
) -> None:
    axis.set_xlabel(x_label, fontsize=8, color=_INK)
    if x_label == "step":
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_title(label, fontsize=10, color=_INK, loc="left")
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_ylim(bottom=bottom, top=top)
    if axis.get_legend_handles_labels()[0]:
        # A fixed place, because the search for the best one is slow and matplotlib warns about that.
        axis.legend(fontsize=8, frameon=False, loc="lower right" if top == 1 else "upper right")
