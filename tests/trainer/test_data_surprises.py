"""Siblings of the reports in test_user_reports.py: data that are easily read in a wrong way unsaid."""

import errno
import json
import os

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from vessa.datasets import open_dataset
from vessa.errors import InvalidConfig, InvalidDataset
from vessa_trainer.config import DataConfig
from vessa_trainer.data.splits import plan_splits
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.data.verification import verify_data
from vessa_trainer.experiments import run as run_module
from vessa_trainer.semi_supervised.trainer import Interrupted


def read(path):
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture
def hdf5(hearts, tmp_path, write_hdf5):
    """Write the phantoms in SSL4MIS form; a name may hold underscores."""

    def write(name_of=lambda group: group):
        folder = write_hdf5(tmp_path / "hdf5", name_of)
        (folder / "meta.json").write_text((hearts / "meta.json").read_text())
        return folder

    return write


def splits_of(folder):
    plan = plan_splits(open_training_data(DataConfig(root=str(folder))), DataConfig())
    return plan.splits, plan.sources


@pytest.fixture
def volumes(hearts, tmp_path):
    """The phantoms as nnU-Net volumes, with their split files."""
    folder = tmp_path / "volumes"
    for kind, target, end in (("images", "imagesTr", "_0000"), ("masks", "labelsTr", "")):
        (folder / target).mkdir(parents=True)
        for group in sorted({p.name.split("_")[0] for p in (hearts / kind).iterdir()}):
            stack = np.stack([read(p).T for p in sorted((hearts / kind).glob(f"{group}_*"))], -1)
            volume = nib.Nifti1Image(stack, np.diag([1.5, 1.5, 8.0, 1.0]))
            nib.save(volume, folder / target / f"{group}{end}.nii.gz")
    labels = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": labels}))
    (hearts / "splits").rename(folder / "splits")
    return folder


@pytest.mark.parametrize("name", ["background", "Background", "bg", "unlabeled", "clear label", "0", ""])
def test_id_0_may_have_any_name_of_the_background(hearts, name):
    meta = json.loads((hearts / "meta.json").read_text())
    meta["classes"]["0"] = name
    (hearts / "meta.json").write_text(json.dumps(meta))
    assert len(open_dataset(hearts).classes) == 3


def test_a_structure_called_0_is_refused(hearts, volumes, hdf5):
    said = "class id 0 is called 'nodule', but 0 is always the background. Number the classes from 1"
    folder = hdf5()
    for path in (hearts / "meta.json", folder / "meta.json"):
        path.write_text(json.dumps({"classes": {"0": "nodule", "1": "vessel"}}))
        with pytest.raises(InvalidDataset, match=said):
            open_dataset(path.parent)
    description = json.loads((volumes / "dataset.json").read_text())
    description["labels"] = {"nodule": 0, "vessel": 1}
    (volumes / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(InvalidDataset, match=said):
        open_dataset(volumes)


def test_a_validation_list_without_a_test_list_is_honored(hdf5):
    folder = hdf5()
    (folder / "train.list").write_text("".join(f"heart00{i}\n" for i in range(4)))
    (folder / "val.list").write_text("heart004\n")
    splits, sources = splits_of(folder)
    assert splits.val == ("heart004",)
    assert sources["val"] == "the data set's own val list"
    assert "drawn from the training patients" in sources["test"]
    assert {*splits.labeled, *splits.unlabeled, *splits.test} == {f"heart00{i}" for i in range(4)}


def test_a_test_list_alone_is_never_trained_on(hdf5):
    folder = hdf5()
    (folder / "test.list").write_text("heart002.h5\nheart003.h5\n")
    splits, sources = splits_of(folder)
    assert splits.test == ("heart002", "heart003")
    assert sources["unlabeled"] == "all patients of no other list"
    others = {*splits.labeled, *splits.unlabeled, *splits.val}
    assert others == {"heart000", "heart001", "heart004", "heart005"}


def test_a_file_called_test_in_the_working_directory_is_no_list(hdf5, tmp_path, monkeypatch):
    folder = hdf5()
    (tmp_path / "test").write_text("#!/bin/sh\n")
    monkeypatch.chdir(tmp_path)
    assert "drawn among 6 annotated groups" in splits_of(folder)[1]["test"]


def test_underscores_in_names_of_patients_are_kept(hdf5):
    folder = hdf5(lambda group: f"site_1_{group}")
    (folder / "train.list").write_text("".join(f"site_1_heart00{i}_slice_1\n" for i in range(4)))
    (folder / "val.list").write_text("site_1_heart004\n")
    (folder / "test.list").write_text("site_1_heart005\n")
    splits, _ = splits_of(folder)
    assert (splits.val, splits.test) == (("site_1_heart004",), ("site_1_heart005",))


def test_files_of_channels_that_nobody_names_are_said(volumes):
    (volumes / "imagesTr" / "heart000_0001.nii.gz").write_bytes(
        (volumes / "imagesTr" / "heart000_0000.nii.gz").read_bytes()
    )
    found = verify_data(volumes, []).findings
    assert [f.where for f in found if f.kind == "left_out"] == ["heart000_0001.nii.gz"]


def test_a_corrected_spacing_is_another_data_set(volumes, train):
    train(data=volumes)
    path = next((volumes / "imagesTr").glob("heart000*"))
    for one in (path, volumes / "labelsTr" / "heart000.nii.gz"):
        image = nib.load(one)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1.5, 1.5, 4.0, 1.0])), one)
    with pytest.raises(InvalidConfig, match=r"data have changed .*spacings of 1 patients \(heart000\)"):
        train(data=volumes)


def test_a_disk_that_fills_up_at_the_end_leaves_the_line_that_resumes(train, tmp_path, monkeypatch):
    whole = run_module.write_run_report

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr(run_module, "write_run_report", full)
    with pytest.raises(
        Interrupted, match=r"No space left on device. The training is done and saved.*--resume"
    ):
        train()
    monkeypatch.setattr(run_module, "write_run_report", whole)
    assert train()["steps"] == 2
    assert (tmp_path / "run" / "summary.json").is_file()
