"""Curves from metrics.jsonl, also from one that is empty, short or cut."""

import json

import pytest
from PIL import Image

from vessa_trainer.reporting.plots import (
    bars_figure,
    comparison_figure,
    progress_figure,
    read_metrics,
    validation_dice,
    write_progress,
)


def validation(step, dice):
    scored = {"mean": {"dice": dice}, "by_class": {"heart": {"dice": dice}}}
    return {"step": step, "val_student": scored, "val_teacher": scored}


ROWS = [
    {"step": 10, "loss": 1.2, "loss_sup": 0.7, "lr": 0.1, "eta": 0.1, "feed": {"label_dice": 0.5}},
    validation(10, None),
    {"step": 20, "loss": 1.0, "loss_sup": 0.6, "lr": 0.05, "eta": 0.2, "feed": {"label_dice": 0.6}},
    validation(20, 0.4),
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS) + '{"step": 30, "lo')
    return tmp_path


def lines_of(axis):
    return {str(line.get_label()): list(map(tuple, line.get_xydata().tolist())) for line in axis.lines}


def test_a_line_cut_by_a_kill_is_left_out(run, tmp_path):
    assert read_metrics(run) == ROWS
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_validation_without_a_score_is_no_point_of_the_curve():
    assert validation_dice(ROWS, "val_teacher") == [(20, 0.4)]


def test_the_progress_shows_losses_dice_and_labels():
    axes = progress_figure(ROWS, "a run").axes
    assert lines_of(axes[0]) == {"sup": [(10, 0.7), (20, 0.6)]}
    assert lines_of(axes[1]) == {"teacher": [(20, 0.4)], "student": [(20, 0.4)]}
    assert lines_of(axes[2]) == {"heart": [(20, 0.4)]}
    assert lines_of(axes[4]) == {"against the truth": [(10, 0.5), (20, 0.6)]}


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[1:2], [{**ROWS[0], "step": s} for s in range(100)]])
def test_whatever_there_is_can_be_drawn(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_progress(tmp_path, "a run")
    with Image.open(tmp_path / "progress.png") as picture:
        assert picture.format == "PNG"
    assert not (tmp_path / ".progress.png").exists()


def test_a_comparison_averages_seeds_over_the_steps_that_all_have(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text(json.dumps(validation(20, 0.8)) + "\n")
    (axis,) = comparison_figure({"VESSA": [run, other], "nothing yet": [tmp_path / "nowhere"]}).axes
    assert lines_of(axis)["VESSA"] == [(20, pytest.approx(0.6))]


def test_bars_have_a_dot_for_each_seed():
    (axis,) = bars_figure({"a": [[0.5, 0.7], []], "b": [[0.2], [0.3]]}, ["heart", "lung"], "Dice").axes
    assert sorted(round(p.get_height(), 3) for p in axis.patches) == [0.0, 0.2, 0.3, 0.6]
    assert [len(line.get_xdata()) for line in axis.lines] == [2]
