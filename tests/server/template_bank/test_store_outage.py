"""A Redis that goes away while the service runs: clear errors until it is back, and nothing lost."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessa.errors import StoreUnavailable
from vessa_server.settings import Settings
from vessa_server.storage.redis_connection import check_redis
from vessa_server.template_bank.redis_store import RedisStore


class Redis:
    """A Redis on a fixed port that keeps its data on disk, to be stopped and started again."""

    def __init__(self, folder: Path, port: int, run: Callable[..., subprocess.Popen[bytes]]) -> None:
        self.folder, self.port, self._run = folder, port, run
        self.url = f"redis://127.0.0.1:{port}/0"
        self.start()

    def start(self) -> None:
        kept = ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = self._run(self.folder, self.port, *kept)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def redis(tmp_path: Path, port: int, start_redis: Any) -> Iterator[Redis]:
    """A running Redis of this test's own."""
    one = Redis(tmp_path, port, start_redis)
    yield one
    one.kill()


@pytest.fixture
def served(server_of: Any, redis: Redis, nano_weights: Path) -> Any:
    """A server whose banks are in that Redis."""
    return server_of(Settings(api_key="k" * 20, weights=str(nano_weights), device="cpu", store=redis.url))


def unavailable(answer: Any) -> None:
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "store_unavailable"
    assert "Redis" in error["message"]
    assert int(answer.headers["Retry-After"]) > 0
    assert "127.0.0.1" not in answer.text


def test_a_redis_that_went_away_is_503_and_comes_back(
    served: Any, redis: Redis, example: Any, file_of: Any
) -> None:
    image, mask = example(7)
    query = {"images": image[None]}
    served.seed("b", 2)
    before = served.http.get("/banks/b").json()
    assert served.segment(query, bank="b").status_code == 200

    redis.kill()
    form = {"files": {"image": ("i", file_of(image)), "mask": ("m", file_of(mask))}}
    text = {"bank": "b", "group": "p9", "classes": '{"1": "ventricle", "2": "wall"}'}
    started = time.monotonic()
    for answer in (
        served.http.get("/banks"),
        served.http.get("/info"),
        served.http.get("/banks/b"),
        served.http.get("/templates", params={"bank": "b"}),
        served.http.delete("/banks/b"),
        served.http.post("/templates", **form, data=text),
        served.segment(query, bank="b"),
        served.http.post("/segment", files={"image": ("i", file_of(image))}, data={"bank": "b"}),
    ):
        unavailable(answer)
    assert time.monotonic() - started < 20
    assert served.http.get("/livez").status_code == 200
    assert served.http.get("/metrics").status_code == 200

    redis.start()
    assert served.http.get("/banks/b").json() == before
    assert served.segment(query, bank="b").status_code == 200
    assert served.http.post("/templates", **form, data=text).status_code == 201
    assert served.http.get("/banks/b").json()["templates"] == 3


def test_a_redis_that_goes_away_during_a_batch_fails_its_items_with_the_same_code(
    served: Any, redis: Redis, example: Any
) -> None:
    """The body was read while Redis lived; the worker meets the outage."""
    served.seed("b", 2)
    worker = served.app.state.service.engine().worker
    original = worker.segment

    def kill_first(items: Any) -> Any:
        redis.kill()
        return original(items)

    worker.segment = kill_first
    try:
        answer = served.segment({"images": np.stack([example(i)[0] for i in range(2)])}, bank="b")
    finally:
        worker.segment = original
    assert answer.status_code == 200
    assert answer.content.count(b"store_unavailable") == 2
    redis.start()
    assert served.segment({"images": example(0)[0][None]}, bank="b").status_code == 200


def test_a_service_waits_at_its_start_for_a_redis_that_is_late(
    server_of: Any, redis: Redis, nano_weights: Path
) -> None:
    redis.kill()
    settings = Settings(api_key="k" * 20, weights=str(nano_weights), device="cpu", store=redis.url)
    server = server_of(settings, wait=False)
    answer = server.http.get("/readyz")
    deadline = time.monotonic() + 20
    while "The template store (Redis) does not answer" not in answer.text:
        assert answer.status_code == 503
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
        answer = server.http.get("/readyz")
    redis.start()
    while server.http.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline + 30
        time.sleep(0.1)
    assert server.http.get("/banks").json() == []


def test_a_redis_that_hangs_is_given_up(redis: Redis) -> None:
    store = RedisStore(redis.url, timeout=0.3)
    assert store.names() == []
    redis.process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.names()
    assert time.monotonic() - started < 10
    redis.process.send_signal(signal.SIGCONT)
    assert store.names() == []


def test_a_redis_that_takes_no_more_says_so_and_keeps_what_it_has(
    served: Any, redis: Redis, example: Any, file_of: Any
) -> None:
    served.seed("b", 1)
    before = served.http.get("/banks/b").json()
    store = served.app.state.service.engine().banks.store
    store._redis.config_set("maxmemory", "1kb")
    image, mask = example(7)
    answer = served.http.post(
        "/templates",
        files={"image": ("i", file_of(image)), "mask": ("m", file_of(mask))},
        data={"bank": "b", "group": "p9", "classes": '{"1": "ventricle", "2": "wall"}'},
    )
    unavailable(answer)
    assert served.http.get("/banks/b").json() == before
    assert served.http.delete("/banks/b").status_code == 204  # a full Redis still deletes
    assert served.http.get("/banks/b").status_code == 404
    assert store._redis.exists("vessa:blobs:{b}") == 0
    store._redis.config_set("maxmemory", "0")


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_a_redis_that_evicts_banks_is_refused(redis: Redis, policy: str) -> None:
    client = RedisStore(redis.url)._redis
    client.config_set("maxmemory-policy", policy)
    with pytest.raises(StoreUnavailable, match=f"maxmemory-policy {policy}.*noeviction"):
        check_redis(redis.url)
    client.config_set("maxmemory-policy", "volatile-lru")
    assert check_redis(redis.url) == []
    client.config_set("appendfsync", "no")
    assert "appendfsync no" in check_redis(redis.url)[0]
    client.config_set("appendonly", "no")
    assert "appendonly" in check_redis(redis.url)[0]
    client.replicaof("127.0.0.1", 1)  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="replica"):
        check_redis(redis.url)


def test_readyz_names_a_redis_that_evicts_or_hangs(served: Any, redis: Redis) -> None:
    client = served.app.state.service.engine().banks.store._redis
    client.config_set("maxmemory-policy", "allkeys-lru")
    answer = served.http.get("/readyz")
    assert (answer.status_code, "allkeys-lru" in answer.text) == (503, True)
    client.config_set("maxmemory-policy", "noeviction")
    assert served.http.get("/readyz").status_code == 200
    redis.process.send_signal(signal.SIGSTOP)
    try:
        assert served.http.get("/readyz").status_code == 503
    finally:
        redis.process.send_signal(signal.SIGCONT)
