"""Masks in a viewer's volume: what prompts decide, how they continue, and what undo brings back."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vessa.errors import InvalidImage, InvalidPrompt, LimitReached, ShapeMismatch
from vessa_server.viewers import interactions
from vessa_server.viewers.drawing import Painter
from vessa_server.viewers.growth import Growth
from vessa_server.viewers.stack import Stack
from vessa_server.viewers.target import MAX_STEPS, Step, Target, changed_box

SHAPE = (7, 16, 16)


@pytest.fixture
def stack() -> Stack:
    """An empty volume of seven slices along the first axis."""
    return Stack(np.zeros(SHAPE, np.uint8), (8.0, 1.0, 1.0))


def block(top: int, left: int, size: int = 4) -> np.ndarray:
    """A slice with one block."""
    found = np.zeros(SHAPE[1:], bool)
    found[top : top + size, left : left + size] = True
    return found


def grown(target: Target, truth: dict[int, np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Grow a target whose bank labels slices as `truth` says; also the slices that it asked for."""
    for place, number, _ in target.undrawn():
        target.drawn[place] = number, truth[place[1]]
    growth, asked = Growth(target), []
    while missing := growth.missing(2):
        asked += [index for _, index in missing]
        empty = np.zeros(SHAPE[1:], bool)
        target.labels |= {place: truth.get(place[1], empty).astype(np.uint8) for place in missing}
    return growth.mask(), asked


def click(index: int, row: int = 6, column: int = 6) -> Step:
    """A click inside."""
    return Step([interactions.point([index, row, column], True, 0, SHAPE)])


def test_a_mask_follows_its_structure_and_leaves_others_alone(stack: Stack) -> None:
    """A second block of the class, which touches nothing, stays out; the mask ends where the block does."""
    target = Target(stack, class_id=1)
    target.add(click(3))
    truth = {2: block(5, 5) | block(0, 12, 3), 3: block(5, 5), 4: block(6, 6), 5: block(7, 7)}
    mask, asked = grown(target, truth)
    assert np.flatnonzero(mask.any((1, 2))).tolist() == [2, 3, 4, 5]
    np.testing.assert_array_equal(mask[2], block(5, 5))
    assert set(asked) == {1, 2, 4, 5, 6}
    target.through = False
    assert np.flatnonzero(grown(target, truth)[0].any((1, 2))).tolist() == [3]


def test_the_next_slice_with_prompts_ends_a_mask(stack: Stack) -> None:
    target = Target(stack, class_id=1)
    target.add(click(3))
    target.add(click(4))
    empty = np.zeros(SHAPE[1:], bool)
    truth = {3: block(5, 5), 4: empty, 5: block(5, 5)}
    assert np.flatnonzero(grown(target, truth)[0].any((1, 2))).tolist() == [3]


def test_a_label_stays_where_nothing_is_drawn_and_undo_brings_it_back(stack: Stack) -> None:
    target = Target(stack, class_id=1)
    label = np.zeros(SHAPE, bool)
    label[5] = block(0, 0)
    target.add(Step(label=label))
    target.add(click(3))
    mask, _ = grown(target, {3: block(5, 5), 4: block(5, 5)})
    assert np.flatnonzero(mask.any((1, 2))).tolist() == [3, 4, 5]
    np.testing.assert_array_equal(mask[5], label[5])
    assert target.undo()
    np.testing.assert_array_equal(grown(target, {})[0], label)
    with pytest.raises(ShapeMismatch):
        target.add(Step(label=label[1:]))


def test_a_slice_is_drawn_again_after_each_of_its_prompts(stack: Stack) -> None:
    target = Target(stack, class_id=1)
    for _ in range(2):
        target.add(click(3))
        assert [place for place, _, _ in target.undrawn()] == [(0, 3)]
        grown(target, {3: block(5, 5)})
        assert target.undrawn() == []
    target.undo()
    assert [len(drawings) for _, _, drawings in target.undrawn()] == [1]
    target.reset(None)
    assert not target.undo()
    for _ in range(MAX_STEPS):
        target.add(click(3))
    with pytest.raises(LimitReached, match="at most 256 interactions"):
        target.add(click(3))


