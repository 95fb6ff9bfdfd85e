"""Test suggestions: the ranking on hand-made features, and its route."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from vessa.codec import encode
from vessa.errors import DeadlineExceeded
from vessa_server.active_learning import CandidateCache, suggest


def on_circle(*degrees: float) -> Any:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def rows_of(features: Any, count: int, **options: Any) -> list[tuple[int, ...]]:
    return [pick.images for pick in suggest(features, count, **options)]


def test_the_first_serves_all_and_the_next_is_in_the_middle_of_the_rest() -> None:
    features = on_circle(0, 10, 20, 120, 130, 140)
    assert {rows[0] for rows in rows_of(features, 2)} == {2, 4}


def test_what_the_bank_covers_already_is_left_for_later() -> None:
    features = on_circle(0, 5, 90)
    assert rows_of(features, 1, covered=on_circle(2)) == [(2,)]


def test_where_the_annotator_is_sure_there_is_less_to_gain() -> None:
    features = on_circle(-60, 60)
    sure = np.array([0.1, 0.9], np.float32)
    assert rows_of(features, 2, covered=on_circle(0), confidence=sure) == [(0,), (1,)]
    assert rows_of(features, 2, covered=on_circle(0), confidence=1 - sure) == [(1,), (0,)]


def test_a_group_is_taken_as_a_whole_and_its_least_covered_image_is_named_first() -> None:
    features = on_circle(0, 90, 30, 35)
    (first, *_) = suggest(features, 2, covered=on_circle(10), groups=["a", "a", "b", "b"])
    assert (first.group, first.images) == ("a", (1, 0))
    assert 0 < first.gain <= 1


def test_lazy_gains_choose_what_gains_computed_anew_would() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    away, chosen = np.full(40, 2.0), []
    distances = np.clip(1 - features @ features.T, 0, 2)
    for _ in range(6):
        losses = [(np.minimum(away, distances[i]) ** 4).sum() for i in range(40)]
        chosen.append(int(np.argmin(losses)))
        away = np.minimum(away, distances[chosen[-1]])
    assert [rows[0] for rows in rows_of(features, 6, power=4.0)] == chosen


@pytest.mark.parametrize("wrong", [{"groups": ["a"]}, {"count": 0}, {"confidence": np.ones(3)}, {"power": 0}])
def test_what_does_not_fit_is_said(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected features"):
        suggest(on_circle(0, 1), **{"count": 1, **wrong})


def test_a_ranking_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(DeadlineExceeded, match="rank fewer"):
        suggest(on_circle(0, 1, 2), 2, until=time.monotonic() - 1)


def test_the_candidate_cache_is_bounded_and_its_confidences_belong_to_a_state_of_a_bank() -> None:
    cache = CandidateCache(capacity=2)
    for i in range(3):
        cache.put(f"i{i}", np.ones(2, np.float32), "b", "one", 0.5)
    assert cache.feature("i0") is None
    assert cache.confidence("i2", "b", "one") == 0.5
    assert cache.confidence("i2", "b", "other") is None


def ask(server: Any, bank: str, tensors: dict[str, Any], **metadata: str) -> Any:
    return server.send(f"/banks/{bank}/suggest", encode(tensors, metadata))


def test_images_are_sent_once_and_ranked_by_their_ids(server: Any, bank: str, example: Any) -> None:
    images = np.stack([example(i)[0] for i in range(4)])
    first = ask(server, bank, {"images": images[:2]}, groups='["p8", "p8"]').json()
    assert (first["bank_version"], first["suggestions"][0]["group"]) == (0, "p8")
    second = ask(server, bank, {"images": images[2:]}).json()
    ids = json.dumps(first["image_ids"] + second["image_ids"])
    answer = ask(server, bank, {}, image_ids=ids, count="2", groups='["p8", "p8", "p9", null]').json()
    assert answer["unknown"] == []
    assert len({s["group"] for s in answer["suggestions"]}) == 2
    server.seed(bank)  # now the annotator has an opinion of each: the pixels are needed again
    again = ask(server, bank, {}, image_ids=ids).json()
    assert (len(again["unknown"]), again["suggestions"]) == (4, [])
    ask(server, bank, {"images": images})
    assert len(ask(server, bank, {}, image_ids=ids, count="3").json()["suggestions"]) == 3


def test_as_many_candidates_as_are_taken_fit_into_a_header(server: Any) -> None:
    ids = json.dumps([f"sha256:{i:064x}" for i in range(10_000)])
    groups = json.dumps(["p" * 120] * 10_000)
    answer = ask(server, "none", {}, image_ids=ids, groups=groups)
    assert len(answer.json()["unknown"]) == 10_000


@pytest.mark.parametrize(
    ("tensors", "metadata", "code"),
    [
        ({}, {}, "malformed_body"),
        ({}, {"image_ids": "[]"}, "too_large"),
        ({}, {"image_ids": '["a"]', "count": "2"}, "invalid_request"),
        ({}, {"image_ids": '["a"]', "count": "-1"}, "invalid_request"),
        ({}, {"image_ids": '["a"]', "groups": "[]"}, "invalid_request"),
        ({"images": np.zeros((1, 0, 4), np.uint8)}, {}, "invalid_image"),
        ({"images": np.zeros((65, 2, 2), np.uint8)}, {}, "too_large"),
    ],
)
def test_wrong_candidates_are_refused(server: Any, tensors: Any, metadata: Any, code: str) -> None:
    answer = ask(server, "none", tensors, **metadata)
    assert answer.json()["error"]["code"] == code, answer.text
    assert 400 <= answer.status_code < 500
