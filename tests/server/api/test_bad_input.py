"""Bad input over HTTP: a stable code, a message that says what was expected, and a bank left as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from vessa.codec import MEDIA_TYPE, TensorSpec, decode, encode

NAMES = json.dumps({"1": "ventricle", "2": "wall"})
FORM = "multipart/form-data; boundary=x"
NOT_AN_IMAGE = b"GIF89a, and then no image at all"


@pytest.fixture
def kept(server: Any, bank: str) -> Iterator[None]:
    """A seeded bank that the test must leave as it was: content, version and what it answers."""

    def state() -> tuple[Any, ...]:
        listed = server.http.get("/templates", params={"bank": bank}).json()
        answer = server.segment({"images": np.full((1, 48, 64), 90, np.uint8)}, bank=bank)
        labels, (item,) = items_of(answer)
        return server.http.get(f"/banks/{bank}").json(), listed, item, labels.tobytes()

    server.seed(bank, 2)
    before = state()
    yield
    assert state() == before


@pytest.fixture
def add(server: Any, bank: str, example: Any, file_of: Any) -> Callable[..., Any]:
    """POST a template as a form; `changes` replace its parts, None leaves one out."""

    def send(**changes: Any) -> Any:
        image, mask = example(9)
        parts = {
            "image": file_of(image), "mask": file_of(mask), "classes": NAMES, "group": "p9", "bank": bank,
        } | changes  # fmt: skip
        files = {k: (k, v) for k, v in parts.items() if isinstance(v, bytes)}
        return server.http.post(
            "/templates", files=files, data={k: v for k, v in parts.items() if isinstance(v, str)}
        )

    return send


@pytest.fixture
def ask(server: Any, bank: str, example: Any, file_of: Any) -> Callable[..., Any]:
    """POST one image to /segment as a form; `changes` replace its parts."""

    def send(**changes: Any) -> Any:
        parts = {"image": file_of(example(9)[0]), "bank": bank} | changes
        return server.http.post(
            "/segment",
            files={k: (k, v) for k, v in parts.items() if isinstance(v, bytes)},
            data={k: v for k, v in parts.items() if isinstance(v, str)},
        )

    return send


def refused(answer: Any, status: int, code: str, *words: str) -> None:
    """Check a failure's form, status, code, and that its message holds each of `words`."""
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert body["code"] == code, body
    for word in words:
        assert word in body["message"], body


# --- templates


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("changes", "status", "code", "word"),
    [
        ({"image": NOT_AN_IMAGE}, 422, "invalid_image", "the image is no PNG, JPEG or TIFF file"),
        ({"mask": NOT_AN_IMAGE}, 422, "invalid_image", "the mask must be a PNG file"),
        ({"image": b""}, 422, "invalid_request", "needs the file 'image'"),
        ({"mask": None}, 422, "invalid_request", "needs the file 'mask'"),
        ({"classes": None}, 422, "invalid_request", 'such as {"1": "right ventricle"}'),
        ({"classes": "{"}, 422, "invalid_request", "'classes' must be JSON"),
        ({"classes": '{"0": "x"}'}, 422, "invalid_request", "class id (1 to 254)"),
        ({"classes": '{"256": "x"}'}, 422, "invalid_request", "class id (1 to 254)"),
        ({"classes": '{"1": "a", "2": "a"}'}, 422, "invalid_request", "an id and a name of its own"),
        ({"classes": '{"1": "a\\nb"}'}, 422, "invalid_request", "printable characters"),
        ({"classes": '{"1": "ventricle"}'}, 422, "unknown_class", "Add [2] to `classes`"),
        ({"classes": '{"1": "atrium", "2": "wall"}'}, 409, "class_conflict", "'ventricle' in this bank"),
        ({"classes": '{"1": "wall", "2": "ventricle"}'}, 409, "class_conflict", "in this bank"),
        ({"group": None}, 422, "invalid_request", "whose image it is"),
        ({"group": "x" * 129}, 422, "invalid_request", "1 to 128 printable"),
        ({"bank": "../../etc"}, 422, "invalid_request", "A bank name is 1 to 64 of"),
        ({"colour": "red"}, 422, "invalid_request", "Expected only bank, classes, group, image, mask"),
        ({"classes": " " * (1 << 20) + "{}"}, 413, "too_large", "more than the limit of 1048576"),
    ],
)  # fmt: skip
def test_a_bad_template_is_refused(add: Any, changes: Any, status: int, code: str, word: str) -> None:
    refused(add(**changes), status, code, word)


