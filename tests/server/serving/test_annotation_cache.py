"""Test provenance and GET /annotations/{id} while an annotation is cached."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from vessa.codec import array_digest, image_digest
from vessa.errors import UnknownAnnotation
from vessa.schemas import TemplateUse
from vessa_server.auth.keys import Caller, Role
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.serving.annotation_cache import AnnotationCache
from vessa_server.template_bank.retrieval import Bank
from vessa_server.types import Answer, SegmentItem, SegmentResult

PNG, JSON, SAFETENSORS = "image/png", "application/json", "application/vnd.safetensors"
ALICE, BOB, ROOT = Caller("alice", Role.annotate), Caller("bob", Role.curate), Caller("root", Role.admin)


def fetch(server: Any, identity: str, accept: str = JSON) -> Any:
    return server.http.get(f"/annotations/{identity}", headers={"Accept": accept})


def read(answer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a safetensors answer and its metadata, with its items parsed."""
    assert answer.status_code == 200, answer.text
    body = answer.content
    metadata = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
    return safetensors.numpy.load(body), metadata | {"items": json.loads(metadata["items"])}


def labels_of(png: Any) -> Any:
    with Image.open(io.BytesIO(png.content)) as picture:
        return np.array(picture)


@pytest.fixture
def form(server: Any, bank: str, example: Any, file_of: Any) -> Any:
    """Segment one image by a form, from a bank of three templates."""
    server.seed(bank, 3)

    def send(accept: str = JSON, **fields: str) -> Any:
        files = {"image": ("i.png", file_of(example(5)[0]))}
        answer = server.http.post(
            "/segment", files=files, data={"bank": bank, **fields}, headers={"Accept": accept}
        )
        assert answer.status_code == 200, answer.text
        return answer

    return send


def test_an_annotation_is_returned_in_every_format(server: Any, form: Any) -> None:
    first = form()
    identity = first.json()["annotation_id"]
    assert first.headers["x-annotation-id"] == identity
    again = fetch(server, identity)
    assert (again.content, again.headers["content-type"]) == (first.content, JSON)
    assert again.headers["x-annotation-id"] == identity
    png = form(PNG)
    assert png.headers["x-annotation-id"] == identity
    assert fetch(server, identity, PNG).content == png.content
    tensors, metadata = read(fetch(server, identity, SAFETENSORS))
    assert tensors.keys() == {"labels"}
    assert np.array_equal(tensors["labels"], labels_of(png)[None])
    assert metadata["items"] == read(form(SAFETENSORS))[1]["items"]
    made = json.loads(metadata["provenance"])
    assert made == {k: v for k, v in first.json().items() if k not in ("annotation_id", "masks")}


def test_an_annotation_states_its_provenance(server: Any, form: Any, bank: str, example: Any) -> None:
    asked = {
        "group": "p0",
        "classes": '["wall", "ventricle"]',
        "template_choice": "sample",
        "seed": "7",
        "boxes": '{"wall": [10, 8, 50.5, 40]}',
        "points": '{"ventricle": [[32, 24], [2, 2.5]]}',
        "point_labels": '{"ventricle": [1, 0]}',
    }
    made = fetch(server, form(**asked).json()["annotation_id"]).json()
    info = server.http.get("/info").json()
    assert made["image_id"] == image_digest(example(5)[0])
    assert (made["model"], made["labels_version"]) == (info["model"], info["labels_version"])
    assert (made["bank"], made["bank_version"], made["adaptation"]) == (bank, 1, None)
    assert list(made["classes"].items()) == [("2", "wall"), ("1", "ventricle")]
    assert (made["group"], made["template_choice"], made["seed"]) == ("p0", "sample", 7)
    assert made["boxes"] == {"wall": [10, 8, 50.5, 40]}
    assert made["points"] == {"ventricle": [[32, 24, 1], [2, 2.5, 0]]}
    assert made["mask_logits"] == {}
    for used in made["templates"].values():
        assert used[0]["group"] in {"p1", "p2"}
        assert -1 <= used[0]["similarity"] <= 1


def test_each_item_of_a_batch_has_an_id_of_its_own(server: Any, bank: str, example: Any) -> None:
    server.seed(bank, 2)
    images = np.stack([example(i)[0] for i in (30, 31)])
    logits = np.random.default_rng(0).normal(size=(2, 2, 8, 8)).astype(np.float16)
    box = np.full((2, 2, 4), -1, np.float32)
    box[1, 0] = 0, 0, 65, 48  # wider than the image
    tensors, metadata = read(
        server.segment({"images": images, "boxes": box, "mask_logits": logits,
                        "mask_present": np.array([[0, 1], [1, 1]], np.uint8)}, bank=bank)
    )  # fmt: skip
    good, bad = metadata["items"]
    assert (good["status"], bad["status"], bad["annotation_id"]) == ("ok", "error", "")
    made = fetch(server, good["annotation_id"]).json()
    assert np.array_equal(labels_of(fetch(server, good["annotation_id"], PNG)), tensors["labels"][0])
    assert made["mask_logits"] == {"wall": array_digest(logits[0, 1])}
    assert (made["scores"], made["templates"]) == (good["scores"], good["templates"])
    # The same image by its id is the same annotation.
    ids = json.dumps([good["image_id"]])
    present = np.array([[0, 1]], np.uint8)
    by_id = {"boxes": box[:1], "mask_logits": logits[:1], "mask_present": present}
    _, again = read(server.segment(by_id, bank=bank, image_ids=ids))
    assert again["items"][0]["annotation_id"] == good["annotation_id"]


