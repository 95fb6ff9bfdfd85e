"""`annotation` of both clients: read a cached annotation with its provenance."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from vessa.codec import MEDIA_TYPE, encode
from vessa.errors import BadResponse, UnknownAnnotation

MADE = {
    "image_id": "sha256:0", "height": 2, "width": 3, "bank": "b", "bank_version": 4, "model": "m",
    "adaptation": "d", "labels_version": "1", "classes": {"1": "liver"}, "templates": {},
    "scores": {"liver": 0.5}, "boxes": {"liver": [0, 0, 2, 2]}, "points": {"liver": [[1, 1, 1]]},
}  # fmt: skip


def kept(shape: tuple[int, ...] = (1, 2, 3), **changes: Any) -> httpx.Response:
    items = json.dumps([{"status": "ok", "image_id": "sha256:0", "annotation_id": "a1"}])
    metadata = {"items": items, "provenance": json.dumps(MADE), **changes}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    body = encode({"labels": np.ones(shape, np.uint8)}, metadata)
    return httpx.Response(200, content=body, headers={"Content-Type": MEDIA_TYPE})


def test_an_annotation_has_its_provenance(ask: Any) -> None:
    requests = []

    def handler(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return kept()

    found = ask(handler, "annotation", "a/../b")
    assert requests[0].url.raw_path == b"/annotations/a%2F..%2Fb"
    assert requests[0].headers["Accept"] == MEDIA_TYPE
    assert (found.annotation_id, found.image_id, found.bank_version) == ("a1", "sha256:0", 4)
    assert (found.model, found.adaptation, found.labels_version) == ("m", "d", "1")
    assert (found.labels.shape, found.labels.flags.writeable, found.confidence) == ((2, 3), True, None)
    assert found.provenance.points == {"liver": [(1.0, 1.0, 1)]}
    assert found.provenance.boxes == {"liver": [0, 0, 2, 2]}


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b"no"),
        kept((1, 3, 2)),
        kept((2, 2, 3)),
        kept(provenance=None),
        kept(provenance="{}"),
        kept(items="[]"),
    ],
)
def test_an_invalid_annotation_is_a_bad_response(ask: Any, answer: httpx.Response) -> None:
    with pytest.raises(BadResponse, match="GET /annotations"):
        ask(lambda request: httpx.Response(200, content=answer.content), "annotation", "a")


def test_the_running_annotator_returns_a_cached_annotation(ask_annotator: Any) -> None:
    y, x = np.mgrid[:40, :48]
    mask = (np.hypot(y - 20, x - 24) < 8).astype(np.uint8)
    ask_annotator("add_templates", "kept", [mask * 180], [mask], {1: "disk"}, ["p1"])
    (first,) = ask_annotator("segment", [mask * 170], bank="kept")
    again = ask_annotator("annotation", first.annotation_id)
    assert np.array_equal(again.labels, first.labels)
    assert (again.scores, again.templates, again.classes) == (first.scores, first.templates, first.classes)
    assert (again.annotation_id, again.bank_version) == (first.annotation_id, first.bank_version)
    assert again.provenance.bank == "kept"
    with pytest.raises(UnknownAnnotation, match="VESSA_ANNOTATION_BYTES"):
        ask_annotator("annotation", "0" * 64)
