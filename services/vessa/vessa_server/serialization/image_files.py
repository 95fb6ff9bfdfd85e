"""Image files in and out. Sizes are checked before decoding, and no library's words reach the caller."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vessa.errors import InvalidImage, ShapeMismatch, TooLarge, UnknownClass
from vessa.images import has_many_scans, has_second_frame, is_turned, jpeg_parts, to_bytes
from vessa.volumes import Bounds, Volume, read_volume
from vessa.volumes.dicom import frame_count, is_dicom

# A header that claims absurd sizes is an error and never a mere warning.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF")
WIDE_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
GRAY_MODES = {"1", "L", "LA"}


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
    return png_bytes(Image.fromarray(labels))


def png_bytes(image: Image.Image) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
