"""The demo's images come from a generator that Stage 1 never sees: other code, organ and intensities."""

import ast
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vessa.datasets import open_dataset
from vessa_server.pretraining.data import synthetic
from vessa_trainer.data.verification import verify_data

ROOT = Path(__file__).resolve().parents[1]
GENERATOR = ROOT / "examples" / "knees.py"


@pytest.fixture(scope="module")
def knees():
    spec = importlib.util.spec_from_file_location("knees", GENERATOR)
    module = importlib.util.module_from_spec(spec)
    sys.modules["knees"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(knees, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "knees"
    knees.write_knees(folder, patients=4, slices=3, size=64, seed=1)
    return folder


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_generator_and_annotator_share_no_code():
    assert {name.split(".")[0] for name in imports_of(GENERATOR)} <= {
        *sys.stdlib_module_names,
        "numpy",
        "PIL",
    }
    for path in (ROOT / "services").rglob("*.py"):
        assert not any("knees" in name for name in imports_of(path)), path
        assert "knee" not in path.read_text(encoding="utf-8").lower(), path


def test_the_demo_runs_on_these_images_alone():
    script = (ROOT / "examples" / "demo.sh").read_text(encoding="utf-8")
    assert 'knees.py" "$folder/knees"' in script
    assert "vessa-server phantoms" not in script


def test_no_class_of_the_demo_is_one_of_stage_1(knees):
    ours = set(knees.CLASSES.values())
    theirs = {name for classes in synthetic.CLASSES.values() for name in classes.values()}
    assert not any(one in other or other in one for one in ours for other in theirs)


def test_the_labeled_patient_shows_one_of_two_sequences(folder):
    # Marrow is darker than the rim around it in one sequence, and brighter in the other.
    share: dict[str, list[float]] = {}
    for path in sorted((folder / "masks").iterdir()):
        with Image.open(path) as one, Image.open(folder / "images" / path.name) as other:
            mask, image = np.array(one) > 0, np.array(other).astype(float)
        if mask.sum() < 60:
            continue
        grown = np.zeros_like(mask)
        for dy, dx in ((0, 2), (0, -2), (2, 0), (-2, 0)):
            grown |= np.roll(mask, (dy, dx), (0, 1))
        share.setdefault(path.stem[:7], []).append(image[mask].mean() / image[grown & ~mask].mean())
    ratios = {group: np.mean(values) for group, values in share.items()}
    assert all(ratios[group] < 0.9 for group in ("knee000", "knee002"))
    assert all(ratios[group] > 1.1 for group in ("knee001", "knee003"))
    assert len((folder / "splits" / "labeled_1.txt").read_text().split()) == 1


def test_the_data_set_is_sound_and_the_same_for_the_same_seed(knees, folder, tmp_path):
    found = verify_data(folder, [])
    assert (found.images, found.errors) == (12, 0), found.findings
    assert open_dataset(folder).classes == knees.CLASSES
    knees.write_knees(tmp_path / "again", patients=4, slices=3, size=64, seed=1)
    for path in (folder / "images").iterdir():
        assert (tmp_path / "again" / "images" / path.name).read_bytes() == path.read_bytes()
