"""Tables of methods: each class and the mean over classes, over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vessa.metrics import METRICS, Scores

_HEADINGS = {"dice": "Dice", "iou": "IoU", "iou_fgbg": "IoU (fg+bg)", "hd95": "HD95"}


@dataclass(frozen=True)
class Row:
    """One method of a table. seeds: its scores for each seed; one entry where seeds do not matter."""

    name: str
    seeds: list[Scores]

    def values(self, metric: str, class_name: str | None = None) -> list[float]:
        """A metric over seeds, of one class or of the mean over classes."""
        chosen = [s.mean if class_name is None else s.by_class[class_name] for s in self.seeds]
        return [v for c in chosen if (v := c[metric]) is not None]

    def mean(self, metric: str, class_name: str | None = None) -> float | None:
        """Mean over seeds; None where the metric was never scored."""
        values = self.values(metric, class_name)
        return float(np.mean(values)) if values else None

    def cell(self, metric: str, class_name: str | None = None) -> str:
        """Mean, and with several seeds the standard deviation, as text."""
        values = self.values(metric, class_name)
        if not values:
            return "–"
        digits = 1 if metric == "hd95" else 3
        text = f"{np.mean(values):.{digits}f}"
        return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


@dataclass(frozen=True)
class Table:
    """Header and cells of a comparison, a line for each class and method; best: (line, column) to stress."""

    header: list[str]
    lines: list[list[str]]
    best: set[tuple[int, int]]

    def markdown(self) -> str:
        """Write it as Markdown."""
        stressed = [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(line)]
            for i, line in enumerate(self.lines)
        ]
        rows = [self.header, ["---"] * len(self.header), *stressed]
        return "\n".join("| " + " | ".join(r) + " |" for r in rows) + "\n"


def table(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> Table:
    """Make the table of some methods: each class, then the mean over classes."""
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
    """Read scores back from a summary."""
    return Scores(data["by_class"], data["mean"], data["unit"], data["counts"])


def missed(rows: Sequence[Row]) -> str:
    """Say how often something was missed or invented: HD95 counts each as a volume's diagonal."""
    parts = []
    for row in rows:
        counts = [c for scores in row.seeds for c in scores.counts.values()]
        empty, invented = (sum(c[k] for c in counts) for k in ("pred_empty", "truth_empty"))
        if empty or invented:
            parts.append(f"{row.name}: {empty} missed, {invented} invented")
    if not parts:
        return ""
    return (
        "Structures wholly missed or invented count in HD95 as the volume's diagonal. "
        + "; ".join(parts)
        + "."
    )


def cards(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Headline figures of methods: name, Dice, the rest."""
    unit = rows[0].seeds[0].unit
    return [
        (r.name, r.cell("dice"), f"mean Dice · IoU {r.cell('iou')} · HD95 {r.cell('hd95')} {unit}")
        for r in rows
    ]
