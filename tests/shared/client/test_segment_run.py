"""Large calls of `segment`: several requests at once, results in order, only failed items sent again."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from vessa.client import AnnotatorClient
from vessa.codec import image_digest
from vessa.errors import InvalidPrompt, InvalidRequest, NotReady, QueueFull, UnknownImage

QUICK = {"wait_initial": 0.0}


def image(value: int, size: tuple[int, int] = (2, 3)) -> Any:
    return np.full(size, value, np.uint8)


def with_errors(segmented: Any, request: Any, codes: dict[int, str], count: int) -> Any:
    """Answer a request in which the items with the indices in `codes` fail."""
    items = [
        {"status": "ok", "image_id": f"i{i}"}
        if i not in codes
        else {"status": "error", "image_id": f"i{i}", "error": {"code": codes[i], "message": "m", "item": i}}
        for i in range(count)
    ]
    return segmented(request, items=items)


def test_a_large_batch_is_split_and_keeps_its_order_and_progress(ask, segmented, sent):
    sizes, told, together, lock = [], [], [0, 0], threading.Lock()

    def handler(request):
        with lock:
            together[0] += 1
            together[1] = max(together)
            sizes.append(len(sent(request)[0]["images"]))
        answer = segmented(request)
        with lock:
            together[0] -= 1
        return answer

    images = [image(i % 250) for i in range(150)] + [image(7, (4, 4))]
    found = ask(
        handler, "segment", images, bank="b", progress=lambda done, all_: told.append((done, all_)),
        client={"in_flight": 3},
    )  # fmt: skip
    assert [a.labels.flat[0] for a in found] == [i % 250 for i in range(150)] + [7]
    assert sorted(sizes) == [1, 22, 32, 32, 32, 32]
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (151, 151)
    assert together[1] <= 3


def test_pixels_are_sent_only_for_unknown_ids(ask, segmented, sent):
    images = [image(1), image(2), image(3, (5, 5))]
    asked = []

    def handler(request):
        tensors, metadata = sent(request)
        if "images" in tensors:
            asked.append(tensors["images"].reshape(len(tensors["images"]), -1)[:, 0].tolist())
            assert metadata["groups"] == ["y"]
            return segmented(request)
        asked.append(metadata["image_ids"])
        if metadata["image_ids"] == [image_digest(i) for i in images[:2]]:
            return with_errors(segmented, request, {1: "unknown_image"}, 2)
        return segmented(request, labels=np.full((1, 5, 5), 9, np.uint8), confidence=image(0, (1, 5, 5)))

    found = ask(
        handler, "segment", images, bank="b", by_id=True, groups=["x", "y", "z"], client={"in_flight": 1}
    )
    assert asked == [[image_digest(i) for i in images[:2]], [image_digest(images[2])], [2]]
    assert [a.labels.flat[0] for a in found] == [0, 2, 9]
    assert all(a.error is None for a in found)


def test_an_item_with_a_retryable_error_is_sent_again_alone(ask, segmented, sent):
    tries = []

    def handler(request):
        values = sent(request)[0]["images"][:, 0, 0].tolist()
        tries.append(values)
        if len(tries) == 1:
            return with_errors(segmented, request, {0: "invalid_prompt", 2: "not_ready"}, 4)
        return segmented(request)

    told = []
    found = ask(
        handler, "segment", [image(i) for i in range(4)], bank="b", client=QUICK,
        progress=lambda done, _: told.append(done),
    )  # fmt: skip
    assert tries == [[0, 1, 2, 3], [2]]
    assert told == [3, 4]
    assert isinstance(found[0].error, InvalidPrompt)
    assert [a.labels.flat[0] for a in found[1:]] == [1, 2, 3]


def test_retries_end_and_items_keep_the_callers_index(ask, segmented, sent):
    tries = []

    def handler(request):
        tries.append(count := len(sent(request)[0]["images"]))
        return with_errors(segmented, request, {count - 1: "not_ready"}, count)

    found = ask(handler, "segment", [image(1), image(2)], bank="b", client={"attempts": 3, **QUICK})
    assert tries == [2, 1, 1]
    assert isinstance(found[1].error, NotReady)
    assert found[1].error.item == 1


def test_a_service_that_never_knows_an_image_is_not_asked_for_ever(ask, segmented, sent):
    tries = []

    def handler(request):
        tensors, _ = sent(request)
        tries.append("images" in tensors)
        return with_errors(segmented, request, {0: "unknown_image"}, 1)

    found = ask(handler, "segment", [image(1)], bank="b", by_id=True)
    assert tries == [False, True]
    assert isinstance(found[0].error, UnknownImage)


def test_by_id_needs_the_images(ask, segmented):
    with pytest.raises(InvalidRequest, match="by_id needs the images"):
        ask(segmented, "segment", bank="b", image_ids=["sha256:1"], by_id=True)


def test_a_failed_request_ends_the_call_with_its_error(ask, failure_of_32):
    with pytest.raises(QueueFull) as caught:
        ask(failure_of_32, "segment", [image(i) for i in range(100)], bank="b")
    assert caught.value.queue_position == 7


@pytest.fixture
def failure_of_32(segmented, sent):
    import httpx

    def handler(request):
        if len(sent(request)[0]["images"]) == 32:
            return segmented(request)
        body = {"error": {"code": "queue_full", "message": "m", "item": None}}
        return httpx.Response(429, json=body, headers={"Retry-After": "0", "X-Queue-Position": "7"})

    return handler


def test_in_flight_is_at_least_one():
    with pytest.raises(ValueError, match="in_flight >= 1"):
        AnnotatorClient("http://annotator", "key", in_flight=0)
