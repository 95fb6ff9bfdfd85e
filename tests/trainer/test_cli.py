"""The command line as its users meet it: files in, one JSON line out, one clear line when it fails."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from vessa_trainer import cli
from vessa_trainer.students import checkpoint

SMALL = (
    "student.size=32",
    "student.crop=32",
    "student.widths=[4,8,16]",
    "batch_labeled=2",
    "batch_unlabeled=2",
    "eval_every=2",
    "checkpoint_every=100",
)


def sets(*overrides):
    return [part for override in (*SMALL, *overrides) for part in ("--set", override)]


@pytest.fixture(autouse=True, scope="module")
def own_sigterm():
    """Give the tests' process its own handler back: the command line sets one."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line; returns its exit code, its standard output and what it said."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["vessa-trainer", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, said = capsys.readouterr()
        return end.value.code, out, said

    return run


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "2024"  # a name that YAML reads as a number
    command = ["fit", "--data", str(phantoms), "--out", str(out), "--steps", "2", *sets(), "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vessa-trainer", *command])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    return out


def test_compare_ends_with_one_line_of_json(call, phantoms, annotator, tmp_path, monkeypatch):
    monkeypatch.setenv("VESSA_API_KEY", annotator.api_key)
    out = tmp_path / "comparison"
    code, output, said = call(
        "compare", "--data", phantoms, "--url", annotator.url, "--out", out, "--steps", 3, "--seeds", 1,
        *sets(f"cache.url=folder:{tmp_path / 'labels'}", "feedback.every=1"),
        "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(output.splitlines()[-1])
    for key in ("unimatch_v2_dice", "vessa_assisted_dice", "vessa_alone_dice"):
        assert 0 <= result[key] <= 1
    page = (out / "report.html").read_text()
    assert result["report"] == str(out / "report.html")
    for name in ("UniMatch V2", "VESSA-assisted", "VESSA alone"):
        assert name in page
        assert name in said
    assert annotator.api_key not in said + page


def test_fit_says_its_dice_and_refuses_to_train_over_it(call, trained, phantoms):
    command = ["fit", "--data", phantoms, "--out", trained, "--steps", 2, *sets()]
    code, output, said = call(*command)
    assert (code, output) == (1, "")
    assert f"vessa-trainer: invalid_config: {trained} holds a run" in said
    code, output, said = call(*command, "--resume", "--json")
    assert code == 0
    result = json.loads(output.splitlines()[-1])
    assert result["out"] == str(trained)
    assert f"test Dice {result['dice']:.3f}" in said


def test_fit_takes_methods_seeds_and_config_files(call, phantoms, tmp_path):
    (tmp_path / "e.yaml").write_text("steps: 50\nsemi: {method: unimatch_v2}\n")
    out = tmp_path / "a: #b"  # YAML would read it as something else
    code, _, _ = call(
        "fit", "--config", tmp_path / "e.yaml", "--data", phantoms, "--out", out, "--method", "supervised",
        "--steps", 2, "--seed", 3, *sets(),
    )  # fmt: skip
    assert code == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["method"], summary["seed"], summary["steps"]) == ("supervised", 3, 2)


def test_fit_without_any_test_mask_ends_well(call, phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "heart")
    for group in (tmp_path / "heart" / "splits" / "test.txt").read_text().split():
        for path in (tmp_path / "heart" / "masks").glob(f"{group}_*.png"):
            path.unlink()
    code, output, said = call(
        "fit", "--data", tmp_path / "heart", "--out", tmp_path / "run", "--steps", 2, *sets(), "--json"
    )
    assert code == 0
    assert json.loads(output.splitlines()[-1])["dice"] is None
    assert "test Dice not scored" in said


def test_evaluate_scores_the_best_teacher_as_the_run_did(call, trained):
    code, output, said = call("evaluate", trained, "--json")
    assert code == 0
    summary = json.loads((trained / "summary.json").read_text())
    found = json.loads(output.splitlines()[-1])
    assert found.pop("delivered", None) == summary.get("test_delivered")
    assert found == summary["test"]
    assert "HD95 (voxel)" in said
    code, output, _ = call("evaluate", trained, "--split", "val", "--json")
    assert code == 0
    found = json.loads(output.splitlines()[-1])
    assert found.pop("delivered", None) == summary.get("val_delivered")
    assert found == summary["val"]


def test_evaluate_refuses_what_would_mislead(call, trained, phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "heart")
    meta = json.loads((phantoms / "meta.json").read_text())
    meta["classes"]["1"], meta["classes"]["3"] = meta["classes"]["3"], meta["classes"]["1"]
    (tmp_path / "heart" / "meta.json").write_text(json.dumps(meta))
    code, _, said = call("evaluate", trained, "--data", tmp_path / "heart")
    assert code == 1
    assert "scores would mislead" in said
    code, _, said = call("evaluate", trained, "--split", "splits/none.txt")
    assert code == 1
    assert "No split file 'splits/none.txt'" in said
    code, _, said = call("evaluate", tmp_path / "no-run")
    assert code == 1
    assert "cannot read the config file" in said


