"""What people look at when a run or a comparison has ended: progress.png, summary.json, report.html."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vessa.images import class_color, overlay
from vessa.metrics import METRICS, Scores

matplotlib.use("Agg")

_HEADINGS = {"dice": "Dice", "iou": "IoU", "iou_fgbg": "IoU (fg+bg)", "hd95": "HD95"}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl; a line cut by a kill is left out."""
    rows = []
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def progress_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the curves of one run: losses, validation Dice, who teaches, learning rate."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(title)
    panels = (
        (axes[0, 0], "loss", ("loss_sup", "loss_unsup", "loss_teacher", "loss_vessa")),
        (axes[1, 0], "share", ("eta", "confident", "vessa_confident", "agreement")),
        (axes[1, 1], "learning rate", ("lr",)),
    )
    for axis, label, keys in panels:
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if key in r]
            if points:
                axis.plot(*zip(*points, strict=True), label=key.replace("_", " "), linewidth=1)
        _finish(axis, label)
    for key in ("val_student", "val_teacher"):
        points = [(r["step"], r[key]["mean"]["dice"] or 0.0) for r in rows if key in r]
        if points:
            axes[0, 1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=key[4:])
    axes[0, 1].set_ylim(0, 1)
    _finish(axes[0, 1], "validation Dice")
    return figure


def _finish(axis: Any, label: str) -> None:
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def write_run_report(run: Path, summary: Mapping[str, Any]) -> None:
    """Write progress.png and summary.json of one finished run."""
    figure = progress_figure(read_metrics(run), f"{summary['method']}, seed {summary['seed']}")
    figure.savefig(run / "progress.png", dpi=110)
    fresh = run / ".summary.json"
    fresh.write_text(json.dumps(summary, indent=1) + "\n")
    fresh.replace(run / "summary.json")


@dataclass(frozen=True)
class Row:
    """One method of a table. seeds: its scores for each seed; one entry where seeds do not matter."""

    name: str
    seeds: list[Scores]

    def values(self, metric: str, class_name: str | None) -> list[float]:
        """A metric over seeds, of one class or of the mean over classes."""
        chosen = [s.mean if class_name is None else s.by_class[class_name] for s in self.seeds]
        return [v for c in chosen if (v := c[metric]) is not None]

    def cell(self, metric: str, class_name: str | None = None) -> str:
        """Mean, and with several seeds the standard deviation, as text."""
        values = self.values(metric, class_name)
        if not values:
            return "–"
        digits = 1 if metric == "hd95" else 3
        text = f"{np.mean(values):.{digits}f}"
        return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def table(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the comparison: a line for each class and method."""
    unit = rows[0].seeds[0].unit
    headings = [_HEADINGS[m] + (f" ({unit})" if m == "hd95" else "") for m in metrics]
    classes: list[str | None] = [*rows[0].seeds[0].by_class, None]
    lines = [
        [name or "mean", row.name, *(row.cell(m, name) for m in metrics)] for name in classes for row in rows
    ]
    return ["class", "method", *headings], lines


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a table as Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(r) + " |" for r in rows) + "\n"


@dataclass(frozen=True)
class Overlay:
    """One case of the picture table. image: uint8 (H, W[, 3]); masks: column to uint8 (H, W)."""

    title: str
    image: np.ndarray
    masks: dict[str, np.ndarray]
    captions: dict[str, str]


def _picture(pixels: np.ndarray, height: int = 190) -> str:
    """An <img> tag with the pixels in it, enlarged to a readable height."""
    image = Image.fromarray(pixels)
    factor = max(1, math.ceil(height / pixels.shape[0]))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img height="{height}" alt="" src="data:image/png;base64,{data}">'


def _css(class_id: int) -> str:
    return ",".join(f"{v:.0f}" for v in class_color(class_id))


def _chart(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img class="chart" alt="curves" src="data:image/png;base64,{data}">'


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2rem}
p.lead{color:#53606f;margin-top:0} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #e3e7ec}
th{color:#53606f;font-weight:600} th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
tr.first td{border-top:2px solid #aab4c0} tr.mean td{font-weight:600;background:#f4f7fa}
.chart{width:100%} .cases td,.cases th{text-align:center;border:0;padding:.25rem;vertical-align:top}
.cases td:first-child{text-align:left;max-width:11rem;font-size:.85rem} .cases small{color:#53606f}
.swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 1em}
details pre{background:#f4f7fa;padding:.8rem;overflow:auto;font-size:.8rem}
"""


def write_html(
    path: Path,
    *,
    title: str,
    lead: str,
    header: Sequence[str],
    lines: Sequence[Sequence[str]],
    figures: Sequence[tuple[str, Figure]],
    overlays: Sequence[Overlay],
    classes: Mapping[int, str],
    details: Mapping[str, Any],
) -> None:
    """Write one self-contained page: table, pictures of cases, curves, and how it was made."""
    escape = html.escape
    body = [f"<h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p><h2>Test patients</h2><table><tr>"]
    body += [f"<th>{escape(h)}</th>" for h in header]
    previous = None
    for line in lines:
        kind = ("first " if line[0] != previous else "") + ("mean" if line[0] == "mean" else "")
        previous = line[0]
        body.append(f"</tr><tr class='{kind.strip()}'>" + "".join(f"<td>{escape(c)}</td>" for c in line))
    body.append("</tr></table>")
    if overlays:
        legend = "".join(
            f"<span class='swatch' style='background:rgb({_css(c)})'></span>{escape(n)}"
            for c, n in classes.items()
        )
        body.append(
            f"<h2>Best, median and worst cases</h2><p>{legend}</p>"
            "<table class='cases'><tr><th></th><th>image</th>"
        )
        body += [f"<th>{escape(t)}</th>" for t in overlays[0].masks]
        for case in overlays:
            plain = overlay(case.image, np.zeros(case.image.shape[:2], np.uint8))
            body.append(f"</tr><tr><td>{escape(case.title)}</td><td>{_picture(plain)}</td>")
            for name, mask in case.masks.items():
                caption = f"<br><small>{escape(case.captions.get(name, ''))}</small>"
                body.append(f"<td>{_picture(overlay(case.image, mask))}{caption}</td>")
        body.append("</tr></table>")
    for name, figure in figures:
        body.append(f"<h2>{escape(name)}</h2>{_chart(figure)}")
    listing = escape(json.dumps(details, indent=1, default=str))
    body.append(
        "<h2>How this was made</h2><details><summary>configuration and counts</summary>"
        f"<pre>{listing}</pre></details>"
    )
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><body>{''.join(body)}</body></html>"
    )
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(page, encoding="utf-8")
    fresh.replace(path)
