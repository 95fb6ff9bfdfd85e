"""The MONAI Label protocol over HTTP, as 3D Slicer's extension uses it."""

from __future__ import annotations

import email
import gzip
import io
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest

from vessa_server.auth.keys import Role, create_key

KEY = "a-key-for-tests-0123456789"
BASE = "/monailabel/bank"
# Oblique, with a flipped axis and a large distance between slices.
AFFINE = np.array([[-1.0, 0.1, 0.0, 12.0], [0.1, 1.0, 0.4, -7.0], [0.0, -0.1, 5.0, 3.0], [0, 0, 0, 1]])


@pytest.fixture
def viewers(viewers_of: Any) -> Callable[..., Any]:
    """Serve the protocol, with a bank: `viewers(**settings)`."""
    return partial(viewers_of, "monailabel")


def nifti(array: np.ndarray, affine: np.ndarray = AFFINE) -> bytes:
    """A compressed NIfTI file of voxels (I, J, K)."""
    return gzip.compress(nib.Nifti1Image(array, affine).to_bytes(), mtime=0)  # type: ignore[no-untyped-call]


def scan(example: Any, slices: int = 4) -> np.ndarray:
    """Voxels (64, 48, slices) of examples that the bank does not hold."""
    return np.stack([example(10 + k)[0].T for k in range(slices)], -1).astype(np.int16)


def upload(server: Any, name: str, data: bytes) -> Any:
    """Send a volume under a name."""
    files = {"file": ("/data/patient.nii.gz", data)}
    return server.http.put(f"{BASE}/datastore/", params={"image": name}, files=files, data={"params": "{}"})


def test_an_upload_counts_until_its_request_ends(viewers: Any, example: Any) -> None:
    data = nifti(scan(example))
    server = viewers(viewer_key_bytes=len(data) + 2000, viewer_bytes=1 << 30)
    answer = upload(server, "large", data + bytes(4000))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "limit_reached")
    assert "Uploads of viewers" in answer.json()["error"]["message"]
    assert server.app.state.viewer_sessions._uploads.total() == 0


