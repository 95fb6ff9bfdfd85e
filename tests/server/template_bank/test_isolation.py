"""Another key's banks, templates, jobs and answers: on no route can be told whether they are there."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from fastapi.routing import iter_route_contexts
from PIL import Image
from scans import nifti

from vessa.codec import encode
from vessa_server.app import create_app
from vessa_server.settings import Settings

ROUTES = sorted(
    (method, context.path)
    for context in iter_route_contexts(create_app(Settings(api_key="k" * 20)).routes)
    for method in context.methods
    if "{" in context.path and not context.path.startswith("/console/")  # files of the page, without data
)
NOTHING = {
    "bank": "nothing",
    "template": "0" * 64,
    "job": "0" * 24,
    "annotation": "0" * 24,
    "worklist": "nothing",
    "item": "0" * 32,
    "volume": "0" * 32,
}
ADMIN_ONLY = ("/groups/", "/runs/")


def owned(server: Any, name: str) -> dict[str, str]:
    """Make one of each thing, and return what it is called."""
    template = server.seed(name, 2)[0]["id"]
    file = {"image": ("i", _file(server))}
    answer = server.http.post("/segment", files=file, data={"bank": name})
    assert answer.status_code == 200, answer.text
    volume = nifti(np.zeros((32, 32, 2), np.uint8), np.eye(4))
    job = server.http.post("/jobs", files={"image": ("v", volume)}, data={"bank": name})
    assert job.status_code == 202, job.text
    annotation = answer.headers["X-Annotation-Id"]
    assert server.http.post("/worklists", json={"name": name, "bank": name}).status_code == 201
    form = {"files": {"image": ("q.png", _file(server))}, "data": {"name": "q.png", "group": "q"}}
    item = server.http.post(f"/worklists/{name}/items", **form)
    assert item.status_code == 201, item.text
    added = server.http.post(f"/worklists/{name}/volumes", files={"image": ("v", volume)})
    assert added.status_code == 201, added.text
    return {
        "bank": name,
        "template": template,
        "job": job.json()["id"],
        "annotation": annotation,
        "worklist": name,
        "item": item.json()["id"],
        "volume": added.json()["id"],
    }


def _file(server: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64), 90, np.uint8)).save(file, "PNG")
    return file.getvalue()


def ask(server: Any, method: str, path: str, names: dict[str, str]) -> Any:
    """Ask a route for something by its name, in a body that suits all of them."""
    kind = path.split("/")[1].removesuffix("s")
    place = path.replace("{bank}", names["bank"]).replace("{group}", "p0")
    place = place.replace("{name}", names["worklist"]).replace("{volume}", names["volume"])
    identity = names["item" if kind == "worklist" else kind] if "{identity}" in place else ""
    place = place.replace("{identity}", identity)
    assert "{" not in place, "a new kind of thing: add it to NOTHING and `owned`"
    query = {"bank": names["bank"]} if kind == "template" else {}
    if path.endswith("/suggest"):
        body = encode({"images": np.zeros((1, 8, 8), np.uint8)}, {})
        return server.send(place, body)
    return server.http.request(method, place, params=query)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_what_is_anothers_is_answered_like_what_is_not_there(
    server: Any, bank: str, key_of: Any, method: str, path: str
) -> None:
    alice, bob = (server.as_key(key_of("curate", name)) for name in ("alice", "bob"))
    theirs = owned(alice, bank)
    try:
        there, missing = ask(bob, method, path, theirs), ask(bob, method, path, NOTHING)
        assert there.status_code == missing.status_code
        told = [answer.text.replace(answer.headers["X-Request-Id"], "") for answer in (there, missing)]
        for kind, name in theirs.items():
            told[0] = told[0].replace(name, NOTHING[kind]).replace(name[:40], NOTHING[kind][:40])
        assert told[0] == told[1]
        if path.startswith(ADMIN_ONLY):
            assert there.status_code in (403, 404)
        elif method in ("POST", "PUT") and path.startswith("/worklists/"):  # a body of another form
            assert there.status_code in (400, 404, 415, 422)
        elif not path.endswith("/suggest"):  # a bank that does not exist yet is an empty one
            assert there.status_code == 404
        assert alice.http.get(f"/banks/{bank}").json()["templates"] == 2
    finally:
        alice.http.delete(f"/jobs/{theirs['job']}")
        alice.http.delete(f"/worklists/{theirs['worklist']}")
