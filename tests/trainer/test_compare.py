"""The comparison, end to end against a real annotator."""

import json
import shutil

import pytest
from rich.console import Console

from vessa.errors import InvalidConfig, InvalidDataset
from vessa_trainer import checkpoint, loop
from vessa_trainer.compare import compare
from vessa_trainer.loop import Interrupted

METHODS = ("UniMatch V2", "VESSA-assisted", "VESSA alone")
RESUME = "vessa-trainer compare --out here"


@pytest.fixture
def quiet(tmp_path):
    with (tmp_path / "said").open("w") as file:
        yield Console(file=file, width=160)


@pytest.fixture
def config_of(tiny, annotator):
    def make(*overrides, **keys):
        there = (f"annotator.url={annotator.url}", f"annotator.api_key={annotator.api_key}")
        return tiny(*there, *overrides, **keys)

    return make


def test_both_methods_are_trained_for_each_seed_and_reported(config_of, quiet, tmp_path, dataset, annotator):
    result = compare(config_of(steps=2), seeds=2, resume_line=RESUME, console=quiet)
    out = tmp_path / "run"
    for key in ("unimatch_v2", "vessa_assisted", "vessa_alone"):
        assert 0 <= result[f"{key}_dice"] <= 1
        assert set(result[key]["by_class"]) == set(dataset.classes.values())
    assert len(result["vessa_assisted"]["dice_by_seed"]) == 2
    assert len(result["vessa_alone"]["dice_by_seed"]) == 1
    assert (result["seeds"], result["steps"], result["hd95_unit"]) == (2, 2, "voxel")
    assert json.loads(json.dumps(result)) == result
    runs = {f"{m}-{seed}" for m in ("unimatch_v2", "vessa") for seed in (0, 1)}
    assert {p.name for p in out.iterdir()} == runs | {"vessa_alone-0", "report.html", "results.md"}
    assert all((out / run / "report.html").is_file() for run in runs)
    page, table = (out / "report.html").read_text(), (out / "results.md").read_text()
    for name in METHODS:
        assert name in page
        assert name in table
    assert result["report"] == str(out / "report.html")
    assert annotator.api_key not in page

    # A second call trains nothing, and says the same.
    trained = {run: (out / run / checkpoint.LAST).stat().st_mtime_ns for run in runs}
    assert compare(config_of(steps=2), seeds=2, resume_line=RESUME, console=quiet) == result
    assert {run: (out / run / checkpoint.LAST).stat().st_mtime_ns for run in runs} == trained


def test_the_two_methods_differ_by_their_method_alone(config_of, quiet, tmp_path):
    compare(config_of(steps=2), seeds=1, resume_line=RESUME, console=quiet)
    one, other = (
        json.loads((tmp_path / "run" / f"{m}-0" / "summary.json").read_text())["config"]
        for m in ("unimatch_v2", "vessa")
    )
    assert one["semi"].pop("method") == "unimatch_v2"
    assert other["semi"].pop("method") == "vessa"
    assert one.pop("out") != other.pop("out")
    assert (one.pop("title"), other.pop("title")) == ("UniMatch V2", "VESSA-assisted")
    assert one == other


def test_an_interrupted_comparison_is_taken_up(config_of, quiet, tmp_path, monkeypatch):
    real = loop.Run._validate_if_due

    def pressed(run, board):
        if run.config.semi.method == "vessa" and run.step == 3:
            raise KeyboardInterrupt
        real(run, board)

    monkeypatch.setattr(loop.Run, "_validate_if_due", pressed)
    with pytest.raises(Interrupted, match=f"saved at step 3. Resume with: {RESUME}"):
        compare(config_of(), seeds=1, resume_line=RESUME, console=quiet)
    monkeypatch.setattr(loop.Run, "_validate_if_due", real)
    result = compare(config_of(), seeds=1, resume_line=RESUME, console=quiet)
    assert result["steps"] == 4
    rows = (tmp_path / "run" / "vessa-0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 4]


def test_runs_trained_with_other_weights_of_the_annotator_are_refused(config_of, quiet, tmp_path):
    compare(config_of(steps=2), seeds=1, resume_line=RESUME, console=quiet)
    path = tmp_path / "run" / "vessa-0" / "summary.json"
    summary = json.loads(path.read_text())
    summary["annotator"]["model"] = "sha256:other"
    path.write_text(json.dumps(summary))
    with pytest.raises(InvalidConfig, match="are of different weights of the annotator .*sha256:other with"):
        compare(config_of(steps=2), seeds=1, resume_line=RESUME, console=quiet)


def test_without_any_test_mask_there_is_nothing_to_compare_by(config_of, quiet, tmp_path, phantoms):
    shutil.copytree(phantoms, tmp_path / "heart")
    for group in (tmp_path / "heart" / "splits" / "test.txt").read_text().split():
        for path in (tmp_path / "heart" / "masks").glob(f"{group}_*.png"):
            path.unlink()
    with pytest.raises(InvalidDataset, match="no test patient has a mask"):
        compare(config_of(f"data.root={tmp_path / 'heart'}"), seeds=1, resume_line=RESUME, console=quiet)