def test_reads_of_a_key_are_bounded(viewers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume as it was sent may have 512 MiB."""
    server = viewers()
    monkeypatch.setattr(server.app.state.limits, "reads", 0)
    for path in ("info/", "datastore/", "datastore/image?image=x"):
        answer = server.http.get(f"{BASE}/{path}")
        assert answer.json()["error"]["code"] == "limit_reached", path


def infer(server: Any, model: str, params: dict[str, Any], **query: str) -> Any:
    """Ask for a segmentation."""
    given = {"params": (None, json.dumps(params))}
    return server.http.post(f"{BASE}/infer/{model}", params=query, files=given)


def parts_of(answer: Any) -> tuple[dict[str, Any], np.ndarray, dict[str, Any]]:
    """The params, the labels (I, J, K) and the NRRD header of an answer."""
    assert answer.status_code == 200, answer.text
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    params, image = email.message_from_bytes(head + answer.content).get_payload()  # type: ignore[misc]
    assert image.get_filename() == "labels.nrrd"
    stream = io.BytesIO(image.get_payload(decode=True))
    header = nrrd.read_header(stream)
    return json.loads(params.get_payload()), nrrd.read_data(header, stream, index_order="F"), dict(header)


def test_a_volume_is_segmented_on_its_own_grid(viewers: Any, example: Any) -> None:
    """The whole volume, one slice by points, and the structure through the volume by a box."""
    server = viewers()
    info = server.http.get(f"{BASE}/info/").json()
    assert info["labels"] == ["ventricle", "wall"]
    assert {m: v["type"] for m, v in info["models"].items()} == {
        "bank": "segmentation", "bank-slice": "deepgrow", "bank-volume": "deepgrow",
    }  # fmt: skip
    assert server.http.get(f"{BASE}/train/?check_if_running=true").status_code == 404
    made = server.http.put(f"{BASE}/session/", files={"files": ("v.nii.gz", nifti(scan(example)))}).json()
    token = made["session_id"]
    assert server.http.get(f"{BASE}/session/{token}").json()["session_id"] == token
    assert server.http.get(f"{BASE}/session/gone").json() == {}
    params, labels, header = parts_of(infer(server, "bank", {}, image="x", session_id=token))
    assert labels.shape == (64, 48, 4)
    assert set(params["label_names"].values()) == {int(v) for v in np.unique(labels) if v}
    lps = np.diag([-1.0, -1.0, 1.0])
    np.testing.assert_allclose(header["space directions"].T, lps @ AFFINE[:3, :3], atol=1e-5)
    np.testing.assert_allclose(header["space origin"], lps @ AFFINE[:3, 3], atol=1e-5)
    points = {"label": "ventricle", "foreground": [[32, 24, 2]], "background": [[3, 3, 2]], "slice": 2}
    params, labels, _ = parts_of(infer(server, "bank-slice", points, image="x", session_id=token))
    assert set(np.unique(labels)) <= {0, 1}
    assert not labels[:, :, [0, 1, 3]].any()
    roi = {"label": "wall", "foreground": [], "background": [], "roi": [44, 20, 12, 36, 2, 1]}
    _, labels, _ = parts_of(infer(server, "bank-volume", roi, image="x", session_id=token))
    assert labels.shape == (64, 48, 4)


def test_saved_labels_become_templates_and_the_next_volume_is_suggested(viewers: Any, example: Any) -> None:
    server = viewers()
    mask = np.stack([example(20 + k)[1].T for k in range(4)], -1)
    for name in ("first", "second"):
        assert upload(server, name, nifti(scan(example))).json() == {"image": name}
    label = {"label_info": [{"name": "ventricle", "idx": 1}, {"name": "new", "idx": 2}]}
    saved = server.http.put(
        f"{BASE}/datastore/label",
        params={"image": "first"},
        files={"label": ("l.nii.gz", nifti(mask)), "params": (None, json.dumps(label))},
    )
    assert saved.status_code == 200, saved.text
    bank = server.http.get("/banks/bank").json()
    assert bank["classes"] == {"1": "ventricle", "2": "wall", "3": "new"}
    assert "first" in bank["groups"]
    assert len(saved.json()["templates"]) == 4
    sample = server.http.post(f"{BASE}/activelearning/vessa", json={"client_id": "me"})
    assert sample.json()["id"] == "second"
    sent = server.http.get(f"{BASE}/datastore/image", params={"image": "second"})
    assert sent.content == nifti(scan(example))
    assert server.http.get(f"{BASE}/info/").json()["datastore"] == {"total": 2, "completed": 1}
    wrong = server.http.put(
        f"{BASE}/datastore/label",
        params={"image": "second"},
        files={"label": ("l.nii.gz", nifti(mask, np.eye(4)))},
    )
    assert wrong.json()["error"]["code"] == "shape_mismatch"


def test_keys_decide_who_may_do_what(viewers: Any, example: Any) -> None:
    server = viewers(viewer_key_sessions=2)
    keys = server.app.state.access.keys
    other = server.as_key(create_key(keys, "other", Role.annotate))
    server.http.put("/banks/bank/share")
    assert server.http.get(f"{BASE}/auth/", headers={"Authorization": ""}).json() == {"enabled": True}
    form = {"username": "me", "password": KEY, "grant_type": "password"}
    assert server.http.post(f"{BASE}/auth/token", data=form).json()["access_token"] == KEY
    form["password"] = "wrong-key-0123456789"
    assert server.http.post(f"{BASE}/auth/token", data=form).status_code == 401
    upload(server, "mine", nifti(scan(example)))
    assert infer(other, "bank", {}, image="mine").json()["error"]["code"] == "unknown_image"
    assert upload(other, "theirs", nifti(scan(example))).status_code == 200
    files = {"label": ("l.nii.gz", nifti(np.zeros((64, 48, 4), np.uint8)))}
    refused = other.http.put(f"{BASE}/datastore/label", params={"image": "theirs"}, files=files)
    assert refused.json()["error"]["code"] == "forbidden"
    for name in ("b", "c"):  # the place of the longest unused volume is taken
        assert upload(server, name, nifti(scan(example))).status_code == 200
    assert set(server.http.get(f"{BASE}/datastore/?output=all").json()["objects"]) == {"b", "c"}


def test_wrong_requests_say_what_is_expected(viewers: Any, example: Any) -> None:
    server = viewers(viewer_voxels=64 * 48 * 4)
    upload(server, "a", nifti(scan(example)))
    for model, params, code in [
        ("other", {}, "invalid_request"),
        ("bank-slice", {"label": "ventricle"}, "invalid_request"),
        ("bank-slice", {"label": "liver", "foreground": [[1, 1, 1]]}, "unknown_class"),
        ("bank-slice", {"label": "wall", "foreground": [[99, 1, 1]]}, "invalid_prompt"),
        ("bank-volume", {"label": "wall", "roi": [0, 5]}, "invalid_request"),
        ("bank", {"result_extension": ".exe"}, "invalid_request"),
    ]:
        assert infer(server, model, params, image="a").json()["error"]["code"] == code, (model, params)
    assert upload(server, "big", nifti(scan(example, 5))).json()["error"]["code"] == "too_large"
    assert upload(server, "n", b"NRRD0004\n").json()["error"]["code"] == "invalid_request"
    assert upload(server, "x" * 129, nifti(scan(example))).status_code == 422
    assert server.http.post(f"{BASE}/activelearning/random").json()["error"]["code"] == "invalid_request"
