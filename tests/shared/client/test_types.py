"""The types of `segment`: prompts, options and annotations."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from typing import get_type_hints

import numpy as np
import pytest

from vessa.client import endpoints
from vessa.client.types import Annotation, Prompts, SegmentOptions
from vessa.mask_geometry import box_and_point


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
