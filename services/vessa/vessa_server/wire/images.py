"""Image files in and out. Sizes are checked before decoding, and no library's words reach the caller."""

import io
import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vessa.errors import InvalidImage, ShapeMismatch, TooLarge, UnknownClass
from vessa.images import has_many_scans, has_second_frame, is_turned, jpeg_parts, to_bytes
from vessa.volumes import Bounds, Volume, read_volume
from vessa.volumes.dicom import frame_count, is_dicom

# A header that claims absurd sizes is an error and never a mere warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF")
WIDE_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
GRAY_MODES = {"1", "L", "LA"}
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


def decode_image(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels of a PNG, JPEG, TIFF or DICOM file with one frame.

    Returns (H, W) uint8 for gray and (H, W, 3) uint8 RGB for color. More than 8 bits a pixel (16-bit, float)
    go through `vessa.images.to_bytes`, DICOM through its window where it has one. Transparency is dropped,
    EXIF rotation is not applied: coordinates are those of the stored pixels. Errors: InvalidImage, TooLarge.
    """
    if is_dicom(data):
        return decode_dicom(data, max_pixels).image(2, 0)
    image = _open(data, IMAGE_FORMATS, max_pixels, "image")
    if image.mode in WIDE_MODES:
        return to_bytes(np.asarray(image, dtype=np.float32))
    return np.array(image.convert("L" if image.mode in GRAY_MODES else "RGB"), dtype=np.uint8)


def decode_dicom(data: bytes, max_pixels: int) -> Volume:
    """Return a DICOM file of one frame; InvalidImage for several and for no DICOM, TooLarge."""
    if not is_dicom(data):
        raise InvalidImage("a DICOM SEG refers to a DICOM image; send one, or accept another answer")
    if frame_count(data) > 1:
        raise InvalidImage("the DICOM file must hold one frame, got several; send it to POST /jobs")
    return read_volume([data], Bounds(max_pixels, max_pixels, 1))


def decode_mask(data: bytes, size: tuple[int, int], max_pixels: int) -> NDArray[np.uint8]:
    """Return the class ids of a PNG mask, (H, W) uint8: gray values or palette indexes, as they are stored.

    size: (H, W) of its image. Errors: InvalidImage (no PNG, has color), ShapeMismatch, UnknownClass (id over
    255).
    """
    image = _open(data, ("PNG",), max_pixels, "mask")
    if (image.height, image.width) != size:
        raise ShapeMismatch(
            f"the mask must have the image's size (height, width) {size}, got {(image.height, image.width)}"
        )
    if image.mode not in {"1", "L", "P", "I", "I;16"}:
        raise InvalidImage(
            "the mask must have one channel whose values are class ids, got color or transparency"
        )
    values = np.array(image)
    if values.max() > 255:
        raise UnknownClass(f"the mask holds the value {int(values.max())}; class ids are 1 to 254")
    values = values.astype(np.uint8)
    # Pillow spreads gray PNGs of 2 and 4 bits over 0..255; ids must come back as they were stored.
    depth = data[24]
    return values // np.uint8(255 // (2**depth - 1)) if image.mode == "L" and depth in {2, 4} else values


def _open(data: bytes, formats: tuple[str, ...], max_pixels: int, what: str) -> Image.Image:
    expected = f"a {' or '.join(formats)} file"
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"the {what} has more than {max_pixels} pixels") from None
    except Exception:  # decoders fail in many ways on hostile bytes
        raise InvalidImage(
            f"the {what} must be {expected}; got {len(data)} bytes of something else"
        ) from None
    if image.width * image.height > max_pixels:
        raise TooLarge(
            f"the {what} has {image.height} x {image.width} pixels, more than the limit of {max_pixels}"
        )
    try:
        alone, turned, parts = not has_second_frame(image), is_turned(image), jpeg_parts(image)
        repeated = parts > 0 and has_many_scans(data, parts)
        if alone and not turned and not repeated:
            image.load()
    except Exception:
        raise InvalidImage(f"the {what} is damaged or cut off; {expected} was expected") from None
    if not alone:
        raise InvalidImage(f"the {what} must hold one frame, got several; send them one by one")
    if repeated:
        raise InvalidImage(f"the {what} is a JPEG of more scans than any picture has; save it anew")
    if turned:
        raise InvalidImage(f"the {what} is a TIFF with an orientation tag; send it upright, without one")
    return image


def label_png(labels: NDArray[np.uint8]) -> bytes:
    """Return labels (H, W) uint8 class ids as an 8-bit gray PNG of the same size."""
    return _png(Image.fromarray(labels))


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
    return _png(_with_legend(Image.fromarray(pixels.astype(np.uint8)), classes))


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


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
