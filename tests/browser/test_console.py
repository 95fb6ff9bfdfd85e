"""Drive the console in a real browser, from the first visit to a folder that the trainer reads."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from browser_steps import clicks, pixels, seed, stage_at, until, worklist

pytestmark = pytest.mark.browser
AXE = Path(os.environ.get("VESSA_AXE", "none"))  # `make test-browser` fetches axe-core


def test_from_first_visit_to_a_training_folder(
    page: Any, console: Any, phantoms: Path, tmp_path: Path, shot: Any
) -> None:
    seed(console, phantoms, "story")
    page.reload()
    page.get_by_role("button", name="story").click()
    page.locator(".thumbs img").first.wait_for()
    shot(page, "bank")
    worklist(page, "story", "story")
    images = sorted((phantoms / "images").glob("*.png"))[3:]
    page.get_by_label("Files").set_input_files(images)
    page.get_by_text(f"{len(images)} of {len(images)} files done").wait_for(timeout=120_000)
    assert page.locator(".items button").count() == len(images)
    assert page.locator("details").count() == 0  # nothing failed
    shot(page, "annotate")
    page.get_by_role("link", name="Review").click()
    page.get_by_text(f"{len(images)} open").wait_for()
    page.locator(".classes .count").first.wait_for()
    shot(page, "review")
    page.keyboard.press("r")
    page.get_by_text("1 rejected").wait_for()
    page.keyboard.press("u")
    page.get_by_text("0 rejected").wait_for()
    for done in range(1, len(images)):
        page.keyboard.press("b" if done == 1 else "a")
        page.get_by_text(f"{done} accepted").first.wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name="Data folder for vessa-trainer").click()
    archive = tmp_path / "export.zip"
    download.value.save_as(archive)
    folder = tmp_path / "folder"
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    counts = json.loads((folder / "export.json").read_text())
    assert counts["images"] == len(images)
    assert (counts["accepted"], counts["open"], counts["masks_left_out"]) == (len(images) - 1, 1, 1)
    assert len(list((folder / "masks").glob("*.png"))) == len(images) - 1
    verify = [sys.executable, "-m", "vessa_trainer", "verify", str(folder)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_corrections_change_one_class_and_are_undone(
    page: Any, console: Any, phantoms: Path, shot: Any
) -> None:
    seed(console, phantoms, "correct")
    page.reload()
    worklist(page, "correct", "correct")
    page.get_by_label("Files").set_input_files(sorted((phantoms / "images").glob("*.png"))[4])
    page.get_by_text("1 of 1 files done").wait_for(timeout=60_000)
    page.locator(".classes .count").first.wait_for()
    until(page, lambda: not pixels(page).startswith("0 px"))
    start = pixels(page)
    page.get_by_role("button", name="Brush", exact=True).click()
    page.mouse.move(*stage_at(page, 0.45, 0.2))
    page.mouse.down()
    page.mouse.move(*stage_at(page, 0.55, 0.2), steps=5)
    page.mouse.up()
    until(page, lambda: pixels(page) != start)
    painted = pixels(page)
    page.get_by_role("button", name="Undo", exact=True).click()
    until(page, lambda: pixels(page) == start)
    page.get_by_role("button", name="Redo", exact=True).click()
    until(page, lambda: pixels(page) == painted)
    page.get_by_role("button", name="Point", exact=True).click()
    page.mouse.click(*stage_at(page, 0.5, 0.5))
    until(page, lambda: clicks(page) > 0)
    shot(page, "corrected")
    # what was drawn is stored: another visit shows it
    shown = pixels(page)
    page.get_by_text("Working.").wait_for(state="hidden")
    page.reload()
    until(page, lambda: pixels(page) == shown)


def test_a_click_is_answered_within_reach_of_the_hand(
    page: Any, console: Any, phantoms: Path, figures: dict[str, Any]
) -> None:
    """The time is reported, not asserted: machines differ."""
    seed(console, phantoms, "clicks")
    page.reload()
    worklist(page, "clicks", "clicks")
    page.get_by_label("Files").set_input_files(sorted((phantoms / "images").glob("*.png"))[4])
    page.get_by_text("1 of 1 files done").wait_for(timeout=60_000)
    page.get_by_role("button", name="Point", exact=True).click()
    count = 100
    for number in range(count):
        page.mouse.click(*stage_at(page, 0.4 + 0.02 * (number % 10), 0.4 + 0.02 * (number // 10)))
        until(page, lambda: clicks(page) > number)  # noqa: B023
        page.get_by_text("Working.").wait_for(state="hidden")
        if number % 10 == 9:  # nobody corrects one class by a hundred points
            page.get_by_role("button", name="Undo", exact=True).click()
            page.get_by_text("Working.").wait_for(state="hidden")
    times = page.evaluate("performance.getEntriesByName('vessa-click').map((e) => e.duration)")
    assert len(times) == count
    figures["click_ms_median"] = round(statistics.median(times), 1)


def test_a_mask_is_drawn_into_an_empty_bank(page: Any, phantoms: Path, shot: Any) -> None:
    page.get_by_label("Image or volume").set_input_files(sorted((phantoms / "images").glob("*.png"))[0])
    page.get_by_label("to draw on").wait_for()
    page.get_by_label("Bank", exact=True).fill("drawn")
    page.get_by_label("Patient").fill("p1")
    page.mouse.move(*stage_at(page, 0.45, 0.5))
    page.mouse.down()
    page.mouse.move(*stage_at(page, 0.55, 0.5), steps=8)
    page.mouse.up()
    shot(page, "draw")
    page.get_by_role("button", name="Add template").click()
    page.get_by_role("button", name="drawn").wait_for()
    page.locator(".thumbs img").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_has_an_accessibility_violation(
    page: Any, console: Any, phantoms: Path, figures: dict[str, Any], scheme: str, shot: Any
) -> None:
    if not AXE.is_file():
        pytest.skip("VESSA_AXE names no axe-core: `make test-browser` fetches it")
    seed(console, phantoms, "axe")
    page.emulate_media(color_scheme=scheme)
    page.reload()
    worklist(page, f"axe-{scheme}", "axe")
    page.get_by_label("Files").set_input_files(sorted((phantoms / "images").glob("*.png"))[3])
    page.get_by_text("1 of 1 files done").wait_for(timeout=60_000)
    found = []
    for name in ("Bank", "Annotate", "Review", "Training", "Admin"):
        page.get_by_role("link", name=name, exact=True).click()
        page.locator("h1").wait_for()
        page.evaluate(AXE.read_text())
        result = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
        found += [f"{name}: {v['id']} {v['nodes'][0]['html'][:120]}" for v in result["violations"]]
        shot(page, f"{name.lower()}-axe-{scheme}")
    figures["axe_violations"] = figures.get("axe_violations", 0) + len(found)
    assert found == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_tablet_shows_every_page_without_a_sideways_scroll(
    page: Any, console: Any, phantoms: Path, scheme: str, shot: Any
) -> None:
    seed(console, phantoms, "tablet")
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 820, "height": 1180})
    page.reload()
    worklist(page, f"tablet-{scheme}", "tablet")
    page.get_by_label("Files").set_input_files(sorted((phantoms / "images").glob("*.png"))[4])
    page.get_by_text("1 of 1 files done").wait_for(timeout=60_000)
    for name in ("Bank", "Annotate", "Review", "Training", "Admin"):
        page.get_by_role("link", name=name, exact=True).click()
        page.locator("h1").wait_for()
        page.wait_for_timeout(500)
        wide = page.evaluate(
            "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, name
        shot(page, f"tablet-{name.lower()}-{scheme}", whole=False)
