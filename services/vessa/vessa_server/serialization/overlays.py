"""Draw templates and annotations as PNG, enlarged and with a legend."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vessa.masks.colors import class_color
from vessa.masks.overlay import overlay
from vessa_server.serialization.image_files import png_bytes

OVERLAY_SIDE = 512  # px, the shortest longer side of a picture
_CONTOURS_PER_SIDE = 400  # a contour is 1 px wide for each 400 px of the longer side
_LINE = 22  # px, height of a line of the legend


def overlay_png(image: NDArray[np.uint8], labels: NDArray[np.uint8], classes: Mapping[int, str]) -> bytes:
    """Return an RGB PNG of the image with its classes and a legend below.

    image: (H, W) or (H, W, 3) uint8; labels: (H, W) uint8; classes: {id: name} for the legend. Small images
    are enlarged by a whole factor until the longer side has at least 512 px.
    """
    factor = -(-OVERLAY_SIDE // max(labels.shape)) if max(labels.shape) < OVERLAY_SIDE else 1
    large, ids = _enlarge(image, factor), _enlarge(labels, factor)
    picture = overlay(large, ids, contour=max(1, round(max(ids.shape) / _CONTOURS_PER_SIDE)))
    return png_bytes(_with_legend(Image.fromarray(picture), classes))


def _enlarge(array: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _with_legend(picture: Image.Image, classes: Mapping[int, str]) -> Image.Image:
    """Add one line per class below the picture: its color, id and name."""
    if not classes:
        return picture
    full = Image.new("RGB", (picture.width, picture.height + _LINE * len(classes) + 6), "black")
    full.paste(picture)
    draw = ImageDraw.Draw(full)
    font = ImageFont.load_default(15)
    for row, (class_id, name) in enumerate(sorted(classes.items())):
        top = picture.height + 4 + row * _LINE
        draw.rectangle((8, top + 3, 22, top + 17), fill=class_color(class_id))
        draw.text((30, top), f"{class_id}  {name}", fill="white", font=font)
    return full
