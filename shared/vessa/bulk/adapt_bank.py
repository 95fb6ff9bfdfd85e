"""Adapt a bank to a lab's own unlabeled images, and wait for the end."""

import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from vessa.client import AnnotatorClient
from vessa.client.types import Image
from vessa.errors import ServiceError
from vessa.schemas import ADAPTATION_IMAGES, ADAPTATION_SIDE, AdaptationInfo

_POLL_S = 1.0


def gray_squares(images: Sequence[Image]) -> NDArray[np.uint8]:
    """Return evenly spaced images as gray squares, uint8 (M, S, S), from which a bank learns.

    images: uint8 (H, W[, 3]), of any sizes; a sequence that reads an image when it is indexed will do
    The longer side becomes S px, the shorter one is padded with black.
    """
    count = min(len(images), ADAPTATION_IMAGES)
    rows = np.linspace(0, len(images) - 1, count).round().astype(int)
    squares = np.zeros((count, ADAPTATION_SIDE, ADAPTATION_SIDE), np.uint8)
    for place, row in enumerate(rows):
        picture = Pillow.fromarray(images[int(row)]).convert("L")
        scale = ADAPTATION_SIDE / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        small = np.asarray(picture.resize((width, height), Pillow.Resampling.BILINEAR))
        top, left = (ADAPTATION_SIDE - height) // 2, (ADAPTATION_SIDE - width) // 2
        squares[place, top : top + height, left : left + width] = small
    return squares


def adapt_bank(
    client: AnnotatorClient,
    bank: str,
    seconds: float,
    images: Sequence[Image] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> AdaptationInfo:
    """Adapt a bank and wait for the end; return its state, with the figures.

    images: see `gray_squares`; progress: called with the share done, in [0, 1]
    Raises ServiceError when the adaptation fails, and errors of the service.
    """
    return wait_for_adaptation(client, client.adapt(bank, seconds, gray_squares(images)), progress)


def wait_for_adaptation(
    client: AnnotatorClient, info: AdaptationInfo, progress: Callable[[float], None] = lambda share: None
) -> AdaptationInfo:
    """Wait for the end of a running adaptation. Raises ServiceError when it fails."""
    while info.state == "running":
        time.sleep(_POLL_S)
        info = client.adaptation(info.bank)
        progress(info.progress)
    if info.state == "failed":
        raise ServiceError(f"The adaptation to bank {info.bank} failed: {info.error}.")
    return info
