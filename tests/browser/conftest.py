"""A real browser against the real service with the shipped nano weights: Debian's chromium, by Playwright."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.fixture
def page(chromium: Any, console: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page that is signed in; every error of the page and every request to elsewhere fails the test."""
    context = chromium.new_context(base_url=console.url, viewport={"width": 1280, "height": 860})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    elsewhere: list[str] = []
    page.on(
        "request",
        lambda request: (
            elsewhere.append(request.url)
            if not request.url.startswith((console.url, "data:", "blob:"))
            else None
        ),
    )
    page.goto("/")
    page.get_by_label("Key").fill(console.api_key)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("link", name="Annotate").wait_for()
    page.problems = problems
    yield page
    if os.environ.get("VESSA_SCREENSHOTS"):
        page.screenshot(
            path=Path(os.environ["VESSA_SCREENSHOTS"]) / f"end-{request.node.name}.png", full_page=True
        )
    context.close()
    assert elsewhere == []
    expected = [p for p in problems if "401" in p]  # the first look for a session, before there is one
    assert [p for p in problems if p not in expected] == []


@pytest.fixture
def shot(request: pytest.FixtureRequest) -> Callable[[Any, str], None]:
    """Keep a screenshot in the folder that VESSA_SCREENSHOTS names: `shot(page, name)`."""
    folder = os.environ.get("VESSA_SCREENSHOTS")

    def take(page: Any, name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    return take


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, Any]]:
    """Figures of the session; printed as the last line's JSON by `make test-browser`."""
    found: dict[str, Any] = {}
    yield found
    out = os.environ.get("VESSA_BROWSER_FIGURES")
    if out:
        Path(out).write_text(json.dumps(found))
