"""Region of interest: its window, the way of masks back into the image, and the cache of zoomed views."""

import numpy as np
import pytest
import torch

from vessa.codec import image_digest
from vessa.masks.geometry import box_of
from vessa_server.inference import first_pass
from vessa_server.inference.annotator import Annotator
from vessa_server.inference.first_pass import read_first_pass
from vessa_server.inference.image_views import FirstPass
from vessa_server.inference.region_of_interest import prompted_box, union, window_around
from vessa_server.model.geometry import Square, Window
from vessa_server.model.weights import directory
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem, TemplateItem


def test_the_window_is_a_square_around_the_box():
    window = window_around((40, 50, 60, 60), 200, 300)
    assert window == Window(25, 20, 60)  # a fifth of the longer side at least
    assert window_around((40, 50, 100, 60), 200, 300) == Window(10, 25, 90)  # half as much again
    assert window_around((0, 0, 200, 200), 200, 300) is None  # large enough in the whole image
    assert window_around(None, 200, 300) is None


def test_union_joins_boxes_and_is_none_without_boxes():
    assert union([None, (1, 2, 3, 4), (0, 3, 2, 9)]) == (0, 2, 3, 9)
    assert union([None]) is None
    mask = np.zeros((6, 8), bool)
    assert box_of(mask) is None
    mask[2:4, 5:8] = True
    assert box_of(mask) == (5, 2, 8, 4)


def test_specks_beside_the_largest_piece_do_not_widen_the_window():
    logits = torch.full((2, 1, 20, 20), -5.0)
    logits[0, :, 2:6, 4:10] = 5
    logits[0, :, 18, 18] = 5
    square = Square(100, 200)  # 50 rows of padding above the image
    found = read_first_pass(logits, [1, 4], square)
    assert found.box == (40, -30, 100, 10)
    assert found.areas == {1: 2500, 4: 0}
    assert found.layout(Window(0, 0, 100)) == {1: 0.5, 4: 0}
    logits[1, :, 0:2, 0:2] = 9
    assert read_first_pass(logits, [1, 4], square).box == (0, -50, 100, 10)
    logits[0, :, 16:20, 16:20] = 5  # a second large piece, as with nuclei
    assert read_first_pass(logits, [1, 4], square).box == (0, -50, 200, 150)
    inside = Square(100, 200, Window(10, 20, 40))
    assert read_first_pass(logits[:1, :, :12], [1], inside).box == (28, 14, 40, 22)
    nothing = read_first_pass(-torch.ones(1, 1, 20, 20), [1], square)
    assert nothing.box is None
    assert nothing.layout(Window(0, 0, 10)) is None


def test_prompts_give_the_region_of_interest():
    nothing = SegmentItem("i", None, "bank")
    assert prompted_box(nothing, 60, 80) == (None, False)
    absent = np.full((2, 4), -1, np.float32)
    assert prompted_box(SegmentItem("i", None, "bank", boxes=absent), 60, 80) == (None, False)
    boxes = np.array([[-1, -1, -1, -1], [10, 12, 20, 22]], np.float32)
    points = np.array([[[30, 40], [70, 50]]], np.float32)
    item = SegmentItem(
        "i", None, "bank", boxes=boxes, points=points, point_labels=np.array([[1, 0]], np.int8)
    )
    # A point outside the structure does not count. The first class has no prompt and may be anywhere.
    assert prompted_box(item, 60, 80) == ((10, 12, 30, 40), False)
    logits = np.full((2, 6, 8), -3, np.float32)
    logits[1, 1:3, 2:5] = 3
    there = SegmentItem("i", None, "bank", mask_logits=logits, mask_present=np.array([True, True]))
    assert prompted_box(there, 60, 80) == ((20, 10, 50, 30), False)
    hidden = SegmentItem("i", None, "bank", mask_logits=logits, mask_present=np.array([True, False]))
    assert prompted_box(hidden, 60, 80) == (None, False)
    both = SegmentItem("i", None, "bank", boxes=boxes[::-1].copy(), mask_logits=logits)
    assert prompted_box(both, 60, 80) == ((10, 10, 50, 30), True)  # a box for one, a mask for the other
    told = SegmentItem("i", None, "bank", boxes=boxes[1:])
    assert prompted_box(told, 60, 80) == ((10, 12, 20, 22), True)


def test_a_window_enters_and_leaves_at_its_place():
    image = torch.zeros(1, 1, 60, 80)
    image[..., 20:30, 50:70] = 1
    over_edges = Window(-10, 45, 50)
    for window, places in (
        (Window(10, 40, 40), (slice(10, 50), slice(40, 80))),
        (over_edges, (slice(0, 40), slice(45, 80))),
    ):
        square = Square(60, 80, window)
        seen = square.enter(image, window.side)
        assert seen.shape == (1, 1, window.side, window.side)
        rows, columns = square.seen
        assert (rows, columns) == places
        assert torch.equal(square.leave(seen), image[..., rows, columns])
        corner = square.points(torch.tensor([50.0, 20.0]), 2 * window.side)
        assert corner.tolist() == [2 * (50 - window.left), 2 * (20 - window.top)]