def test_another_bank_version_is_another_annotation_and_the_old_one_stays(
    server: Any, bank: str, form: Any
) -> None:
    first = form().json()
    assert form().json()["annotation_id"] == first["annotation_id"]
    server.seed(bank, 5)
    second = form().json()
    assert (first["bank_version"], second["bank_version"]) == (1, 2)
    assert second["annotation_id"] != first["annotation_id"]
    assert fetch(server, first["annotation_id"]).json() == first
    server.http.delete(f"/banks/{bank}")
    assert fetch(server, first["annotation_id"]).status_code == 404


def test_annotations_by_a_bank_that_is_no_longer_shared_are_hidden(
    server: Any, bank: str, form: Any, key_of: Any, example: Any, file_of: Any
) -> None:
    server.http.put(f"/banks/{bank}/share")
    other = server.as_key(key_of("annotate", "guest"))
    answer = other.http.post("/segment", files={"image": file_of(example(3)[0])}, data={"bank": bank})
    identity = answer.json()["annotation_id"]
    assert fetch(other, identity).status_code == 200
    server.http.delete(f"/banks/{bank}/share")
    assert fetch(other, identity).status_code == 404
    assert fetch(server, identity).status_code == 200


def test_only_keys_that_received_an_annotation_see_it(
    server: Any, bank: str, example: Any, key_of: Any
) -> None:
    alice = server.as_key(key_of("curate", "alice"))
    bob = server.as_key(key_of("annotate", "bob"))
    alice.seed(bank)
    alice.http.put(f"/banks/{bank}/share")
    image = example(40)[0][None]
    identity = read(alice.segment({"images": image}, bank=bank))[1]["items"][0]["annotation_id"]
    assert fetch(alice, identity).status_code == 200
    assert fetch(server, identity).status_code == 200  # an admin
    for unknown in (identity, "0" * 64, "x" * 300):
        refused = fetch(bob, unknown)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "unknown_annotation"
    assert (
        fetch(bob, identity).json()["error"]["message"].replace(identity, "0" * 64)
        == (fetch(bob, "0" * 64).json()["error"]["message"])
    )
    assert read(bob.segment({"images": image}, bank=bank))[1]["items"][0]["annotation_id"] == identity
    assert fetch(bob, identity).status_code == 200  # bob sent the same request and received the same


def test_a_format_without_the_original_image_is_refused(server: Any, form: Any) -> None:
    refused = fetch(server, form().json()["annotation_id"], "application/dicom")
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media")


def test_the_metrics_state_the_bytes_of_annotations(server: Any, form: Any) -> None:
    form()
    assert 'vessa_bytes{where="annotations"}' in server.http.get("/metrics").text


def answer_of(
    annotations: AnnotationCache, caller: Caller, image: str, adaptation: str | None = None
) -> Answer:
    """Store an answer of 64 x 64 random labels."""
    seed = int.from_bytes(image.encode(), "big") % 1000
    labels = np.random.default_rng(seed).integers(0, 3, (64, 64), np.uint8)
    item = SegmentItem(image, None, "b", ("wall",))
    request = SegmentRequest(Bank("b", 1, ()), (image,), [item], {2: "wall"}, (64, 64), False)
    used = {"wall": [TemplateUse(id="t", group="p1", similarity=0.5)]}
    result = SegmentResult(
        image, labels, labels, None, (2,), ("wall",), {"wall": 0.5}, used, 4, adaptation
    )  # fmt: skip
    (answer,) = annotations.store(request, [result], caller)
    assert isinstance(answer, Answer)
    return answer


def test_a_byte_budget_evicts_the_least_recently_used() -> None:
    annotations = AnnotationCache(12_000, "m", "1")
    ids = [answer_of(annotations, ALICE, "i0").id]
    one = annotations.nbytes
    for i in range(1, 12):
        ids.append(answer_of(annotations, ALICE, f"i{i}").id)
        assert annotations.nbytes <= 12_000
        annotations.get(ids[0], ALICE)  # keeps it recently used
    found = []
    for identity in ids:
        try:
            found.append(annotations.get(identity, ALICE).provenance.image_id)
        except UnknownAnnotation:
            continue
    assert found == ["i0", *(f"i{i}" for i in range(13 - 12_000 // one, 12))]


def test_without_a_budget_nothing_is_stored() -> None:
    annotations = AnnotationCache(0, "m", "1")
    identity = answer_of(annotations, ALICE, "i").id
    with pytest.raises(UnknownAnnotation, match="VESSA_ANNOTATION_BYTES"):
        annotations.get(identity, ALICE)


def test_two_keys_share_one_entry_and_admins_see_it() -> None:
    annotations = AnnotationCache(100_000, "m", "1")
    first = answer_of(annotations, ALICE, "i")
    one = annotations.nbytes
    with pytest.raises(UnknownAnnotation):
        annotations.get(first.id, BOB)
    assert answer_of(annotations, BOB, "i").id == first.id
    assert annotations.nbytes == one
    for caller in (ALICE, BOB, ROOT):
        found = annotations.get(first.id, caller)
        assert found.provenance == first.provenance
        assert np.array_equal(found.labels, first.labels)


def test_provenance_names_the_banks_own_weights() -> None:
    annotations = AnnotationCache(100_000, "m", "1")
    plain, adapted = (answer_of(annotations, ALICE, "i", digest) for digest in (None, "d" * 64))
    assert (adapted.provenance.adaptation, adapted.provenance.bank_version) == ("d" * 64, 4)
    assert plain.id != adapted.id
