"""Decode uploaded image files and encode label maps.

Sizes are checked before decoding, and no library's words reach the caller. DICOM and TIFF, whose decoders are
many, are read in a child process.
"""

import io
import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vessa import images
from vessa.errors import InvalidImage
from vessa.file_kinds import HEAD, is_dicom, is_tiff
from vessa.masks import files as mask_files
from vessa.volumes import Bounds, Volume, isolated

# A header that claims absurd sizes is an error and never a mere warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode_image(data: bytes, max_pixels: int, notes: list[str] | None = None) -> NDArray[np.uint8]:
    """Return the pixels of a PNG, JPEG, TIFF or DICOM file with one frame.

    notes: gets a sentence for everything that was repaired, guessed or left out

    Returns (H, W) uint8 for gray and (H, W, 3) uint8 RGB for color: those of `vessa.images.decode_picture`,
    and of a DICOM file as its makers want it shown. Errors: InvalidImage, TooLarge.
    """
    notes = [] if notes is None else notes
    if is_dicom(data):
        volume = decode_dicom(data, max_pixels)
        notes += volume.notes
        return volume.image(2, 0)
    if is_tiff(data[:HEAD]):
        return isolated.decode_picture(data, max_pixels, "the image", notes)
    return images.decode_picture(data, max_pixels, notes=notes)


def decode_dicom(data: bytes, max_pixels: int) -> Volume:
    """Return a DICOM file of one frame. Raises InvalidImage for several and for no DICOM, TooLarge."""
    if not is_dicom(data):
        raise InvalidImage("a DICOM SEG refers to a DICOM image; send one, or accept another answer")
    return isolated.read_volume([data], Bounds(max_pixels, max_pixels, 1), one_frame=True)


def decode_mask(
    data: bytes, size: tuple[int, int], max_pixels: int, classes: Mapping[int, str] | None = None
) -> NDArray[np.uint8]:
    """Return the class ids of a PNG mask, (H, W) uint8; the rules are those of `vessa.masks.files`.

    size: (H, W) of its image; classes: id to name, without which the stored values are the ids. Errors:
    InvalidImage (no PNG, has color), ShapeMismatch, UnknownClass (a value that is no id).
    """
    values = mask_files.decode_mask(data, max_pixels, size=size)
    return mask_files.class_ids(values, classes or {})


def label_png(labels: NDArray[np.uint8]) -> bytes:
    """Return labels (H, W) uint8 class ids as an 8-bit gray PNG of the same size."""
    return png_bytes(Image.fromarray(labels))


def png_bytes(image: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
