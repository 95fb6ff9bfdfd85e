"""Drive the review queue and the pages to read: suggestion, layers, cancel, training curves, admin."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser_steps import seed, worklist

pytestmark = pytest.mark.browser


def test_the_queue_is_ordered_by_suggestion_and_layers_are_shown(
    page: Any, console: Any, phantoms: Path
) -> None:
    seed(console, phantoms, "order")
    page.reload()
    worklist(page, "order", "order")
    images = sorted((phantoms / "images").glob("*.png"))
    page.get_by_label("Files").set_input_files([images[3], images[5], images[8]])
    page.get_by_text("3 of 3 files done").wait_for(timeout=60_000)
    page.get_by_role("link", name="Review", exact=True).click()
    page.get_by_text("3 open").wait_for()
    page.get_by_label("Order most").select_option("suggestion")
    page.get_by_text("Ranking the images.").wait_for(state="detached")
    headers = {"Authorization": f"Bearer {console.api_key}"}
    ranked = httpx.post(f"{console.url}/worklists/order/suggest", headers=headers).json()["items"]
    content = httpx.get(f"{console.url}/worklists/order", headers=headers).json()["items"]
    named = {item["id"]: item["name"] for item in content}
    assert page.locator(".items strong").all_inner_texts() == [named[one["id"]] for one in ranked]
    page.keyboard.press("d")
    assert page.get_by_label("Layer").input_value() == "doubt"
    page.keyboard.press("d")
    assert page.get_by_label("Layer").input_value() == "disagreement"
    page.keyboard.press("d")
    page.keyboard.press("a")
    page.get_by_text("1 accepted").wait_for()


def test_segmentation_is_cancelled_and_continued(page: Any, console: Any, phantoms: Path) -> None:
    seed(console, phantoms, "stop")
    page.reload()
    worklist(page, "stop", "stop")
    images = sorted((phantoms / "images").glob("*.png"))[3:]
    page.get_by_label("Files").set_input_files(images)
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("cancelled").first.wait_for()
    page.get_by_role("button", name="Cancel").wait_for(state="detached")
    page.get_by_label("Files").set_input_files(images)
    page.get_by_text(f"{len(images)} of {len(images)} files done").wait_for(timeout=120_000)
    assert page.locator(".items button").count() == len(images)


def test_a_run_shows_curves_scores_and_its_report(page: Any, console: Any, shot: Any) -> None:
    run = console.folder / "runs" / "vessa-0"
    run.mkdir()
    (run / "config.yaml").write_text("title: phantoms")
    classes = ("left ventricle cavity", "left ventricle myocardium")
    lines = []
    for step in range(0, 600, 50):
        lines.append(
            {"step": step, "loss": 2 / (1 + step / 100), "loss_sup": 1 / (1 + step / 100), "lr": 1e-3}
        )
        dice = {
            part: 0.9 - 0.6 / (1 + step / gain) for part, gain in (("val_student", 150), ("val_teacher", 90))
        }
        lines.append({"step": step, **{part: {"mean": {"dice": d}} for part, d in dice.items()}})
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    scores = {"dice": 0.91, "iou": 0.84, "hd95": 2.5}
    part = {"mean": scores, "by_class": {classes[0]: scores, classes[1]: scores | {"dice": 0.71}}}
    (run / "summary.json").write_text(json.dumps({"val": part, "test": part}))
    (run / "report.html").write_text("<h1>Worst cases</h1>")
    page.get_by_role("link", name="Training", exact=True).click()
    page.get_by_role("img", name="Dice by step: val_student mean dice, val_teacher mean dice").wait_for()
    page.get_by_role("img", name="Loss by step: loss, loss_sup").wait_for()
    assert page.get_by_role("cell", name="0.710").count() == 2
    page.frame_locator("iframe.report").get_by_text("Worst cases").wait_for()
    shot(page, "training")
    shutil.rmtree(run)
    if "VESSA_RUN" in os.environ:
        show_real_run(page, console, shot)


def show_real_run(page: Any, console: Any, shot: Any) -> None:
    """Take the pictures of the documentation: VESSA_RUN names a finished run on phantoms."""
    folder = console.folder / "runs" / "phantoms"
    shutil.copytree(os.environ["VESSA_RUN"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    page.reload()
    page.get_by_role("button", name="phantoms").click()
    page.get_by_role("img", name="val_vessa mean dice").wait_for()
    page.wait_for_timeout(1000)
    shot(page, "training-run", whole=False)
    page.locator("iframe.report").scroll_into_view_if_needed()
    page.frame_locator("iframe.report").locator("img").first.wait_for()
    shot(page, "training-report", whole=False, top=False)
    shutil.rmtree(folder)


def test_an_admin_sees_queue_limits_and_audit(page: Any, shot: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.get_by_role("link", name="Admin", exact=True).click()
    page.get_by_text("Images waiting").wait_for()
    page.get_by_text("0 of 256").wait_for()
    page.get_by_role("columnheader", name="Action").wait_for()
    shot(page, "admin-dark", whole=False)