def test_prompts_of_a_slice_are_points_a_box_and_a_region(stack: Stack) -> None:
    mask = np.zeros(SHAPE, bool)
    mask[2] = block(4, 6)
    given: dict[str, Any] = {"corner": [0, 0, 0], "axis": 0}
    (lasso,) = interactions.lasso(mask, include=True, shape=SHAPE, **given)
    (scribble,) = interactions.scribble(mask, include=False, most=4, **given)
    inside = interactions.point([2, 5, 7], True, 0, SHAPE)
    prompts, excluded = interactions.prompts_of([lasso, scribble, inside], SHAPE[1:], None, 64)
    assert prompts.boxes is not None
    assert prompts.points is not None
    assert prompts.point_labels is not None
    assert prompts.boxes.tolist() == [[[6, 4, 10, 8]]]
    assert prompts.points[0, 0, -1].tolist() == [7.5, 5.5]
    assert prompts.point_labels.tolist() == [[[0, 0, 0, 0, 1]]]
    assert not excluded.any()
    outside = interactions.point([2, 15, 15], True, 0, SHAPE)
    assert interactions.prompts_of([lasso, outside], SHAPE[1:], None, 64)[0].boxes is None
    (wrong,) = interactions.box([[2, 3], [0, 4], [0, 4]], False, 0, SHAPE)
    assert interactions.prompts_of([wrong], SHAPE[1:], None, 64)[1].sum() == 16


def test_drawings_lie_in_the_plane_that_they_are_flat_in(stack: Stack) -> None:
    coronal = interactions.box([[0, 7], [3, 4], [2, 9]], True, 0, SHAPE)
    assert [(one.axis, one.index, one.box) for one in coronal] == [(1, 3, (0, 2, 7, 9))]
    thick = interactions.box([[2, 5], [0, 9], [0, 9]], True, 0, SHAPE)
    assert [one.index for one in thick] == [2, 3, 4]
    mask = np.zeros((2, 3, 4), bool)
    mask[:, 1] = True
    (drawn,) = interactions.scribble(mask, [1, 5, 6], True, 0, 64)
    assert (drawn.axis, drawn.index) == (1, 6)
    assert drawn.points is not None
    assert drawn.points.min(0).tolist() == [1, 6, 1]
    with pytest.raises(InvalidPrompt, match="empty"):
        interactions.scribble(np.zeros((1, 2, 3), bool), [0, 0, 0], True, 0, 64)


def test_the_axis_of_a_stack_is_the_coarsest_or_single_one() -> None:
    pixels = np.zeros((9, 20, 30), np.uint8)
    assert Stack(pixels, (1.0, 3.0, 1.0)).axis == 1
    assert Stack(pixels).axis == 0
    assert Stack(np.zeros((20, 1, 30), np.uint8), (5.0, 1.0, 1.0)).axis == 1
    assert Stack.of_channels(np.zeros((3, 1, 8, 9), np.uint8), []).image(0, 0).shape == (8, 9, 3)
    assert Stack.of_channels(np.zeros((1, 4, 8, 9), np.uint8), [0, "x", 1]).spacing == (1.0, 1.0, 1.0)
    with pytest.raises(InvalidImage, match="2 channels"):
        Stack.of_channels(np.zeros((2, 4, 8, 9), np.uint8), [])


def test_the_changed_box_covers_old_and_new_voxels() -> None:
    old, new = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    assert changed_box(old, new) is None
    old[1, 2, 3] = new[4, 5, 6] = True
    assert changed_box(old, new) == [[1, 5], [2, 6], [3, 7]]


def test_a_mask_that_takes_too_long_is_continued_later(stack: Stack) -> None:
    """The time is over at once: the slices with prompts are drawn by the second call."""
    reader = SimpleNamespace(
        settings=SimpleNamespace(limits=SimpleNamespace(max_points=64)),
        banks=SimpleNamespace(get=lambda _: SimpleNamespace(classes={1: "a"})),
        segment_prompted=lambda *_: None,
        segment_slices=lambda _, __, images, ___: images,
    )

    async def annotate(request: Any) -> list[Any]:
        count = 1 if request is None else len(request)
        return [SimpleNamespace(labels=block(5, 5).astype(np.uint8), scores={"a": 1.0})] * count

    target = Target(stack)
    target.add(click(3))
    painter: Any = Painter(reader, "bank", annotate)  # type: ignore[arg-type]
    mask, complete = asyncio.run(painter.paint(target, -1.0))
    assert (mask.any(), complete) == (False, False)
    mask, complete = asyncio.run(painter.paint(target, 60.0))
    assert complete
    assert mask.any((1, 2)).all()
