"""Data set layouts, read from files that the test writes; nnU-Net has a file of its own."""

import json

import h5py
import numpy as np
import pytest
from PIL import Image

from vessa.datasets import BiomedParse, PngFolder, Ssl4mis, open_dataset
from vessa.datasets.biomedparse import group_of
from vessa.errors import InvalidDataset

RNG = np.random.default_rng(0)


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


def h5(path, image, label=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"] = image
        if label is not None:
            file["label"] = label


def gray(height=6, width=8):
    return RNG.integers(0, 255, (height, width), dtype=np.uint8)


# --- PNG folders


@pytest.fixture
def png_folder(tmp_path):
    root = tmp_path / "hearts"
    for name in ("p1_frame01_02", "p1_frame01_10", "p1_frame12_01", "p2_05", "alone"):
        png(root / "images" / f"{name}.png", gray())
        png(root / "masks" / f"{name}.png", np.eye(6, 8, dtype=np.uint8))
    (root / "masks" / "p2_05.png").unlink()
    meta = {"classes": {"0": "background", "1": "heart"}, "modality": "MR", "licence": "CC0"}
    (root / "meta.json").write_text(json.dumps(meta))
    return root


def test_png_folders_are_read(png_folder):
    dataset = open_dataset(png_folder)
    assert isinstance(dataset, PngFolder)
    assert (dataset.name, dataset.classes, dataset.modality, dataset.licence) == (
        "hearts",
        {1: "heart"},
        "MR",
        "CC0",
    )
    assert [(c.name, c.group, [s.index for s in c.slices]) for c in dataset.cases()] == [
        ("alone", "alone", [0]),
        ("p1_frame01", "p1", [2, 10]),
        ("p1_frame12", "p1", [1]),
        ("p2", "p2", [5]),
    ]
    assert dataset.groups() == ("alone", "p1", "p2")
    first = dataset.slices()[1]
    assert first.name == "p1_frame01_02"
    assert np.array_equal(dataset.image(first), np.array(Image.open(png_folder / "images/p1_frame01_02.png")))
    assert dataset.mask(first).sum() == 6
    assert dataset.mask(dataset.slices()[-1]) is None


def test_png_colors_palettes_and_depths(png_folder):
    dataset = open_dataset(png_folder)
    item = dataset.slices()[0]
    path, mask_path = png_folder / "images/alone.png", png_folder / "masks/alone.png"
    png(path, np.dstack([gray()] * 4))
    assert dataset.image(item).shape == (6, 8, 3)
    Image.fromarray(gray()).convert("LA").save(path)
    assert dataset.image(item).shape == (6, 8)
    indexed = Image.fromarray(np.full((6, 8), 1, np.uint8), "L").convert("P")
    indexed.putpalette([0, 0, 0, 255, 0, 0])
    indexed.putdata([1] * 48)
    indexed.save(mask_path)
    assert np.unique(dataset.mask(item)).tolist() == [1]
    png(path, gray().astype(np.uint16) * 200)
    assert dataset.image(item).max() == 255  # deep pixels are scaled as the annotator scales them
    png(mask_path, np.dstack([gray()] * 3))
    with pytest.raises(InvalidDataset, match="alone.png has color or transparency"):
        dataset.mask(item)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InvalidDataset, match="alone.png is damaged or cut off"):
        dataset.image(item)


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": 3}', '{"classes": {"x": "y"}}'])
def test_a_damaged_meta_json_is_named(png_folder, text):
    (png_folder / "meta.json").write_text(text)
    with pytest.raises(InvalidDataset, match=r"meta\.json"):
        open_dataset(png_folder)


def test_splits_are_looked_up_in_the_data_folder_then_here(png_folder, tmp_path, monkeypatch):
    dataset = open_dataset(png_folder)
    (png_folder / "splits").mkdir()
    (png_folder / "splits" / "test.txt").write_text("p2\n\np1\np2\n")
    assert dataset.split("splits/test.txt") == dataset.split("test") == ("p2", "p1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("alone")
    assert dataset.split("mine.txt") == dataset.split(tmp_path / "mine.txt") == ("alone",)
    (tmp_path / "wrong.txt").write_text("p1\np9\n")
    with pytest.raises(InvalidDataset, match=r"wrong\.txt names groups .* \['p9'\]"):
        dataset.split("wrong.txt")
    with pytest.raises(InvalidDataset, match="No split file 'nowhere'"):
        dataset.split("nowhere")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidDataset, match="not a readable text file"):
        dataset.split("binary.txt")


# --- SSL4MIS


