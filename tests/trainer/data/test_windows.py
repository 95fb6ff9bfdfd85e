"""Regions of interest: from a box to a window, and a window shown and put back."""

import numpy as np
import pytest
import torch

from vessa.errors import InvalidConfig
from vessa_trainer.config import ViewsConfig, load_config
from vessa_trainer.data.augmentation import draw_geometry
from vessa_trainer.data.prepared import Frame, PreparedSlices
from vessa_trainer.data.splits import slices_of
from vessa_trainer.data.windows import WHOLE, put_back, show, union_box, window_around
from vessa_trainer.pseudo_labels.types import LabelBatch, PseudoLabel
from vessa_trainer.semi_supervised.batches import labeled_batch, unlabeled_views
from vessa_trainer.students.inference import predict_volume


def test_a_window_is_a_square_around_the_box():
    # 20 x 10 px around (50, 35) of 100 px, 1.6 times the longer side
    assert window_around((40, 30, 60, 40), 100, 1.6) == pytest.approx((0.0, -0.3, 0.32))


@pytest.mark.parametrize("box", [None, (0, 0, 90, 10)])
def test_without_a_box_or_with_a_large_one_the_window_is_the_whole(box):
    assert window_around(box, 100, 1.6) == WHOLE


def test_the_box_of_masks_spans_the_volume_without_what_was_not_annotated():
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, 1, 2], masks[1, 5, 6], masks[1, 7, 7] = 1, 3, 255
    assert union_box(masks) == (2, 1, 7, 6)
    assert union_box(masks * 0) is None


def test_what_a_window_shows_is_put_back_where_it_was():
    square = torch.zeros(1, 1, 64, 64)
    square[..., 20:40, 24:44] = 1
    window = window_around((24, 20, 44, 40), 64, 1.6)
    shown = show(window, square, 32)
    assert shown.mean() == pytest.approx(1 / 1.6**2, abs=0.02)
    back = put_back(window, shown, 64)
    assert ((back > 0.5) != (square > 0.5)).sum() == 0


def test_a_box_of_an_image_moves_to_its_square():
    assert Frame(50, 100, 200).box_on_square((10, 5, 20, 15)) == (20, 60, 40, 80)


def test_views_lie_on_their_windows():
    plain = ViewsConfig(scale=(1, 1), flip_p=0)
    geometry = draw_geometry(1, 32, 32, plain, torch.Generator().manual_seed(0))
    square = torch.rand(1, 1, 64, 64)
    window = (0.25, -0.125, 0.5)
    assert torch.allclose(
        geometry.on(torch.tensor([window])).image(square), show(window, square, 32), atol=1e-5
    )


def test_rotated_views_keep_image_and_labels_together():
    turned = ViewsConfig(scale=(1, 1), flip_p=0, rotate_p=1, rotate=90)
    geometry = draw_geometry(4, 64, 64, turned, torch.Generator().manual_seed(0))
    square = torch.zeros(4, 64, 64)
    square[:, 30:34, 32:56] = 1  # a bar to the right of the center
    image, labels = geometry.image(square[:, None])[:, 0], geometry.labels(square)
    assert ((image > 0.5) == (labels == 1)).float().mean() > 0.98
    assert not torch.allclose(labels[0].float(), square[0])


WINDOW = (
    "student.size=32",
    "student.crop=16",
    "student.window=1.6",
    "views.whole_p=0",
    "views.scale=[1,1]",
    "views.flip_p=0",
    "student.widths=[4,8]",
)


class Boxes:
    """Labels of nothing but a box; one is late."""

    def take(self, names):
        empty = np.zeros((32, 32), np.uint8)
        return LabelBatch([PseudoLabel(empty, empty, (8, 8, 16, 16)), None], waited=2.0)


def test_batches_show_the_region_of_interest(dataset, tiny):
    rows = slices_of(dataset, dataset.groups()[:1])
    data, config = PreparedSlices(dataset, rows, 32, need_masks=True), tiny(*WINDOW)
    generator = torch.Generator().manual_seed(0)
    images, masks, _ = labeled_batch(data, [0, 1], config, generator)
    assert images.shape[-2:] == (16, 16)
    assert (masks > 0).float().mean() > (data.masks[[0, 1]] > 0).float().mean()
    views = unlabeled_views(data, [0, 1], config, Boxes(), generator, usual=(0.5, 0.5, 0.25))
    squares = data.floats([0, 1])
    boxed = window_around((8, 8, 16, 16), 32, 1.6)
    assert torch.allclose(views.weak[:1], show(boxed, squares[:1], 16), atol=1e-5)
    assert torch.allclose(views.weak[1:], show((0.5, 0.5, 0.25), squares[1:], 16), atol=1e-5)  # late
    assert views.waited == 2.0
    whole = tiny(*WINDOW, "views.whole_p=1")
    views = unlabeled_views(data, [0, 1], whole, Boxes(), generator)
    assert torch.allclose(views.weak, show(WHOLE, squares, 16), atol=1e-5)


class White(torch.nn.Module):
    """A network that calls white class 1; notes the mean brightness of what it sees."""

    def __init__(self):
        super().__init__()
        self.anchor, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x, dropout=None):
        self.seen.append(float(x.mean()))
        white = 20 * (x - 0.5)
        return torch.cat([-white, white], 1)


def test_prediction_looks_at_the_whole_and_then_at_the_region_of_interest(tiny):
    images = [np.zeros((60, 80), np.uint8) for _ in range(3)]
    for image in images:
        image[20:30, 40:52] = 255
    images[1][50:52, 2:4] = 255  # a speck: no structure
    model = White()
    predicted = predict_volume(model, images, tiny(*WINDOW), 1)
    labels = np.stack([p.argmax(0).numpy() for p in predicted])
    assert model.seen[1] > 5 * model.seen[0]  # it fills the second view
    assert (labels[:, 20:30, 40:52] == 1).mean() > 0.9
    assert labels[:, 50:52, 2:4].sum() == 0  # outside of the region of interest
    blank = White()
    predict_volume(blank, [np.zeros((60, 80), np.uint8)], tiny(*WINDOW), 1)
    assert len(blank.seen) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.window=0.5"], "0 or at least 1"),
        (
            ["student.window=1.6", "semi.method=vessa", "annotator.clean=false"],
            "annotator.clean must be true",
        ),
    ],
)
def test_windows_that_cannot_be_found_are_refused(overrides, message):
    with pytest.raises(InvalidConfig, match=message):
        load_config(None, overrides)
