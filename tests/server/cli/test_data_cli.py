"""`vessa-server data` and the check that every Stage 1 begins with."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vessa.datasets import COLLECTIONS
from vessa.errors import InvalidRequest
from vessa_server.cli.main import app
from vessa_server.pretraining.data.phantoms import write_phantoms


@pytest.fixture
def hearts(tmp_path):
    write_phantoms(tmp_path, patients=5, slices=2, size=64, seed=0)
    return tmp_path / "heart"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def last_line(result):
    return json.loads(result.stdout.splitlines()[-1])


def test_the_collections_are_listed():
    shown = invoke("data", "list")
    assert shown.exit_code == 0
    assert all(entry.name in shown.stdout for entry in COLLECTIONS)
    found = last_line(invoke("data", "list", "--json"))["collections"]
    assert [c["name"] for c in found] == [c.name for c in COLLECTIONS]
    assert found[0]["ships"] is False


def test_one_collection_is_shown_with_its_files_and_terms():
    shown = invoke("data", "show", "mms").stdout
    assert "classes: left heart ventricle, myocardium, right heart ventricle" in shown
    assert "ships: no" in shown
    assert "files: train/<id>_<modality>_<site>.png" in shown
    assert last_line(invoke("data", "show", "hc18", "--json"))["licence"] == "CC BY 4.0"
    result = invoke("data", "show", "none")
    assert isinstance(result.exception, InvalidRequest)
    assert "Known collections: amos22" in result.exception.message


def test_a_sound_folder_passes_with_its_particulars(hearts):
    result = invoke("data", "verify", hearts, "--split", "train", "--split", "test", "--json")
    assert result.exit_code == 0
    found = last_line(result)
    assert (found["errors"], found["groups"], found["images"], found["layout"]) == (0, 5, 10, "PngFolder")
    assert found["collection"] is None


def test_a_faulty_folder_fails_and_says_what_to_do(hearts):
    for path in sorted((hearts / "masks").glob("*.png")):
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
    result = invoke("data", "verify", hearts)
    assert result.exit_code == 1
    assert "mask holds class ids [9]; expected 0 or one of [1, 2, 3]" in result.stdout
    assert "To do: add the class to the description" in result.stdout


def test_many_findings_of_a_kind_are_shortened(tmp_path):
    write_phantoms(tmp_path, patients=11, slices=2, size=64, seed=0)
    for path in (tmp_path / "heart/masks").glob("*.png"):
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
    shown = invoke("data", "verify", tmp_path / "heart").stdout
    assert shown.count("error: unknown_class") == 20
    assert "2 more of unknown_class" in shown


def test_a_folder_is_compared_with_the_collection_that_it_is_said_to_be(hearts):
    found = last_line(invoke("data", "verify", hearts, "--as", "MMs", "--json"))
    assert found["collection"] == "MMs"
    assert [f["kind"] for f in found["findings"]] == ["other_layout"]
    assert found["findings"][0]["advice"]


def test_pretraining_refuses_what_would_spoil_it_before_it_writes_anything(hearts, tmp_path):
    broken = min((hearts / "masks").glob("*.png"))
    broken.write_bytes(b"no PNG")
    result = invoke("pretrain", "--data", hearts, "--out", tmp_path / "run", "--studies", 1, "--steps", 1)
    assert result.exit_code == 1
    assert f"'heart' has errors that would harm the training: {broken.stem}" in result.exception.message
    assert "(unreadable: export the file again" in result.exception.message
    assert not (tmp_path / "run").exists()
