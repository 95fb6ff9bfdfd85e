"""POST /segment in its three forms, read back with other people's tools: Pillow, pycocotools, safetensors."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from pycocotools import mask as coco

from vessa.codec import image_digest

PNG, JSON, SAFETENSORS = "image/png", "application/json", "application/vnd.safetensors"


@pytest.fixture
def seeded(server: Any, bank: str) -> str:
    """A bank with two templates of the groups p0 and p1."""
    server.seed(bank, 2)
    return bank


@pytest.fixture
def post(server: Any, seeded: str, example: Any, file_of: Any) -> Any:
    """POST one image as a form: `post(accept, query, image=array, **fields)`."""

    def send(accept: str = "*/*", query: str = "", image: Any = None, **fields: str) -> Any:
        pixels = example(5)[0] if image is None else image
        answer = server.http.post(
            f"/segment{query}",
            files={"image": ("i.png", file_of(pixels))},
            data={"bank": seeded, **fields},
            headers={"Accept": accept},
        )
        assert answer.status_code == 200, answer.text
        return answer

    return send


def tensors_of(answer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors answer, read by the safetensors library."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == SAFETENSORS
    body = answer.content
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    metadata = dict(header["__metadata__"])
    return safetensors.numpy.load(body), metadata | {"items": json.loads(metadata["items"])}


def labels_of(png: Any) -> Any:
    with Image.open(io.BytesIO(png.content)) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        return np.array(picture)


def test_a_form_becomes_a_label_map(post: Any, example: Any) -> None:
    answer = post(PNG)
    assert answer.headers["content-type"] == PNG
    labels = labels_of(answer)
    assert labels.shape == example(5)[0].shape
    assert set(np.unique(labels)) <= {0, 1, 2}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools itself
def test_a_form_becomes_coco_rle_of_the_same_masks(post: Any, server: Any, seeded: str, example: Any) -> None:
    answer = post(JSON).json()
    labels = labels_of(post(PNG))
    image = example(5)[0]
    assert answer["image_id"] == image_digest(image)
    assert (answer["height"], answer["width"], answer["bank"]) == (*image.shape, seeded)
    assert answer["bank_version"] == 1
    assert answer["model"] == server.http.get("/info").json()["model"]
    assert [(m["class_id"], m["class_name"]) for m in answer["masks"]] == [(1, "ventricle"), (2, "wall")]
    for one in answer["masks"]:
        rle = {"size": one["rle"]["size"], "counts": one["rle"]["counts"].encode()}
        mask = coco.decode(rle)
        assert np.array_equal(mask, labels == one["class_id"])
        assert one["area"] == mask.sum() == coco.area(rle)
        assert 0 <= one["score"] <= 1
    assert answer["templates"].keys() == {"ventricle", "wall"}
    for used in answer["templates"].values():
        assert used[0]["group"] in {"p0", "p1"}
        assert -1 <= used[0]["similarity"] <= 1


def test_a_form_becomes_tensors(post: Any) -> None:
    tensors, metadata = tensors_of(post(SAFETENSORS))
    assert np.array_equal(tensors["labels"][0], labels_of(post(PNG)))
    assert tensors["confidence"].shape == tensors["labels"].shape
    assert tensors["confidence"].dtype == np.uint8
    assert (tensors["confidence"] >= 255 // 3 - 1).all()  # the most likely of three is never below a third
    assert metadata["items"][0]["status"] == "ok"


def test_the_accept_header_chooses(post: Any) -> None:
    for accept, expected in (
        ("*/*", JSON),
        ("application/*", JSON),
        ("image/*", PNG),
        ("image/png;q=0.5, application/json;q=0.9", JSON),
        ("image/png;q=high, image/png", PNG),
        (f"text/html, {SAFETENSORS};q=0.1", SAFETENSORS),
    ):
        assert post(accept).headers["content-type"] == expected, accept


def test_an_overlay_is_for_the_eye(post: Any) -> None:
    with Image.open(io.BytesIO(post(PNG, "?overlay=true").content)) as picture:
        assert picture.mode == "RGB"
        assert max(picture.size) >= 512


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_a_label_map(annotator: Any, tmp_path: Path, example: Any, file_of: Any) -> None:
    image, mask = example(1)
    (tmp_path / "i.png").write_bytes(file_of(image))
    (tmp_path / "m.png").write_bytes(file_of(mask))

    def curl(*arguments: str) -> bytes:
        command = ["curl", "-fsS", "-H", f"Authorization: Bearer {annotator.api_key}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=60).stdout

    names = 'classes={"1": "ventricle", "2": "wall"}'
    template = ["-F", "image=@i.png", "-F", "mask=@m.png", "-F", names, "-F", "group=p1", "-F", "bank=curl"]
    assert json.loads(curl(*template, f"{annotator.url}/templates"))["group"] == "p1"
    curl("-H", "Accept: image/png", "-F", "image=@i.png", "-F", "bank=curl", "-o", "out.png",
         f"{annotator.url}/segment")  # fmt: skip
    with Image.open(tmp_path / "out.png") as labels:
        assert (labels.mode, labels.size) == ("L", (64, 48))


def test_a_forms_prompts_are_those_of_the_wire(post: Any, server: Any, seeded: str, example: Any) -> None:
    image = example(5)[0]
    form = post(
        SAFETENSORS,
        boxes='{"wall": [10, 8, 50, 40]}',
        points='[[[32, 24], [2, 2]], null]',
        point_labels='[[1, 0], null]',
    )  # fmt: skip
    boxes = np.array([[[-1] * 4, [10, 8, 50, 40]]], np.float32)
    points = np.zeros((1, 2, 2, 2), np.float32)
    points[0, 0] = (32, 24), (2, 2)
    kinds = np.array([[[1, 0], [-1, -1]]], np.int8)
    wire = server.segment(
        {"images": image[None], "boxes": boxes, "points": points, "point_labels": kinds}, bank=seeded
    )
    plain = server.segment({"images": image[None]}, bank=seeded)
    found = [tensors_of(answer)[0]["confidence"] for answer in (form, wire, plain)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_a_batch_gives_what_its_images_give_alone(server: Any, seeded: str, example: Any) -> None:
    images = np.stack([example(seed)[0] for seed in range(60, 66)])
    together, metadata = tensors_of(server.segment({"images": images}, bank=seeded))
    assert [item["image_id"] for item in metadata["items"]] == [image_digest(image) for image in images]
    for i, image in enumerate(images):
        alone = tensors_of(server.segment({"images": image[None]}, bank=seeded))[0]
        assert (alone["labels"][0] != together["labels"][i]).mean() < 1e-3
        assert np.abs(alone["confidence"][0].astype(int) - together["confidence"][i]).max() <= 2


def test_classes_and_their_order_are_the_callers(server: Any, seeded: str, example: Any) -> None:
    image = example(5)[0][None]
    tensors, metadata = tensors_of(
        server.segment({"images": image}, bank=seeded, classes='["wall", "ventricle"]', probabilities="1")
    )
    assert list(json.loads(metadata["classes"]).items()) == [("2", "wall"), ("1", "ventricle")]
    probabilities = tensors["probabilities"].astype(np.float32)
    assert probabilities.shape == (1, 3, 48, 64)
    assert np.allclose(probabilities.sum(1), 1, atol=5e-3)
    channel = np.array([0, 2, 1])[tensors["labels"]]  # wall, class 2, is the first after the background
    chosen = np.take_along_axis(probabilities, channel[:, None], axis=1)[:, 0]
    assert np.allclose(chosen, probabilities.max(1), atol=1e-3)
    assert np.allclose(chosen * 255, tensors["confidence"], atol=1)
    only, _ = tensors_of(server.segment({"images": image}, bank=seeded, classes='["wall"]'))
    assert set(np.unique(only["labels"])) <= {0, 2}
    assert "probabilities" not in only


def test_the_querys_own_group_is_not_its_template(server: Any, seeded: str, example: Any) -> None:
    images = np.stack([example(0)[0], example(1)[0], example(0)[0]])
    _, metadata = tensors_of(server.segment({"images": images}, bank=seeded, groups='["p0", "p1", null]'))
    used = [item["templates"]["wall"][0]["group"] for item in metadata["items"]]
    assert used == ["p1", "p0", "p0"]
    server.http.delete(f"/banks/{seeded}")
    server.seed(seeded, 1)
    _, metadata = tensors_of(server.segment({"images": images[:2]}, bank=seeded, groups='["p0", null]'))
    assert metadata["items"][0]["error"]["code"] == "no_template"
    assert metadata["items"][1]["status"] == "ok"
    assert metadata["bank_version"] == "3"


def test_an_image_is_sent_once_and_then_named(server: Any, seeded: str, example: Any) -> None:
    images = np.stack([example(seed)[0] for seed in (70, 71)])
    first, metadata = tensors_of(server.segment({"images": images}, bank=seeded))
    ids = [item["image_id"] for item in metadata["items"]]
    again, _ = tensors_of(server.segment({}, bank=seeded, image_ids=json.dumps(ids)))
    assert np.array_equal(first["labels"], again["labels"])
    box = np.full((2, 2, 4), -1, np.float32)
    box[0, 0] = 0, 0, 64, 48
    prompted, _ = tensors_of(server.segment({"boxes": box}, bank=seeded, image_ids=json.dumps(ids)))
    assert not np.array_equal(first["confidence"][0], prompted["confidence"][0])
    box[0, 0, 2] = 65  # prompts are checked by the size of the image that was named
    _, metadata = tensors_of(server.segment({"boxes": box}, bank=seeded, image_ids=json.dumps(ids)))
    assert [item["status"] for item in metadata["items"]] == ["error", "ok"]


def test_an_unknown_id_fails_its_item_alone(server: Any, seeded: str, example: Any) -> None:
    image = example(72)[0][None]
    _, metadata = tensors_of(server.segment({"images": image}, bank=seeded))
    known = metadata["items"][0]["image_id"]
    tensors, metadata = tensors_of(
        server.segment({}, bank=seeded, image_ids=json.dumps(["sha256:none", known, "../../etc/passwd"]))
    )
    assert [item["status"] for item in metadata["items"]] == ["error", "ok", "error"]
    for i in (0, 2):
        error = metadata["items"][i]["error"]
        assert (error["code"], error["item"]) == ("unknown_image", i)
        assert "Send its pixels" in error["message"]
        assert not tensors["labels"][i].any()
    none, metadata = tensors_of(server.segment({}, bank=seeded, image_ids='["sha256:none"]'))
    assert none["labels"].shape == (1, 1, 1)
    assert metadata["items"][0]["error"]["code"] == "unknown_image"


def test_ids_of_images_of_different_sizes_need_two_requests(server: Any, seeded: str, example: Any) -> None:
    ids = []
    for size in ((48, 64), (64, 48)):
        image = example(73, size)[0][None]
        ids.append(tensors_of(server.segment({"images": image}, bank=seeded))[1]["items"][0]["image_id"])
    answer = server.segment({}, bank=seeded, image_ids=json.dumps(ids))
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "shape_mismatch"
    assert "[(48, 64), (64, 48)]" in answer.json()["error"]["message"]


def test_sampling_is_repeatable_and_does_not_depend_on_the_batch(
    server: Any, bank: str, example: Any
) -> None:
    server.seed(bank, 5)
    images = np.stack([example(seed)[0] for seed in range(80, 84)])

    def drawn(rows: slice, seed: str) -> list[str]:
        answer = server.segment({"images": images[rows]}, bank=bank, template_choice="sample", seed=seed)
        return [item["templates"]["wall"][0]["id"] for item in tensors_of(answer)[1]["items"]]

    together = drawn(slice(0, 4), "1")
    assert together == drawn(slice(0, 4), "1")
    assert together == [drawn(slice(i, i + 1), "1")[0] for i in range(4)]
    assert len({tuple(drawn(slice(0, 4), str(seed))) for seed in range(6)}) > 1


def test_color_deep_and_transparent_images_are_segmented(post: Any, example: Any) -> None:
    gray = example(5)[0]
    plain = labels_of(post(PNG))
    alpha = np.dstack([gray, gray, gray, np.full_like(gray, 9)])
    for image in (np.dstack([gray] * 3), alpha):
        assert (labels_of(post(PNG, image=image)) != plain).mean() < 0.02
    assert labels_of(post(PNG, image=gray.astype(np.uint16) * 100)).shape == gray.shape


def test_concurrent_requests_get_their_own_answers(server: Any, seeded: str, example: Any) -> None:
    images = [example(seed)[0][None] for seed in range(90, 98)]
    alone = [tensors_of(server.segment({"images": image}, bank=seeded))[0]["labels"] for image in images]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: server.segment({"images": i}, bank=seeded), images))
    for one, answer in zip(alone, together, strict=True):
        assert (one != tensors_of(answer)[0]["labels"]).mean() < 1e-3
