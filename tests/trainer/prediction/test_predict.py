"""Predicting whole files and folders, and the exported network."""

import gzip
import json
from pathlib import Path

import h5py
import highdicom as hd
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from rich.console import Console
from scans import dicom_series, nifti, phantom, written

from vessa.errors import InvalidDataset
from vessa.volumes import read_volume
from vessa.volumes.grid import slice_of
from vessa_trainer.config import save_config
from vessa_trainer.prediction.onnx_export import export
from vessa_trainer.prediction.predict import predict
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_slices
from vessa_trainer.students.networks import build_student

CLASSES = {1: "cavity", 2: "wall"}
AFFINE = np.array([[-1.2, 0, 0.1, 3], [0, 1.5, 0, 4], [0.1, 0, 6.0, 5], [0, 0, 0, 1]], np.float32)


def make_run(tiny, *overrides):
    config = tiny(*overrides)
    torch.manual_seed(0)
    model = build_student(config.student, 1, max(CLASSES) + 1)
    out = Path(config.out)
    metadata = {"channels": 1, "classes": {str(k): v for k, v in CLASSES.items()}, "best": [0.5, 1]}
    checkpoint.write(out / checkpoint.BEST, checkpoint.module_state(model, "teacher"), metadata)
    save_config(config, out / "config.yaml")
    return out, config


@pytest.fixture
def run(tiny):
    """A finished run's folder; its network has learned nothing, which is enough here."""
    return make_run(tiny)


def go(run, source, out, *, flips=False, axis="auto", nifti=False):
    return predict(run[0], source, out, Console(quiet=True), flips=flips, axis=axis, nifti=nifti)


def expected(run, volume, axis):
    model, channels, _ = load_best(*run)
    labels = np.zeros(volume.shape, np.uint8)
    for i in range(volume.shape[axis]):
        (probability,) = predict_slices(model, [volume.image(axis, i)], run[1], channels)
        slice_of(labels, axis, i)[...] = probability.argmax(0).numpy()
    return labels


@pytest.mark.parametrize(("axis", "number"), [("auto", 2), ("coronal", 1)])
def test_nifti_comes_back_with_its_affine_cut_along_the_axis(run, tmp_path, axis, number):
    (tmp_path / "scans").mkdir()
    path = tmp_path / "scans" / "heart.nii.gz"
    path.write_bytes(gzip.compress(nifti(phantom(), AFFINE)))
    go(run, tmp_path / "scans", tmp_path / "out", axis=axis)
    back = nib.load(tmp_path / "out" / "heart.nii.gz")
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(back.dataobj), expected(run, read_volume(path), number))


def test_a_dicom_series_comes_back_as_dicom_seg_or_nifti(run, tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    for index, file in enumerate(dicom_series(phantom())):
        (folder / f"IM{index}").write_bytes(written(file))
    go(run, folder, tmp_path / "seg")
    seg = hd.seg.segread(tmp_path / "seg" / "series.dcm")
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == ["cavity", "wall"]
    go(run, folder, tmp_path / "nii", nifti=True)
    back = nib.load(tmp_path / "nii" / "series.nii.gz")
    volume = read_volume(folder)
    np.testing.assert_allclose(back.affine, volume.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(back.dataobj), expected(run, volume, 2))
    with pytest.raises(InvalidDataset, match="holds the images"):
        go(run, folder, folder)


def test_repairs_are_said_and_a_dicom_without_seg_is_named_before_it_is_predicted(
    run, tmp_path, caplog, monkeypatch
):
    folder = tmp_path / "scans"
    folder.mkdir()
    holes = phantom((24, 20, 3)).astype(np.float32)
    holes[0] = np.nan
    (folder / "a.nii").write_bytes(nifti(holes, np.eye(4)))
    assert go(run, folder, tmp_path / "out")["failed"] == {}
    assert "60 voxels are NaN or infinite" in caplog.text
    file = dicom_series(phantom())[0]
    del file.StudyInstanceUID
    monkeypatch.setattr("vessa_trainer.prediction.delivery.predict_volume", None)  # must not be called
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "one.dcm").write_bytes(written(file))
    (why,) = go(run, tmp_path / "dicom" / "one.dcm", tmp_path / "seg")["failed"].values()
    assert "one.dcm: a DICOM SEG refers to its image by StudyInstanceUID" in why


def test_ssl4mis_volumes_come_back_as_hdf5(run, tmp_path):
    (tmp_path / "acdc" / "data").mkdir(parents=True)
    with h5py.File(tmp_path / "acdc" / "data" / "patient001_frame01.h5", "w") as file:
        file["image"] = phantom().astype(np.float32)
    go(run, tmp_path / "acdc", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "patient001_frame01.h5") as file:
        assert (file["label"].shape, file["label"].dtype) == ((12, 10, 6), np.uint8)


def test_an_interrupted_prediction_goes_on_and_nothing_else_is_mixed_in(run, tmp_path):
    (tmp_path / "scans").mkdir()
    for name in "ab":
        Image.fromarray(phantom()[:, :, 0].astype(np.uint8)).save(tmp_path / "scans" / f"{name}.png")
    out = tmp_path / "out"
    assert go(run, tmp_path / "scans", out)["skipped"] == 0
    (out / "b.png").unlink()
    (out / "a.png").write_bytes(b"kept")
    assert go(run, tmp_path / "scans", out)["skipped"] == 1
    assert (out / "a.png").read_bytes() == b"kept"
    with Image.open(out / "b.png") as mask:
        assert mask.size == (10, 12)
    with pytest.raises(InvalidDataset, match="other images, runs or options"):
        go(run, tmp_path / "scans", out, flips=True)
    (tmp_path / "scans").rename(tmp_path / "others")
    with pytest.raises(InvalidDataset, match="other images, runs or options"):
        go(run, tmp_path / "others", out)
    (tmp_path / "others").rename(tmp_path / "scans")
    (out / "predict.json").unlink()
    with pytest.raises(InvalidDataset, match="not predicted here"):
        go(run, tmp_path / "scans", out)


def test_flips_average_the_four_mirror_images(run):
    model, channels, _ = load_best(*run)
    image = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    (found,) = predict_slices(model, [image], run[1], channels, flips=True)
    views = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    back = [lambda p: p, lambda p: p.flip(-1), lambda p: p.flip(-2), lambda p: p.flip(-2, -1)]
    each = predict_slices(model, [np.ascontiguousarray(v) for v in views], run[1], channels)
    mean = sum(turn(p) for turn, p in zip(back, each, strict=True)) / 4
    torch.testing.assert_close(found, mean)


@pytest.mark.parametrize("student", ["unet", "dpt"])
@pytest.mark.filterwarnings("ignore")  # the exporter's own, about versions of operators
def test_the_exported_network_computes_the_same_for_any_batch(tiny, tmp_path, student):
    more = ["student.backbone=tiny", "student.pretrained=false", "student.size=42", "student.crop=42"]
    run = make_run(tiny, f"student.name={student}", *(more if student == "dpt" else []))
    result = export(run[0], tmp_path / "student.onnx")
    assert result["difference"] < 1e-3
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx")
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == {"1": "cavity", "2": "wall"}
    assert json.loads(properties["preprocessing"])["channels"] == 1
    size = session.get_inputs()[0].shape[-1]
    images = np.random.default_rng(0).random((5, 1, size, size), np.float32)
    (logits,) = session.run(None, {"image": images})
    assert logits.shape == (5, 3, size, size)
