"""Browser sessions, worklists and operator routes over HTTP."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vessa_server.auth.sessions import IDLE_S, LINK_S, MOST_SESSIONS, Sessions
from vessa_server.settings import Settings


@pytest.fixture
def browser(server: Any) -> Any:
    """A client without a key of its own."""
    from fastapi.testclient import TestClient

    return TestClient(server.app, raise_server_exceptions=False)


def sign_in(browser: Any, key: str) -> dict[str, str]:
    """Open a session and return the headers that its changing requests need."""
    answer = browser.post("/session", json={"key": key})
    assert answer.status_code == 200, answer.text
    return {"X-CSRF-Token": answer.json()["csrf"]}


def gray(response: Any) -> np.ndarray:
    """The pixels of a PNG answer."""
    assert response.status_code == 200, response.text
    return np.array(Image.open(io.BytesIO(response.content)))


def test_the_page_is_served_without_a_key_and_with_a_strict_policy(browser: Any) -> None:
    answer = browser.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    assert browser.get("/", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    "path", ["/console/../settings.py", "/console/vendor/vendor.json", "/console/none.js"]
)
def test_no_other_file_is_served(browser: Any, path: str) -> None:
    assert browser.get(path).status_code == 404


def test_a_session_changes_something_only_with_its_csrf_token(server: Any, browser: Any, bank: str) -> None:
    server.seed(bank)
    csrf = sign_in(browser, server.settings.key)
    cookie = next(c for c in browser.cookies.jar if c.name == "vessa_session")
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "strict"
    assert browser.get("/banks").status_code == 200
    assert browser.delete(f"/banks/{bank}").json()["error"]["code"] == "forbidden"
    assert browser.delete(f"/banks/{bank}", headers={"X-CSRF-Token": "x"}).status_code == 403
    assert browser.delete(f"/banks/{bank}", headers=csrf).status_code == 204
    assert browser.delete("/session", headers=csrf).status_code == 204
    assert browser.get("/banks").status_code == 401


def test_a_session_has_its_keys_role_and_ends_with_the_key(server: Any, browser: Any, key_of: Any) -> None:
    csrf = sign_in(browser, key_of("annotate", "reader"))
    assert browser.get("/session").json()["role"] == "annotate"
    assert browser.get("/keys").status_code == 403
    assert browser.delete("/banks/none", headers=csrf).status_code == 403
    server.app.state.access.keys.remove("reader")
    assert browser.get("/banks").status_code == 401


def test_a_link_signs_in_once_and_not_for_ever(server: Any, browser: Any) -> None:
    now = [0.0]
    sessions = Sessions(server.app.state.access, clock=lambda: now[0])
    link = sessions.create_link()
    cookie, session = sessions.open_by_link(link)
    assert session.caller.name == "local"
    with pytest.raises(Exception, match="used already"):
        sessions.open_by_link(link)
    late = sessions.create_link()
    now[0] = LINK_S + 1
    with pytest.raises(Exception, match="older than 15 minutes"):
        sessions.open_by_link(late)
    assert sessions.find(cookie) is session
    now[0] += IDLE_S + 1
    with pytest.raises(Exception, match="sign in again"):
        sessions.find(cookie)


def test_one_keys_sessions_end_no_others(server: Any, browser: Any, key_of: Any) -> None:
    sessions = Sessions(server.app.state.access)
    other, _ = sessions.open_by_key(server.settings.key)
    key = key_of("annotate", "greedy")
    cookies = [sessions.open_by_key(key)[0] for _ in range(MOST_SESSIONS + 1)]
    assert sessions.find(other).caller.name == "local"
    with pytest.raises(Exception, match="sign in again"):
        sessions.find(cookies[0])
    assert sessions.find(cookies[-1]).caller.name == "greedy"


def test_a_wrong_key_opens_no_session(browser: Any) -> None:
    assert browser.post("/session", json={"key": "wrong-key-0123456789"}).status_code == 401
    assert browser.post("/session", json={}).status_code == 422
    assert browser.post("/session", json={"key": "a", "link": "b"}).status_code == 422


def test_the_console_can_be_left_out(server_of: Any, nano_weights: Path, tmp_path: Path) -> None:
    settings = Settings(
        api_key="k" * 20, weights=str(nano_weights), store=f"folder:{tmp_path}", serve_console=False
    )
    server = server_of(settings, wait=False)
    assert server.http.get("/").status_code == 404
    assert server.http.post("/session", json={"key": "k" * 20}).status_code == 404


@pytest.fixture
def filled(server: Any, bank: str, file_of: Any, example: Any) -> Callable[[], tuple[str, dict[str, Any]]]:
    """A worklist of one image, by its path and its item."""
    server.seed(bank)

    def make() -> tuple[str, dict[str, Any]]:
        made = server.http.post("/worklists", json={"name": bank, "bank": bank})
        assert made.status_code == 201, made.text
        image, _ = example(7)
        added = server.http.post(
            f"/worklists/{bank}/items",
            files={"image": ("q.png", file_of(image))},
            data={"name": "q.png", "group": "q"},
        )
        assert added.status_code == 201, added.text
        return f"/worklists/{bank}/items/{added.json()['id']}", added.json()

    return make


def test_an_item_is_segmented_corrected_and_undone(server: Any, filled: Any) -> None:
    path, item = filled()
    assert item["labels"] == 0
    assert not gray(server.http.get(f"{path}/labels.png")).any()
    first = gray(server.http.post(f"{path}/segment", json={}))
    assert np.array_equal(gray(server.http.get(f"{path}/labels.png")), first)
    drawn = np.zeros((item["height"], item["width"]), np.uint8)
    drawn[10:20, 10:20] = 2
    stored = server.http.put(f"{path}/labels", content=drawn.tobytes())
    assert stored.json()["edited"] is True
    assert np.array_equal(gray(server.http.get(f"{path}/labels.png")), drawn)
    kept_out = server.http.post(
        f"{path}/segment?keep=false",
        json={"classes": ["wall"], "points": {"wall": [[30, 24]]}, "point_labels": {"wall": [1]}},
    )
    assert set(np.unique(gray(kept_out))) <= {0, 2}
    assert np.array_equal(gray(server.http.get(f"{path}/labels.png")), drawn)
    assert server.http.post(f"{path}/undo").json()["can_undo"] is False
    assert np.array_equal(gray(server.http.get(f"{path}/labels.png")), first)
    assert server.http.post(f"{path}/undo").status_code == 422


def test_labels_of_another_size_or_class_are_refused(server: Any, filled: Any) -> None:
    path, item = filled()
    assert server.http.put(f"{path}/labels", content=b"\0").json()["error"]["code"] == "shape_mismatch"
    strange = np.full((item["height"], item["width"]), 9, np.uint8)
    answer = server.http.put(f"{path}/labels", content=strange.tobytes())
    assert answer.json()["error"]["code"] == "unknown_class"


def test_decisions_are_audited_and_undone(server: Any, filled: Any, bank: str) -> None:
    path, item = filled()
    early = server.http.post(f"{path}/decision", json={"decision": "accepted"})
    assert early.status_code == 422
    drawn = np.ones((item["height"], item["width"]), np.uint8)
    server.http.put(f"{path}/labels", content=drawn.tobytes())
    before = server.http.get(f"/banks/{bank}").json()["templates"]
    accepted = server.http.post(f"{path}/decision", json={"decision": "accepted", "add_to_bank": True})
    assert accepted.json()["in_bank"] is True
    assert server.http.get(f"/banks/{bank}").json()["templates"] == before + 1
    assert server.http.delete(f"{path}/decision").json()["decision"] == "open"
    assert server.http.delete(f"{path}/decision").status_code == 422
    lines = server.http.get("/audit?count=20").json()
    actions = {line["action"] for line in lines}
    assert {"worklist.add", "worklist.label", "worklist.decide", "worklist.undo"} <= actions
    (decided,) = (line for line in lines if line["action"] == "worklist.decide" and line["state"] == "done")
    known = {template["id"] for template in server.http.get(f"/templates?bank={bank}").json()}
    assert len(decided["templates"]) == 1
    assert set(decided["templates"]) <= known


def test_another_key_sees_no_worklist_of_this_one(server: Any, filled: Any, bank: str, key_of: Any) -> None:
    path, _ = filled()
    other = server.as_key(key_of("curate", "other")).http
    assert other.get("/worklists").json() == []
    for answer in (
        other.get(f"/worklists/{bank}"),
        other.get(f"{path}/image.png"),
        other.delete(f"/worklists/{bank}"),
    ):
        assert answer.json()["error"]["code"] == "unknown_worklist"


@pytest.mark.parametrize("kind", ["folder", "nnunet", "coco"])
def test_an_export_holds_accepted_masks_alone(
    server: Any, filled: Any, bank: str, kind: str, tmp_path: Path, file_of: Any, example: Any
) -> None:
    path, item = filled()
    drawn = np.zeros((item["height"], item["width"]), np.uint8)
    drawn[10:20, 10:20] = 2
    server.http.put(f"{path}/labels", content=drawn.tobytes())
    server.http.post(f"{path}/decision", json={"decision": "accepted"})
    files = {"image": ("r.png", file_of(example(8)[0]))}
    server.http.post(f"/worklists/{bank}/items", files=files, data={"name": "r.png", "group": "r"})
    answer = server.http.get(f"/worklists/{bank}/export?format={kind}")
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        names = set(archive.namelist())
        assert json.loads(archive.read("export.json"))["masks_left_out"] == 1
        archive.extractall(tmp_path)
    if kind == "folder":
        from vessa.datasets import open_dataset

        dataset = open_dataset(tmp_path)
        masks = [dataset.mask(s) for s in dataset.slices()]
        assert [m is not None for m in masks] == [True, False]
        assert np.array_equal(masks[0], drawn)
    elif kind == "nnunet":
        assert {"labelsTr/q_001.png", "imagesTr/q_001_0000.png", "imagesTs/r_001_0000.png"} <= names
        assert json.loads((tmp_path / "dataset.json").read_text())["numTraining"] == 1
    else:
        body = json.loads((tmp_path / "annotations.json").read_text())
        (annotation,) = body["annotations"]
        assert annotation["area"] == 100
        assert annotation["bbox"] == [10, 10, 10, 10]


def test_a_key_has_its_share_of_bytes(server: Any, filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, item = filled()
    monkeypatch.setattr(server.app.state.worklists, "most_bytes", 10)
    answer = server.http.put(f"{path}/labels", content=bytes(item["height"] * item["width"]))
    assert answer.status_code == 413
    assert "VESSA_WORKLIST_BYTES" in answer.json()["error"]["message"]


def test_runs_of_the_allowed_folder_are_listed(server_of: Any, nano_weights: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, step in (("one", 3), ("..two", 4), ("torn", 5)):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.yaml").write_text("title: x")
        if name == "torn":
            (runs / name / "summary.json").write_text("[1]")
            (runs / name / "metrics.jsonl").write_text('{"step": "x"}\n7\n[]\n')
            continue
        (runs / name / "metrics.jsonl").write_text(json.dumps({"step": step, "dice": 0.5}) + "\n{cut")
    (runs / "one" / "report.html").write_text("<p>report</p>")
    settings = Settings(
        api_key="k" * 20, weights=str(nano_weights), store=f"folder:{tmp_path / 'b'}", runs_folder=runs
    )
    http = server_of(settings, wait=False).http
    run, torn = http.get("/runs").json()
    assert (torn["name"], torn["state"], torn["step"], torn["summary"]) == ("torn", "running", None, None)
    assert (run["name"], run["state"], run["step"], run["has_report"]) == ("one", "running", 3, True)
    assert http.get("/runs/one/metrics").json() == [{"step": 3, "dice": 0.5}]
    report = http.get("/runs/one/report.html")
    assert "sandbox" in report.headers["content-security-policy"]
    for path in ("/runs/..two/metrics", "/runs/none/metrics", "/runs/%2e%2e/metrics"):
        assert http.get(path).status_code == 404


def test_keys_are_listed_without_secrets(server: Any, key_of: Any) -> None:
    secret = key_of("curate", "listed")
    answer = server.http.get("/keys")
    assert "listed" in [key["name"] for key in answer.json()]
    assert secret not in answer.text
    assert "digest" not in answer.text


def test_an_admin_sees_the_queue_beside_its_limits(server: Any, browser: Any, key_of: Any) -> None:
    queue = server.http.get("/queue").json()
    assert (queue["waiting"], queue["requests"], queue["worker"]) == (0, 0, "ready")
    assert queue["queue_items"] == server.settings.queue.queue_items
    sign_in(browser, key_of("curate", "curious"))
    assert browser.get("/queue").status_code == 403


def test_erasing_a_patient_removes_its_images_from_worklists(server: Any, filled: Any, bank: str) -> None:
    path, _ = filled()
    assert server.http.delete("/groups/q").json()["worklist_items"] >= 1
    assert server.http.get(f"{path}/image.png").json()["error"]["code"] == "unknown_worklist"
    assert server.http.get(f"/worklists/{bank}").json()["items"] == []
