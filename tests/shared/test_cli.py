"""The command line `vessa` with a running annotator, called as a user calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vessa import cli
from vessa.errors import InvalidRequest

NO_SERVICE = "http://127.0.0.1:9"  # the discard port: no service listens there


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder of three patients with one bright disk each; the third has no mask."""
    root = tmp_path / "disks"
    y, x = np.mgrid[:40, :48]
    for sub in ("images", "masks", "splits"):
        (root / sub).mkdir(parents=True)
    for i in range(1, 4):
        mask = (np.hypot(y - 18 - i, x - 20 - i) < 8).astype(np.uint8)
        Image.fromarray(mask * 180 + 30).save(root / "images" / f"p{i}_00.png")
        if i < 3:
            Image.fromarray(mask).save(root / "masks" / f"p{i}_00.png")
    (root / "meta.json").write_text('{"classes": {"1": "disk"}}')
    (root / "splits" / "train.txt").write_text("p2\n")
    return root


@pytest.fixture
def bank() -> str:
    return f"cli-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def run(annotator: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run `vessa` in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("VESSA_URL", annotator.url)
    monkeypatch.setenv("VESSA_API_KEY", annotator.api_key)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


def vessa(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own; returns its exit code and output."""
    command = [sys.executable, "-c", "from vessa.cli import main; main()", *map(str, arguments)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VESSA_")}
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60)


def last(stdout: str) -> dict[str, Any]:
    return json.loads(stdout.splitlines()[-1])


def test_seeding_fills_a_bank_once(run: Any, folder: Path, bank: str) -> None:
    code, out, _ = run("seed", folder, "--bank", bank, "--json")
    assert code == 0
    first = last(out)
    assert (first["created"], first["templates"], first["groups"]) == (2, 2, ["p1", "p2"])
    assert first["classes"] == {"1": "disk"}
    again = last(run("seed", folder, "--bank", bank, "--json")[1])
    assert (again["created"], again["templates"], again["version"]) == (0, 2, first["version"])


def test_seeding_adds_only_the_chosen_groups(run: Any, folder: Path, bank: str) -> None:
    assert last(run("seed", folder, "--bank", bank, "--split", "train", "--json")[1])["groups"] == ["p2"]
    out = run("seed", folder, "--bank", f"{bank}-b", "--groups", "p1, p3", "--json")[1]
    assert last(out)["groups"] == ["p1"]  # p3 has no mask
    code, _, err = run("seed", folder, "--bank", bank, "--groups", "p1", "--split", "train")
    assert code == 2
    assert "not both" in err


def test_segment_writes_a_label_map_and_an_overlay(run: Any, folder: Path, bank: str, tmp_path: Path) -> None:
    run("seed", folder, "--bank", bank)
    image = folder / "images" / "p3_00.png"
    code, out, err = run(
        "segment", image, "--bank", bank, "--out", "m.png", "--overlay", "o.png", "--classes", "disk",
        "--group", "p1", "--json",
    )  # fmt: skip
    assert code == 0
    with Image.open(tmp_path / "m.png") as mask, Image.open(tmp_path / "o.png") as picture:
        assert (mask.mode, picture.mode) == ("L", "RGB")
        assert mask.size == picture.size == (48, 40)
        labels = np.array(mask)
    assert set(np.unique(labels)) <= {0, 1}
    result = last(out)
    assert result["mask"] == "m.png"
    assert result["areas"] == {"disk": int((labels == 1).sum())}
    assert set(result["scores"]) == {"disk"}
    assert result["bank_version"] == 1
    assert re.search(r"disk: \d+ px, score \d\.\d\d, template of p2 \(\d\.\d\d\)", err)


def test_annotation_prints_provenance_and_writes_labels(
    run: Any, folder: Path, bank: str, tmp_path: Path
) -> None:
    run("seed", folder, "--bank", bank)
    first = run("segment", folder / "images" / "p3_00.png", "--bank", bank, "--group", "p1", "--json")
    identity = last(first[1])["annotation_id"]
    assert identity in first[2]
    code, out, err = run("annotation", identity, "--out", "again.png", "--json")
    assert code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "mask.png").read_bytes()
    made = last(out)
    assert (made["bank"], made["bank_version"], made["group"]) == (bank, 1, "p1")
    assert made["templates"]["disk"][0]["group"] == "p2"
    assert made["model"] in err


def test_suggestions_are_ranked_by_patient(run: Any, folder: Path, bank: str) -> None:
    for name in ("p4_00", "p4_01"):
        Image.fromarray(np.full((40, 48), 9 * int(name[-1]), np.uint8)).save(
            folder / "images" / f"{name}.png"
        )
    (folder / "images" / "p5_00.png").write_bytes(b"broken")
    run("seed", folder, "--bank", bank)
    code, out, err = run("suggest", folder, "--bank", bank, "--json")
    assert code == 0
    result = last(out)
    assert (result["bank"], result["bank_version"], result["images"]) == (bank, 1, 3)
    assert result["skipped"] == ["p5_00"]
    assert {one["group"]: sorted(one["images"]) for one in result["suggestions"]} == {
        "p3": ["p3_00"],
        "p4": ["p4_00", "p4_01"],
    }
    first, second = (one["gain"] for one in result["suggestions"])
    assert 1 >= first >= second >= 0
    assert "p5_00 is skipped" in err
    assert re.search(r"1 .*p\d.*\d%", err)


def test_suggestions_from_a_folder_of_images_name_files(run: Any, folder: Path, bank: str) -> None:
    (folder / "images" / "p3_00.png").rename(folder / "images" / "p3[b].png")
    code, out, err = run("suggest", folder / "images", "--bank", bank, "--count", "3", "--json")
    assert code == 0
    result = last(out)
    assert (result["bank_version"], len(result["suggestions"])) == (0, 3)
    for one in result["suggestions"]:
        assert one["group"] is None
        assert one["images"][0] in {"p1_00.png", "p2_00.png", "p3[b].png"}
        assert one["images"][0] in err


def test_a_folder_without_candidates_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "images" / "p3_00.png").unlink()
    done = vessa("suggest", folder, VESSA_URL=NO_SERVICE)
    assert done.returncode == 1
    assert "invalid_dataset" in done.stderr
    assert "no readable image without a mask" in done.stderr


def test_without_json_nothing_is_on_stdout(run: Any, folder: Path, bank: str, tmp_path: Path) -> None:
    assert run("seed", folder, "--bank", bank)[1] == ""
    assert run("segment", folder / "images" / "p3_00.png", "--bank", bank)[1] == ""
    assert (tmp_path / "mask.png").is_file()
    code, out, err = run("banks")
    assert (code, out) == (0, "")
    assert bank in err


def test_banks_are_listed_as_json(run: Any, folder: Path, bank: str) -> None:
    run("seed", folder, "--bank", bank)
    listed = {info["name"]: info for info in last(run("banks", "--json")[1])["banks"]}
    assert (listed[bank]["templates"], listed[bank]["classes"]) == (2, {"1": "disk"})


def test_names_that_look_like_markup_are_printed_as_they_are(run: Any, folder: Path, bank: str) -> None:
    """A class or a bank named as a closing tag of rich ended the command with a traceback."""
    (folder / "meta.json").write_text('{"classes": {"1": "[/nope]"}}')
    (folder / "images" / "p3_00.png").rename(folder / "images" / "[bold]p3_00.png")
    image = folder / "images" / "[bold]p3_00.png"
    with pytest.raises(InvalidRequest, match=r"Got '\[/nope\]'"):
        run("seed", folder, "--bank", "[/nope]")
    assert run("seed", folder, "--bank", bank)[0] == 0
    for arguments in (
        ("banks",),
        ("segment", image, "--bank", bank),
        ("suggest", folder, "--bank", bank),
        ("verify", folder),
    ):
        code, _, err = run(*arguments)
        assert code == 0, err
        assert (
            "[bold]p3" if arguments[0] == "suggest" else "[/nope]" if arguments[0] != "verify" else ""
        ) in err


@pytest.mark.parametrize("option", ["--out", "--overlay"])
def test_only_png_keeps_class_ids(run: Any, folder: Path, bank: str, option: str, tmp_path: Path) -> None:
    code, _, err = run("segment", folder / "images" / "p3_00.png", "--bank", bank, option, "mask.jpg")
    assert code == 2
    assert ".png" in err
    assert not list(tmp_path.glob("mask.*"))


def test_verify_passes_a_sound_folder_and_names_its_splits(run: Any, folder: Path) -> None:
    code, out, err = run("verify", folder, "--json")
    assert code == 0
    result = last(out)
    assert (result["images"], result["groups"], result["errors"], result["splits"]) == (3, 3, 0, ["train"])
    assert "layout: PngFolder" in err


def test_verify_fails_on_a_patient_in_two_splits_and_says_what_to_do(run: Any, folder: Path) -> None:
    (folder / "splits" / "test.txt").write_text("p1\np2\n")
    code, out, _ = run("verify", folder)
    assert code == 1
    assert "error: split_overlap: train, test: groups in both: ['p2']" in out
    assert "To do: keep each patient in one split only" in out
    assert run("verify", folder, "--split", "train")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["banks", "--url", NO_SERVICE], "vessa: unreachable: no response from the annotator at http://127.0.0.1:9"),
        (["banks", "--api-key", "wrong"], "vessa: unauthorized: The key is wrong or revoked."),
        (["segment", "text.png"], "vessa: invalid_image: text.png is no PNG, JPEG or TIFF file"),
        (["segment", "none.png"], "vessa: invalid_image: no such file: none.png"),
        (["segment", "disks/images/p1_00.png", "--bank", "no-such"], "vessa: unknown_bank: "),
        (["segment", "disks/images/p1_00.png", "--bank", "a b"], "vessa: invalid_request: A bank name is"),
        (["seed", "nowhere"], "vessa: invalid_dataset: "),
        (["seed", "disks", "--groups", "p9"], "vessa: invalid_dataset: 'disks' has no groups ['p9']"),
        (["seed", "disks", "--groups", "p3"], "vessa: invalid_dataset: no mask of the 1 groups of"),
    ],
)  # fmt: skip
def test_a_failure_prints_one_line_and_exits_with_code_1(
    run: Any, folder: Path, arguments: list[str], line: str, monkeypatch: Any, capsys: Any
) -> None:
    Path("text.png").write_text("no image")
    monkeypatch.setattr(sys, "argv", ["vessa", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.out == ""
    *warnings, last = captured.err.splitlines()
    assert last.startswith(line)
    assert ["process list" in warning for warning in warnings] == [True] * ("--api-key" in arguments)


def test_the_program_exits_with_code_1_and_no_traceback(annotator: Any, folder: Path, bank: str) -> None:
    known = {"VESSA_URL": annotator.url, "VESSA_API_KEY": annotator.api_key}
    assert vessa("seed", folder, "--bank", bank, **known).returncode == 0
    ended = vessa(
        "segment", folder / "images/p1_00.png", "--bank", bank, "--out", folder / "no/m.png", **known
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("vessa: ")
    assert "No such file or directory" in ended.stderr
    assert "Traceback" not in ended.stderr
