"""Make tables that compare methods, by class and over random seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vessa.metrics import METRICS, Scores

_HEADINGS = {"dice": "Dice", "iou": "IoU", "iou_fgbg": "IoU (fg+bg)", "hd95": "HD95"}


@dataclass(frozen=True)
class Row:
    """One method of a table. seeds: scores for each random seed; one entry if the method uses none."""

    name: str
    seeds: list[Scores]

    def values(self, metric: str, class_name: str | None = None) -> list[float]:
        """Return a metric for each seed, of one class or averaged over classes."""
        chosen = [s.mean if class_name is None else s.by_class[class_name] for s in self.seeds]
        return [v for c in chosen if (v := c[metric]) is not None]

    def mean(self, metric: str, class_name: str | None = None) -> float | None:
        """Return the mean over seeds; None if the metric has no value."""
        values = self.values(metric, class_name)
        return float(np.mean(values)) if values else None

    def cell(self, metric: str, class_name: str | None = None) -> str:
        """Return the mean, with several seeds also the standard deviation, as text."""
        values = self.values(metric, class_name)
        if not values:
            return "–"
        digits = 1 if metric == "hd95" else 3
        text = f"{np.mean(values):.{digits}f}"
        return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


@dataclass(frozen=True)
class Table:
    """Header and cells of a comparison, one line per class and method. best: (line, column) in bold."""

    header: list[str]
    lines: list[list[str]]
    best: set[tuple[int, int]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        stressed = [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(line)]
            for i, line in enumerate(self.lines)
        ]
        rows = [self.header, ["---"] * len(self.header), *stressed]
        return "\n".join("| " + " | ".join(r) + " |" for r in rows) + "\n"


def table(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> Table:
    """Compare some methods: first each class, then the mean over classes."""
    unit = rows[0].seeds[0].unit
    header = ["class", "method", *(_HEADINGS[m] + (f" ({unit})" if m == "hd95" else "") for m in metrics)]
    lines: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for name in (*rows[0].seeds[0].by_class, None):
        first = len(lines)
        lines += [[name or "mean", row.name, *(row.cell(m, name) for m in metrics)] for row in rows]
        for column, metric in enumerate(metrics, start=2):
            sign = -1 if metric == "hd95" else 1
            marks = [-np.inf if (v := row.mean(metric, name)) is None else sign * v for row in rows]
            if len(rows) > 1 and marks.count(max(marks)) == 1:
                best.add((first + int(np.argmax(marks)), column))
    return Table(header, lines, best)


def scores_from(data: Mapping[str, Any]) -> Scores:
    """Read scores from a summary."""
    return Scores(data["by_class"], data["mean"], data["unit"], data["counts"])


def missed(rows: Sequence[Row]) -> str:
    """Return a sentence on wholly missed or invented structures, which HD95 counts as a volume's diagonal."""
    parts = []
    for row in rows:
        counts = [c for scores in row.seeds for c in scores.counts.values()]
        empty, invented = (sum(c[k] for c in counts) for k in ("pred_empty", "truth_empty"))
        if empty or invented:
            parts.append(f"{row.name}: {empty} missed, {invented} invented")
    if not parts:
        return ""
    return (
        "HD95 counts a structure that is wholly missed or invented as the volume's diagonal. "
        + "; ".join(parts)
        + "."
    )


def cards(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return headline figures of methods: (name, Dice, other metrics)."""
    unit = rows[0].seeds[0].unit
    return [
        (r.name, r.cell("dice"), f"mean Dice · IoU {r.cell('iou')} · HD95 {r.cell('hd95')} {unit}")
        for r in rows
    ]
