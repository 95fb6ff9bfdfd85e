"""Split large calls of both clients: in order, ids first, several requests at once."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from vessa.client import AnnotatorClient, AsyncAnnotatorClient
from vessa.client.types import Annotation
from vessa.codec import image_digest

COUNT = 34  # two requests


@pytest.fixture(scope="module")
def images() -> list[Any]:
    rng = np.random.default_rng(5)
    mask = np.zeros((32, 40), np.uint8)
    mask[8:20, 10:26] = 1
    return [rng.integers(0, 90, mask.shape, dtype=np.uint8) + mask * 120 for _ in range(COUNT)]


@pytest.fixture(scope="module")
def bank(annotator: Any, images: list[Any]) -> str:
    mask = np.zeros((32, 40), np.uint8)
    mask[8:20, 10:26] = 1
    with AnnotatorClient(annotator.url, annotator.api_key, timeout=280) as client:
        client.add_templates("large", images[:1], [mask], {1: "square"}, ["p"])
    return "large"


def both(annotator: Any, images: list[Any], **options: Any) -> list[list[Annotation]]:
    """Return the answers of the sync and the async client, asked at the same time."""

    async def ask() -> list[list[Annotation]]:
        with AnnotatorClient(annotator.url, annotator.api_key, timeout=280) as sync:
            async with AsyncAnnotatorClient(annotator.url, annotator.api_key, timeout=280) as one:
                threaded = asyncio.to_thread(sync.segment, images, **options)
                return list(await asyncio.gather(threaded, one.segment(images, **options)))

    return asyncio.run(ask())


def test_both_clients_bring_many_images_in_order(annotator: Any, bank: str, images: list[Any]) -> None:
    told: list[int] = []
    first, second = both(annotator, images, bank=bank, progress=lambda done, _: told.append(done))
    expected = [image_digest(image) for image in images]
    for answers in (first, second):
        assert [a.image_id for a in answers] == expected
        assert all(a.error is None for a in answers)
    for one, other in zip(first, second, strict=True):
        assert (one.labels != other.labels).mean() < 1e-2
    assert told.count(COUNT) == 2


def test_pixels_follow_for_images_that_are_not_held(annotator: Any, bank: str, images: list[Any]) -> None:
    rng = np.random.default_rng(6)
    fresh = [rng.integers(0, 255, (32, 40), dtype=np.uint8) for _ in range(3)]
    mixed = [images[0], *fresh, images[1]]
    with AnnotatorClient(annotator.url, annotator.api_key, timeout=280) as client:
        by_id = client.segment(mixed, bank=bank, by_id=True)
        by_pixels = client.segment(mixed, bank=bank)
    for one, other in zip(by_id, by_pixels, strict=True):
        assert one.error is None
        assert (one.labels != other.labels).mean() < 1e-2
