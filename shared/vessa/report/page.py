"""Write one self-contained HTML page with text, tables and pictures; it loads nothing else."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa import atomic_write
from vessa.masks.colors import class_hex
from vessa.masks.overlay import overlay
from vessa.report.cases import Overlay, Pixels

_HEIGHT = 200  # px of a picture on the page; the image has twice as many for sharp prints
_STYLE = """
:root{--ink:#1c2430;--soft:#5a6675;--line:#e3e7ec;--wash:#f5f7fa;--accent:#0b6e99}
*{box-sizing:border-box} html{background:#fff}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);
max-width:1160px;margin:2.5rem auto 4rem;padding:0 1.25rem}
h1{font-size:1.65rem;line-height:1.25;margin:0 0 .3rem} h2{font-size:1.15rem;margin:2.4rem 0 .7rem}
p{margin:.4rem 0} .lead,.note{color:var(--soft)} .note{font-size:.85rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:1rem;margin:1.5rem 0}
.card{border:1px solid var(--line);border-top:3px solid var(--accent);border-radius:6px;padding:.8rem 1.1rem}
.card b{display:block;font-size:1.75rem;line-height:1.3;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.85rem}
.wide{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.35rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;font-size:.85rem}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
tr.first td{border-top:2px solid #aab4c0} tr.mean td{background:var(--wash)} td.best{font-weight:700}
tr:not(.first) td:first-child{color:transparent}
.case{break-inside:avoid;margin:0 0 1.1rem} .case h3{font-size:.9rem;font-weight:600;margin:0 0 .35rem}
.row{display:grid;gap:.6rem} figure{margin:0}
figure img{width:100%;display:block;border-radius:3px;background:#000}
figcaption{font-size:.8rem;color:var(--soft);line-height:1.35;margin-top:.25rem}
figcaption b{color:var(--ink);display:block}
.legend span{margin-right:1.2rem;white-space:nowrap}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1rem}
.charts img{width:100%} summary{cursor:pointer;color:var(--accent)}
pre{background:var(--wash);padding:.9rem;overflow:auto;font-size:.78rem;border-radius:4px}
@media print{body{margin:0;max-width:none;font-size:11px} h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact} 
.charts img{break-inside:avoid} details{display:none}}
"""


class Page:
    """Collect the parts of a page from top to bottom, then write it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def lead(self, text: str) -> None:
        """Add the sentence below the title."""
        self._parts.append(f"<p class='lead'>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a remark in small print, unless it is empty."""
        if text:
            self._parts.append(f"<p class='note'>{html.escape(text)}</p>")

    def heading(self, text: str) -> None:
        """Add the heading of a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Add headline figures. cards: (name, figure, explanation) of each."""
        cells = [
            f"<div class='card'><span>{html.escape(name)}</span>"
            f"<b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>"
            for name, value, what in cards
        ]
        self._parts.append(f"<div class='cards'>{''.join(cells)}</div>")

    def table(
        self, header: Sequence[str], lines: Sequence[Sequence[str]], best: set[tuple[int, int]]
    ) -> None:
        """Add a table whose first column groups its lines. best: (line, column) of cells in bold."""
        head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
        body, previous = [], None
        for index, line in enumerate(lines):
            kinds = ["first"] if line[0] != previous else []
            kinds += ["mean"] if line[0] == "mean" else []
            previous = line[0]
            cells = "".join(
                f"<td{' class=best' if (index, column) in best else ''}>{html.escape(cell)}</td>"
                for column, cell in enumerate(line)
            )
            body.append(f"<tr class='{' '.join(kinds)}'>{cells}</tr>")
        self._parts.append(
            f"<div class='wide'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>"
        )

    def overlays(self, rows: Sequence[Overlay], classes: Mapping[int, str]) -> None:
        """Add one row of pictures per case, with a legend of the classes."""
        if not rows:
            return
        self.heading("Best, median and worst case")
        legend = "".join(
            f"<span><i style='background:{class_hex(c)}'></i>{html.escape(n)}</span>"
            for c, n in classes.items()
        )
        self._parts.append(f"<p class='legend'>{legend}</p>")
        for case in rows:
            plain = overlay(case.image, np.zeros(case.image.shape[:2], np.uint8))
            cells = [_figure(plain, "image", "")]
            cells += [
                _figure(overlay(case.image, mask), name, case.captions.get(name, ""))
                for name, mask in case.masks.items()
            ]
            columns = f"grid-template-columns:repeat({len(cells)},1fr)"
            self._parts.append(
                f"<div class='case'><h3>{html.escape(case.title)}</h3>"
                f"<div class='row' style='{columns}'>{''.join(cells)}</div></div>"
            )

    def figures(self, figures: Sequence[Any]) -> None:
        """Add charts (matplotlib figures), side by side on wide screens."""
        images = []
        for figure in figures:
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=140)
            images.append(f"<img alt='curves' src='{_data(stream)}'>")
        self._parts.append(f"<div class='charts'>{''.join(images)}</div>")

    def links(self, targets: Mapping[str, str]) -> None:
        """Add links to files beside the page. targets: text to relative address."""
        items = " · ".join(
            f"<a href='{html.escape(a, quote=True)}'>{html.escape(t)}</a>" for t, a in targets.items()
        )
        self._parts.append(f"<p class='note'>{items}</p>")

    def details(self, title: str, content: Any) -> None:
        """Add data as JSON in a section that folds out."""
        listing = html.escape(json.dumps(content, indent=1, default=str))
        self._parts.append(
            f"<h2>How this was made</h2><details><summary>{html.escape(title)}</summary>"
            f"<pre>{listing}</pre></details>"
        )

    def write(self, path: Path) -> None:
        """Write the page atomically, with the line that every report ends with."""
        self.note("Research use only. Not a medical device.")
        page = (
            "<!doctype html><html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width,initial-scale=1'>"
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style><body>{''.join(self._parts)}</body></html>"
        )
        atomic_write.write_text(path, page)


def _figure(pixels: Pixels, name: str, caption: str) -> str:
    """Return one picture with its name, enlarged by a whole factor so that pixels stay sharp."""
    factor = max(1, round(2 * _HEIGHT / max(pixels.shape[:2])))
    image = Image.fromarray(pixels)
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    text = f"<figcaption><b>{html.escape(name)}</b>{html.escape(caption)}</figcaption>"
    return f"<figure><img alt='{html.escape(name, quote=True)}' src='{_data(stream)}'>{text}</figure>"


def _data(stream: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
