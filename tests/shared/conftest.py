"""Fixtures of the client's tests: responses without an annotator, and both clients behind one call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import stamina

from vessa.client import AnnotatorClient, AsyncAnnotatorClient
from vessa.codec import MEDIA_TYPE, encode

KEY = "a-key-for-tests-0123456789"
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def _no_waits() -> Iterator[None]:
    """Retry without waiting; tests of the waiting time turn this off."""
    with stamina.set_testing(True, attempts=10, cap=True):
        yield


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a method of the sync and of the async client: `call(url, settings, method, *arguments)`."""

    def make(url: str, settings: dict[str, Any], method: str, *arguments: Any, **options: Any) -> Any:
        if request.param == "sync":
            with AnnotatorClient(url, KEY, **settings) as one:
                return getattr(one, method)(*arguments, **options)

        async def run() -> Any:
            async with AsyncAnnotatorClient(url, KEY, **settings) as one:
                return await getattr(one, method)(*arguments, **options)

        return asyncio.run(run())

    return make


@pytest.fixture
def ask(call: Callable[..., Any]) -> Callable[..., Any]:
    """Call a method without a service: `ask(handler, method, *arguments)`.

    handler: returns the responses in place of the network; client: options of the client
    """

    def make(
        handler: Handler, method: str, *arguments: Any, client: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        settings = {"transport": httpx.MockTransport(handler), **(client or {})}
        return call("http://annotator", settings, method, *arguments, **options)

    return make


@pytest.fixture
def ask_annotator(call: Callable[..., Any], annotator: Any) -> Callable[..., Any]:
    """Call a method of a client of the running annotator: `ask_annotator(method, *arguments)`."""
    assert annotator.api_key == KEY
    return partial(call, annotator.url, {})


def read_request(request: httpx.Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a body and its metadata, JSON entries parsed."""
    body = request.content
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    metadata = header.get("__metadata__", {})
    for name in ("classes", "groups", "image_ids"):
        if name in metadata:
            metadata[name] = json.loads(metadata[name])
    return safetensors.numpy.load(body), metadata


def segment_answer(request: httpx.Request, **changes: Any) -> httpx.Response:
    """Answer POST /segment: each label map has the value of its image's first pixel; None omits a part."""
    tensors, metadata = read_request(request)
    images = tensors.get("images")
    count = len(images) if images is not None else len(metadata["image_ids"])
    size = images.shape[1:3] if images is not None else (2, 3)
    labels = np.zeros((count, *size), np.uint8)
    if images is not None:
        labels += images.reshape(count, -1)[:, :1, None]
    items = [{"status": "ok", "image_id": f"sha256:{i}", "scores": {"liver": 0.5}} for i in range(count)]
    parts = {"labels": labels, "confidence": np.full_like(labels, 200)}
    if metadata.get("probabilities"):
        parts["probabilities"] = np.zeros((count, 2, *size), np.float16)
    about = {
        "items": json.dumps(changes.pop("items", items)),
        "classes": '{"1": "liver"}',
        "model": "m",
        "bank_version": "3",
        "bank_digest": "d" * 64,
        "labels_version": "1",
    }
    for name, value in changes.items():
        target: dict[str, Any] = about if name in about else parts
        target[name] = value
    parts = {name: value for name, value in parts.items() if value is not None}
    about = {name: value for name, value in about.items() if value is not None}
    return httpx.Response(200, content=encode(parts, about), headers={"Content-Type": MEDIA_TYPE})


@pytest.fixture
def segmented() -> Callable[..., httpx.Response]:
    """Answer POST /segment as the annotator does: `segmented(request, **changes)`."""
    return segment_answer


@pytest.fixture
def sent() -> Callable[[httpx.Request], tuple[dict[str, Any], dict[str, Any]]]:
    """Read a request's tensors and metadata."""
    return read_request
