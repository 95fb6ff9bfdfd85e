"""nnU-Net data sets, read from volumes that the test writes."""

import json

import nibabel as nib
import numpy as np
import pytest

from vessa.datasets import NnUnet, open_dataset
from vessa.errors import InvalidDataset


def nifti(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.5, 2.0, 8.0, 1.0]) if affine is None else affine), path)


@pytest.fixture
def nnunet(tmp_path):
    volume = np.zeros((9, 5, 3), np.int16)  # x, y, z
    volume[7, 1, 2] = 100  # right in a row of x, near the top
    volume[:, :, 0] = 1000 * np.arange(9)[:, None]
    labels = (volume == 100).astype(np.uint8) * 2
    for case in ("a_001", "b_002"):
        nifti(tmp_path / f"imagesTr/{case}_0000.nii.gz", volume)
        nifti(tmp_path / f"imagesTr/{case}_0001.nii.gz", volume)
        nifti(tmp_path / f"labelsTr/{case}.nii.gz", labels)
    nifti(tmp_path / "imagesTs/c_003_0000.nii.gz", volume)
    meta = {"labels": {"background": 0, "liver": 1, "tumor": 2}, "channel_names": {"0": "CT"}}
    (tmp_path / "dataset.json").write_text(json.dumps(meta | {"groups": {"b_002": "a_001"}}))
    return tmp_path


def test_nnunet_is_read_slice_by_slice_upright(nnunet):
    dataset = open_dataset(nnunet)
    assert isinstance(dataset, NnUnet)
    assert (dataset.classes, dataset.modality) == ({1: "liver", 2: "tumor"}, "CT")
    assert [(c.name, c.group) for c in dataset.cases()] == [
        ("a_001", "a_001"),
        ("b_002", "a_001"),
        ("c_003", "c_003"),
    ]
    case = dataset.cases()[0]
    assert case.spacing == (8.0, 2.0, 1.5)
    assert [s.index for s in case.slices] == [0, 1, 2]
    bottom, _, top = case.slices
    image, mask = dataset.image(top), dataset.mask(top)
    assert image.shape == mask.shape == (5, 9)
    assert image.dtype == mask.dtype == np.uint8
    assert np.argwhere(mask == 2).tolist() == [[1, 7]]  # row = y, column = x, nothing flipped
    assert np.argwhere(image == image.max()).tolist() == [[1, 7]]
    assert (np.diff(dataset.image(bottom).astype(int), axis=1) > 0).all()
    assert dataset.mask(dataset.cases()[2].slices[0]) is None


def test_nnunet_intensities_are_clipped_to_the_volumes_percentiles(tmp_path):
    volume = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    volume[0, 0, 0] = -1e6
    nifti(tmp_path / "imagesTr/a_0000.nii", volume)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "background", "1": "liver"}, "modality": {}}')
    dataset = open_dataset(tmp_path)
    assert dataset.classes == {1: "liver"}
    pixels = np.stack([dataset.image(s) for s in dataset.slices()])
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert (pixels == 255).sum() < 10
    assert 120 < np.median(pixels) < 135


def test_nnunet_labels_off_the_images_grid_are_refused(nnunet):
    dataset = open_dataset(nnunet)
    item = dataset.slices()[0]
    nifti(nnunet / "labelsTr/a_001.nii.gz", np.zeros((9, 5, 2), np.uint8))
    with pytest.raises(InvalidDataset, match=r"has shape \(9, 5, 2\), its image \(9, 5, 3\)"):
        dataset.mask(item)
    nifti(nnunet / "labelsTr/a_001.nii.gz", np.zeros((9, 5, 3), np.uint8), np.diag([-1.5, 2.0, 8.0, 1.0]))
    with pytest.raises(InvalidDataset, match="another orientation"):
        dataset.mask(item)


def test_nnunet_damage_is_named(nnunet):
    dataset = open_dataset(nnunet)
    for case, damage in zip(dataset.cases(), ("cut", "nan", "text"), strict=True):
        path = next(nnunet.glob(f"images*/{case.name}_0000.nii.gz"))
        if damage == "cut":
            nifti(
                path, np.random.default_rng(0).integers(0, 1000, (32, 16, 3), dtype=np.int16)
            )  # noise does not shrink
            path.write_bytes(path.read_bytes()[:-60])
        elif damage == "nan":
            nifti(path, np.full((9, 5, 3), np.nan, np.float32))
        else:
            path.write_bytes(b"no NIfTI")
        message = {
            "cut": "is damaged",
            "nan": "no voxel that is a finite number",
            "text": "0000.nii.gz: the file is no NIfTI",
        }[damage]
        with pytest.raises(InvalidDataset, match=message):
            dataset.image(case.slices[0])
    nifti(nnunet / "imagesTr/a_001_0000.nii.gz", np.zeros((2, 2, 2, 2), np.uint8))
    with pytest.raises(InvalidDataset, match="has 4 axes"):
        open_dataset(nnunet).cases()
    nifti(nnunet / "imagesTs/a_001_0000.nii.gz", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InvalidDataset, match="there twice"):
        open_dataset(nnunet)


@pytest.mark.parametrize("text", ["{", '{"labels": {"background": 0, "a": "x"}}', "[]"])
def test_a_damaged_dataset_json_is_named(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InvalidDataset, match=r"dataset\.json must hold"):
        open_dataset(tmp_path)


def test_nnunet_without_images_is_no_data_set(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": {"background": 0}}')
    with pytest.raises(InvalidDataset, match="holds no imagesTr"):
        open_dataset(tmp_path)
