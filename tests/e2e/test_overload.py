"""Overload the service: slow bodies, full queues, and callers that retry until all is done."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from vessa.client import AnnotatorClient
from vessa.codec import MEDIA_TYPE

PLACES = 2


@pytest.fixture(scope="module")
def narrow(start_annotator: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An annotator with slots for two requests; each must send its body within a second."""
    folder = tmp_path_factory.mktemp("narrow")
    return start_annotator(folder, VESSA_MAX_REQUESTS=str(PLACES), VESSA_BODY_TIMEOUT_S="1")


def connect(service: Any) -> socket.socket:
    """Start a POST /segment that announces 1000 bytes and sends ten."""
    host, port = service.url.removeprefix("http://").split(":")
    lines = ("POST /segment HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {service.api_key}",
             f"Content-Type: {MEDIA_TYPE}", "Content-Length: 1000", "", "0123456789")  # fmt: skip
    slow = socket.create_connection((host, int(port)), timeout=20)
    slow.sendall("\r\n".join(lines).encode())
    return slow


def read(connection: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return status, headers and error of an answer."""
    data = b""
    while b"}}" not in data:
        part = connection.recv(1 << 16)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body)["error"]


def test_a_slow_body_is_given_up_and_its_place_is_free_again(narrow: Any) -> None:
    for _ in range(PLACES + 1):  # one after another: a place that stayed taken would end this early
        with connect(narrow) as slow:
            status, _, error = read(slow)
        assert (status, error["code"]) == (400, "malformed_body")
        assert (
            error["message"] == "The body did not arrive within 1 s: 10 bytes came. Send it faster, or less."
        )


def test_one_key_holds_a_share_of_the_places_and_is_told_when_to_retry(narrow: Any) -> None:
    slow = [connect(narrow) for _ in range(PLACES + 1)]
    answers = [read(connection) for connection in slow]
    for connection in slow:
        connection.close()
    assert sorted(status for status, _, _ in answers) == [400, 429, 429]
    for _, headers, error in (answer for answer in answers if answer[0] == 429):
        assert error["code"] == "limit_reached"
        assert "already has 1 requests in progress, its limit" in error["message"]
        assert int(headers["retry-after"]) >= 1


def test_three_times_the_capacity_loses_and_doubles_nothing(narrow: Any) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((32, 40), np.uint8)
    mask[8:20, 10:26] = 1
    images = [rng.integers(0, 90, mask.shape, dtype=np.uint8) + mask * 120 for _ in range(3 * PLACES)]
    with AnnotatorClient(narrow.url, narrow.api_key, attempts=20) as client:
        groups = [f"p{i}" for i in range(2)]
        client.add_templates("b", images[:2], [mask] * 2, {1: "square"}, groups)
        expected = [client.segment([image], bank="b")[0].labels for image in images]
        with ThreadPoolExecutor(3 * PLACES) as pool:
            found = list(pool.map(lambda image: client.segment([image], bank="b")[0].labels, images))
            masks = [mask] * len(images)
            adders = [
                pool.submit(client.add_templates, "b", images, masks, {1: "square"}, groups * PLACES + groups)
                for _ in range(3)
            ]
            created = [info.created for adder in adders for info in adder.result()]
        for one, other in zip(expected, found, strict=True):
            assert (one != other).mean() < 1e-3
        # The same six are added by three callers at once, and two of them are there already.
        assert sum(created) == len(images) - 2
        assert client.bank("b").templates == len(images)
