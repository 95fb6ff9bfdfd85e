"""The comparison, end to end against a real annotator."""

import json
import shutil

import pytest
from rich.console import Console

from vessa.errors import InvalidConfig, InvalidDataset, InvalidWeights
from vessa_trainer.config import save_config
from vessa_trainer.experiments.compare import compare
from vessa_trainer.semi_supervised import trainer
from vessa_trainer.semi_supervised.trainer import Interrupted
from vessa_trainer.students import checkpoint

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
    real = trainer.Run._validate_if_due

    def pressed(run, board):
        if run.config.semi.method == "vessa" and run.step == 3:
            raise KeyboardInterrupt
        real(run, board)

    monkeypatch.setattr(trainer.Run, "_validate_if_due", pressed)
    with pytest.raises(Interrupted, match=f"saved at step 3. Resume with: {RESUME}"):
        compare(config_of(), seeds=1, resume_line=RESUME, console=quiet)
    monkeypatch.setattr(trainer.Run, "_validate_if_due", real)
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
    with pytest.raises(
        InvalidConfig, match="have labels of different weights of the annotator .*sha256:other with"
    ):
        compare(config_of(steps=2), seeds=1, resume_line=RESUME, console=quiet)


def test_without_any_test_mask_there_is_nothing_to_compare_by(config_of, quiet, tmp_path, phantoms):
    shutil.copytree(phantoms, tmp_path / "heart")
    for group in (tmp_path / "heart" / "splits" / "test.txt").read_text().split():
        for path in (tmp_path / "heart" / "masks").glob(f"{group}_*.png"):
            path.unlink()
    with pytest.raises(InvalidDataset, match="no test patient has a mask"):
        compare(config_of(f"data.root={tmp_path / 'heart'}"), seeds=1, resume_line=RESUME, console=quiet)


def test_budgets_and_methods_are_compared_by_their_names(config_of, quiet, tmp_path):
    (tmp_path / "slow.yaml").write_text(
        "title: Half the rate\nsemi: {method: supervised}\noptim: {lr: 5.0e-4}\n"
    )
    result = compare(
        config_of("semi.vessa_gate=teacher", steps=2),
        seeds=1,
        resume_line=RESUME,
        console=quiet,
        methods=["supervised", str(tmp_path / "slow.yaml")],
        labeled=["splits/labeled_1.txt", "splits/train.txt"],
        urls=["http://127.0.0.1:9"],  # no method needs an annotator
    )
    assert list(result["budgets"]) == ["labeled_1", "train"]
    for name, figures in result["budgets"].items():
        assert {"supervised_dice", "slow_dice"} <= set(figures)
        assert "annotator_model" not in figures
        page = (tmp_path / "run" / name / "report.html").read_text()
        assert "Half the rate" in page
    (one, other) = (
        json.loads((tmp_path / "run" / name / "slow-0" / "summary.json").read_text())
        for name in ("labeled_1", "train")
    )
    assert (one["groups"]["labeled"], other["groups"]["labeled"]) == (1, 4)
    assert (one["config"]["optim"]["lr"], one["config"]["semi"]["vessa_gate"]) == (5e-4, "teacher")


def test_a_method_is_labeled_by_the_annotator_that_it_names(
    config_of, quiet, tmp_path, annotator, prompts_only
):
    result = compare(
        config_of(steps=2),
        seeds=1,
        resume_line=RESUME,
        console=quiet,
        methods=["semisam", "vessa_alone"],
        urls=[annotator.url, prompts_only.url],
    )
    assert set(result) >= {"semisam_dice", "vessa_alone_dice"}
    parts = {
        name: json.loads((tmp_path / "run" / f"{name}-0" / "summary.json").read_text())["annotator"]["parts"]
        for name in ("semisam", "vessa_alone")
    }
    assert parts == {"semisam": [], "vessa_alone": ["language", "memory"]}


def test_a_killed_attempt_blocks_nothing(config_of, quiet, tmp_path):
    left = tmp_path / "run" / "supervised-0"  # killed before its first checkpoint, of another config at that
    left.mkdir(parents=True)
    save_config(config_of("optim.lr=0.5"), left / "config.yaml")
    (left / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (left / f".{checkpoint.LAST}.4711").write_bytes(b"half a checkpoint")
    result = compare(config_of(steps=2), seeds=1, resume_line=RESUME, console=quiet, methods=["supervised"])
    assert 0 <= result["supervised_dice"] <= 1
    assert {json.loads(r)["step"] for r in (left / "metrics.jsonl").read_text().splitlines()} == {2}


@pytest.mark.parametrize(
    "student", ["{init: nowhere}", "{encoder: tf_efficientnet_lite0, weights: nowhere.safetensors}"]
)
def test_missing_weights_of_a_later_method_are_found_before_the_first(config_of, quiet, tmp_path, student):
    (tmp_path / "later.yaml").write_text(f"semi: {{method: supervised}}\nstudent: {student}\n")
    methods = ["supervised", str(tmp_path / "later.yaml")]
    with pytest.raises(InvalidWeights, match="nowhere"):
        compare(config_of(steps=2), seeds=1, resume_line=RESUME, console=quiet, methods=methods)
    assert not (tmp_path / "run" / "supervised-0").exists()


def test_methods_need_names_of_their_own(config_of, quiet):
    for methods, said in (
        (["vessa", "vessa"], "different names"),
        (["vesa"], "no shipped config is called 'vesa'"),
    ):
        with pytest.raises(InvalidConfig, match=said):
            compare(config_of(), seeds=1, resume_line=RESUME, console=quiet, methods=methods)
    with pytest.raises(InvalidConfig, match="label splits of different names"):
        compare(config_of(), seeds=1, resume_line=RESUME, console=quiet, labeled=["a/one.txt", "b/one.txt"])
