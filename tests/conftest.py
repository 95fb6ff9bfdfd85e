"""Fixtures for all tests: nano weights of a fixed seed, a real Redis, a running annotator.

Tests marked `gpu` are skipped without a CUDA device. Processes end with the test run, also when it
is interrupted or killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import proving
import pytest
from processes import bound

SERVE = ("-m", "vessa_server", "serve")


def pytest_configure() -> None:
    """Interrupt the tests on SIGINT and SIGTERM, so that fixtures end what they started.

    A shell lets its background jobs ignore SIGINT, and SIGTERM would end Python without any clean-up.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_levels() -> None:
    """Begin with the usual levels, whatever an earlier test left, and without httpx's line per request."""
    logging.getLogger().setLevel(logging.WARNING)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def end(process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """End a process: SIGTERM, and SIGKILL when it does not end within `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the `gpu` tests without a GPU; torch is imported only for such a test."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def free_port() -> int:
    """Return a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def nano_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights directory of an untrained nano annotator, the same in every run."""
    import torch

    from vessa_server.model.presets import PRESETS
    from vessa_server.model.vessa import Vessa
    from vessa_server.model.weights import directory

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "nano"
    directory.write(Vessa(PRESETS["nano"]).eval(), folder, {"command": "none: untrained, for tests"})
    return folder


def run_redis(folder: Path, port: int, *options: str) -> subprocess.Popen[bytes]:
    """Start a separate Redis on a loopback port and wait until it listens."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.fail(
            "no redis-server on this machine: `make test` installs it, or `apt-get install redis-server`"
        )
    place = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    server = subprocess.Popen(bound([binary, *place, *options]), stdout=subprocess.DEVNULL)
    wait_for_port(port, server)
    return server


@pytest.fixture(scope="session")
def start_redis() -> Callable[..., subprocess.Popen[bytes]]:
    """Return a function that starts a Redis: `start_redis(folder, port, *options)`. The caller ends it."""
    return run_redis


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real Redis of this test session."""
    port = free_port()
    server = run_redis(tmp_path_factory.mktemp("redis"), port)
    yield f"redis://127.0.0.1:{port}/0"
    end(server)


@pytest.fixture
def port() -> int:
    """A free port on loopback."""
    return free_port()


@pytest.fixture
def png_of_size() -> Callable[[int, int], bytes]:
    """Return a function that makes a small PNG file with a claimed size: `png_of_size(height, width)`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def make(height: int, width: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        return (
            b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        )

    return make


@dataclass(frozen=True)
class Service:
    """A running annotator with its address, its banks and its log."""

    url: str
    api_key: str
    process: subprocess.Popen[bytes]
    folder: Path


@pytest.fixture(scope="session")
def start_annotator(nano_weights: Path) -> Iterator[Callable[..., Service]]:
    """Return a function that serves untrained weights: `start_annotator(folder, **settings)`.

    Each in a process of its own, with a key, ended with the test session; a second one on the same folder
    has the banks of the first.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, program: Sequence[str] = SERVE, **settings: str) -> Service:
        port = int(settings.get("VESSA_PORT", free_port()))
        key = "a-key-for-tests-0123456789"
        settings = {
            "VESSA_API_KEY": key,
            "VESSA_WEIGHTS": str(nano_weights),
            "VESSA_STORE": f"folder:{folder / 'banks'}",
            "VESSA_PORT": str(port),
            "VESSA_DEVICE": "cpu",
            "VESSA_THREADS": "1",  # more would only wait for each other on a small machine
            "XDG_CONFIG_HOME": str(folder),
            "XDG_DATA_HOME": str(folder),  # jobs lie there, and those of whoever runs this stay untouched
        } | settings
        command = bound([sys.executable, *program])
        with (folder / "log").open("a") as log:
            process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, folder / "log")
        return Service(url, key, process, folder)

    yield start
    for process in started:
        process.terminate()
    for process in started:
        end(process)


@pytest.fixture(scope="session")
def annotator(start_annotator: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A running annotator for all tests that only need separate banks."""
    return start_annotator(tmp_path_factory.mktemp("annotator"))


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Wait until a process listens on a loopback port; fail when it ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the process ended with status {process.returncode} before it listened")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"nothing listens on port {port} after {seconds} s")


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 240) -> None:
    """Wait until the service is ready; fail with its log otherwise."""
    import httpx

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    process.kill()
    pytest.fail(f"the annotator did not become ready:\n{log.read_text()[-3000:]}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Return the counts of a pytest-xdist worker."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["tried"] = dict(proving.tried)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the counts of a worker; a dead worker has none."""
    proving.tried.update(getattr(node, "workeroutput", {}).get("tried", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of inputs of the proving ground, for docs/explanation/reliability.md."""
    if proving.tried:
        counts = ", ".join(f"{what} {count}" for what, count in sorted(proving.tried.items()))
        terminalreporter.write_line(f"inputs tried: {proving.tried.total()} ({counts})")
    results = {
        name: len(terminalreporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")
    }
    proving.results.update(results)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the figures of `make proving` as its last line: one JSON object."""
    if "PROVING_JSON" in os.environ and not hasattr(config, "workerinput"):
        results = proving.results
        failed = results["failed"] + results["error"]
        figures = {"inputs": proving.tried.total(), "attacks": results["passed"] + failed, "failed": failed}
        print(
            json.dumps(
                {**figures, "skipped": results["skipped"], "by_kind": dict(sorted(proving.tried.items()))}
            )
        )
