"""Draw templates and answers for the eye."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vessa_server.serialization.image_files import png_bytes

OVERLAY_SIDE = 512

FILL = 0.35

# Okabe and Ito's colors, told apart also by the color-blind; class id 1 is the first.
COLORS = (
    (0, 158, 115),
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
)


def color_of(class_id: int) -> tuple[int, int, int]:
    """Return the RGB color that shows a class; after the palette's seven it goes on in darker rounds."""
    round_, place = divmod(class_id - 1, len(COLORS))
    red, green, blue = (round(channel * 0.65**round_) for channel in COLORS[place])
    return red, green, blue


def overlay_png(image: NDArray[np.uint8], labels: NDArray[np.uint8], classes: Mapping[int, str]) -> bytes:
    """Return an RGB PNG for the eye: the image with tinted classes, their contours and a legend.

    image: (H, W) or (H, W, 3) uint8; labels: (H, W) uint8; classes: {id: name} for the legend. Small images
    are enlarged by a whole factor until the longer side has 512 pixels or more; the legend lies below the
    image.
    """
    factor = -(-OVERLAY_SIDE // max(labels.shape)) if max(labels.shape) < OVERLAY_SIDE else 1
    rgb = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image
    pixels = _enlarge(rgb, factor).astype(np.float32)
    ids = _enlarge(labels, factor)
    edge = _inner_edge(ids, width=max(1, round(max(ids.shape) / 400)))
    for class_id in sorted(int(value) for value in np.unique(labels) if value):
        color = np.asarray(color_of(class_id), dtype=np.float32)
        inside = ids == class_id
        pixels[inside] = pixels[inside] * (1 - FILL) + color * FILL
        pixels[inside & edge] = color
    return png_bytes(_with_legend(Image.fromarray(pixels.astype(np.uint8)), classes))


def _enlarge(array: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def _inner_edge(ids: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """Return (H, W) bool: pixels within `width` pixels of another class."""
    padded = np.pad(ids, width, mode="edge")
    height, length = ids.shape
    edge = np.zeros(ids.shape, dtype=bool)
    for shift in range(2 * width + 1):
        edge |= padded[shift : shift + height, width : width + length] != ids
        edge |= padded[width : width + height, shift : shift + length] != ids
    return edge


def _with_legend(picture: Image.Image, classes: Mapping[int, str]) -> Image.Image:
    """Add one line per class below the picture: its color, id and name."""
    if not classes:
        return picture
    line = 22
    full = Image.new("RGB", (picture.width, picture.height + line * len(classes) + 6), "black")
    full.paste(picture)
    draw = ImageDraw.Draw(full)
    font = ImageFont.load_default(15)
    for row, (class_id, name) in enumerate(sorted(classes.items())):
        top = picture.height + 4 + row * line
        draw.rectangle((8, top + 3, 22, top + 17), fill=color_of(class_id))
        draw.text((30, top), f"{class_id}  {name}", fill="white", font=font)
    return full