@pytest.mark.usefixtures("kept")
def test_a_mask_must_fit_its_image_and_hold_class_ids(add: Any, example: Any, file_of: Any) -> None:
    mask = example(9)[1]
    refused(
        add(mask=file_of(mask[:-1])), 422, "shape_mismatch",
        "the image's size (height, width) (48, 64), got (47, 64)",
    )  # fmt: skip
    refused(add(mask=file_of(mask * 0)), 422, "invalid_image", "at least one pixel of a class")
    refused(add(mask=file_of(np.dstack([mask] * 3))), 422, "invalid_image", "one channel", "class ids")
    refused(add(mask=file_of(mask.astype(np.uint16) * 300)), 422, "unknown_class", "no class ids (1 to 254)")
    refused(add(mask=file_of(mask, "TIFF")), 422, "invalid_image", "the mask must be a PNG file")


@pytest.mark.usefixtures("kept")
def test_a_batch_of_templates_is_added_whole_or_not(server: Any, bank: str, example: Any) -> None:
    pairs = [example(seed) for seed in range(20, 23)]
    images, masks = (np.stack(part) for part in zip(*pairs, strict=True))
    about = {"bank": bank, "classes": NAMES, "groups": '["a", "b", "c"]'}
    masks[1, 0, 0] = 77
    answer = server.send("/templates", encode({"images": images, "masks": masks}, about))
    refused(answer, 422, "unknown_class", "The mask of image 1", "Add [77] to `classes`")
    assert answer.json()["error"]["item"] == 1
    masks[1] = 0
    answer = server.send("/templates", encode({"images": images, "masks": masks}, about))
    refused(answer, 422, "invalid_image", "The mask of image 1 is empty")
    both = {"images": images, "masks": masks}
    for tensors, metadata, status, code, word in (
        ({"images": images, "masks": masks[:2]}, about, 422, "shape_mismatch", "(3, 48, 64), got (2,"),
        ({"images": images}, about, 400, "malformed_body", "needs the tensors images and masks"),
        (both, about | {"groups": '["a"]'}, 422, "invalid_request", "3 strings"),
        (both, about | {"groups": '["a", "", "c"]'}, 422, "invalid_request", "1 to"),
        (both, about | {"bnak": "x"}, 422, "invalid_request", "Unknown metadata"),
        (both, {"bank": bank}, 422, "invalid_request", "needs 'classes'"),
        ({"images": images[:0], "masks": masks[:0]}, about, 422, "invalid_request", "has no image"),
        ({"images": images.astype(np.float32), "masks": masks}, about, 400, "malformed_body", "Expected U8"),
    ):  # fmt: skip
        refused(server.send("/templates", encode(tensors, metadata)), status, code, word)


