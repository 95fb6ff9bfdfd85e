"""The types of `segment`: prompts, options and annotations."""

from __future__ import annotations

import inspect
import io
from dataclasses import FrozenInstanceError, replace
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image

from vessa.client import endpoints
from vessa.client.types import Annotation, Prompts, SegmentOptions
from vessa.errors import InvalidImage, InvalidRequest, NoTemplate, ShapeMismatch
from vessa.masks.geometry import box_and_point
from vessa.masks.overlay import overlay


def test_an_annotation_without_arrays_and_empty_prompts_are_valid():
    annotation = Annotation("x")
    assert annotation.labels is annotation.confidence is annotation.probabilities is annotation.error is None
    assert annotation.templates == annotation.classes == annotation.scores == {}
    assert annotation.templates is not Annotation("y").templates
    assert all(value is None for value in vars(Prompts()).values())


def test_annotations_and_prompts_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Annotation("x").labels = None
    with pytest.raises(FrozenInstanceError):
        Prompts().boxes = None


def test_the_options_match_the_arguments_of_the_protocol():
    parameters = set(inspect.signature(endpoints.segment).parameters)
    assert set(get_type_hints(SegmentOptions)) == parameters - {"images", "bank", "image_ids"}


def test_box_and_point_of_a_mask():
    mask = np.zeros((9, 12), bool)
    mask[2:7, 3:8] = True
    mask[4, 8:11] = True  # a thin arm widens the box and leaves the deepest point where it was
    box, point = box_and_point(mask)
    assert box.tolist() == [3, 2, 11, 7]
    assert point.tolist() == [5.5, 4.5]
    with pytest.raises(ValueError, match="at least one pixel"):
        box_and_point(np.zeros((3, 3), bool))


def disk():
    """An annotation of a disk that has its image."""
    y, x = np.mgrid[:20, :24]
    labels = (np.hypot(y - 10, x - 12) < 5).astype(np.uint8) * 2
    gray = np.full(labels.shape, 90, np.uint8)
    return Annotation("x", labels, classes={1: "wall", 2: "disk"}, scores={"disk": 0.9}, image=gray)


def test_an_annotation_is_one_line_of_areas_and_scores():
    area = int((disk().labels > 0).sum())
    assert disk().areas() == {"wall": 0, "disk": area}
    assert repr(disk()) == f"Annotation(wall: 0 px; disk: {area} px, score 0.90)"
    assert "NoTemplate('none')" in repr(Annotation("x", error=NoTemplate("none")))


def test_an_annotation_draws_its_overlay_and_notebooks_show_it():
    one = disk()
    assert np.array_equal(one.overlay(), overlay(one.image, one.labels))
    with Image.open(io.BytesIO(one._repr_png_())) as picture:
        assert np.array_equal(np.array(picture), one.overlay())
    without = replace(one, image=None)
    assert np.array_equal(without.overlay(one.image), one.overlay())
    assert without._repr_png_() is None
    assert "data:image/png" in (one._repr_html_() or "")
    assert "data:image" not in (without._repr_html_() or "")
    with pytest.raises(InvalidRequest, match="has no image"):
        without.overlay()
    with pytest.raises(ShapeMismatch, match=r"size \(5, 5\), the labels \(20, 24\)"):
        one.overlay(np.zeros((5, 5), np.uint8))


def test_an_annotation_saves_its_class_ids_as_png(tmp_path):
    disk().save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "L"
        assert np.array_equal(np.array(saved), disk().labels)
    with pytest.raises(InvalidRequest, match="label_volume"):
        disk().save(tmp_path / "a.nii.gz")
    for method in ("areas", "overlay", "_labels"):
        with pytest.raises(NoTemplate):
            getattr(Annotation("x", error=NoTemplate("none")), method)()


def test_segment_image_takes_a_path_or_an_array_and_raises_the_images_error(ask, segmented, tmp_path):
    pixels = np.full((4, 5), 3, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for given in (pixels, tmp_path / "a.png", str(tmp_path / "a.png")):
        found = ask(segmented, "segment_image", given, bank="b", group="p1")
        assert np.array_equal(found.image, pixels)
        assert np.array_equal(found.labels, pixels)
        assert found.overlay().shape == (4, 5, 3)

    def fails(request):
        error = {"code": "no_template", "message": "of another group"}
        return segmented(request, items=[{"status": "error", "image_id": "x", "error": error}])

    with pytest.raises(NoTemplate, match="of another group"):
        ask(fails, "segment_image", pixels, bank="b")
    with pytest.raises(InvalidImage, match="none.png"):
        ask(fails, "segment_image", tmp_path / "none.png")