def test_predict_writes_a_mask_for_each_image_of_a_folder(call, trained, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 30), np.uint8)).save(folder / "gray.png")
    Image.fromarray(rng.integers(0, 255, (25, 50, 3), np.uint8)).save(folder / "color.jpg")
    code, output, _ = call("predict", trained, folder, tmp_path / "masks", "--json")
    assert code == 0
    result = json.loads(output.splitlines()[-1])
    assert (result["masks"], result["classes"]["1"]) == (2, "right ventricle cavity")
    for name, size in (("gray", (30, 40)), ("color", (50, 25))):
        with Image.open(tmp_path / "masks" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("L", size)
            assert np.asarray(mask).max() <= 3


def test_predict_takes_a_data_set_too(call, trained, phantoms, tmp_path):
    code, _, said = call("predict", trained, phantoms, tmp_path / "masks")
    assert code == 0
    assert "18 masks in" in said
    assert sorted(p.name for p in (tmp_path / "masks").glob("*.png")) == sorted(
        p.name for p in (phantoms / "images").iterdir()
    )


def test_predict_never_writes_over_the_images(call, trained, phantoms, tmp_path):
    shutil.copytree(phantoms, tmp_path / "heart")
    for out in (tmp_path / "heart", tmp_path / "heart" / "images"):
        code, _, said = call("predict", trained, tmp_path / "heart", out)
        assert code == 1
        assert "holds the images, and masks would replace them" in said
    code, _, said = call("predict", trained, tmp_path / "heart" / "images", tmp_path / "heart" / "images")
    assert code == 1
    assert (tmp_path / "heart" / "images" / "heart000_01.png").read_bytes() == (
        phantoms / "images" / "heart000_01.png"
    ).read_bytes()


def test_predict_refuses_folders_it_cannot_name_masks_for(call, trained, tmp_path):
    code, _, said = call("predict", trained, tmp_path, tmp_path / "masks")
    assert code == 1
    assert "is no data set and holds no PNG, JPEG or TIFF images" in said
    for suffix in ("png", "tif"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"a.{suffix}")
    code, _, said = call("predict", trained, tmp_path, tmp_path / "masks")
    assert code == 1
    assert "holds several images called a" in said
    assert not (tmp_path / "masks").exists()


def test_verify_passes_what_is_sound_and_fails_what_is_not(call, phantoms, tmp_path):
    code, output, said = call("verify", phantoms, "--json")
    assert code == 0
    assert json.loads(output.splitlines()[-1])["images"] == 18
    assert "18 images, 0 errors" in said
    shutil.copytree(phantoms, tmp_path / "heart")
    shutil.copy(tmp_path / "heart" / "splits" / "val.txt", tmp_path / "heart" / "splits" / "test.txt")
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(tmp_path / "heart" / "masks" / "heart000_01.png")
    code, output, said = call("verify", tmp_path / "heart", "--json")
    assert code == 1
    result = json.loads(output.splitlines()[-1])
    assert result["errors"] >= 2
    assert "heart000_01" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--data", "FOLDER", "--out", "FOLDER/run"),
        ("compare", "--data", "FOLDER", "--out", "FOLDER/run", "--seeds", "1"),
        ("verify", "FOLDER"),
        ("fit", "--data", "FOLDER/missing", "--out", "FOLDER/run"),
        ("fit", "--set", "semi.methd=vessa"),
    ],
    ids=["fit", "compare", "verify", "missing", "config"],
)
def test_what_is_wrong_is_said_in_one_line_with_exit_code_1(call, tmp_path, arguments):
    code, output, said = call(*(a.replace("FOLDER", str(tmp_path)) for a in arguments))
    assert (code, output) == (1, "")
    (line,) = said.strip().splitlines()
    assert line.startswith(("vessa-trainer: invalid_dataset: ", "vessa-trainer: invalid_config: "))


def test_text_in_brackets_is_printed_as_it_is(call, phantoms, tmp_path):
    code, _, said = call("verify", tmp_path / "scans [old]")
    assert code == 1
    assert said.strip().endswith("scans [old]")
    folder = shutil.copytree(phantoms, tmp_path / "[bold]hearts")
    with (folder / "splits" / "train.txt").open("a") as file:
        file.write("[/anon]\n")
    code, _, said = call("verify", folder)
    assert code == 1
    assert "[bold]hearts: PngFolder" in said
    assert "[/anon]" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "docker stop"])
def test_a_process_that_is_stopped_saves_and_prints_the_line_that_resumes_it(phantoms, tmp_path, number):
    out = tmp_path / "stopped"
    command = [
        "fit",
        "--data",
        str(phantoms),
        "--out",
        str(out),
        "--steps",
        "100000",
        *sets("eval_every=100000"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "vessa_trainer", *command],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    with process:
        metrics = out / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("vessa-trainer: interrupted: stopped by Ctrl-C or SIGTERM; saved at step ")
    step = checkpoint.read(out / checkpoint.LAST)[1]["state"]["step"]
    line = last.partition("Resume with: ")[2]
    assert f"saved at step {step}." in last
    assert shlex.split(line) == ["vessa-trainer", *command, "--resume"]
