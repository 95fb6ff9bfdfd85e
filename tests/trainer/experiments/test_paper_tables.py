"""The paper's tables in small, on phantoms and against real annotators."""

import csv
import json
import shutil
import sys

import pytest
from PIL import Image
from rich.console import Console

from vessa.datasets import open_dataset
from vessa.errors import InvalidConfig, InvalidDataset
from vessa_trainer import cli
from vessa_trainer.experiments.paper_tables import TABLES, labeled_patients, run_table, split_patients
from vessa_trainer.students import checkpoint

RESUME = "vessa-trainer table2 --out here"


@pytest.fixture
def quiet(tmp_path):
    with (tmp_path / "said").open("w") as file:
        yield Console(file=file, width=160)


def records(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_table2_is_run_resumed_and_written(tiny, annotator, prompts_only, quiet, tmp_path, dataset):
    config = tiny(
        f"annotator.api_key={annotator.api_key}",
        "feedback.min_confidence=0.0",
        "annotator.patience_s=300",
        steps=2,
    )
    arguments = {"seeds": 1, "urls": [annotator.url, prompts_only.url], "percents": [1, 50]}
    result = run_table("table2", config, resume_line=RESUME, console=quiet, **arguments)
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} == {
        "splits", "labeled_1", "labeled_2", "labeled_4", "table2.md", "table2.csv", "table2.png"
    }  # fmt: skip
    assert (out / "splits" / "labeled_2.txt").read_text().split() == list(dataset.split("train"))[:2]
    assert list(result["percents"]) == ["1", "50", "100"]
    assert {"semisam_dice", "unimatch_v2_dice", "vessa_assisted_dice"} <= set(result["percents"]["50"])
    assert json.loads(json.dumps(result)) == result
    page = (out / "table2.md").read_text()
    header, _, *lines = [line for line in page.splitlines() if line.startswith("|")]
    assert header == "| method | class | 1 % (1 patient) | 50 % (2 patients) | 100 % (4 patients) |"
    assert len(lines) == 4 * 4  # methods with the bound, classes with their mean
    assert lines[-1].startswith("| Supervised, all labels | mean | – | – | 0.")
    assert "the data's own split files" in page
    assert "SemiSAM+: preset nano" in page
    assert "by prompts alone; Stage 1 saw nothing" in page
    rows = records(out / "table2.csv")
    (dice,) = [
        r for r in rows
        if (r["method"], r["class"], r["percent"], r["metric"]) == ("VESSA-assisted", "mean", "50", "dice")
    ]  # fmt: skip
    assert float(dice["mean"]) == pytest.approx(result["percents"]["50"]["vessa_assisted_dice"], abs=1e-4)
    assert (dice["labeled"], dice["std"]) == ("2", "")
    with Image.open(out / "table2.png") as picture:
        assert picture.width > 600

    # A second call trains nothing, needs no annotator, and says the same.
    before = {p: p.stat().st_mtime_ns for p in out.rglob(checkpoint.LAST)}
    arguments["urls"] = ["http://127.0.0.1:9"]
    assert run_table("table2", config, resume_line=RESUME, console=quiet, **arguments) == result
    assert {p: p.stat().st_mtime_ns for p in out.rglob(checkpoint.LAST)} == before


def test_an_out_folder_holds_one_split(tiny, quiet, phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "heart")
    shutil.rmtree(tmp_path / "heart" / "splits")
    here = {"seeds": 1, "urls": [None], "resume_line": RESUME, "console": quiet, "methods": ["supervised"]}
    drawn = (f"data.root={tmp_path / 'heart'}", "steps=2")
    run_table("table1", tiny(*drawn), **here)
    assert "drawn by seed 0" in (tmp_path / "run" / "table1.md").read_text()
    with pytest.raises(InvalidConfig, match=r"txt names other patients. Choose another --out"):
        run_table("table1", tiny(*drawn, "data.split_seed=1"), **here)


def test_a_table_wants_the_annotators_that_its_methods_name(tiny, annotator, quiet, tmp_path):
    config = tiny(f"annotator.api_key={annotator.api_key}", steps=2)
    with pytest.raises(
        InvalidConfig, match="'no_language' means memory: start one with VESSA_WITHOUT=language"
    ):
        run_table("table4", config, seeds=1, urls=[annotator.url], resume_line=RESUME, console=quiet)
    assert not list((tmp_path / "run").rglob(checkpoint.LAST))  # said before anything is trained


def test_a_table_on_the_command_line(monkeypatch, capsys, phantoms, annotator, tmp_path):
    small = ("student.size=32", "student.crop=32", "student.widths=[4,8,16]", "eval_every=2")
    sets = [part for one in (*small, f"cache.url=folder:{tmp_path / 'labels'}") for part in ("--set", one)]
    monkeypatch.setenv("VESSA_API_KEY", annotator.api_key)
    command = ["table1", "--data", str(phantoms), "--url", annotator.url, "--out", str(tmp_path / "t")]
    command += ["--methods", "vessa_alone,vessa", "--student", "unet", "--steps", "2", "--seeds", "1", *sets]
    monkeypatch.setattr(sys, "argv", ["vessa-trainer", *command, "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["percents"]["1"]) >= {"vessa_alone_dice", "vessa_assisted_dice"}
    assert {"table1.md", "table1.csv", "table1.png"} <= {p.name for p in (tmp_path / "t").iterdir()}


def test_splits_are_the_datas_own_or_the_papers(dataset, phantoms, tmp_path):
    own = split_patients(dataset, 0)
    assert own.train == dataset.split("train")
    assert labeled_patients(dataset, own, 1) == dataset.split("labeled_1")
    assert labeled_patients(dataset, own, 75) == dataset.split("labeled_3")
    assert labeled_patients(dataset, own, 50) == own.train[:2]  # there is no labeled_2
    shutil.copytree(phantoms, tmp_path / "heart")
    shutil.rmtree(tmp_path / "heart" / "splits")
    drawn = split_patients(open_dataset(tmp_path / "heart"), 0)
    assert (len(drawn.train), len(drawn.val), len(drawn.test)) == (4, 1, 1)
    assert {*drawn.train, *drawn.val, *drawn.test} == set(dataset.groups())
    assert drawn == split_patients(open_dataset(tmp_path / "heart"), 0)
    assert drawn.test != split_patients(open_dataset(tmp_path / "heart"), 1).test
    assert "drawn by seed 0" in drawn.source


def test_train_and_test_files_alone_leave_validation_to_be_drawn(phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "heart")
    (tmp_path / "heart" / "splits" / "val.txt").unlink()
    dataset = open_dataset(tmp_path / "heart")
    split = split_patients(dataset, 0)
    assert set(split.val) < set(dataset.split("train"))
    assert not set(split.val) & set(split.train)
    assert split.test == dataset.split("test")
    (tmp_path / "heart" / "splits" / "test.txt").unlink()
    with pytest.raises(InvalidDataset, match="of train or of test alone"):
        split_patients(open_dataset(tmp_path / "heart"), 0)


def test_every_table_names_configs_that_ship():
    assert set(TABLES) == {"table1", "table2", "table3", "table4"}
    from vessa_trainer.experiments.methods import find_methods

    for table in TABLES.values():
        assert [m.name for m in find_methods(table.methods)] == list(table.methods)
