"""Do in the browser what a person does: choose a bank, make a worklist, aim at the canvas, wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seed(console: Any, phantoms: Path, bank: str) -> None:
    """Put the first phantom patient into a bank."""
    from vessa.client import AnnotatorClient
    from vessa.datasets import open_dataset

    dataset = open_dataset(phantoms)
    patient = sorted(dataset.groups())[0]
    slices = [s for s in dataset.slices() if s.group == patient]
    with AnnotatorClient(console.url, console.api_key) as client:
        client.add_templates(
            bank,
            [dataset.image(s) for s in slices],
            [dataset.mask(s) for s in slices],
            dataset.classes,
            [patient] * len(slices),
        )


def worklist(page: Any, name: str, bank: str) -> None:
    """Make a worklist on the page Annotate."""
    page.get_by_role("link", name="Annotate").click()
    new = page.get_by_role("button", name="New worklist")
    field = page.get_by_label("New worklist")
    field.or_(new).first.wait_for()
    if new.count():
        new.click()
    field.fill(name)
    page.locator("form.inline select[name=bank]").select_option(bank)
    page.get_by_role("button", name="Create").click()
    page.locator(f".chooser > label option:checked[value='{name}']").wait_for(state="attached")
    page.get_by_label("Files").wait_for()


def stage_at(page: Any, x: float, y: float) -> tuple[float, float]:
    """The place on the screen of a share (x, y) of the canvas."""
    page.locator("canvas.stage").scroll_into_view_if_needed()
    box = page.locator("canvas.stage").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def image_at(page: Any, x: float, y: float, size: int = 160) -> tuple[float, float]:
    """The place on the screen of a pixel of a square image that is shown whole."""
    page.locator("canvas.stage").scroll_into_view_if_needed()
    box = page.locator("canvas.stage").bounding_box()
    scale = min(box["width"], box["height"]) / size
    left, top = (box["width"] - size * scale) / 2, (box["height"] - size * scale) / 2
    return box["x"] + left + x * scale, box["y"] + top + y * scale


def drag(page: Any, *places: tuple[float, float]) -> None:
    """Press at the first place, go through the others, and let go."""
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def pixels(page: Any) -> str:
    """The pixel counts that the class list shows."""
    return " ".join(page.locator(".classes .count").all_inner_texts())


def clicks(page: Any) -> int:
    """How many corrections have come back."""
    return page.evaluate("performance.getEntriesByName('vessa-click').length")


def until(page: Any, true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait; Playwright's own wait evaluates strings, which the content security policy refuses."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, pixels(page)
        page.wait_for_timeout(30)
