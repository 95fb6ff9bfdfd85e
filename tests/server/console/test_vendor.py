"""The console's vendored files are those that vendor.json names, with their licences."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import vessa_server.console
from vessa.masks.colors import CLASS_COLORS, OPACITY

VENDOR = Path(vessa_server.console.__file__).with_name("static") / "vendor"


def test_every_vendored_file_has_its_digest_and_licence() -> None:
    entries = json.loads((VENDOR / "vendor.json").read_text())
    files = {entry["file"] for entry in entries}
    ours = {"vendor.json", "preact-htm.d.ts", "uPlot.d.ts"}
    assert files == {p.name for p in VENDOR.iterdir() if p.is_file()} - ours
    for entry in entries:
        data = (VENDOR / entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["file"]
        licence = VENDOR / "licences" / f"{entry['name'].split('/')[-1]}.txt"
        assert "Copyright" in licence.read_text(), entry["file"]


def test_the_console_draws_in_the_colors_of_every_picture() -> None:
    js = VENDOR.parent / "js"
    block = re.search(r"COLORS = \[(.*?)\n\];", (js / "masks.js").read_text(), re.DOTALL)
    assert block is not None
    colors = re.findall(r"\[(\d+), (\d+), (\d+)\]", block[1])
    assert [tuple(map(int, color)) for color in colors] == list(CLASS_COLORS)
    assert f"this.opacity = {OPACITY};" in (js / "canvas.js").read_text()
