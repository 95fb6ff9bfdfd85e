"""Start services of a benchmark, each in a process group that ends with the block."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from processes import bound

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    """Return whether an address answers 200."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def family(pid: int) -> list[int]:
    """Return a process and all that it has started and that runs, as Linux tells."""
    children = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(one for some in children for child in some for one in family(int(child)))]


@contextmanager
def running(
    command: list[str], log: Path, ready: Callable[[], bool], **settings: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a service, and what it starts itself, until the end of the block."""
    with log.open("w") as file:
        process = subprocess.Popen(
            bound(command),
            cwd=ROOT,
            env=os.environ | settings,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a server's workers may outlive it
        process.wait()


@contextmanager
def paused(*processes: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Stop services, and what they started, during the block: an idle one may look for work all the time."""
    for process in processes:
        os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGCONT)


@dataclass(frozen=True)
class Served:
    """A running annotator: its address, its key, its process."""

    url: str
    key: str
    process: "subprocess.Popen[bytes]"

    def __iter__(self) -> Iterator[str]:
        return iter((self.url, self.key))


@contextmanager
def annotator(folder: Path, name: str = "annotator", **settings: str) -> Iterator[Served]:
    """Run the service on a CPU, its banks in `folder / "banks"`; yields its address and its key."""
    port, key = free_port(), secrets.token_urlsafe(24)
    url = f"http://127.0.0.1:{port}"
    common = {
        "VESSA_API_KEY": key,
        "VESSA_PORT": str(port),
        "VESSA_STORE": f"folder:{folder / 'banks'}",
        "VESSA_DEVICE": "cpu",
        "XDG_CONFIG_HOME": str(folder / name),
    }
    command = [sys.executable, "-m", "vessa_server", "serve"]
    log = folder / f"{name}.log"
    with running(command, log, lambda: answers(f"{url}/readyz"), **(common | settings)) as process:
        yield Served(url, key, process)