def example(seed, size=(60, 80)):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, size, dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[20:30, 30 + seed : 42 + seed] = 1
    return image, mask


@pytest.fixture
def annotator(nano_weights, tmp_path):
    model, digest = directory.read(nano_weights)
    assert model.preset.closer
    annotator = Annotator(model, TemplateBanks(FolderStore(tmp_path)), 1 << 28, digest)
    items = [TemplateItem(*example(seed), {1: "liver"}, f"patient{seed}") for seed in range(3)]
    annotator.banks.add("bank", annotator.encode_templates(items))
    return annotator


def query(**options):
    image = example(9)[0]
    return SegmentItem(image_digest(image), image, "bank", **options)


BOX = np.array([[34, 22, 46, 32]], np.float32)


def fix_first_pass(monkeypatch, box):
    """Fix the result of the first pass, since untrained weights find the classes anywhere."""
    monkeypatch.setattr(first_pass, "read_first_pass", lambda logits, ids, square: FirstPass(box, {1: 100.0}))


def test_templates_are_encoded_whole_and_zoomed(annotator):
    for template in annotator.banks.get("bank").templates:
        top, left, side = template.close.window
        rows, columns = np.nonzero(template.mask)
        assert top <= rows.min() < rows.max() < top + side
        assert left <= columns.min() < columns.max() < left + side
        assert template.close.memories[1].shape == template.whole.memories[1].shape
        assert not np.array_equal(template.close.feature, template.whole.feature)


def test_pixels_outside_the_window_are_background(annotator, monkeypatch):
    fix_first_pass(monkeypatch, (30.0, 20.0, 50.0, 30.0))
    result = annotator.segment([query()])[0]
    inside = np.zeros((60, 80), bool)
    inside[10:40, 25:55] = True
    assert (result.labels[~inside] == 0).all()
    assert (result.confidence[~inside] == 255).all()
    assert (result.confidence[inside] < 255).any()


def test_a_zoomed_view_is_cached_with_its_image(annotator, monkeypatch):
    fix_first_pass(monkeypatch, (30.0, 20.0, 50.0, 40.0))
    first = annotator.segment([query()])[0]
    spent = dict(annotator.stage_seconds())
    by_id = SegmentItem(query().image_id, None, "bank")
    point = {"points": np.array([[[36, 28]]], np.float32), "point_labels": np.array([[1]], np.int8)}
    again, prompted = annotator.segment([by_id, SegmentItem(by_id.image_id, None, "bank", **point)])
    for stage in ("encode", "language", "attend"):
        # A prompt inside the window only runs the mask decoder.
        assert annotator.stage_seconds()[stage] == spent[stage], stage
    assert (first.labels != again.labels).mean() < 1e-2
    assert not np.array_equal(again.confidence, prompted.confidence)


def test_boxes_of_every_class_replace_the_first_pass(annotator, monkeypatch):
    fix_first_pass(monkeypatch, (2.0, 2.0, 30.0, 30.0))
    result = annotator.segment([query(boxes=BOX)])[0]
    inside = np.zeros((60, 80), bool)
    inside[18:36, 31:49] = True  # half as wide again as the box
    assert (result.labels[~inside] == 0).all()


def test_an_answer_does_not_depend_on_earlier_prompts(annotator, monkeypatch):
    fix_first_pass(monkeypatch, (30.0, 20.0, 50.0, 40.0))
    point = {"points": np.array([[[2, 2]]], np.float32), "point_labels": np.array([[1]], np.int8)}
    fresh = annotator.segment([query()])[0]
    widened = annotator.segment([query(**point)])[0]
    after = annotator.segment([query()])[0]
    assert np.abs(fresh.confidence.astype(int) - after.confidence).max() <= 2
    assert not np.array_equal(fresh.confidence, widened.confidence)


def test_many_windows_on_one_image_in_one_batch(annotator, monkeypatch):
    fix_first_pass(monkeypatch, None)
    items = [query(boxes=BOX + 4 * i) for i in range(6)]
    together = annotator.segment(items)
    annotator.leave_out(frozenset())
    for item, result in zip(items, together, strict=True):
        alone = annotator.segment([item])[0]
        assert (alone.labels != result.labels).mean() < 1e-2
    view = annotator._cache.get(items[0].image_id).views[None]
    assert len(view.zoomed) == 4
    assert annotator._cache.nbytes == sum(held.nbytes for _, held in annotator._cache)


def test_older_weights_segment_in_one_pass(nano_weights, tmp_path, monkeypatch):
    model, digest = directory.read(nano_weights)
    object.__setattr__(model.preset, "closer", False)
    annotator = Annotator(model, TemplateBanks(FolderStore(tmp_path)), 1 << 28, digest)
    annotator.banks.add(
        "bank", annotator.encode_templates([TemplateItem(*example(1), {1: "liver"}, "patient1")])
    )
    monkeypatch.setattr(first_pass, "read_first_pass", lambda *_: pytest.fail("a first pass was made"))
    annotator.segment([query()])
    assert annotator.banks.get("bank").templates[0].close is None
