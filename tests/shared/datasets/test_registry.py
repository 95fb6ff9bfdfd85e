"""The registry: what it must say, how a folder is recognized, what `require_sound` refuses."""

import json
import logging
import re

import numpy as np
import pytest
from PIL import Image

from vessa.datasets import COLLECTIONS, collection, open_dataset, recognize, require_sound, verify
from vessa.datasets.biomedparse import group_of
from vessa.datasets.registry import LAYOUTS, fits_patient
from vessa.errors import InvalidDataset

BY_USE = {
    "stage1": {"amos22", "LGG", "MMs", "CAMUS", "ChestXray", "BUSI"},
    "stage2": {"ACDC", "AbdomenCT-1K"},
    "shipped": {"sunnybrook", "hc18", "dsb2018"},
}


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def mms(tmp_path):
    """Four patients of M&Ms, two slices each, in BiomedParse layout."""
    rng = np.random.default_rng(0)
    for part, patients in (("train", ("A1B2C3", "A2B2C3", "A3B2C3")), ("test", ("A4B2C3",))):
        for patient in patients:
            for index in range(2):
                name = f"{patient}_sa_0_{index}_MRI_heart"
                png(tmp_path / f"MMs/{part}/{name}.png", rng.integers(0, 255, (8, 8)))
                png(tmp_path / f"MMs/{part}_mask/{name}_myocardium.png", np.eye(8) * 255)
    return tmp_path / "MMs"


def kinds(findings):
    return [(f.kind, f.severity) for f in findings]


def test_the_papers_sets_are_there_and_only_free_ones_may_ship():
    assert {u: {c.name for c in COLLECTIONS if c.use == u} for u in BY_USE} == BY_USE
    assert {c.name for c in COLLECTIONS if c.ships} == BY_USE["shipped"]
    assert {c.licence for c in COLLECTIONS if c.ships} <= {"CC0", "CC BY 4.0"}


@pytest.mark.parametrize("entry", COLLECTIONS, ids=lambda entry: entry.name)
def test_an_entry_is_complete_and_its_example_is_of_one_of_its_patients(entry):
    assert all(vars(entry)[key] for key in vars(entry) if key not in ("ships", "note"))
    assert entry.layout in LAYOUTS
    assert all(recognize(f"anywhere/{folder}") is entry for folder in entry.folders)
    name = entry.example.split("/")[-1].split(".")[0]
    if entry.layout == "BiomedParse":
        image, _, target = name.rpartition("_")
        assert target.replace("+", " ") in entry.classes
        assert fits_patient(entry, group_of(image.rsplit("_", 2)[0])[0])
    else:
        assert re.match(entry.patient, name)


def test_names_are_found_whatever_their_case():
    assert collection("busi").title.startswith("BUSI")
    with pytest.raises(
        ValueError, match=r"No collection is named 'MSD'. Known collections: amos22, LGG, MMs"
    ):
        collection("MSD")


def test_folders_are_recognized_by_their_last_names(tmp_path):
    assert recognize(tmp_path / "amos22" / "mri").name == "amos22"
    assert recognize(tmp_path / "MRI") is None
    assert recognize(tmp_path / "amos22" / "CT" / "mine") is None


def test_a_registered_collection_brings_its_licence(mms):
    assert open_dataset(mms).licence == collection("MMs").licence
    assert open_dataset(mms.rename(mms.parent / "mine")).licence == ""


def test_a_folder_as_the_registry_has_it_has_no_findings(mms):
    dataset = open_dataset(mms)
    splits = {name: dataset.split(name) for name in ("train", "test")}
    assert verify(dataset, splits, recognize(mms)) == []


def test_other_classes_patients_and_layouts_than_the_registrys_are_named(mms, tmp_path):
    png(mms / "train/stranger_MRI_heart.png", np.eye(8) * 9)
    png(mms / "train_mask/stranger_MRI_heart_liver.png", np.eye(8))
    findings = verify(open_dataset(mms), entry=recognize(mms))
    assert kinds(findings) == [("class_names", "warning"), ("patient_names", "warning")]
    assert "['liver']" in findings[0].message
    assert "1 patients such as ['stranger']; expected names like" in findings[1].message
    assert "A2L1N6_sa_0_3" in findings[1].message
    png(tmp_path / "LGG/images/a_1.png", np.eye(8))
    png(tmp_path / "LGG/masks/a_1.png", np.eye(8))
    (tmp_path / "LGG/meta.json").write_text(json.dumps({"classes": {"0": "background", "1": "glioma"}}))
    findings = verify(open_dataset(tmp_path / "LGG"), entry=recognize(tmp_path / "LGG"))
    assert kinds(findings) == [("other_layout", "warning")]
    assert "layout PngFolder; expected BiomedParse for LGG: train/<id>" in findings[0].message


def test_sound_data_pass_and_their_warnings_are_logged(mms, caplog):
    for index in range(2):
        png(mms / f"train_mask/A1B2C3_sa_0_{index}_MRI_heart_myocardium.png", np.zeros((8, 8)))
    with caplog.at_level(logging.WARNING):
        require_sound(open_dataset(mms), min_groups=4)
    assert caplog.messages == [
        "MMs: 2 x empty_mask, the first is A1B2C3_sa_0_0_MRI_heart: the mask is all background"
    ]


def test_faulty_data_are_refused_with_what_to_do(mms):
    for index in range(2):
        png(mms / f"train_mask/A1B2C3_sa_0_{index}_MRI_heart_myocardium.png", np.eye(4))
        twin = mms / f"train/A2B2C3_sa_0_{index}_MRI_heart.png"
        (mms / f"train/A3B2C3_sa_0_{index}_MRI_heart.png").write_bytes(twin.read_bytes())
    expected = (
        r"'MMs' has errors that would harm the training: A1B2C3_sa_0_0_MRI_heart: image has size "
        r"\(8, 8\), its mask \(4, 4\); expected one size \(size_mismatch: replace it by the mask of .*"
        r"duplicate_image: remove one.*; "
        r"and 2 more"
    )
    with pytest.raises(InvalidDataset, match=expected):
        require_sound(open_dataset(mms), min_groups=5)


def test_too_few_patients_are_refused(mms):
    with pytest.raises(InvalidDataset, match=r"MMs: 4 patients, expected at least 5 \(few_groups: add"):
        require_sound(open_dataset(mms), min_groups=5)
