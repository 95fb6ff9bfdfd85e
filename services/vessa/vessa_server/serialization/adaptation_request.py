"""Read the unlabeled images of a request to adapt a bank."""

import numpy as np
from numpy.typing import NDArray

from vessa.codec import TensorSpec, decode
from vessa.errors import InvalidImage, TooLarge
from vessa.schemas import ADAPTATION_IMAGES, ADAPTATION_SIDE

_TENSORS = {"images": TensorSpec(("U8",), ((None, None, None),))}


def read_squares(body: bytes, max_bytes: int) -> NDArray[np.uint8]:
    """Return gray squares, uint8 (M, S, S); an empty body holds none.

    Raises MalformedBody, TooLarge for more images than are allowed, InvalidImage for another side than S.
    """
    none = np.zeros((0, ADAPTATION_SIDE, ADAPTATION_SIDE), np.uint8)
    if not body:
        return none
    tensors, _ = decode(body, _TENSORS, max_bytes=max_bytes)
    images = tensors.get("images", none)
    if images.shape[1:] != none.shape[1:]:
        raise InvalidImage(
            f"Images to adapt with are gray squares of {ADAPTATION_SIDE} px, uint8 (M, {ADAPTATION_SIDE}, "
            f"{ADAPTATION_SIDE}). Got {images.shape}."
        )
    if len(images) > ADAPTATION_IMAGES:
        raise TooLarge(
            f"A bank is adapted with at most {ADAPTATION_IMAGES} images, got {len(images)}. Send fewer."
        )
    return images.copy()  # the body's bytes are read-only
