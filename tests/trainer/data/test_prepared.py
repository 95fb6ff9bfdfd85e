"""Splits by patient, images on squares, the order of rows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vessa.datasets import open_dataset
from vessa.errors import InvalidDataset
from vessa_trainer.config import DataConfig
from vessa_trainer.data.prepared import Frame, Order, PreparedSlices
from vessa_trainer.data.splits import cases_of, read_splits, slices_of


@pytest.fixture
def folder(tmp_path):
    """A data folder of eight patients with two slices each, without split files."""
    for part in ("images", "masks", "splits"):
        (tmp_path / part).mkdir()
    (tmp_path / "meta.json").write_text(json.dumps({"classes": {"0": "background", "1": "disk"}}))
    for patient in range(8):
        for index in range(2):
            image = np.full((20, 30), 10 * patient, np.uint8)
            mask = np.zeros((20, 30), np.uint8)
            mask[5:10, 5 : 10 + index] = 1
            Image.fromarray(image).save(tmp_path / "images" / f"p{patient}_{index}.png")
            Image.fromarray(mask).save(tmp_path / "masks" / f"p{patient}_{index}.png")
    return tmp_path


def write_splits(folder, **parts):
    for name, groups in parts.items():
        (folder / "splits" / f"{name}.txt").write_text("".join(f"{g}\n" for g in groups))


def test_labeled_groups_are_not_unlabeled_ones(folder):
    write_splits(folder, labeled_1=["p0"], train=["p0", "p1", "p2"], val=["p3"], test=["p4", "p5"])
    splits = read_splits(open_dataset(folder), DataConfig())
    assert splits.labeled == ("p0",)
    assert splits.unlabeled == ("p1", "p2")
    assert splits.val == ("p3",)
    assert splits.test == ("p4", "p5")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"val": ["p3"], "test": ["p3"]}, "groups in both val and test: .'p3'"),
        ({"val": ["p0"], "test": ["p4"]}, "groups in both labeled and val: .'p0'"),
        ({"val": ["p3"], "test": ["p0"]}, "groups in both labeled and test"),
        ({"val": ["p1"], "test": ["p4"]}, "groups in both unlabeled and val"),
        ({"val": ["p3"], "test": ["p2"]}, "groups in both unlabeled and test"),
    ],
)
def test_a_patient_in_two_parts_is_refused(folder, parts, message):
    write_splits(folder, labeled_1=["p0"], train=["p0", "p1", "p2"], **parts)
    with pytest.raises(InvalidDataset, match=message):
        read_splits(open_dataset(folder), DataConfig())


def test_split_files_that_are_missing_are_named(folder):
    write_splits(folder, labeled_1=["p0"], train=["p0", "p1"])
    with pytest.raises(InvalidDataset, match=r"val \(splits/val.txt\), test \(splits/test.txt\)"):
        read_splits(open_dataset(folder), DataConfig())


def test_without_split_files_the_patients_are_drawn(folder):
    dataset = open_dataset(folder)
    config = DataConfig(labeled_groups=2, val_share=0.125, test_share=0.25, split_seed=3)
    splits = read_splits(dataset, config)
    assert [len(p) for p in vars(splits).values()] == [2, 3, 1, 2]
    assert sorted(g for part in vars(splits).values() for g in part) == list(dataset.groups())
    assert read_splits(dataset, config) == splits
    assert read_splits(dataset, DataConfig(split_seed=4)) != splits


def test_too_few_patients_to_draw_from_are_refused(folder):
    with pytest.raises(
        InvalidDataset, match="8 of the 8 groups .* too few for 6 labeled, 1 validation and 2"
    ):
        read_splits(open_dataset(folder), DataConfig(labeled_groups=6))


def test_slices_and_cases_of_groups(folder):
    dataset = open_dataset(folder)
    assert [s.name for s in slices_of(dataset, ["p3", "p1"])] == ["p1_0", "p1_1", "p3_0", "p3_1"]
    assert [c.name for c in cases_of(dataset, ["p3", "p1"])] == ["p1", "p3"]


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (64, 64), (7, 3), (100, 1)])
def test_what_enters_a_frame_leaves_it_as_it_was(height, width):
    frame = Frame(height, width, 64)
    ramp = torch.linspace(0, 1, width).expand(1, height, width)
    entered = frame.enter(ramp)
    assert entered.shape == (1, 64, 64)
    left = frame.leave(entered)
    assert left.shape == (1, height, width)
    assert (left - ramp).abs().max() < 0.05


def test_the_border_of_a_frame_is_zero_and_even():
    frame = Frame(32, 64, 64)
    entered = frame.enter(torch.ones(1, 32, 64))[0]
    assert frame.inner == (32, 64)
    assert (entered[16:48] == 1).all()
    assert entered.sum() == 32 * 64


def test_labels_keep_their_ids_in_a_frame():
    ids = torch.tensor([[0, 3], [1, 7]])
    entered = Frame(2, 2, 8).enter_labels(ids)
    assert entered[::7, ::7].tolist() == ids.tolist()
    assert set(entered.unique().tolist()) == {0, 1, 3, 7}


def test_labels_of_one_class_fill_the_image_and_leave_the_border():
    entered = Frame(4, 8, 4).enter_labels(torch.full((4, 8), 5))
    assert entered.tolist() == [[0] * 4, [5] * 4, [5] * 4, [0] * 4]


@pytest.mark.parametrize("left", [20, 21])
def test_labels_are_not_shifted_against_the_image_at_an_even_factor(left):
    """Nearest neighbors take the right-hand one of two pixels: both squares would lie alike."""
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[left : left + 20, left : left + 20] = 1
    frame = Frame(64, 64, 32)
    image, labels = frame.enter(mask[None].float())[0], frame.enter_labels(mask).float()

    def center(square):
        return float((square.sum(0) * torch.arange(32.0)).sum() / square.sum())

    assert center(image) == pytest.approx((left + 9.5 + 0.5) / 2 - 0.5)
    assert center(labels) == pytest.approx(center(image))


def test_prepared_images_masks_and_validity_lie_alike(folder):
    dataset = open_dataset(folder)
    data = PreparedSlices(dataset, slices_of(dataset, ["p5"]), 60, need_masks=True)
    assert len(data) == 2
    assert data.rows == {"p5_0": 0, "p5_1": 1}
    assert data.images.shape == (2, 1, 60, 60)
    assert data.valid[0].sum() == 40 * 60  # 20 x 30 px become 40 x 60
    assert (data.images[0, 0][data.valid[0]] == 50).all()
    assert (data.images[0, 0][~data.valid[0]] == 0).all()
    assert data.masks[0].sum() == 4 * 25
    assert data.floats([1, 0]).max().item() == pytest.approx(50 / 255)


def test_masks_of_unlabeled_images_are_not_read(folder):
    for path in (folder / "masks").iterdir():
        path.write_bytes(b"no PNG")
    dataset = open_dataset(folder)
    data = PreparedSlices(dataset, slices_of(dataset, ["p5"]), 32, need_masks=False)
    assert data.masks.sum() == 0


def test_a_labeled_slice_without_mask_is_refused(folder):
    (folder / "masks" / "p5_1.png").unlink()
    dataset = open_dataset(folder)
    with pytest.raises(InvalidDataset, match="p5_1 is in a labeled split but has no mask"):
        PreparedSlices(dataset, slices_of(dataset, ["p5"]), 32, need_masks=True)


def test_a_class_that_the_data_set_does_not_name_is_refused(folder):
    Image.fromarray(np.full((20, 30), 9, np.uint8)).save(folder / "masks" / "p5_1.png")
    dataset = open_dataset(folder)
    with pytest.raises(InvalidDataset, match="the mask of p5_1 holds class id 9, .* names ids up to 1"):
        PreparedSlices(dataset, slices_of(dataset, ["p5"]), 32, need_masks=True)


def test_a_split_without_images_is_refused(folder):
    with pytest.raises(InvalidDataset, match="a split holds no images"):
        PreparedSlices(open_dataset(folder), [], 32, need_masks=False)


def test_gray_images_among_color_ones_become_color(folder):
    Image.fromarray(np.full((20, 30, 3), (200, 0, 0), np.uint8)).save(folder / "images" / "p5_1.png")
    dataset = open_dataset(folder)
    mixed = PreparedSlices(dataset, slices_of(dataset, ["p5"]), 32, need_masks=False)
    gray = PreparedSlices(dataset, slices_of(dataset, ["p4"]), 32, need_masks=False)
    assert (mixed.channels, gray.channels) == (3, 1)
    gray.show_as(3)
    assert gray.floats([0]).shape == (1, 3, 32, 32)


def test_each_epoch_shows_every_row_once():
    order = Order(7, 3, seed=5)
    rows = [r for step in range(7) for r in order.rows(step)]
    epochs = [rows[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_position_alone_says_what_comes_next():
    walked = Order(7, 3, seed=5)
    rows = [walked.rows(step) for step in range(20)]
    assert Order(7, 3, seed=5).rows(13) == rows[13]
    assert list(Order(7, 3, seed=5).ahead(11, 4)) == rows[11:15]
    assert list(walked.ahead(2, 3)) == rows[2:5]  # looking back after looking far ahead
    assert Order(7, 3, seed=6).rows(13) != rows[13]


def test_a_batch_may_be_larger_than_the_data():
    rows = Order(2, 5, seed=0).rows(0)
    assert len(rows) == 5
    assert sorted(rows[:2]) == sorted(rows[2:4]) == [0, 1]


def test_ignored_pixels_are_not_valid_and_no_class(folder):
    mask = np.full((20, 30), 255, np.uint8)
    mask[:, :15] = 1
    Image.fromarray(mask).save(folder / "masks" / "p5_1.png")
    dataset = open_dataset(folder)
    dataset.mask = lambda item: mask  # as of a layout that marks pixels without annotation
    data = PreparedSlices(dataset, slices_of(dataset, ["p5"]), 60, need_masks=True)
    assert data.valid[1].any()
    assert not data.valid[1][:, 32:].any()
    assert (data.masks[1][data.valid[1]] == 1).all()
