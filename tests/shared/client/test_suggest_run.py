"""`suggest` of both clients: ids first, then pixels for unknown ids; also with the running annotator."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import numpy as np
import pytest

from vessa.codec import image_digest
from vessa.errors import BadResponse, InvalidImage, InvalidRequest, TooLarge, UnknownBank, UnknownImage


def image(value: int, size: tuple[int, ...] = (2, 3)) -> Any:
    return np.full(size, value, np.uint8)


class Looker:
    """A service that ranks candidates by their ids once it has the features of all."""

    def __init__(self, sent: Any, known: Any = (), forgets: bool = False) -> None:
        self.sent, self.known, self.forgets = sent, set(known), forgets
        self.bodies: list[Any] = []
        self.lock = threading.Lock()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/banks/b/suggest")
        tensors, metadata = self.sent(request)
        with self.lock:
            self.bodies.append((tensors, metadata))
            ids = metadata.get("image_ids") or [image_digest(one) for one in tensors["images"]]
            if "images" in tensors and not self.forgets:
                self.known |= set(ids)
            unknown = [one for one in ids if one not in self.known]
        groups = [group or one for one, group in zip(ids, metadata["groups"], strict=True)]
        ranked = [
            {
                "group": name,
                "image_ids": [ids[i] for i, group in enumerate(groups) if group == name],
                "gain": 0,
            }
            for name in sorted(set(groups))[: int(metadata.get("count", 1))]
        ]
        answer = {"bank": "b", "bank_version": 1, "image_ids": ids, "unknown": unknown}
        return httpx.Response(200, json={**answer, "suggestions": [] if unknown else ranked})


def test_pixels_of_unknown_ids_are_sent_in_several_requests(ask, sent):
    images = [image(i) for i in range(40)] + [image(9, (4, 4, 3))]
    looker = Looker(sent, [image_digest(images[0])])
    told = []
    answer = ask(looker, "suggest", "b", images, groups=["p2"] * 20 + ["p1"] * 21, count=5,
                 progress=lambda done, total: told.append((done, total)))  # fmt: skip
    assert [one.group for one in answer.suggestions] == ["p1", "p2"]
    assert answer.image_ids == [image_digest(one) for one in images]
    first, *parts, last = looker.bodies
    assert first[0] == last[0] == {}
    assert first[1]["image_ids"] == answer.image_ids
    assert sorted(len(tensors["images"]) for tensors, _ in parts) == [1, 7, 32]
    assert sorted(group for _, metadata in parts for group in metadata["groups"]) == ["p1"] * 21 + ["p2"] * 19
    assert sorted(told)[-1] == (41, 41)
    assert min(told)[0] > 1


def test_images_with_known_features_are_not_sent(ask, sent):
    images = [image(i) for i in range(3)]
    looker = Looker(sent, [image_digest(one) for one in images])
    answer = ask(looker, "suggest", "b", images)
    assert len(looker.bodies) == 1
    assert looker.bodies[0][1]["count"] == "3"  # at most as many as there are
    assert [one.group for one in answer.suggestions] == sorted(answer.image_ids)


def test_equal_images_are_sent_once(ask, sent):
    looker = Looker(sent)
    ask(looker, "suggest", "b", [image(1), image(1), image(1)], groups=["a", "b", "b"])
    assert [len(tensors["images"]) for tensors, _ in looker.bodies[1:-1]] == [1]


def test_images_are_read_only_when_they_are_needed(ask, sent):
    class Lazy(list):
        read = 0

        def __getitem__(self, place):
            Lazy.read += 1
            return super().__getitem__(place)

    Lazy.read = 0
    images = Lazy(image(i) for i in range(5))
    ask(Looker(sent, [image_digest(image(i)) for i in range(3)]), "suggest", "b", images)
    assert Lazy.read == 5 + 2


def test_a_service_that_forgets_features_at_once_is_an_error(ask, sent):
    looker = Looker(sent, forgets=True)
    with pytest.raises(UnknownImage, match="2 of 2 candidates are unknown after 3 rounds"):
        ask(looker, "suggest", "b", [image(1), image(2)])
    assert len(looker.bodies) == 7


def test_too_many_candidates_are_refused_before_any_pixel_is_sent(ask):
    requests = []

    def full(request):
        requests.append(request)
        body = {"error": {"code": "too_large", "message": "expected 1 to 2 candidates"}}
        return httpx.Response(413, json=body)

    with pytest.raises(TooLarge, match="1 to 2"):
        ask(full, "suggest", "b", [image(i) for i in range(3)])
    assert len(requests) == 1


def test_a_refused_image_is_named_by_its_index(ask, sent):
    looker = Looker(sent, [image_digest(image(1))])

    def refusing(request):
        if "images" in sent(request)[0]:
            body = {"error": {"code": "invalid_image", "message": "no", "item": 0}}
            return httpx.Response(422, json=body)
        return looker(request)

    with pytest.raises(InvalidImage) as caught:
        ask(refusing, "suggest", "b", [image(1), image(2)])
    assert caught.value.item == 1


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([], {}, InvalidRequest, "at least one image"),
        ([image(1)], {"count": 0}, InvalidRequest, "a count of 1 or more"),
        ([image(1)], {"groups": ["a", "b"]}, InvalidRequest, "1 images, 2 groups"),
        ([image(1)], {"groups": "a"}, InvalidRequest, "groups must be a list"),
        ([image(1), image(1) * 1.0], {}, InvalidImage, "image 1 is float64"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(ask, images, options, error, message):
    with pytest.raises(error, match=message):
        ask(lambda request: pytest.fail("it was sent"), "suggest", "b", images, **options)


def test_a_response_about_other_images_is_a_bad_response(ask):
    answer = {"bank": "b", "bank_version": 1, "image_ids": [], "unknown": ["sha256:0"]}
    with pytest.raises(BadResponse, match="no candidates of this call"):
        ask(lambda request: httpx.Response(200, json=answer), "suggest", "b", [image(1)])


def test_the_running_annotator_ranks_patients(ask_annotator: Any, request: pytest.FixtureRequest) -> None:
    rng = np.random.default_rng(len(request.node.name))
    y, x = np.mgrid[:40, :48]
    mask = (np.hypot(y - 20, x - 24) < 8).astype(np.uint8)
    bank = f"suggest-{request.node.callspec.id}"
    noise = [rng.integers(0, 20, (40, 48), np.uint8) for _ in range(5)]
    images = [mask * 180 + noise[0], mask * 170 + noise[1], 200 - mask * 90 + noise[2], noise[3][:32, :32]]
    groups = ["p1", "p1", "p2", None]
    told: list[tuple[int, int]] = []

    def ask() -> Any:
        told.clear()
        return ask_annotator("suggest", bank, images, groups=groups, count=2,
                             progress=lambda done, total: told.append((done, total)))  # fmt: skip

    new = ask()  # the bank is not there yet
    assert (new.bank, new.bank_version, len(new.suggestions)) == (bank, 0, 2)
    assert new.image_ids == [image_digest(one) for one in images]
    assert told[-1] == (4, 4)
    assert 1 >= new.suggestions[0].gain >= new.suggestions[1].gain >= 0
    assert ask() == new
    assert told == []  # by the ids alone
    ask_annotator("add_templates", bank, [mask * 180 + noise[4]], [mask], {1: "disk"}, ["p9"])
    after = ask()  # it has an opinion of each image now, and needs to look again
    assert (after.bank_version, told[-1]) == (1, (4, 4))
    assert after.suggestions[0].group != "p1"  # the template is much like these
    ask_annotator("delete_bank", bank)
    with pytest.raises(UnknownBank):
        ask_annotator("bank", bank)
