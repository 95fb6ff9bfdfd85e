"""Label Studio's ML backend protocol over HTTP."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from vessa.errors import TooLarge
from vessa_server.auth.keys import Role, create_key
from vessa_server.viewers import brush

KEY = "a-key-for-tests-0123456789"
BASE = "/labelstudio/bank"
CONFIG = """<View><Image name="image" value="$picture"/>
<BrushLabels name="brush" toName="image"><Label value="ventricle"/><Label value="other"/></BrushLabels>
<KeyPointLabels name="point" toName="image" smart="true"><Label value="ventricle"/></KeyPointLabels></View>"""


@pytest.fixture
def viewers(viewers_of: Any) -> Callable[..., Any]:
    """Serve the protocol, with a bank: `viewers(**settings)`."""
    return partial(viewers_of, "labelstudio")


@pytest.fixture
def picture(example: Any, file_of: Any) -> str:
    """An image as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(file_of(example(10)[0])).decode()


def basic(key: str) -> dict[str, str]:
    """The header that Label Studio sends."""
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{key}".encode()).decode()}


def predict(server: Any, address: str, context: Any = None) -> Any:
    """Ask for one task's masks."""
    task = {"id": 1, "data": {"picture": address}}
    body = {"tasks": [task], "label_config": CONFIG, "params": {"context": context}}
    return server.http.post(f"{BASE}/predict", json=body, headers=basic(KEY))


def test_tasks_get_brush_masks_of_the_labels_that_the_bank_knows(viewers: Any, picture: str) -> None:
    server = viewers()
    assert server.http.get(f"{BASE}/health", headers=basic(KEY)).json()["status"] == "UP"
    schema = {"project": "1.2", "schema": CONFIG}
    assert "model_version" in server.http.post(f"{BASE}/setup", json=schema, headers=basic(KEY)).json()
    point = {"type": "keypointlabels", "value": {"x": 50.0, "y": 50.0, "keypointlabels": ["ventricle"]}}
    box = {"x": 30.0, "y": 20.0, "width": 40.0, "height": 60.0, "rectanglelabels": ["ventricle"]}
    regions = [point, {**point, "is_positive": 0, "value": {**point["value"], "x": 2.0}}]
    for context in (None, {"result": regions}, {"result": [{"type": "rectanglelabels", "value": box}]}):
        answer = predict(server, picture, context)
        assert answer.status_code == 200, answer.text
        (result,) = answer.json()["results"]
        for region in result["result"]:
            assert region["value"]["brushlabels"] == ["ventricle"]
            assert (region["original_width"], region["original_height"]) == (64, 48)
            assert brush.decode(region["value"]["rle"], 48, 64, 10_000).any()


def test_a_saved_annotation_becomes_a_template(viewers: Any, picture: str, example: Any) -> None:
    server = viewers()
    server.http.put("/banks/bank/share")
    mask = example(10)[1] == 1
    value = {"format": "rle", "rle": brush.encode(mask), "brushlabels": ["other"]}
    region = {"type": "brushlabels", "original_width": 64, "original_height": 48, "value": value}
    event = {
        "action": "ANNOTATION_CREATED",
        "annotation": {"result": [region, {"type": "choices"}]},
        "task": {"id": 7, "data": {"picture": picture}},
        "project": {"label_config": CONFIG},
    }
    annotate = create_key(server.app.state.access.keys, "annotator", Role.annotate)
    refused = server.http.post(f"{BASE}/webhook", json=event, headers=basic(annotate))
    assert refused.json()["error"]["code"] == "forbidden"
    saved = server.http.post(f"{BASE}/webhook", json=event, headers=basic(KEY))
    assert saved.status_code == 201, saved.text
    assert saved.json()["regions_left_out"] == 1
    (identity,) = saved.json()["templates"]
    template = server.http.get(f"/templates/{identity}", params={"bank": "bank"}).json()
    assert (template["classes"], template["group"]) == ({"3": "other"}, "labelstudio-task-7")
    other = server.http.post(f"{BASE}/webhook", json={"action": "TASKS_CREATED"}, headers=basic(KEY))
    assert other.json() == {"templates": []}


