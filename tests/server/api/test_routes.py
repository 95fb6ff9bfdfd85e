"""Templates, banks and operations over HTTP, with the real annotator."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vessa.codec import TensorSpec, decode, encode
from vessa.errors import InvalidWeights
from vessa_server.serving.worker import load
from vessa_server.settings import Settings

NAMES = {1: "ventricle", 2: "wall"}
LABELS = {name: TensorSpec(("U8",), ((None,) * 3,)) for name in ("labels", "confidence")}


def form(file_of: Any, image: Any, mask: Any, **changes: Any) -> dict[str, Any]:
    """Arguments of a multipart POST /templates."""
    data = {"classes": json.dumps(NAMES), "group": "p9", **changes}
    return {"files": {"image": ("i.png", file_of(image)), "mask": ("m.png", file_of(mask))}, "data": data}


def test_a_form_adds_one_template_once(server: Any, bank: str, example: Any, file_of: Any) -> None:
    image, mask = example()
    first = server.http.post("/templates", **form(file_of, image, mask, bank=bank))
    again = server.http.post("/templates", **form(file_of, image, mask, bank=bank))
    assert (first.status_code, again.status_code) == (201, 201)
    info = first.json()
    assert info == {**again.json(), "created": True}
    assert not again.json()["created"]
    assert (info["height"], info["width"], info["group"]) == (48, 64, "p9")
    assert info["classes"] == {"1": "ventricle", "2": "wall"}
    assert server.http.get(f"/banks/{bank}").json()["version"] == 1


def test_only_classes_of_the_mask_are_kept(server: Any, bank: str, example: Any, file_of: Any) -> None:
    image, mask = example()
    names = json.dumps({**NAMES, 7: "not in it"})
    info = server.http.post("/templates", **form(file_of, image, mask, bank=bank, classes=names)).json()
    assert set(info["classes"]) == {"1", "2"}


def test_color_and_16_bit_images_are_taken(server: Any, bank: str, example: Any, file_of: Any) -> None:
    image, mask = example()
    for array in (np.repeat(image[..., None], 3, axis=2), image.astype(np.uint16) * 257):
        answer = server.http.post("/templates", **form(file_of, array, mask, bank=bank))
        assert answer.status_code == 201, answer.text
    assert server.http.get(f"/banks/{bank}").json()["templates"] == 2


def test_many_templates_at_once_are_idempotent(server: Any, bank: str) -> None:
    first = server.seed(bank, 3)
    again = server.seed(bank, 4)
    assert [t["created"] for t in first] == [True] * 3
    assert [t["created"] for t in again] == [False] * 3 + [True]
    listed = server.http.get("/templates", params={"bank": bank}).json()
    assert [t["id"] for t in listed] == [t["id"] for t in again]
    assert not any(t["created"] for t in listed)


def test_each_change_raises_the_version(server: Any, bank: str) -> None:
    ids = [t["id"] for t in server.seed(bank, 2)]
    versions = [server.http.get(f"/banks/{bank}").json()["version"]]
    assert server.http.delete(f"/templates/{ids[0]}", params={"bank": bank}).status_code == 204
    versions.append(server.http.get(f"/banks/{bank}").json()["version"])
    assert server.http.delete(f"/banks/{bank}").status_code == 204
    assert server.http.get(f"/banks/{bank}").status_code == 404
    server.seed(bank, 1)
    versions.append(server.http.get(f"/banks/{bank}").json()["version"])
    assert versions == [1, 2, 4]


def test_one_template_can_be_read_and_seen(server: Any, bank: str) -> None:
    identity = server.seed(bank, 1)[0]["id"]
    assert server.http.get(f"/templates/{identity}", params={"bank": bank}).json()["group"] == "p0"
    answer = server.http.get(f"/templates/{identity}/overlay.png", params={"bank": bank})
    assert answer.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.mode == "RGB"
    assert max(picture.size) >= 512
    assert len(picture.getcolors(1 << 20) or []) > 10


def test_banks_are_listed_with_their_groups(server: Any, bank: str) -> None:
    server.seed(bank, 2)
    (mine,) = [info for info in server.http.get("/banks").json() if info["name"] == bank]
    assert mine["groups"] == ["p0", "p1"]
    assert mine["classes"] == {"1": "ventricle", "2": "wall"}
    assert mine in server.http.get("/info").json()["banks"]


def test_two_adders_at_once_lose_nothing(server: Any, bank: str, example: Any) -> None:
    def add(start: int) -> None:
        for i in range(start, start + 3):
            image, mask = example(i)
            metadata = {"bank": bank, "classes": json.dumps(NAMES), "groups": json.dumps([f"g{i}"])}
            body = encode({"images": image[None], "masks": mask[None]}, metadata)
            assert server.send("/templates", body).status_code == 201

    threads = [threading.Thread(target=add, args=(start,)) for start in (0, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.http.get(f"/banks/{bank}").json()["templates"] == 6


def test_info_says_what_runs(server: Any) -> None:
    info = server.http.get("/info").json()
    assert info["preset"] == "nano"
    assert info["device"] == "cpu"
    assert info["labels_version"]
    assert info["limits"]["max_body_bytes"] == server.settings.limits.max_body_bytes
    assert info["model"] == server.app.state.service.engine().info.model


def test_info_tells_an_annotator_without_a_part_from_a_whole_one(
    server: Any, server_of: Any, bank: str
) -> None:
    whole = server.http.get("/info").json()
    assert whole["parts"] == ["language", "memory"]
    assert whole["trained_on"] is None  # the tests' weights went through no Stage 1
    settings = server.settings.model_copy(update={"without": frozenset({"language"})})
    less = server_of(settings)
    assert less.http.get("/info").json()["parts"] == ["memory"]
    # Labels of the one are never taken for those of the other.
    assert whole["labels_version"] != less.http.get("/info").json()["labels_version"]
    less.seed(bank, 1)
    wanted = {"images": np.zeros((1, 32, 32), np.uint8)}
    tensors, metadata = decode(less.segment(wanted, bank=bank).content, LABELS, max_bytes=1 << 20)
    assert tensors["labels"].shape == (1, 32, 32)
    assert metadata["labels_version"].endswith("nolanguage")


def test_metrics_count_requests_by_route_and_not_by_path(server: Any, bank: str) -> None:
    server.seed(bank, 1)
    for path in (f"/banks/{bank}", "/banks/unknown-bank", "/no/such/path"):
        server.http.get(path)
    text = server.http.get("/metrics").text
    assert 'vessa_requests_total{code="200",method="GET",route="/banks/{bank}"}' in text
    assert 'vessa_requests_total{code="404",method="GET",route="/banks/{bank}"}' in text
    assert 'vessa_requests_total{code="201",method="POST",route="/templates"}' in text
    assert "no/such/path" not in text
    for name in ("vessa_queue_depth", "vessa_batch_items_bucket", "vessa_batch_seconds_sum"):
        assert f"\n{name}" in text


def test_docs_are_whole_without_the_network(server: Any) -> None:
    page = server.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for word in ("POST /segment", "mask_logits", "/livez", "point_labels"):
        assert word in page.text
    for word in ("http://", "https://", "<script", "<link"):
        assert word not in page.text
    assert "/segment" in server.http.get("/openapi.json").json()["paths"]


def test_request_ids_come_back(server: Any) -> None:
    assert server.http.get("/livez", headers={"X-Request-Id": "my-id.1"}).headers["X-Request-Id"] == "my-id.1"
    made = {
        server.http.get("/livez", headers={"X-Request-Id": bad}).headers["X-Request-Id"]
        for bad in ("a b", "")
    }
    assert len(made) == 2
    assert all(len(one) == 32 for one in made)


def test_while_weights_load_only_livez_answers(server_of: Any, nano_weights: Path, tmp_path: Path) -> None:
    go = threading.Event()

    def slow(settings: Settings, banks: Any) -> Any:
        assert go.wait(30)
        return load(settings, banks)

    settings = Settings(api_key="k" * 20, weights=str(nano_weights), device="cpu", store=f"folder:{tmp_path}")
    server = server_of(settings, wait=False, worker_factory=slow)
    try:
        assert server.http.get("/livez").status_code == 200
        for method, path in (("GET", "/readyz"), ("GET", "/info"), ("POST", "/segment"), ("GET", "/banks")):
            answer = server.http.request(method, path)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "not_ready"
            assert int(answer.headers["Retry-After"]) > 0
        assert server.http.get("/metrics").status_code == 200
    finally:
        go.set()


def test_weights_that_do_not_load_leave_a_service_that_says_so(server_of: Any, tmp_path: Path) -> None:
    settings = Settings(
        api_key="k" * 20, weights=str(tmp_path / "none"), device="cpu", store=f"folder:{tmp_path}"
    )
    server = server_of(settings, wait=False)
    service = server.app.state.service
    deadline = time.monotonic() + 30
    while service.failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert isinstance(service.failure, InvalidWeights)
    assert server.http.get("/livez").status_code == 200
    answer = server.http.get("/readyz")
    assert answer.status_code == 503
    assert str(tmp_path) not in answer.text


def test_a_hung_worker_fails_readyz_and_requests_meet_their_deadline(
    server_of: Any, nano_weights: Path, tmp_path: Path, example: Any
) -> None:
    settings = Settings(
        api_key="k" * 20,
        weights=str(nano_weights),
        device="cpu",
        store=f"folder:{tmp_path}",
        request_timeout_s=0.4,
        hang_s=1.3,
        queue_items=2,
        max_items=2,
        drain_s=5,
    )
    server = server_of(settings)
    go = threading.Event()
    worker = server.app.state.service.engine().worker
    original = worker.encode_templates

    def hang(items: Any) -> Any:
        assert go.wait(30)
        return original(items)

    worker.encode_templates = hang
    image, mask = example()
    body = encode(
        {"images": image[None], "masks": mask[None]},
        {"bank": "b", "classes": json.dumps(NAMES), "groups": '["g"]'},
    )
    try:
        answer = server.send("/templates", body)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert int(answer.headers["Retry-After"]) > 0
        deadline = time.monotonic() + 10
        while server.http.get("/readyz").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "hangs" in server.http.get("/readyz").json()["error"]["message"]
        assert server.http.get("/livez").status_code == 200
    finally:
        go.set()
    deadline = time.monotonic() + 10
    while server.http.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.http.get("/banks").json() == []  # what was too late was not half done
    worker.encode_templates = original
    server.app.state.service.engine().settings.limits.request_timeout_s = 60.0  # for a busy machine
    assert server.send("/templates", body).status_code == 201


def test_a_restart_keeps_the_banks_and_other_weights_encode_them_anew(
    server_of: Any, nano_weights: Path, tmp_path: Path
) -> None:
    settings = Settings(api_key="k" * 20, weights=str(nano_weights), device="cpu", store=f"folder:{tmp_path}")
    first = server_of(settings)
    ids = [t["id"] for t in first.seed("b", 2)]
    info = first.http.get("/banks/b").json()
    second = server_of(settings)
    assert second.http.get("/banks/b").json() == info

    def other_weights(settings: Settings, banks: Any) -> Any:
        worker: Any = load(settings, banks)
        worker.model_digest = "other"
        return worker

    third = server_of(settings, worker_factory=other_weights)
    assert [t["id"] for t in third.http.get("/templates", params={"bank": "b"}).json()] == ids
    assert third.http.get("/banks/b").json()["version"] > info["version"]
    bank = third.app.state.service.engine().banks.get("b")
    assert {t.model for t in bank.templates} == {"other"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("PUT", "/banks", 405, "method_not_allowed"),
        ("GET", "/segment", 405, "method_not_allowed"),
        ("GET", "/banks/unknown", 404, "unknown_bank"),
        ("GET", "/templates?bank=unknown", 404, "unknown_bank"),
        ("DELETE", "/banks/unknown", 404, "unknown_bank"),
        ("GET", "/banks/a%20b", 422, "invalid_request"),
        ("GET", "/templates?bank=..", 422, "invalid_request"),
        ("GET", "/templates?bank=" + "a" * 65, 422, "invalid_request"),
        ("DELETE", "/templates/x?bank=..%2F..", 422, "invalid_request"),
        ("POST", "/segment?overlay=perhaps", 422, "invalid_request"),
        ("POST", "/segment", 415, "unsupported_media"),
        ("POST", "/templates", 415, "unsupported_media"),
    ],
)
def test_every_failure_has_the_same_form(server: Any, method: str, path: str, status: int, code: str) -> None:
    answer = server.http.request(method, path)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message", "item", "request_id"}
    assert answer.json()["error"]["code"] == code
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("identity", ["..", "..%2f..%2fetc%2fpasswd", "a" * 64, "%00", "x" * 5000])
def test_template_ids_are_looked_up_and_never_opened(server: Any, bank: str, identity: str) -> None:
    server.seed(bank, 1)
    for method, path in (("GET", ""), ("GET", "/overlay.png"), ("DELETE", "")):
        answer = server.http.request(method, f"/templates/{identity}{path}", params={"bank": bank})
        # "/templates/.." is "/" to the client: the console's page, which holds no data
        page = method == "GET" and answer.text.startswith("<!doctype html>")
        assert page or answer.status_code in {404, 405}, answer.text
    assert server.http.get(f"/banks/{bank}").json()["templates"] == 1


def test_an_unexpected_failure_tells_nothing_but_its_id(
    server: Any, bank: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    banks = server.app.state.service.engine().banks

    def fail(name: str) -> None:
        raise RuntimeError("secret at 0xdeadbeef in /some/path.py")

    monkeypatch.setattr(banks, "get", fail)
    answer = server.http.get(f"/banks/{bank}")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "0xdead" not in answer.text
    assert answer.headers["X-Request-Id"] in caplog.text
    assert "0xdead" in caplog.text