# --- query images


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("changes", "status", "code", "word"),
    [
        ({"image": NOT_AN_IMAGE}, 422, "invalid_image", "the image is no PNG, JPEG or TIFF file"),
        ({"bank": "no-such-bank"}, 404, "unknown_bank", "no template bank 'no-such-bank'"),
        ({"bank": "a/b"}, 422, "invalid_request", "A bank name is 1 to 64 of"),
        ({"classes": '["atrium"]'}, 422, "unknown_class", "It has ['ventricle', 'wall']"),
        ({"classes": "[]"}, 422, "invalid_request", "one or more different names"),
        ({"classes": '"wall"'}, 422, "invalid_request", "a JSON list of strings"),
        ({"boxes": '{"atrium": [1, 2, 3, 4]}'}, 422, "unknown_class", "not requested: ['ventricle', 'wall']"),
        ({"boxes": '{"wall": [0, 0, 65, 10]}'}, 422, "invalid_prompt", "x2 <= 64 and 0 <= y1 < y2 <= 48"),
        ({"boxes": '{"wall": [5, 5, 5, 9]}'}, 422, "invalid_prompt", "got (5, 5, 5, 9)"),
        ({"boxes": '{"wall": [NaN, 0, 9, 9]}'}, 422, "invalid_prompt", "box of 'wall'"),
        ({"boxes": '{"wall": [1e99, 0, 9, 9]}'}, 422, "invalid_prompt", "box of 'wall'"),
        ({"boxes": '{"wall": [1, 2, 3]}'}, 422, "invalid_request", "numbers of the shape (4)"),
        ({"boxes": '{"wall": ["a", 1, 2, 3]}'}, 422, "invalid_request", "numbers of the shape (4)"),
        ({"boxes": "7"}, 422, "invalid_request", "for each of ['ventricle', 'wall']"),
        ({"boxes": "[" * 5000}, 422, "invalid_request", "'boxes' must be JSON"),
        ({"points": '{"wall": [[1, 2]]}'}, 422, "invalid_prompt", "points and point_labels belong together"),
        (
            {"points": '{"wall": [[64, 49]]}', "point_labels": '{"wall": [1]}'},
            422, "invalid_prompt", "0 <= x <= 64 and 0 <= y <= 48 px, got (64, 49)",
        ),
        (
            {"points": '{"wall": [[1, 2]]}', "point_labels": '{"wall": [2]}'},
            422, "invalid_request", "1 (inside), 0 (outside)",
        ),
        (
            {"points": '{"wall": [[1, 2], [3, 4]]}', "point_labels": '{"wall": [1]}'},
            422, "shape_mismatch", "point_labels must have the shape",
        ),
        (  # another class with more labels must not hide the one that is missing
            {
                "points": '{"wall": [[1, 2], [3, 4]], "ventricle": [[1, 1], [2, 2]]}',
                "point_labels": '{"wall": [1], "ventricle": [1, 1]}',
            },
            422, "invalid_prompt", "Each point needs a point label",
        ),
        (
            {"points": json.dumps({"wall": [[1, 2]] * 65}), "point_labels": json.dumps({"wall": [1] * 65})},
            422, "invalid_prompt", "at most 64 points, got 65",
        ),
        ({"template_choice": "best"}, 422, "invalid_request", "one of top1, top3, sample"),
        ({"seed": "-1"}, 422, "invalid_request", "a whole number from 0"),
        ({"box": "[]"}, 422, "invalid_request", "Unknown form field 'box'"),
    ],
)  # fmt: skip
def test_a_bad_query_is_refused(ask: Any, changes: Any, status: int, code: str, word: str) -> None:
    refused(ask(**changes), status, code, word)