def test_images_come_from_the_named_label_studio_alone(
    viewers: Any, pictures: Any, example: Any, file_of: Any
) -> None:
    address, asked = pictures({"/data/upload/a.png": file_of(example(10)[0])})
    server = viewers(labelstudio_url=address, labelstudio_token="secret")
    assert predict(server, "/data/upload/a.png").status_code == 200
    assert asked == [("/data/upload/a.png", "Token secret")]
    assert predict(server, "/data/upload/none.png").json()["error"]["code"] == "invalid_image"
    assert predict(server, "/redirect").json()["error"]["code"] == "invalid_image"
    for other in ("http://127.0.0.1:1/a.png", "https://example.org/a.png", "file:///etc/passwd", "//x/a"):
        assert predict(server, other).json()["error"]["code"] == "invalid_request", other
    assert [path for path, _ in asked] == ["/data/upload/a.png", "/data/upload/none.png", "/redirect"]


@pytest.mark.parametrize("seed", range(3))
def test_brush_masks_survive_a_round_trip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 300 * (seed + 1))) > (0.5, 0.99, 0.0)[seed]
    np.testing.assert_array_equal(brush.decode(brush.encode(mask), *mask.shape, 10**6), mask)


def test_damaged_brush_masks_are_refused() -> None:
    whole = brush.encode(np.eye(9, dtype=bool))
    for rle in ([], whole[:8], [*whole[:3], 0, *whole[4:]], [300], ["x"], None):
        with pytest.raises(Exception, match="rle is damaged"):
            brush.decode(rle, 9, 9, 100)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="1 to 80 pixels"):
        brush.decode(whole, 9, 9, 80)


def test_brush_masks_that_compute_for_minutes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).random((64, 64)) > 0.5
    monkeypatch.setattr(brush, "MAX_RUNS", 1000)
    with pytest.raises(TooLarge, match="more than 1000 runs"):
        brush.decode(brush.encode(noise), 64, 64, 10**6)


EVENTS: list[tuple[dict[str, Any], str | None]] = [
    ({"action": "ANNOTATION_CREATED"}, "invalid_request"),
    ({"action": {"a": 1}, "task": 3}, None),
    ({"action": "ANNOTATION_CREATED", "task": [1], "project": "x", "annotation": 3}, "invalid_request"),
    ({"result": [{"type": "brushlabels"}] * 300}, "too_large"),
    ({"result": [{"type": "brushlabels", "value": {"brushlabels": ["x" * 9999]}}]}, "invalid_request"),
    ({"result": [{"type": "brushlabels", "value": {"brushlabels": [7], "rle": 3}}]}, "invalid_request"),
]


def test_damaged_and_growing_requests_are_refused(viewers: Any, picture: str) -> None:
    server, headers = viewers(), basic(KEY) | {"Content-Type": "application/json"}
    for event, code in EVENTS:
        if "result" in event:
            task, project = {"id": 7, "data": {"picture": picture}}, {"label_config": CONFIG}
            event = {"action": "ANNOTATION_CREATED", "annotation": event, "task": task, "project": project}
        answer = server.http.post(f"{BASE}/webhook", json=event, headers=headers)
        assert answer.json().get("error", {}).get("code") == code, answer.text
    # Two bytes of JSON may become a hundred in memory, and ten levels of ten references ten billion letters.
    many = b'{"tasks": [' + b"[]," * 1_500_000 + b"[]]}"
    answer = server.http.post(f"{BASE}/predict", content=many, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    deep = server.http.post(f"{BASE}/predict", content=b'{"tasks": ' + b"[" * 100_000, headers=headers)
    assert deep.json()["error"]["code"] == "invalid_request"
    entities = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 10}">' for k in range(1, 11))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "aaaaaaaaaa">{entities}]><View>&e10;</View>'
    answer = server.http.post(f"{BASE}/setup", json={"schema": bomb}, headers=headers)
    assert answer.json()["error"]["code"] == "invalid_request"


@pytest.fixture
def pictures() -> Iterator[Callable[..., Any]]:
    """Serve files on loopback; returns the address and the list of (path, Authorization) that were asked."""
    servers = []

    def serve(files: dict[str, bytes]) -> tuple[str, list[tuple[str, str | None]]]:
        asked: list[tuple[str, str | None]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers.get("Authorization")))
                content = files.get(self.path)
                self.send_response(302 if self.path == "/redirect" else 200 if content else 404)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: Any) -> None:
                """Stay silent."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
