"""The protocol's plain functions: checks before a request is sent, and checks of responses."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import numpy as np
import pytest

from vessa.client import endpoints
from vessa.client.types import Prompts
from vessa.errors import (
    BadResponse,
    InvalidImage,
    InvalidPrompt,
    InvalidRequest,
    ShapeMismatch,
    UnknownTemplate,
)

IMAGE = np.zeros((4, 5), np.uint8)
MASK = np.ones((4, 5), np.uint8)


def request_of(call):
    return httpx.Request(call.method, "http://annotator" + call.path, **call.options)


def answered(call, segmented, **changes):
    return call.read(segmented(request_of(call), **changes))


def first(images, **options):
    return next(endpoints.segment(images, bank="b", **options)[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, InvalidRequest, "expected either images or image_ids"),
        ({"images": [IMAGE], "image_ids": ["x"]}, InvalidRequest, "expected either images or image_ids"),
        ({"images": [IMAGE], "prompts": [None, None]}, InvalidRequest, "1 items with 2 prompts"),
        ({"images": [IMAGE], "groups": ["a", "b"]}, InvalidRequest, "1 prompts and 2 groups"),
        ({"images": [IMAGE] * 2, "groups": "p1"}, InvalidRequest, "groups must be a list .* string 'p1'"),
        ({"images": [IMAGE], "classes": "liver"}, InvalidRequest, "classes must be a list"),
        ({"image_ids": "sha256:0"}, InvalidRequest, "image_ids must be a list"),
        ({"images": [IMAGE, IMAGE * 1.0]}, InvalidImage, r"image 1 is float64 \(4, 5\); expected uint8"),
        ({"images": [IMAGE[..., None]]}, InvalidImage, r"image 0 .*expected uint8 \(H, W\) or \(H, W, 3\)"),
        ({"images": IMAGE}, InvalidImage, "image 0 is uint8"),
        ({"images": [IMAGE[:0]]}, InvalidImage, "image 0"),
        ({"images": [IMAGE.tolist()]}, InvalidImage, "image 0 is a list; expected a numpy array"),
        (
            {"images": [IMAGE] * 2, "prompts": [None, Prompts(point_labels=[[257]])]},
            InvalidPrompt,
            "point_labels of image 1: expected 1, 0 or -1",
        ),
        (
            {"images": [IMAGE], "prompts": [Prompts(boxes=[["a", "b", "c", "d"]])]},
            InvalidPrompt,
            "boxes of image 0: expected numbers",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_of_segment_are_named_before_anything_is_sent(options, error, message):
    with pytest.raises(error, match=message):
        endpoints.segment(options.pop("images", None), bank="b", **options)


@pytest.mark.parametrize(
    ("images", "masks", "groups", "error", "message"),
    [
        ([IMAGE], [MASK, MASK], ["a"], InvalidRequest, "1 images, 2 masks and 1 groups"),
        ([IMAGE], [MASK], [], InvalidRequest, "0 groups"),
        ([IMAGE] * 2, [MASK] * 2, "p1", InvalidRequest, "groups must be a list"),
        ([IMAGE, IMAGE], [MASK, MASK[:3]], ["a", "b"], ShapeMismatch, r"image 1 .*4, 5\), its mask \(3, 5"),
        ([IMAGE], [MASK.astype(int)], ["a"], InvalidImage, "mask 0 is int64; expected .* uint8 class ids"),
        ([IMAGE], [MASK.tolist()], ["a"], InvalidImage, "mask 0 is list"),
        ([IMAGE.astype(np.uint16)], [MASK], ["a"], InvalidImage, "image 0 is uint16"),
    ],
)  # fmt: skip
def test_bad_templates_are_named_before_anything_is_sent(images, masks, groups, error, message):
    with pytest.raises(error, match=message):
        endpoints.add_templates("b", images, masks, {1: "liver"}, groups)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_cannot_lead_to_another_route(name):
    for make in (endpoints.bank, endpoints.delete_bank, lambda n: endpoints.delete_template("b", n)):
        with pytest.raises(InvalidRequest, match="is not a valid name"):
            make(name)


def test_a_stack_of_images_works_like_a_list(sent):
    stack = np.stack([IMAGE, IMAGE + 1])
    count, calls = endpoints.segment(stack, bank="b")
    assert count == 2
    assert np.array_equal(sent(request_of(next(calls)))[0]["images"], stack)


def test_prompts_are_sent_in_the_protocols_types(sent):
    prompts = Prompts(
        boxes=[[0, 1, 2, 3]],
        points=[[[1, 2]]],
        point_labels=[[1]],
        mask_logits=np.full((1, 2, 2), [1e9, -1e9]),
        mask_present=[True],
    )
    call = first(
        [IMAGE], prompts=[prompts], classes=["liver"], groups=[None], template_choice="sample", seed=7
    )
    tensors, metadata = sent(request_of(call))
    assert {name: str(value.dtype) for name, value in tensors.items()} == {
        "images": "uint8", "boxes": "float32", "points": "float32", "point_labels": "int8",
        "mask_logits": "float16", "mask_present": "uint8",
    }  # fmt: skip
    assert np.isfinite(tensors["mask_logits"]).all()  # float16 would overflow to infinity
    assert metadata == {
        "bank": "b", "template_choice": "sample", "seed": "7", "classes": ["liver"], "groups": [None],
    }  # fmt: skip


def test_prompts_of_other_kinds_or_sizes_need_other_requests(sent):
    boxes = np.zeros((1, 4))
    prompts = [None, Prompts(boxes=boxes), Prompts(mask_logits=np.zeros((1, 2, 2))), Prompts(boxes=boxes + 1)]
    _, calls = endpoints.segment([IMAGE] * 4, bank="b", prompts=prompts)
    assert [call.rows for call in calls] == [(0,), (1, 3), (2,)]


def test_a_request_stays_within_its_bytes():
    large = np.zeros((1024, 1024, 3), np.uint8)
    _, calls = endpoints.segment([large] * 7, bank="b")
    assert [len(call.rows) for call in calls] == [5, 2]  # 16 MiB hold five of 3 MiB
    _, calls = endpoints.segment([large] * 3, bank="b", probabilities=True)
    assert [len(call.rows) for call in calls] == [1, 1, 1]
    huge = np.zeros((5000, 5000), np.uint8)
    _, calls = endpoints.segment([huge, huge], bank="b")
    assert [len(call.rows) for call in calls] == [1, 1]  # a single larger image is still sent


def test_a_response_is_read_with_all_its_fields(segmented):
    answer = answered(first([IMAGE + 1], probabilities=True), segmented)[0]
    assert (answer.classes, answer.scores, answer.model) == ({1: "liver"}, {"liver": 0.5}, "m")
    assert (answer.bank_version, answer.labels_version, answer.error) == (3, "1", None)
    assert answer.labels.tolist() == (IMAGE + 1).tolist()
    assert (answer.confidence == 200).all()
    assert answer.probabilities.shape == (2, 4, 5)
    answer.labels[:] = 0  # a writable copy
    assert answered(first([IMAGE]), segmented)[0].probabilities is None


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": None},
        {"confidence": np.zeros((1, 4, 6), np.uint8)},
        {"labels": np.zeros((1, 9, 9), np.uint8), "confidence": np.zeros((1, 9, 9), np.uint8)},
        {"labels": np.zeros((2, 4, 5), np.uint8), "confidence": np.zeros((2, 4, 5), np.uint8)},
        {"labels": np.zeros((1, 4, 5), np.float32)},
        {"probabilities": np.zeros((1, 3, 4, 5), np.float16)},
        {"surprise": np.zeros(3, np.uint8)},
        {"items": []},
        {"items": [{"status": "ok"}]},
        {"items": [{"status": "error", "image_id": "x"}]},
        {"items": [{"status": "perhaps", "image_id": "x"}]},
        {"classes": "[1]"},
        {"classes": None},
        {"bank_version": "new"},
        {"model": None},
        {"labels_version": None},
    ],
)
def test_a_response_that_contradicts_the_request_is_a_bad_response(segmented, changes):
    with pytest.raises(BadResponse, match="POST /segment does not follow the annotator's protocol"):
        answered(first([IMAGE]), segmented, **changes)


def test_a_response_without_safetensors_is_a_bad_response():
    for content in (b"", b"<html>", b"\xff" * 100):
        with pytest.raises(BadResponse):
            first([IMAGE]).read(httpx.Response(200, content=content))


def test_retry_after_is_seconds_or_a_date():
    def wait(value):
        headers = {"Retry-After": value}
        return endpoints.read_error(
            httpx.Response(503, headers=headers, request=httpx.Request("GET", "http://x"))
        ).retry_after

    assert (wait("5"), wait("0.25"), wait("0")) == (5, 0.25, 0)
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < wait(format_datetime(later, usegmt=True)) <= 100
    assert 90 < wait(format_datetime(later.replace(tzinfo=None))) <= 100
    assert wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    for nonsense in ("", "soon", "-5", "1e9", "nan", "9" * 30, "Wed, 99 Oct 99999 07:28:00 GMT"):
        assert wait(nonsense) is None, nonsense


def test_an_invalid_queue_position_is_ignored():
    body = json.dumps({"error": {"code": "unknown_template", "message": "none", "item": 2}})
    for position, expected in (("12", 12), ("-1", None), ("many", None), ("", None)):
        response = httpx.Response(404, content=body, headers={"X-Queue-Position": position})
        error = endpoints.read_error(response)
        assert isinstance(error, UnknownTemplate)
        assert (error.item, error.queue_position) == (2, expected)
