"""What goes into `segment` and comes out of it."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from typing import get_type_hints

import pytest

from vessa import protocol
from vessa.annotation import Annotation, Prompts, SegmentOptions


def test_an_annotation_without_arrays_and_prompts_without_anything_are_possible():
    annotation = Annotation("x")
    assert annotation.labels is annotation.confidence is annotation.probabilities is annotation.error is None
    assert annotation.templates == annotation.classes == annotation.scores == {}
    assert annotation.templates is not Annotation("y").templates
    assert all(value is None for value in vars(Prompts()).values())


def test_an_answer_and_its_prompts_cannot_be_exchanged_in_part():
    with pytest.raises(FrozenInstanceError):
        Annotation("x").labels = None
    with pytest.raises(FrozenInstanceError):
        Prompts().boxes = None


def test_the_options_are_those_that_the_protocol_takes():
    parameters = set(inspect.signature(protocol.segment).parameters)
    assert set(get_type_hints(SegmentOptions)) == parameters - {"images", "bank", "image_ids"}
