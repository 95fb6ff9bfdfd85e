"""Kill clients and the annotator's process: other clients and stored data stay intact."""

from __future__ import annotations

import itertools
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from vessa.client import AnnotatorClient
from vessa.codec import MEDIA_TYPE, encode
from vessa.errors import NotReady, Unreachable

CLASSES = {1: "disk"}


def example(seed: int) -> tuple[Any, Any]:
    """Return a gray image with one bright disk and its mask, both uint8 (48, 64); all seeds differ."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64]
    mask = (np.hypot(y - rng.integers(16, 32), x - rng.integers(16, 48)) < 9).astype(np.uint8)
    return np.clip(mask * 150.0 + 50 + rng.normal(0, 8, mask.shape), 0, 255).astype(np.uint8), mask


def client_of(service: Any, **options: Any) -> AnnotatorClient:
    return AnnotatorClient(service.url, service.api_key, **options)


def add(client: AnnotatorClient, bank: str, seed: int) -> str:
    image, mask = example(seed)
    return client.add_templates(bank, [image], [mask], CLASSES, [f"p{seed}"])[0].id


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(service: Any) -> str:
    headers = {"Authorization": f"Bearer {service.api_key}"}
    return httpx.get(f"{service.url}/metrics", headers=headers).text


def test_a_kill_amid_requests_loses_nothing_that_was_acknowledged(
    start_annotator: Any, tmp_path: Path
) -> None:
    service = start_annotator(tmp_path)
    query = example(1000)[0]
    added: list[str] = []
    answers: list[Any] = []
    lost = threading.Barrier(4)  # three workers and this test: all have met the dead service

    def until_lost(work: Callable[[AnnotatorClient, int], None], start: int) -> None:
        with client_of(service, attempts=1) as client:
            for i in itertools.count(start):
                try:
                    work(client, i)
                except Unreachable:
                    break
        lost.wait(30)

    def add_one(client: AnnotatorClient, i: int) -> None:
        added.append(add(client, "b", i))

    def segment_one(client: AnnotatorClient, i: int) -> None:
        answers.append(client.segment([example(i)[0]] * 4, bank="b"))

    with client_of(service) as client:
        added.append(add(client, "b", 0))
        before = client.segment([query], bank="b")[0]
    jobs = [(add_one, 1), (segment_one, 2000), (segment_one, 3000)]
    threads = [threading.Thread(target=until_lost, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(added) >= 4 and len(answers) >= 4)
    service.process.send_signal(signal.SIGKILL)
    lost.wait(30)
    for thread in threads:
        thread.join()
    service.process.wait(10)

    again = start_annotator(tmp_path)
    with client_of(again) as client:
        kept = client.templates("b")
        assert [t.id for t in kept][: len(added)] == added
        assert len(kept) - len(added) in {0, 1}  # one may have been stored and not yet answered
        assert client.bank("b").version == len(kept)
        after = client.segment([query], bank="b", classes=["disk"])[0]
        assert after.error is None
        assert after.model == before.model
        add(client, "b", 5000)  # the dead writer's lock is free
        assert client.bank("b").templates == len(kept) + 1


def post(service: Any, body: bytes) -> bytes:
    """Return a request as bytes on the wire."""
    host = service.url.removeprefix("http://")
    lines = ("POST /segment HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {service.api_key}",
             f"Content-Type: {MEDIA_TYPE}", f"Content-Length: {len(body)}", "", "")  # fmt: skip
    return "\r\n".join(lines).encode() + body


def test_clients_that_leave_disturb_no_others(annotator: Any) -> None:
    """More clients than the service has request slots leave before, in and after the body."""
    with client_of(annotator, attempts=1) as client:
        add(client, "leavers", 0)
        query = example(1)[0]
        expected = client.segment([query], bank="leavers")[0].labels
        images = np.stack([example(100 + i)[0] for i in range(16)])
        whole = post(annotator, encode({"images": images}, {"bank": "leavers"}))
        host, port = annotator.url.removeprefix("http://").split(":")
        for i in range(48):
            with socket.create_connection((host, int(port)), timeout=10) as leaver:
                leaver.sendall(whole[: (200, len(whole) // 2, len(whole))[i % 3]])
            if i % 8 == 0:
                assert np.array_equal(client.segment([query], bank="leavers")[0].labels, expected)

        def metric(pattern: str) -> float:
            found = re.findall(rf"^{pattern} (\S+)$", metrics(annotator), re.MULTILINE)
            return sum(float(value) for value in found)

        wait_until(lambda: metric("vessa_queue_depth") == 0)
        wait_until(lambda: metric(r'vessa_requests_total{code="499",method="POST",route="/segment"}') >= 30)
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda _: client.segment([query], bank="leavers")[0].labels, range(16)))
        assert all(np.array_equal(labels, expected) for labels in found)
        assert client.ready()


def test_a_body_that_ends_early_is_no_request(annotator: Any) -> None:
    with client_of(annotator) as client:
        add(client, "early", 0)
        before = client.bank("early")
        host, port = annotator.url.removeprefix("http://").split(":")
        body = encode({"images": example(1)[0][None]}, {"bank": "early"})
        with socket.create_connection((host, int(port)), timeout=10) as half:
            half.sendall(post(annotator, body)[:-10])
            half.shutdown(socket.SHUT_WR)
            assert b"200 OK" not in half.recv(1 << 16)
        assert client.bank("early") == before


def test_sigterm_finishes_the_requests_in_work_and_takes_no_more(
    start_annotator: Any, tmp_path: Path
) -> None:
    service = start_annotator(tmp_path)
    with client_of(service, attempts=1) as client, ThreadPoolExecutor(4) as pool:
        add(client, "b", 0)
        batches = [[example(100 * k + i)[0] for i in range(24)] for k in range(1, 5)]
        waiting = [pool.submit(client.segment, batch, bank="b") for batch in batches]
        wait_until(lambda: "vessa_queue_depth 0" not in metrics(service))
        assert not all(one.done() for one in waiting)
        service.process.send_signal(signal.SIGTERM)
        for batch, one in zip(batches, waiting, strict=True):
            answers = one.result(60)
            assert [a.error for a in answers] == [None] * len(batch)
        assert service.process.wait(30) in {0, -signal.SIGTERM}
        with pytest.raises((Unreachable, NotReady)):
            client.banks()
    log = (service.folder / "log").read_text()
    assert "Traceback" not in log
