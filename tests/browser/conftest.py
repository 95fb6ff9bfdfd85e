"""A real browser against the real service with the shipped nano weights: Debian's chromium, by Playwright."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

OPTIONS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running chromium; the tests are skipped where there is none."""
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("no chromium on this machine: `make test-browser` installs it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def console(start_annotator: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A service with the shipped weights, for the browser alone."""
    folder = tmp_path_factory.mktemp("console")
    (folder / "runs").mkdir()
    return start_annotator(folder, VESSA_WEIGHTS="nano", VESSA_RUNS_FOLDER=str(folder / "runs"))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom patients: five of three slices."""
    from vessa_server.pretraining.data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=5, slices=3, size=160, seed=0)
    return folder / "heart"


@contextlib.contextmanager
def watched(chromium: Any, url: str, size: tuple[int, int] = (1280, 860)) -> Iterator[Any]:
    """A page of a service; every error of the page and every request to elsewhere fails the test."""
    context = chromium.new_context(base_url=url, viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    elsewhere: list[str] = []
    page.on(
        "request",
        lambda request: (
            elsewhere.append(request.url) if not request.url.startswith((url, "data:", "blob:")) else None
        ),
    )
    page.problems = problems
    yield page
    context.close()
    assert elsewhere == []
    # The first request for a session is refused, before there is one.
    assert [p for p in problems if "401" not in p] == []


@pytest.fixture
def page(chromium: Any, console: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page that is signed in by a key."""
    with watched(chromium, console.url) as page:
        page.goto("/")
        page.get_by_label("Key").fill(console.api_key)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Annotate").wait_for()
        yield page
        if os.environ.get("VESSA_SCREENSHOTS"):
            path = Path(os.environ["VESSA_SCREENSHOTS"]) / f"end-{request.node.name}.png"
            page.screenshot(path=path, full_page=True)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until a service answers its probe; fail when it ends before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the service ended with status {process.returncode}"
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url):
            return
        time.sleep(0.2)
    pytest.fail(f"{url} did not answer 200 within {seconds:g} s")


@pytest.fixture
def first_visit(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """A page on the one-time link that an empty service prints in a terminal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {
        "VESSA_WEIGHTS": "nano",
        "VESSA_STORE": f"folder:{tmp_path / 'banks'}",
        "VESSA_PORT": str(port),
        "VESSA_DEVICE": "cpu",
        "VESSA_THREADS": "1",
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "TERM": "dumb",
    }
    ours, theirs = pty.openpty()
    log = (tmp_path / "log").open("wb")
    command = [sys.executable, "-m", "vessa_server", "serve"]
    environment = {k: v for k, v in os.environ.items() if k != "VESSA_API_KEY"} | settings
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=log)
    os.close(theirs)
    try:
        text = b""
        while not (link := re.search(rb"Console: (\S+#link=\S+)", text)):
            text += os.read(ours, 4096)  # raises OSError when the process ends
        wait_until_ready(f"http://127.0.0.1:{port}/readyz", process)
        with watched(chromium, f"http://127.0.0.1:{port}") as page:
            page.goto(link[1].decode())
            yield page
    finally:
        process.terminate()
        process.wait()
        os.close(ours)
        log.close()


@pytest.fixture
def shot(request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Keep a screenshot in the folder that VESSA_SCREENSHOTS names: `shot(page, name)`.

    whole: the whole page instead of what fits the window; top: scroll to the top before
    """
    folder = os.environ.get("VESSA_SCREENSHOTS")

    def take(page: Any, name: str, whole: bool = True, top: bool = True) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if top:
                page.evaluate("() => scrollTo(0, 0)")  # the header sticks to where the page is
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)

    return take


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, Any]]:
    """Figures of the session; printed as the last line's JSON by `make test-browser`."""
    found: dict[str, Any] = {}
    yield found
    out = os.environ.get("VESSA_BROWSER_FIGURES")
    if out:
        Path(out).write_text(json.dumps(found))
