"""Limits that hold for every caller: connections, unread answers, shares of keys, image ids of others."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.routing import iter_route_contexts

from vessa.codec import encode, image_digest, read_header
from vessa.errors import DeadlineExceeded, LimitReached
from vessa_server.active_learning import ranking
from vessa_server.api import h11_limits
from vessa_server.api.dependencies import JSON_BYTES
from vessa_server.api.h11_limits import BoundedHttp
from vessa_server.auth.keys import Caller, Role
from vessa_server.settings import Settings
from vessa_server.template_bank.permissions import CallersBanks


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A small app behind the bounded protocol; its port."""
    monkeypatch.setattr(h11_limits, "LINGER_S", 0.3)
    monkeypatch.setattr(h11_limits, "SLOWEST_READER", 64 << 20)
    app = FastAPI()

    @app.get("/large")
    def large() -> Response:
        return Response(bytes(64 << 20))

    @app.get("/medium")
    def medium() -> Response:
        return Response(bytes(4 << 20))

    @app.post("/refused")
    async def refused(request: Request) -> Response:
        return Response("no", 401)

    # The limits stay those of the class, so that a test may change them.
    protocol = type("Limited", (BoundedHttp,), {"max_connections": 4})
    monkeypatch.setattr(BoundedHttp, "write_timeout_s", 1.0)
    config = uvicorn.Config(
        app, port=0, http=protocol, ws="none", log_level="warning", timeout_keep_alive=2, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield int(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(20)


def closed(connection: socket.socket, seconds: float = 5.0) -> bool:
    """Read until the other end closes; False when it does not within `seconds`."""
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 20):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def connect(port: int, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(text)
    return connection


def test_a_body_dripped_at_an_error_answer_is_cut_off(web: int) -> None:
    head = b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    with connect(web, head) as connection:
        assert b"401" in connection.recv(1000)
        cut = False
        for _ in range(40):
            try:
                connection.sendall(b"x")
            except ConnectionError:
                cut = True
                break
            time.sleep(0.05)
        assert cut or closed(connection)


def test_an_answer_that_nobody_reads_is_dropped(web: int) -> None:
    with connect(web, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        time.sleep(3)  # nothing is read meanwhile
        received = 0
        connection.settimeout(5)
        try:
            while chunk := connection.recv(1 << 20):
                received += len(chunk)
        except ConnectionError:
            pass
        assert received < 64 << 20


def test_unread_answers_of_all_connections_are_bounded(web: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedHttp, "max_unread_bytes", 100 << 20)
    monkeypatch.setattr(BoundedHttp, "write_timeout_s", 60.0)
    request = b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received = []
    with contextlib.ExitStack() as open_:
        readers = [open_.enter_context(connect(web, request)) for _ in range(3)]
        time.sleep(1)
        for reader in readers:
            reader.settimeout(20)
            received.append(0)
            with contextlib.suppress(ConnectionError):
                while chunk := reader.recv(1 << 20):
                    received[-1] += len(chunk)
    assert sum(count > 64 << 20 for count in received) == 1, received


def test_an_answer_that_is_read_comes_whole(web: int) -> None:
    with connect(web, b"GET /medium HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") as connection:
        connection.settimeout(20)
        received = 0
        while chunk := connection.recv(1 << 20):
            received += len(chunk)
    assert received > 4 << 20


def test_connections_beyond_the_limit_get_503(web: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", web)) for _ in range(4)]
    time.sleep(0.3)
    with connect(web, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n") as one_more:
        one_more.settimeout(5)
        answer = one_more.recv(1000)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"503" in head
        assert f"Content-Length: {len(body)}".encode() in head
    for connection in idle:
        connection.close()


def test_no_key_holds_all_places(server_of: Any) -> None:
    server = server_of(Settings(api_key="k" * 20, max_requests=8, key_requests=8), wait=False)
    limits = server.app.state.limits
    greedy = Caller("greedy", Role.annotate, requests=100)
    with contextlib.ExitStack() as places:
        for _ in range(6):
            places.enter_context(limits.work(greedy))
        with pytest.raises(LimitReached, match="already has 6 requests in progress"), limits.work(greedy):
            pass
        with limits.work(Caller("other", Role.annotate)):
            pass


def test_reads_of_a_key_are_bounded(server: Any, key_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = server.as_key(key_of("annotate", "reader"))
    monkeypatch.setattr(server.app.state.limits, "reads", 0)
    for path in (
        "/banks",
        "/templates?bank=x",
        "/templates/x/overlay.png",
        "/jobs",
        "/info",
        "/annotations/x",
    ):
        answer = reader.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "limit_reached"), path
    assert reader.http.get("/readyz").status_code == 200


def test_slow_reads_of_one_key_leave_places_to_others(
    server: Any, key_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One client, and so one event loop, for both keys: places are waited for within a loop.
    greedy, other = ({"Authorization": f"Bearer {key_of('annotate', name)}"} for name in ("greedy", "other"))
    go_on, whole = threading.Event(), CallersBanks.list

    def slow(banks: CallersBanks) -> Any:
        if banks.caller.name == "greedy":
            go_on.wait(30)
        return whole(banks)

    monkeypatch.setattr(CallersBanks, "list", slow)
    with ThreadPoolExecutor(9) as pool:
        try:
            slow_ones = [pool.submit(server.http.get, "/banks", headers=greedy) for _ in range(8)]
            time.sleep(0.5)
            assert pool.submit(server.http.get, "/banks", headers=other).result(20).status_code == 200
            assert not any(one.done() for one in slow_ones)
        finally:
            go_on.set()
        assert {one.result(60).status_code for one in slow_ones} == {200}
    assert len(server.app.state.key_reading) == 0


def test_json_bodies_are_bounded_without_a_key(server: Any) -> None:
    """FastAPI reads the body of a pydantic model before it checks the key."""
    large, found = b'{"key": "' + bytes(2 * JSON_BYTES) + b'"}', []
    for route in iter_route_contexts(server.app.routes):
        if getattr(route.original_route, "body_field", None) is None:
            continue
        path = re.sub(r"{[^}]*}", "x", route.path)
        (method,) = route.methods
        headers = {"Authorization": "", "Content-Type": "application/json"}
        answer = server.http.request(method, path, content=large, headers=headers)
        found.append((path, answer.status_code))
    assert {status for _, status in found} == {413}, found
    assert {"/session", "/worklists"} <= {path for path, _ in found}


def test_drawn_labels_take_a_place(server: Any, key_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = server.as_key(key_of("annotate", "drawer"))
    monkeypatch.setattr(server.app.state.limits, "requests", 0)
    answer = drawer.http.put(f"/worklists/x/items/{'0' * 32}/labels", content=b"")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "limit_reached")


def test_changes_of_a_key_are_bounded(server: Any, key_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    curator = server.as_key(key_of("curate", "busy"))
    monkeypatch.setattr(server.app.state.limits, "changes_per_minute", 2)
    codes = [curator.http.delete("/banks/none").status_code for _ in range(4)]
    assert codes == [404, 404, 429, 429]
    assert server.http.delete("/banks/none").status_code == 404  # an admin is never locked out


def test_an_image_id_is_no_permission(server: Any, bank: str, key_of: Any, example: Any) -> None:
    server.seed(bank)
    server.http.put(f"/banks/{bank}/share")
    image = example(9)[0]
    owner, other = (server.as_key(key_of("annotate", name)) for name in ("owner", "other"))
    assert owner.segment({"images": image[None]}, bank=bank).status_code == 200
    held, unknown = image_digest(image), "sha256:" + "0" * 64
    as_ids = {i: other.segment({}, bank=bank, image_ids=f'["{i}"]') for i in (held, unknown)}
    headers = {i: read_header(answer.content)[0]["__metadata__"] for i, answer in as_ids.items()}
    items = {i: json.loads(header["items"].replace(i, "ID")) for i, header in headers.items()}
    assert {answer.status_code for answer in as_ids.values()} == {200}
    assert items[held] == items[unknown]
    assert items[held][0]["error"]["code"] == "unknown_image"
    assert b"unknown_image" not in owner.segment({}, bank=bank, image_ids=f'["{held}"]').content


def test_features_of_others_candidates_are_unknown(server: Any, bank: str, key_of: Any, example: Any) -> None:
    owner, other = (server.as_key(key_of("annotate", name)) for name in ("owner", "other"))
    image, path = example(9)[0], f"/banks/{bank}/suggest"
    assert owner.send(path, encode({"images": image[None]}, {})).status_code == 200
    by_id = encode({}, {"image_ids": f'["{image_digest(image)}"]'})
    assert owner.send(path, by_id).json()["unknown"] == []
    assert other.send(path, by_id).json()["unknown"] == [image_digest(image)]


def test_one_candidate_many_times_costs_as_one(
    server: Any, bank: str, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, path = example(9)[0], f"/banks/{bank}/suggest"
    server.send(path, encode({"images": image[None]}, {}))
    rows: list[int] = []
    whole = ranking._nearest
    monkeypatch.setattr(
        ranking,
        "_nearest",
        lambda features, others: (rows.append(len(features)), whole(features, others))[1],
    )
    ids = ", ".join([f'"{image_digest(image)}"'] * 5000)
    answer = server.send(path, encode({}, {"image_ids": f"[{ids}]"}))
    assert answer.status_code == 200
    assert max(rows) == 1


def test_a_ranking_ends_when_its_caller_has_left() -> None:
    features = np.eye(8, dtype=np.float32)
    with pytest.raises(DeadlineExceeded, match="caller has left"):
        ranking.suggest(features, 2, stopped=lambda: True)
