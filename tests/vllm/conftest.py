"""Start a real vLLM on the CPU with the shipped nano weights; skip without its environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from vessa_server.model.language.remote import LanguageService, VllmAddress, serve_command
from vessa_server.model.weights import directory

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(os.environ.get("VLLM_ENV") or ROOT / ".venv-vllm")
KEY = "a-key-of-the-real-vllm"
# On a CPU: no compiling, and blocks so small that a template fills one (a GPU's are of 16 tokens).
ON_CPU = ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(64 << 20)]


FIGURES: dict[str, Any] = {}


def pytest_unconfigure() -> None:
    """Print the figures as one JSON line at the end."""
    if FIGURES:
        print(json.dumps(FIGURES))


@pytest.fixture
def figures() -> dict[str, Any]:
    """The figures of the last line."""
    return FIGURES


class Vllm:
    """A vLLM that starts, stops and restarts on one port."""

    def __init__(self, port: int, log: Path) -> None:
        self.key, self.port, self.log, self.url = KEY, port, log, f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 500) -> None:
        """Start vLLM and wait until it answers; fail with its log otherwise."""
        language = directory.find("nano") / "language"
        command = [*serve_command(language, "float32"), "--host", "127.0.0.1", "--port", str(self.port)]
        command[0] = str(ENVIRONMENT / "bin" / "vllm")
        own = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_API_KEY": KEY, "HF_HUB_OFFLINE": "1"}
        own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *ON_CPU], env=os.environ | own, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        self.stop(9)
        pytest.fail(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self, signal: int = 15) -> None:
        """Stop vLLM and the processes that it started."""
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal)
        self.process.wait(60)

    def metric(self, name: str) -> float:
        """Return the sum of one of vLLM's counters."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name)


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """The running vLLM."""
    if not (ENVIRONMENT / "bin" / "vllm").exists():
        pytest.skip("no environment of vLLM: `make test-vllm` makes it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Vllm(port, tmp_path_factory.mktemp("vllm") / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def connect(vllm: Vllm) -> Iterator[Callable[..., LanguageService]]:
    """Return a function that opens a client: `connect(weights, key=...)`."""
    services: list[LanguageService] = []

    def make(weights: Any = "nano", key: str = KEY) -> LanguageService:
        folder = directory.find(weights)
        expected = directory.manifest(folder)["language_state"]
        services.append(LanguageService(VllmAddress(vllm.url, key), folder / "language", 128, expected))
        services[-1].connect()
        return services[-1]

    yield make
    for service in services:
        service.close()
