"""Erasing a patient over HTTP reaches what every feature stores, and names what it could not search."""

from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from vessa_server.auth.keys import Caller, Role
from vessa_server.settings import Settings

PATIENT = "patient-4711"


@pytest.fixture
def server(server_of: Any, nano_weights: Path, tmp_path: Path) -> Any:
    """A server whose whole store lies in `tmp_path`."""
    key = "a-key-for-tests-0123456789"
    return server_of(
        Settings(api_key=key, weights=str(nano_weights), store=f"folder:{tmp_path}", device="cpu")
    )


def add_template(server: Any, example: Any, file_of: Any, group: str) -> None:
    """Add one template of a patient to the bank `a`."""
    image, mask = example(1)
    files = {"image": ("i.png", file_of(image)), "mask": ("m.png", file_of(mask))}
    data = {"bank": "a", "group": group, "classes": '{"1": "ventricle", "2": "wall"}'}
    answer = server.http.post("/templates", files=files, data=data)
    assert answer.status_code == 201, answer.text


def test_a_patient_who_guided_others_is_erased_everywhere(
    server: Any, example: Any, file_of: Any, tmp_path: Path
) -> None:
    add_template(server, example, file_of, PATIENT)
    voxels = np.stack([example(10 + k)[0].T for k in range(2)], -1)
    scan = gzip.compress(nib.Nifti1Image(voxels, np.diag([1, 1, 5, 1])).to_bytes())  # type: ignore[no-untyped-call]
    sent = server.http.post("/jobs", files={"image": ("v.nii.gz", scan)}, data={"bank": "a"})
    job = f"/jobs/{sent.json()['id']}"
    while server.http.get(job).json()["state"] not in ("done", "failed"):
        time.sleep(0.05)
    server.http.post("/worklists", json={"name": "list", "bank": "a"})
    image = {"image": ("q.png", file_of(example(7)[0]))}
    item = server.http.post("/worklists/list/items", files=image, data={"name": "q"}).json()["id"]
    server.http.post(f"/worklists/list/items/{item}/segment", json={})
    uses = server.http.get("/worklists/list").json()["items"][0]["templates"]["ventricle"]
    made = server.http.get(f"{job}/provenance").json()
    assert {uses[0]["group"], made[0]["templates"]["ventricle"][0]["group"]} == {PATIENT}

    erased = server.http.delete(f"/groups/{PATIENT}").json()
    assert (erased["templates"], erased["jobs"], erased["worklist_items"]) == (1, 0, 0)
    held = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path for path, data in held.items() if PATIENT.encode() in data] == []
    add_template(server, example, file_of, "other")  # the job's provenance is shown with its bank alone
    uses = server.http.get(f"{job}/provenance").json()[0]["templates"]["ventricle"]
    assert [use["group"] for use in uses] == ["erased"]


def test_sessions_of_viewers_that_may_show_a_patient_end(server: Any) -> None:
    sessions = server.app.state.viewer_sessions
    caller = Caller("viewer", Role.annotate)
    opened = {group: sessions.open("monailabel", caller, "a") for group in (PATIENT, "other", "")}
    for group, session in opened.items():
        session.group = group
    assert server.http.delete(f"/groups/{PATIENT}").json()["viewer_sessions"] == 2
    assert sessions.of("monailabel", caller, "a") == [opened["other"]]


def test_what_could_not_be_searched_is_named(server: Any, example: Any, file_of: Any, tmp_path: Path) -> None:
    server.http.post("/worklists", json={"name": "list", "bank": "a"})
    image = {"image": ("q.png", file_of(example(7)[0]))}
    item = server.http.post("/worklists/list/items", files=image, data={"name": "q"}).json()["id"]
    (path,) = tmp_path.rglob(f"{item}.json")
    path.write_text("{")
    (tmp_path / ".jobs" / "torn").mkdir(parents=True)
    (tmp_path / ".jobs" / "torn" / "job.json").write_text("{")
    erased = server.http.delete(f"/groups/{PATIENT}").json()
    assert erased["unreadable_jobs"] == ["torn"]
    assert [name.rpartition("/")[2] for name in erased["unreadable_worklist_items"]] == [item]
