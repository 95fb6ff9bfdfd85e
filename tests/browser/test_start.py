"""Drive the first visit to an empty service: the link, phantoms, a folder, the first drawn masks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from browser_steps import drag, image_at, pixels, stage_at, until

from vessa.datasets import open_dataset

pytestmark = pytest.mark.browser


def test_the_two_minute_story_from_first_visit_to_accepted_mask(first_visit: Any, shot: Any) -> None:
    page = first_visit
    page.get_by_role("button", name="Load phantoms").wait_for()
    assert "link=" not in page.url
    shot(page, "story-1-start", whole=False)
    page.get_by_role("button", name="Load phantoms").click()
    page.get_by_role("button", name="Segment 12 images").wait_for(timeout=60_000)
    page.get_by_role("link", name="Bank", exact=True).click()
    page.locator(".thumbs img").nth(2).wait_for()
    shot(page, "story-2-bank", whole=False)
    page.get_by_role("link", name="Annotate", exact=True).click()
    page.get_by_role("button", name="Segment 12 images").click()
    page.get_by_text("12 of 12 files done").wait_for(timeout=120_000)
    page.get_by_role("button", name="phantom4_03.png").click()
    until(page, lambda: not pixels(page).startswith("0 px"))
    page.locator("figure img").first.wait_for()
    shot(page, "story-3-annotate", whole=False)
    before = pixels(page)
    page.get_by_label("left ventricle myocardium", exact=True).check()
    page.get_by_role("button", name="Box", exact=True).click()
    drag(page, image_at(page, 81, 60), image_at(page, 112, 87))
    until(page, lambda: pixels(page) != before)
    page.get_by_text("Working.").wait_for(state="hidden")
    page.get_by_label("right ventricle cavity", exact=True).check()
    page.get_by_role("button", name="Lasso", exact=True).click()
    page.get_by_role("button", name="Take away", exact=True).click()
    for left, top, right, bottom in ((60, 60, 80, 75), (8, 108, 23, 128)):
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        drag(page, *[image_at(page, x, y) for x, y in corners])
        page.get_by_text("Working.").wait_for(state="hidden")
    until(page, lambda: pixels(page).startswith("0 px"))
    shot(page, "story-4-correct", whole=False)
    page.get_by_role("link", name="Review", exact=True).click()
    page.get_by_text("12 open").wait_for()
    page.get_by_role("button", name="phantom4_03.png").click()
    until(page, lambda: pixels(page).startswith("0 px") and not pixels(page).startswith("0 px 0 px"))
    page.keyboard.press("a")
    page.get_by_text("1 accepted").wait_for()
    page.locator(".state-accepted").click()
    page.locator("figure img").first.wait_for()
    page.wait_for_timeout(500)
    shot(page, "story-5-accepted", whole=False)


def test_a_folder_with_masks_becomes_a_bank_and_a_worklist(
    first_visit: Any, phantoms: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clinic"
    shutil.copytree(phantoms, folder)
    for mask in sorted((folder / "masks").glob("*.png"))[2:]:
        mask.unlink()
    page = first_visit
    page.get_by_label("Folder").set_input_files(folder)
    page.get_by_role("button", name="Segment 13 images").wait_for(timeout=60_000)
    page.get_by_role("link", name="Bank", exact=True).click()
    page.get_by_text("2 templates, 1 patients").wait_for()
    assert page.locator(".class-name").count() == 3


def test_a_folder_without_masks_says_what_it_needs(first_visit: Any, phantoms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(phantoms / "images", folder)
    first_visit.get_by_label("Folder").set_input_files(folder)
    first_visit.get_by_text("has no annotated image").wait_for()


def test_the_first_mask_is_drawn_on_a_slice_of_a_volume(
    first_visit: Any, phantoms: Path, tmp_path: Path, shot: Any
) -> None:
    dataset = open_dataset(phantoms)
    stack = np.stack([dataset.image(s).T for s in list(dataset.slices())[:3]], -1)
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(stack, np.diag([1.5, 1.5, 8, 1])), path)
    page = first_visit
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_label("Image or volume").set_input_files(path)
    page.get_by_text("2 of 3").wait_for()
    page.mouse.move(*stage_at(page, 0.5, 0.5))
    page.mouse.wheel(0, 100)
    page.get_by_text("3 of 3").wait_for()
    page.get_by_label("Window").fill("0.6")
    page.get_by_role("button", name="Polygon").click()
    around = [(99 + 17 * math.cos(a), 81 + 17 * math.sin(a)) for a in np.linspace(0, 6, 11)]
    for x, y in around[:-1]:  # around the myocardium
        page.mouse.click(*image_at(page, x, y))
    page.mouse.dblclick(*image_at(page, *around[-1]))
    page.locator(".count", has_not_text="0 px").first.wait_for()
    drawn = page.locator(".count").first.inner_text()
    page.get_by_role("button", name="Undo", exact=True).click()
    page.get_by_text("0 px", exact=True).wait_for()
    page.get_by_role("button", name="Redo", exact=True).click()
    page.get_by_text(drawn, exact=True).wait_for()
    shot(page, "draw-volume")
    page.get_by_role("button", name="Add template").click()
    page.locator(".thumbs img").first.wait_for()
    page.get_by_text("1 templates, 1 patients").wait_for()
