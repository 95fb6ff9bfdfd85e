"""Share the real app with untrained nano weights and small annotated examples."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

from vessa.codec import MEDIA_TYPE, encode
from vessa_server.app import create_app
from vessa_server.auth.keys import Keys, Role, create_key
from vessa_server.serving.worker import load
from vessa_server.settings import Settings
from vessa_server.template_bank.template import Template, View, template_id

KEY = "a-key-for-tests-0123456789"
CLASSES = {1: "ventricle", 2: "wall"}


def draw_example(
    seed: int = 0, size: tuple[int, int] = (48, 64)
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A gray image with a bright disk (class 1) in a gray ring (class 2), and its mask, both (H, W) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    cy, cx = size[0] / 2 + rng.integers(-4, 5), size[1] / 2 + rng.integers(-6, 7)
    radius = np.hypot(y - cy, x - cx)
    mask = np.where(radius < 7, 1, np.where(radius < 12, 2, 0)).astype(np.uint8)
    image = np.array([40, 220, 120])[mask] + rng.normal(0, 6, size)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def as_file(array: NDArray[Any], kind: str = "PNG") -> bytes:
    """Encode an array as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def make_template(seed: int = 0, group: str = "p1", model: str = "m", **changes: Any) -> Template:
    """A template with features drawn at random, without a network."""
    rng = np.random.default_rng(seed)
    image, mask = draw_example(seed)
    classes = changes.pop("classes", CLASSES)
    mask[~np.isin(mask, list(classes))] = 0
    feature = changes.pop("feature", rng.normal(size=8).astype(np.float32))
    given: dict[str, Any] = {
        "id": template_id(image, mask, classes, group),
        "group": group,
        "classes": classes,
        "image": image,
        "mask": mask,
        "whole": View(
            feature / np.linalg.norm(feature),
            {key: rng.normal(size=(4, 3)).astype(np.float16) for key in classes},
        ),
        "model": model,
    }
    return Template(**{**given, **changes})


@dataclass
class Server:
    """The app under test and short ways to use it. It presents the key unless told otherwise."""

    http: TestClient
    settings: Settings
    app: Any = field(repr=False, default=None)

    def segment(self, tensors: Mapping[str, NDArray[Any]], **metadata: str) -> Any:
        """POST a safetensors body to /segment."""
        return self.send("/segment", encode(dict(tensors), metadata))

    def send(self, path: str, body: Any, **headers: str) -> Any:
        """POST bytes (or chunks) as safetensors."""
        return self.http.post(path, content=body, headers={"Content-Type": MEDIA_TYPE, **headers})

    def as_key(self, key: str) -> Server:
        """The same app for another key's holder."""
        http = TestClient(self.app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {key}"})
        return Server(http, self.settings, self.app)

    def seed(self, bank: str, count: int = 2) -> list[dict[str, Any]]:
        """Add `count` examples, each of a group of its own: p0, p1, ..."""
        response = self.seed_answer(bank, count)
        assert response.status_code == 201, response.text
        return response.json()["templates"]

    def seed_answer(self, bank: str, count: int = 2) -> Any:
        """What the service answers to them."""
        images, masks = zip(*(draw_example(i) for i in range(count)), strict=True)
        names = json.dumps({str(key): name for key, name in CLASSES.items()})
        groups = json.dumps([f"p{i}" for i in range(count)])
        body = encode(
            {"images": np.stack(images), "masks": np.stack(masks)},
            {"bank": bank, "classes": names, "groups": groups},
        )
        return self.send("/templates", body)


@pytest.fixture
def server_of() -> Iterator[Callable[..., Server]]:
    """Make servers from settings; wait until they are ready unless told otherwise."""
    opened: list[TestClient] = []

    def make(settings: Settings, *, wait: bool = True, **options: Any) -> Server:
        app = create_app(settings, **({"worker_factory": load} | options))
        # A failure must come back as the answer a caller would see, not as the exception.
        http = TestClient(
            app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {settings.key}"}
        )
        http.__enter__()
        opened.append(http)
        if wait:
            wait_ready(http)
        return Server(http, settings, app)

    yield make
    for http in opened:
        http.__exit__(None, None, None)


@pytest.fixture
def viewers_of(server_of: Callable[..., Server], nano_weights: Path, tmp_path: Path) -> Callable[..., Server]:
    """Serve a viewers' protocol, with a bank of three examples: `viewers_of(protocol, **settings)`."""

    def make(protocol: str, **settings: Any) -> Server:
        given: dict[str, Any] = {"api_key": KEY, "weights": str(nano_weights), "device": "cpu"}
        places = {"store": f"folder:{tmp_path / 'banks'}", "keys_file": tmp_path / "keys.jsonl"}
        server = server_of(Settings(serve_viewers=protocol, **given, **places, **settings))
        server.seed("bank", 3)
        return server

    return make


@pytest.fixture
def annotator_of(nano_weights: Path, tmp_path: Path, example: Any) -> Callable[[list[str]], Any]:
    """Make an annotator of untrained weights whose `bank` has an example of each named patient."""
    from vessa_server.inference.annotator import Annotator
    from vessa_server.model.weights import directory
    from vessa_server.template_bank.bank import TemplateBanks
    from vessa_server.template_bank.folder_store import FolderStore
    from vessa_server.types import TemplateItem

    def make(patients: list[str]) -> Annotator:
        model, digest = directory.read(nano_weights)
        annotator = Annotator(model, TemplateBanks(FolderStore(tmp_path)), 1 << 28, digest)
        classes = {1: "disk", 2: "ring"}
        items = [TemplateItem(*example(seed), classes, name) for seed, name in enumerate(patients)]
        annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
        return annotator

    return make


@pytest.fixture(scope="session")
def server(nano_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One ready app for all tests that only need banks of their own."""
    folder = tmp_path_factory.mktemp("banks")
    store, keys = f"folder:{folder}", tmp_path_factory.mktemp("keys") / "keys.jsonl"
    settings = Settings(api_key=KEY, weights=str(nano_weights), device="cpu", store=store, keys_file=keys)
    app = create_app(settings, load)
    with TestClient(app, raise_server_exceptions=False, headers={"Authorization": f"Bearer {KEY}"}) as http:
        wait_ready(http)
        yield Server(http, settings, app)


@pytest.fixture
def key_of(server: Server) -> Iterator[Callable[..., str]]:
    """Make keys of the shared server: `key_of(role, name, **limits)`; revoked after the test."""
    keys: Keys = server.app.state.access.keys
    made: list[str] = []

    def make(role: str, name: str | None = None, **limits: int) -> str:
        name = name or role
        if name in made:
            keys.remove(name)
        made.append(name)
        return create_key(keys, name, Role[role], **limits)

    yield make
    for name in made:
        keys.remove(name)


def wait_ready(http: TestClient, seconds: float = 60) -> None:
    """Wait until /readyz answers 200."""
    deadline = time.monotonic() + seconds
    while (answer := http.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.05)


@pytest.fixture
def bank(request: pytest.FixtureRequest) -> str:
    """A bank name of this test's own."""
    return "b" + "".join(c for c in request.node.name if c.isalnum())[:60]


@pytest.fixture
def template_of() -> Callable[..., Template]:
    """Make templates without a network: `template_of(seed, group=..., model=..., **changes)`."""
    return make_template


@pytest.fixture(scope="session")
def example() -> Callable[..., tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Draw an image and its mask: `example(seed, size)`."""
    return draw_example


@pytest.fixture
def file_of() -> Callable[..., bytes]:
    """Encode an array as an image file: `file_of(array, kind)`."""
    return as_file