@pytest.fixture
def ssl4mis(tmp_path):
    label = np.eye(5, 7, dtype=np.uint8)
    for index, high in ((0, 0.5), (1, 1.0), (10, 0.25)):
        image = np.linspace(0, high, 35).reshape(5, 7)
        h5(tmp_path / "data/slices" / f"patient001_frame01_slice_{index}.h5", image, label * 3)
    h5(tmp_path / "data/patient001_frame01.h5", np.zeros((3, 5, 7)), np.zeros((3, 5, 7)))
    volume = np.stack([np.full((4, 6), v) for v in (0.0, 0.5, 1.0)])
    h5(tmp_path / "data/patient002_frame07.h5", volume, np.broadcast_to([[[0]], [[1]], [[2]]], (3, 4, 6)))
    (tmp_path / "train_slices.list").write_text("patient001_frame01_slice_0\npatient001_frame01_slice_1\n")
    (tmp_path / "val.list").write_text("patient002_frame07\n")
    return tmp_path


def test_ssl4mis_slices_and_volumes_are_read(ssl4mis):
    dataset = open_dataset(ssl4mis)
    assert isinstance(dataset, Ssl4mis)
    assert [(c.name, c.group, len(c.slices), c.spacing) for c in dataset.cases()] == [
        ("patient001_frame01", "patient001", 3, None),
        ("patient002_frame07", "patient002", 3, None),
    ]
    sliced, whole = dataset.cases()
    assert [s.index for s in sliced.slices] == [0, 1, 10]
    assert [int(dataset.image(s).max()) for s in sliced.slices] == [128, 255, 64]
    assert dataset.mask(sliced.slices[0]).max() == 3
    assert [int(dataset.image(s)[0, 0]) for s in whole.slices] == [0, 128, 255]
    assert [int(dataset.mask(s)[0, 0]) for s in whole.slices] == [0, 1, 2]
    assert dataset.image(whole.slices[0]).shape == (4, 6)
    assert dataset.image(whole.slices[0]).dtype == dataset.mask(whole.slices[0]).dtype == np.uint8


def test_ssl4mis_lists_mean_patients(ssl4mis):
    dataset = open_dataset(ssl4mis)
    assert dataset.split("train_slices.list") == dataset.split("train") == ("patient001",)
    assert dataset.split("val") == ("patient002",)


def test_ssl4mis_raw_acdc_folders_are_read(tmp_path):
    h5(tmp_path / "ACDC_training_slices/patient003_frame01_slice_0.h5", np.eye(4))
    h5(tmp_path / "ACDC_training_volumes/patient004_frame01.h5", np.ones((2, 4, 4)))
    dataset = open_dataset(tmp_path)
    assert dataset.groups() == ("patient003", "patient004")
    assert [dataset.mask(s) for s in dataset.slices()] == [None] * 3


def test_ssl4mis_damage_is_named(tmp_path):
    folder = tmp_path / "data/slices"
    h5(folder / "patient001_frame01_slice_0.h5", np.full((4, 4), np.nan))
    h5(folder / "patient002_frame01_slice_0.h5", np.ones((2, 4, 4)))
    (folder / "patient003_frame01_slice_0.h5").write_bytes(b"no HDF5")
    with h5py.File(folder / "patient004_frame01_slice_0.h5", "w") as file:
        file["other"] = 1
    dataset = open_dataset(tmp_path)
    messages = ("not finite", "expected \\(H, W\\)", "not a readable HDF5", "no dataset 'image'")
    for item, message in zip(dataset.slices(), messages, strict=True):
        with pytest.raises(InvalidDataset, match=message):
            dataset.image(item)
    h5(folder / "strange_slice_x.h5", np.eye(4))
    with pytest.raises(InvalidDataset, match="is not named"):
        open_dataset(tmp_path).cases()


def test_ssl4mis_volumes_need_a_volume(tmp_path):
    h5(tmp_path / "data/patient001_frame01.h5", np.eye(4))
    with pytest.raises(InvalidDataset, match=r"a volume is \(D, H, W\)"):
        open_dataset(tmp_path).cases()
    (tmp_path / "data/patient001_frame01.h5").write_bytes(b"no HDF5")
    with pytest.raises(InvalidDataset, match="not an HDF5 file"):
        open_dataset(tmp_path).cases()
    with pytest.raises(InvalidDataset, match="neither"):
        Ssl4mis(tmp_path / "nothing")


# --- BiomedParse


@pytest.fixture
def biomedparse(tmp_path):
    whole, part = np.zeros((6, 6), np.uint8), np.zeros((6, 6), np.uint8)
    whole[1:5, 1:5] = 255
    part[2:4, 2:4] = 255
    for folder, name in (("train", "amos_0004_12"), ("train", "amos_0004_3"), ("test", "amos_0005_1")):
        png(tmp_path / folder / f"{name}_CT_abdomen.png", np.dstack([gray(6, 6)] * 3))
        png(tmp_path / f"{folder}_mask" / f"{name}_CT_abdomen_liver.png", whole)
    png(tmp_path / "train_mask/amos_0004_12_CT_abdomen_liver+tumor.png", np.dstack([part] * 3))
    png(tmp_path / "test/amos_0006_1_CT_abdomen.png", gray(6, 6))
    return tmp_path


