"""The nnInteractive protocol over HTTP: what it draws, what it refuses, whom it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from vessa.volumes.packed_array import pack
from vessa_server.auth.keys import Role, create_key

pytest.importorskip("blosc2", reason="the extra `viewers` is not installed")
KEY = "a-key-for-tests-0123456789"
BASE = "/nninteractive/bank"


@pytest.fixture
def viewers(viewers_of: Any) -> Callable[..., Any]:
    """Serve the protocol, with a bank: `viewers(**settings)`."""
    return partial(viewers_of, "nninteractive")


def volume(example: Any, slices: int = 4) -> np.ndarray:
    """A volume (1, slices, 48, 64) of examples that the bank does not hold."""
    return np.stack([example(10)[0] for _ in range(slices)])[None].astype(np.float32)


def claim(server: Any, base: str = BASE) -> dict[str, str]:
    """Open a session; returns the header that names it."""
    answer = server.http.post(f"{base}/claim")
    assert answer.status_code == 200, answer.text
    return {"X-Lease-Token": answer.json()["lease_token"]}


def send(server: Any, path: str, array: np.ndarray, lease: dict[str, str], **meta: Any) -> Any:
    """Send a packed array with its X-Meta."""
    headers = lease | {"X-Meta": json.dumps(meta), "Content-Type": "application/octet-stream"}
    return server.http.post(f"{BASE}/{path}", content=pack(array), headers=headers)


def click(server: Any, lease: dict[str, str], place: Any, include: Any = True, **more: Any) -> Any:
    """Add a click."""
    body = {"coordinates": place, "include_interaction": include, **more}
    return server.http.post(f"{BASE}/add_point_interaction", json=body, headers=lease)


def test_a_click_changes_its_slice_until_it_is_undone(viewers: Any, example: Any) -> None:
    """Undo brings the old pixels back."""
    server = viewers()
    lease = claim(server, f"{BASE}/ventricle")
    image = volume(example)
    assert send(server, "set_image", image, lease, image_properties={"spacing": [8, 1, 1]}).json() == {
        "original_image_shape": [1, 4, 48, 64]
    }
    server.http.post(f"{BASE}/set_do_autozoom", json={"do_autozoom": False}, headers=lease)
    answer = click(server, lease, [2, 24, 32])
    meta = json.loads(answer.headers["X-Meta"])
    assert answer.status_code == 200, answer.text
    assert meta["ran_prediction"]
    assert meta["complete"]
    assert meta["bbox"][0] == [2, 3]
    assert answer.content[:4] == b"NNIA"
    undone = json.loads(server.http.post(f"{BASE}/undo", headers=lease).headers["X-Meta"])
    assert undone["bbox"] == meta["bbox"]
    again = json.loads(server.http.post(f"{BASE}/undo", headers=lease).headers["X-Meta"])
    assert again == {"ran_prediction": False, "bbox": None}


def test_a_mask_continues_through_the_volume(viewers: Any, example: Any) -> None:
    server = viewers()
    lease = claim(server)
    send(server, "set_image", volume(example, 6), lease, image_properties={"spacing": [8, 1, 1]})
    label = np.zeros((6, 48, 64), np.uint8)
    label[0, 20:30, 28:38] = 1
    answer = send(server, "add_initial_seg_interaction", label, lease, run_prediction=True)
    assert json.loads(answer.headers["X-Meta"])["bbox"] is None  # the viewer has the label already
    lasso = np.zeros((1, 48, 64), bool)
    lasso[:, 16:32, 24:40] = True
    bounds = [[3, 4], [0, 48], [0, 64]]
    given = {"include_interaction": True, "interaction_bbox": bounds}
    answer = send(server, "add_lasso_interaction", lasso, lease, **given)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.headers["X-Meta"])["class_id"] in (1, 2)
    excluded = send(server, "add_lasso_interaction", lasso, lease, **given | {"include_interaction": False})
    assert excluded.status_code == 200, excluded.text


WRONG = [
    ("add_point_interaction", {"coordinates": [9, 0, 0], "include_interaction": True}, "invalid_prompt"),
    ("add_point_interaction", {"coordinates": [0, 0], "include_interaction": True}, "invalid_prompt"),
    ("add_point_interaction", {"coordinates": [0, 0, 0]}, "invalid_prompt"),
    ("add_bbox_interaction", {"bbox_coords": [[0, 1]], "include_interaction": True}, "invalid_prompt"),
    ("add_bbox_interaction", {"bbox_coords": [[0, 1], [90, 99], [0, 9]], "include_interaction": True},
     "invalid_prompt"),
    ("add_bbox_interaction", [], "invalid_request"),
    ("set_target_buffer", {"shape": [1, 2, 3], "dtype": "uint8"}, "shape_mismatch"),
]  # fmt: skip


def test_a_wrong_interaction_says_what_is_expected(viewers: Any, example: Any) -> None:
    server = viewers()
    lease = claim(server)
    assert send(server, "set_image", volume(example), lease).status_code == 200
    for path, body, code in WRONG:
        answer = server.http.post(f"{BASE}/{path}", json=body, headers=lease)
        assert answer.json()["error"]["code"] == code, (path, body)
        assert answer.json()["detail"] == answer.json()["error"]["message"]


def test_uploads_are_bounded_and_checked(viewers: Any, example: Any) -> None:
    server = viewers(viewer_voxels=20_000, viewer_body_bytes=100_000)
    lease = claim(server)
    assert click(server, lease, [0, 0, 0]).json()["error"]["code"] == "invalid_request"  # no image yet
    rng = np.random.default_rng(0)
    for array, code in [
        (volume(example, 8), "too_large"),
        (rng.normal(size=(1, 40, 50, 60)), "too_large"),
        (np.full((1, 3, 4, 5), np.nan), "invalid_image"),
        (np.zeros((2, 3, 4, 5), np.uint8), "invalid_image"),
        (np.zeros((3, 4, 5), bool), "shape_mismatch"),
    ]:
        assert send(server, "set_image", array, lease).json()["error"]["code"] == code, array.shape
    headers = lease | {"X-Meta": "{}"}
    for body in (b"", b"NNIA", pack(volume(example, 2))[:-9], b"NNIA" + bytes(40)):
        answer = server.http.post(f"{BASE}/set_image", content=body, headers=headers)
        assert answer.json()["error"]["code"] == "malformed_body"


def test_sessions_are_bounded_by_key_and_memory(viewers: Any, example: Any) -> None:
    server = viewers(viewer_sessions=3, viewer_key_sessions=2, viewer_key_bytes=100_000)
    first, second = claim(server), claim(server)
    full = server.http.post(f"{BASE}/claim")
    assert full.status_code == 503
    assert "2 viewer sessions, its limit" in full.json()["detail"]
    assert send(server, "set_image", volume(example), first).status_code == 200
    assert send(server, "set_image", volume(example, 16), second).json()["error"]["code"] == "too_large"
    assert server.http.post(f"{BASE}/release", headers=first).json() == {"released": True}
    assert server.http.post(f"{BASE}/heartbeat", headers=first).status_code == 410


def test_a_session_serves_its_own_key_alone(viewers: Any) -> None:
    server = viewers()
    lease = claim(server)
    keys = server.app.state.access.keys
    other = server.as_key(create_key(keys, "other", Role.annotate))
    assert other.http.post(f"{BASE}/heartbeat", headers=lease).status_code == 410
    assert other.http.post(f"{BASE}/claim").json()["error"]["code"] == "unknown_bank"
    assert other.http.post("/nninteractive/no/claim").status_code == 404
    anyone = server.as_key("")
    assert anyone.http.post(f"{BASE}/claim").status_code == 401
    assert server.http.post(f"{BASE}/liver/claim").json()["error"]["code"] == "unknown_class"


def test_the_protocols_are_off_by_default(server: Any) -> None:
    assert server.http.post(f"{BASE}/claim").status_code == 404
