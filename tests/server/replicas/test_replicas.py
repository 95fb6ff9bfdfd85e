"""Two replicas under a real Ray Serve on this machine (`make test-ray`), their banks in a real Redis."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig, VessaError
from vessa_server.cli.main import app

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray: `make test-ray`")
CLASSES = {1: "ventricle", 2: "wall"}
TWO = ("-m", "vessa_server", "ray", "--replicas", "2", "--cpus", "0.5")


def test_without_ray_the_command_says_what_brings_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["ray"])
    assert isinstance(result.exception, InvalidConfig)
    assert "vessa[ray]" in str(result.exception)


@needs_ray
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "VESSA_STORE=redis://"),
        (["--replicas", "3", "--max-replicas", "2"], "not 3 and 2"),
        (["--gpus", "1.5"], "not 1.5"),
        (["--gpus", "-1"], "not -1.0"),
    ],
)
def test_what_cannot_be_served_is_refused_before_ray_starts(options, told):
    result = CliRunner().invoke(app, ["ray", *options], env={"VESSA_STORE": "folder:/nowhere"})
    assert isinstance(result.exception, VessaError)
    assert told in str(result.exception)


@pytest.fixture(scope="module")
def service(start_annotator, redis_url, tmp_path_factory):
    return start_annotator(tmp_path_factory.mktemp("ray"), program=TWO, VESSA_STORE=redis_url)


def workers(service: Any) -> list[psutil.Process]:
    """The replicas' processes."""
    family = psutil.Process(service.process.pid).children(recursive=True)
    return [p for p in family if p.cmdline()[:1] == ["ray::ServeReplica:vessa:annotator"]]


def send(service: Any, example: Any, seed: int, bank: str = "shared") -> Any:
    """Segment one image over a connection of its own, so that any replica may get it."""
    with AnnotatorClient(service.url, service.api_key) as client:
        return client.segment([example(seed)[0]], bank=bank)[0]


@needs_ray
@pytest.mark.slow
def test_two_replicas_share_a_bank_and_a_killed_one_loses_no_request(service, example):
    assert httpx.get(f"{service.url}/info").status_code == 401
    for version in range(1, 6):
        with AnnotatorClient(service.url, service.api_key) as client:
            image, mask = example(version)
            client.add_templates("shared", [image], [mask], CLASSES, ["p1"])
        assert [send(service, example, 9).bank_version for _ in range(4)] == [version] * 4
    before = workers(service)
    assert len(before) == 2
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(send, service, example, 100 + i) for i in range(24)]
        while sum(answer.done() for answer in answers) < 6:
            time.sleep(0.01)
        os.kill(before[0].pid, signal.SIGKILL)
        assert [answer.result().error for answer in answers] == [None] * 24
    deadline = time.monotonic() + 120
    while len(there := workers(service)) != 2 or before[0] in there:
        assert time.monotonic() < deadline, "no replica took the place of the killed one"
        time.sleep(0.5)