def test_biomedparse_is_read(biomedparse):
    dataset = open_dataset(biomedparse)
    assert isinstance(dataset, BiomedParse)
    assert dataset.classes == {1: "liver", 2: "liver tumor"}
    assert dataset.modality == "CT abdomen"
    assert [(c.name, [s.index for s in c.slices]) for c in dataset.cases()] == [
        ("amos_0004", [3, 12]),
        ("amos_0005", [1]),
        ("amos_0006", [1]),
    ]
    assert dataset.split("train") == ("amos_0004",)
    assert dataset.split("test") == ("amos_0005", "amos_0006")
    nested = dataset.mask(dataset.slices()[1])
    assert nested[2, 2] == 2  # the part lies within the whole and is not covered by it
    assert nested[1, 1] == 1
    assert nested[0, 0] == 0
    assert dataset.image(dataset.slices()[0]).shape == (6, 6, 3)
    assert dataset.mask(dataset.slices()[-1]) is None


@pytest.mark.parametrize(
    ("identity", "group", "index"),
    [
        ("amos_0004_12", "amos_0004", 12),
        ("0004_12", "0004", 12),
        ("LIDC-IDRI-0140_143_280", "LIDC-IDRI-0140", 280),
        ("patient001_frame01_5", "patient001", 5),
        ("covid_1585", "covid_1585", 0),
        ("144DME_as_F.jpeg_32", "144DME", 32),
        ("scan", "scan", 0),
        ("left_scan", "left_scan", 0),
    ],
)
def test_the_group_is_the_subject_in_the_name(identity, group, index):
    assert group_of(identity) == (group, index)


def test_stated_groups_go_before_the_name(biomedparse):
    (biomedparse / "groups.json").write_text('{"amos_0006_1_CT_abdomen": "amos_0005"}')
    assert open_dataset(biomedparse).groups() == ("amos_0004", "amos_0005")
    (biomedparse / "groups.json").write_text("[")
    with pytest.raises(InvalidDataset, match=r"groups\.json must hold"):
        open_dataset(biomedparse).groups()


def test_biomedparse_faults_are_named(biomedparse):
    png(biomedparse / "test_mask/amos_0005_1_CT_abdomen_spleen.png", np.zeros((3, 3), np.uint8))
    dataset = open_dataset(biomedparse)
    with pytest.raises(InvalidDataset, match="differ in size"):
        dataset.mask(dataset.cases()[1].slices[0])
    png(biomedparse / "train_mask/amos_0009_1_CT_abdomen_liver.png", gray())
    with pytest.raises(InvalidDataset, match="which is not there"):
        open_dataset(biomedparse)
    png(biomedparse / "train/amos_0005_1_CT_abdomen.png", gray())
    with pytest.raises(InvalidDataset, match=r"in train/ and in test/"):
        open_dataset(biomedparse)


def test_biomedparse_names_and_targets_have_limits(tmp_path):
    (tmp_path / "train_mask").mkdir()
    (tmp_path / "train").mkdir()
    with pytest.raises(InvalidDataset, match="no PNG files"):
        open_dataset(tmp_path)
    png(tmp_path / "train/a_CT_abdomen.png", gray())
    for number in range(255):
        (tmp_path / f"train_mask/a_CT_abdomen_t{number}.png").touch()
    with pytest.raises(InvalidDataset, match="room for 254"):
        open_dataset(tmp_path)
    png(tmp_path / "train/nameless.png", gray())
    with pytest.raises(InvalidDataset, match="is not named"):
        open_dataset(tmp_path)


# --- any


def test_an_unknown_layout_is_told_of_the_known_ones(tmp_path):
    with pytest.raises(InvalidDataset, match=r"PNG folders.*SSL4MIS.*nnU-Net.*BiomedParse"):
        open_dataset(tmp_path)
    with pytest.raises(InvalidDataset, match="no such folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    (tmp_path / "meta.json").write_text('{"classes": {}}')
    with pytest.raises(InvalidDataset, match="holds no PNG"):
        open_dataset(tmp_path)


def test_a_data_set_of_ones_own_in_ssl4mis_form_keeps_its_classes(tmp_path, caplog):
    folder = tmp_path / "data/slices"
    folder.mkdir(parents=True)
    label = np.zeros((4, 4), np.uint8)
    label[1:3, 1:3] = 1
    for name in ("lesion000_slice_1", "lesion001_slice_1"):
        h5(folder / f"{name}.h5", np.eye(4), label)
    assert open_dataset(tmp_path).classes == {1: "class 1"}
    assert 'Name them in meta.json: {"classes": {"0": "background", "1": "class 1"}}' in caplog.text
    (tmp_path / "meta.json").write_text('{"classes": {"0": "background", "1": "lesion"}}')
    assert open_dataset(tmp_path).classes == {1: "lesion"}