def items_of(answer: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Return labels (B, H, W) and the items of a safetensors answer."""
    assert answer.status_code == 200, answer.text
    spec = {name: TensorSpec(("U8",), ((None, None, None),)) for name in ("labels", "confidence")}
    tensors, metadata = decode(answer.content, spec, max_bytes=1 << 24)
    return tensors["labels"], json.loads(metadata["items"])


@pytest.mark.usefixtures("kept")
def test_a_bad_prompt_fails_its_item_alone(server: Any, bank: str, example: Any) -> None:
    images = np.stack([example(seed)[0] for seed in (31, 32, 33)])
    plain, _ = items_of(server.segment({"images": images}, bank=bank))
    boxes = np.full((3, 2, 4), -1, np.float32)
    boxes[1, 0] = (10, 10, 64.5, 20)
    logits = np.zeros((3, 2, 8, 8), np.float16)
    present = np.zeros((3, 2), np.uint8)
    logits[1, 1, 3, 4], present[1, 1] = np.nan, 1
    points, labels = np.zeros((3, 2, 1, 2), np.float32), np.full((3, 2, 1), -1, np.int8)
    points[1, 1, 0], labels[1, 1, 0] = (3, -2), 1
    for tensors, word in (
        ({"boxes": boxes}, "box of 'ventricle' of image 1: expected 0 <= x1 < x2 <= 64"),
        (
            {"mask_logits": logits, "mask_present": present},
            "mask_logits of 'wall' of image 1: expected finite",
        ),
        ({"points": points, "point_labels": labels}, "point 0 of 'wall' of image 1: expected 0 <= x <= 64"),
        ({"points": points, "point_labels": labels - 2}, "point_labels of image"),
    ):
        found, items = items_of(server.segment({"images": images, **tensors}, bank=bank))
        assert items[1]["status"] == "error"
        assert items[1]["error"]["code"] == "invalid_prompt"
        assert word in items[1]["error"]["message"]
        assert not found[1].any()
        if word != "point_labels of image":
            assert [items[i]["status"] for i in (0, 2)] == ["ok", "ok"]
            assert np.array_equal(found[[0, 2]], plain[[0, 2]])


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize(
    ("tensors", "metadata", "status", "code", "word"),
    [
        ({}, {}, 400, "malformed_body", "either the tensor images or the metadata image_ids"),
        ({"images": (1, 8, 8)}, {"image_ids": '["x"]'}, 400, "malformed_body", "and not both"),
        ({"images": (1, 8, 8, 4)}, {}, 400, "malformed_body", "has shape"),
        ({"images": (1, 0, 8)}, {}, 422, "invalid_image", "sides of 3 pixels or more"),
        ({"images": (0, 8, 8)}, {}, 422, "invalid_request", "The request has no image"),
        ({"images": (65, 8, 8)}, {}, 413, "too_large", "at most 64 images, got 65"),
        ({"images": (1, 8, 8), "boxes": (1, 1, 4)}, {}, 422, "shape_mismatch", "(images, classes) = (1, 2)"),
        ({"images": (1, 8, 8), "box": (1, 4)}, {}, 400, "malformed_body", "Unknown tensor 'box'"),
        (
            {"images": (1, 8, 8), "points": (1, 2, 65, 2), "point_labels": (1, 2, 65)}, {},
            422, "invalid_prompt", "at most 64 points, got 65",
        ),
        (
            {"images": (1, 8, 8), "points": (1, 2, 3, 2), "point_labels": (1, 2, 4)}, {},
            422, "shape_mismatch", "point_labels must have the shape (1, 2, 3)",
        ),
        ({"images": (1, 8, 8), "points": (1, 2, 1, 2)}, {}, 422, "invalid_prompt", "belong together"),
        ({"images": (1, 8, 8), "mask_present": (1, 2)}, {}, 422, "invalid_prompt", "without mask_logits"),
        ({"images": (1, 8, 8)}, {"groups": '["a", "b"]'}, 422, "invalid_request", "1 strings or nulls"),
        ({"images": (1, 8, 8)}, {"classes": '["atrium"]'}, 422, "unknown_class", "It has ['ventricle',"),
        ({"images": (1, 8, 8)}, {"bank": "no-such-bank"}, 404, "unknown_bank", "no-such-bank"),
        (
            {"images": (1, 8, 8), "mask_logits": (1, 2, 0, 0)}, {},
            422, "shape_mismatch", "a height and a width of 1 or more",
        ),
        ({"images": (1, 8, 8)}, {"clases": "[]"}, 422, "invalid_request", "Unknown metadata 'clases'"),
        ({}, {"image_ids": "[]"}, 422, "invalid_request", "The request has no image"),
        ({}, {"image_ids": "[1]"}, 422, "invalid_request", "a JSON list of strings"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_refused_whole(
    server: Any, bank: str, tensors: Any, metadata: Any, status: int, code: str, word: str
) -> None:
    kinds = {"images": np.uint8, "mask_present": np.uint8, "point_labels": np.int8}
    arrays = {name: np.zeros(shape, kinds.get(name, np.float32)) for name, shape in tensors.items()}
    refused(server.segment(arrays, **{"bank": bank, **metadata}), status, code, word)


@pytest.mark.usefixtures("kept")
def test_an_answer_over_the_limit_is_refused_before_the_work(
    server: Any, bank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server.app.state.service.engine().settings.limits, "max_answer_bytes", 30_000)
        images = np.zeros((4, 48, 64), np.uint8)
        assert server.segment({"images": images}, bank=bank).status_code == 200
        answer = server.segment({"images": images}, bank=bank, probabilities="1")
        refused(answer, 413, "too_large", "would take 98304 bytes", "request no probabilities")


def test_a_bank_without_a_usable_template_says_so(server: Any, bank: str, ask: Any) -> None:
    identity = server.seed(bank, 1)[0]["id"]
    refused(ask(group="p0"), 409, "no_template", "from a group other than the query's")
    server.http.delete(f"/templates/{identity}", params={"bank": bank})
    refused(ask(), 409, "no_template", "has no template")


# --- bodies


@pytest.mark.usefixtures("kept")
def test_a_truncated_body_is_refused(server: Any, bank: str, example: Any) -> None:
    image, mask = (array[None] for array in example(40))
    about = {"bank": bank, "classes": NAMES, "groups": '["a"]'}
    whole = {
        "/segment": encode({"images": image}, {"bank": bank}),
        "/templates": encode({"images": image, "masks": mask}, about),
    }
    for path, body in whole.items():
        for length in (0, 7, 8, 30, len(body) // 2, len(body) - 1):
            answer = server.send(path, body[:length])
            refused(answer, 400, "malformed_body")
            assert len(answer.json()["error"]["message"]) > 20


@pytest.mark.usefixtures("kept")
def test_a_truncated_or_false_form_is_refused(server: Any, bank: str, example: Any, file_of: Any) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    body = part % (b"bank", bank.encode()) + part % (b"image", file_of(example(41)[0]))
    headers = {"Content-Type": FORM}
    assert server.http.post("/segment", content=body + b"--x--\r\n", headers=headers).status_code == 200
    for cut, word in (
        (body, "closing boundary is missing"),
        (body[:60], "closing boundary is missing"),
        (b"", "closing boundary is missing"),
        (b"no form", "not valid multipart/form-data"),
        (body + part % (b"bank", b"other") + b"--x--\r\n", "'bank' is given twice"),
        (part % (b"", b"v") + b"--x--\r\n", "has no name"),
        (b"".join(part % (b"f%d" % i, b"") for i in range(33)) + b"--x--\r\n", "more than 32 fields"),
        (b"--x\r\nX: " + b"y" * 5000 + b"\r\n\r\n\r\n--x--\r\n", "not valid multipart/form-data"),
    ):
        refused(server.http.post("/segment", content=cut, headers=headers), 400, "malformed_body", word)
    no_boundary = server.http.post("/segment", content=body, headers={"Content-Type": "multipart/form-data"})
    refused(no_boundary, 400, "malformed_body", "needs a boundary")
    text = part % (b"bank", b"\xff\xfe") + part % (b"image", b"x") + b"--x--\r\n"
    refused(server.http.post("/segment", content=text, headers=headers), 422, "invalid_image")
    text = part % (b"seed", b"\xff\xfe") + part % (b"image", b"x") + b"--x--\r\n"
    answer = server.http.post("/segment", content=text, headers=headers)
    refused(answer, 422, "invalid_request", "'seed' must be UTF-8 text")


@pytest.mark.usefixtures("kept")
def test_other_types_of_bodies_and_answers_are_refused(server: Any, bank: str, example: Any) -> None:
    for kind in ("application/json", "text/plain", "application/octet-stream"):
        answer = server.http.post("/segment", content=b"{}", headers={"Content-Type": kind})
        refused(answer, 415, "unsupported_media", "multipart/form-data or application/vnd.safetensors", kind)
    body = encode({"images": example(42)[0][None]}, {"bank": bank})
    for accept in ("text/html", "image/png", "application/vnd.safetensors;q=0"):
        answer = server.http.post(
            "/segment", content=body, headers={"Content-Type": MEDIA_TYPE, "Accept": accept}
        )
        refused(answer, 415, "unsupported_media", "Accept must allow one of application/vnd.safetensors")


@pytest.mark.usefixtures("kept")
def test_a_body_over_the_limit_is_refused_by_what_it_announces_and_by_what_comes(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server.app.state.service.engine().settings.limits, "max_body_bytes", 1000)
        refused(server.send("/segment", bytes(1001)), 413, "too_large", "more than 1000 bytes")
        chunks = iter([bytes(600), bytes(600)])  # chunked: nothing is announced
        refused(server.send("/segment", chunks), 413, "too_large", "more than 1000 bytes")
