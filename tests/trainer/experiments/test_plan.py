"""Plans: a schedule for the data and the machine, a measured time, and warnings before it is spent."""

import shutil

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vessa.errors import InvalidConfig
from vessa_trainer.config import load_config
from vessa_trainer.experiments.plan import make_plan, plan_file
from vessa_trainer.experiments.run_data import open_run_data
from vessa_trainer.experiments.timing import announce_time, label_requests

SMALL = ["student.encoder=null", "student.widths=[4,8]", "threads=1"]


def schedules(tiny, *overrides):
    lengths = {"quick": 300, "standard": 100_000, "full": 10_000_000}
    return {name: tiny(*overrides, steps=steps, eval_every=50) for name, steps in lengths.items()}


def test_the_longest_schedule_that_fits_is_chosen(tiny):
    plan = make_plan(schedules(tiny), minutes=5)
    assert plan.schedule == "quick"
    assert "schedule standard would take" in plan.reasons["steps"]
    assert plan.config.steps == 300
    assert plan.config.student.size == plan.config.student.crop == 32
    time = plan.estimate
    assert time.seconds == pytest.approx(300 * time.step_s + 6 * time.validation_s)
    assert time.step_s > 0
    assert time.validation_s > 0
    assert all(any(line.startswith(key) for line in plan.lines()) for key in plan.reasons)


def test_a_schedule_that_does_not_fit_is_shortened_and_said(tiny):
    plan = make_plan({"standard": tiny(steps=100_000)}, minutes=0.01)
    assert plan.config.steps == 200
    assert "fewer than schedule standard has" in plan.reasons["steps"]
    assert any("even 200 steps take" in warning for warning in plan.warnings)
    assert plan.estimate.validations == 8


def test_labels_are_counted_with_those_of_feedback(tiny, phantoms):
    config = tiny("semi.method=vessa", "feedback.every=2", steps=10)
    found = open_run_data(config)  # 3 unlabeled patients, 1 for validation and 1 for the test, 3 slices each
    # rounds begin at steps 5, 7 and 9; two steps take four of nine images
    assert label_requests(config, found) == 9 + 6 + 3 * 4
    once = ("semi.method=vessa", "feedback.enabled=false")
    assert label_requests(tiny(*once), found) == 15
    assert label_requests(tiny(*once, "annotator.views=true"), found) == 75
    assert label_requests(tiny(), found) == 0


def test_the_annotator_is_measured_where_it_is_given(tiny, client, annotator):
    config = tiny("semi.method=vessa", "feedback.enabled=false", steps=300)
    plan = make_plan({"quick": config}, minutes=60, client=client)
    assert plan.estimate.label_s > 0
    assert "15 labels of" in plan.estimate.text()
    # the labels are in the cache: nothing is left to measure, and that is said
    again = make_plan({"quick": config}, minutes=60, client=client)
    assert again.estimate.label_s is None
    assert "whose time was not measured" in again.estimate.text()


def test_a_plan_is_a_config_that_can_be_edited_and_trained_with(phantoms, tmp_path):
    out = tmp_path / "plan.yaml"
    overrides = [*SMALL, "semi.method=supervised", "student.window=0"]
    plan = plan_file(str(phantoms), overrides, 600, out, schedule="quick")
    config = load_config(out)
    assert (config.student.size, config.steps) == (32, plan.config.steps)
    assert config.data.root == str(phantoms)
    assert (config.student.widths, config.semi.method) == ((4, 8), "supervised")
    assert "# student.size: of schedule quick; images are 32 px long" in out.read_text()
    with pytest.raises(InvalidConfig, match="exists. Choose another --out"):
        plan_file(str(phantoms), overrides, 600, out, schedule="quick")


def test_structures_of_few_pixels_are_warned_of(phantoms, tiny, tmp_path, caplog, capsys):
    folder = shutil.copytree(phantoms, tmp_path / "hearts")
    for path in (folder / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        mask[mask == 2] = 0
        mask[3:5, 3:5] = 2
        Image.fromarray(mask).save(path)
    config = tiny(f"data.root={folder}", steps=300)
    plan = make_plan({"quick": config}, minutes=60)
    assert any("'left ventricle myocardium' covers 4 px" in warning for warning in plan.warnings)
    # a run tells its time and the same warnings before it starts
    announce_time([config] * 2, [open_run_data(config)] * 2, Console())
    said = capsys.readouterr().out
    assert said.count("unimatch_v2: about") == 1
    assert "2 runs: about" in said
    assert "'left ventricle myocardium' covers 4 px" in caplog.text
