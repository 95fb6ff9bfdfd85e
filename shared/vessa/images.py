"""Read PNG, JPEG and TIFF files as uint8 pixels.

Sizes are compared with the limit before anything is decoded. Stored pixels are returned as they are: an
orientation tag (EXIF, TIFF) is never applied, so that a mask of the stored size fits.
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from vessa.errors import InvalidImage, TooLarge, VessaError
from vessa.file_kinds import is_tiff, kind_of
from vessa.intensities import robust_range, scale_to_bytes

FORMATS = ("PNG", "JPEG", "TIFF")
MAX_PIXELS = 64 << 20
_MAX_BYTES = 1 << 30  # of a file
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_log = logging.getLogger(__name__)
_PNG = b"\x89PNG\r\n\x1a\n"
_GRAY = ("1", "L", "LA")
_MAX_SCANS = 100  # of a JPEG; a progressive one has about ten
_MAX_PAGES = 16  # pages of a TIFF searched for a second full image; pyramids have about ten
_MPF_ENTRIES = 0xB002
# Types of the MPO standard whose pictures are images of their own, not previews of the first.
_MPO_FRAMES = (
    "Multi-Frame Image: (Panorama)",
    "Multi-Frame Image: (Disparity)",
    "Multi-Frame Image: (Multi-Angle)",
)
_PHOTOMETRIC = {0: "gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
_PHOTOMETRIC_TAG, _ORIENTATION = 262, 274
_ASSOCIATED = 1  # alpha that the colors are multiplied by
_JPEG_IN_TIFF = (6, 7, 33007, 34892)

# tifffile reports odd tags of a file on the log; its words may quote the file.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def read_image(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a PNG, JPEG or TIFF file as uint8 (H, W) or (H, W, 3).

    The pixels are those that the annotator makes of the same file: see `decode_picture`.
    Raises InvalidImage, or TooLarge before anything is decoded.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise TooLarge(f"{path.name} has more than {_MAX_BYTES} bytes, the limit of a picture")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InvalidImage(f"no such file: {path.name}") from error
    except OSError as error:
        raise InvalidImage(f"{path.name} cannot be read: {error.strerror}") from error
    return decode_picture(data, MAX_PIXELS, path.name)


def decode_picture(
    data: bytes, max_pixels: int = MAX_PIXELS, what: str = "the image", notes: list[str] | None = None
) -> Pixels:
    """Decode one picture as uint8 (H, W) for gray or (H, W, 3) for color.

    data: a PNG, JPEG or TIFF file; max_pixels: limit of H x W; what: how errors name the file. Pixels of 8
    bits stay as they are. Deeper ones (16-bit, signed, float) are scaled by their `robust_range`, the
    channels of a color image by one range. Transparency is dropped; pixels that are no number become
    background, which is added to `notes`, or logged without it. Raises InvalidImage, TooLarge.
    """
    try:
        if is_tiff(data):
            return _decode_tiff(data, max_pixels, what, notes)
        return _decode_png_or_jpeg(data, max_pixels, what, notes)
    except VessaError:
        raise
    except MemoryError:
        raise TooLarge(f"{what} needs more memory than is allowed for one file") from None
    except Exception:  # decoders fail in many ways on damaged bytes
        raise InvalidImage(
            f"{what} is damaged or cut off: its {kind_of(data)} data cannot be decoded. Export it again"
        ) from None


def scaled(pixels: np.ndarray[Any, Any], what: str = "the image", notes: list[str] | None = None) -> Pixels:
    """Scale numbers to uint8 by their `robust_range`; pixels that are not finite become 0.

    notes: gets a sentence about such pixels; without it the sentence is logged
    Raises InvalidImage when no pixel is finite.
    """
    missing = ~np.isfinite(pixels)
    if missing.all():
        raise InvalidImage(f"{what} holds no pixel that is a finite number: all are NaN or infinite")
    low, high = robust_range(pixels[~missing] if missing.any() else pixels)
    if missing.any():
        count = int(missing.sum())
        _say(f"{count} pixels are NaN or infinite; they are read as background", what, notes)
        pixels = np.where(missing, low, pixels)
    return scale_to_bytes(pixels, low, high)


def _say(note: str, what: str, notes: list[str] | None) -> None:
    """Add a note to the caller's list, or log it."""
    if notes is None:
        _log.warning("%s: %s", what, note)
    else:
        notes.append(note)


def _say_orientation(orientation: object, what: str, notes: list[str] | None) -> None:
    """Say that a tag asks viewers to turn the picture; its pixels stay as stored, as its mask is."""
    if isinstance(orientation, int) and 2 <= orientation <= 8:
        note = f"the orientation tag ({orientation}) is not applied: pixels and labels lie as stored"
        _say(note, what, notes)


def _check_size(width: int, height: int, max_pixels: int, what: str) -> None:
    if width < 1 or height < 1:
        raise InvalidImage(f"{what} declares a size of {height} x {width} pixels; expected 1 or more")
    if width * height > max_pixels:
        raise TooLarge(
            f"{what} has {height} x {width} pixels, more than the limit of {max_pixels}. Resize or crop it"
        )


def _decode_png_or_jpeg(data: bytes, max_pixels: int, what: str, notes: list[str] | None) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"{what} has more than {max_pixels} pixels. Resize or crop it") from None
    except Exception:
        if kind_of(data) in FORMATS:
            raise  # damaged, see `decode_picture`
        raise InvalidImage(f"{what} is no PNG, JPEG or TIFF file: got {_named(data)}") from None
    with image:
        _check_size(image.width, image.height, max_pixels, what)
        if _has_second_image(image):
            raise InvalidImage(f"{what} holds several frames; expected one. Save each frame as its own file")
        if image.format != "PNG" and has_many_scans(data):
            raise InvalidImage(
                f"{what} is a JPEG of {_MAX_SCANS} scans or more; save it again as baseline JPEG"
            )
        # Damaged EXIF data is no reason to refuse the pixels.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            _say_orientation(exif.get(_ORIENTATION), what, notes)
        if data[:8] == _PNG and data[24] == 16 and data[25] in (2, 4, 6):
            return _deep_png(data, what)
        if image.mode.startswith(("I", "F")):
            return scaled(np.asarray(image, dtype=np.float32), what)
        return np.array(image.convert("L" if image.mode in _GRAY else "RGB"), dtype=np.uint8)


def _deep_png(data: bytes, what: str) -> Pixels:
    """Decode 16-bit color or gray with alpha, which Pillow reads as 8-bit."""
    import imagecodecs

    pixels = imagecodecs.png_decode(data)
    pixels = pixels[..., 0] if pixels.shape[-1] == 2 else pixels[..., :3]
    return scaled(pixels.astype(np.float32), what)


def _has_second_image(image: Image.Image) -> bool:
    """Tell whether a file holds two images or more; the previews of a camera's MPO do not count."""
    # Pillow's `n_frames` would walk through all frames, and a file can claim millions.
    if image.format == "MPO":
        entries = getattr(image, "mpinfo", {}).get(_MPF_ENTRIES, ())
        return any(entry["Attribute"]["MPType"] in _MPO_FRAMES for entry in entries[:_MAX_PAGES])
    try:
        image.seek(1)
    except EOFError:
        image.seek(0)
        return False
    return True


def has_many_scans(data: bytes, parts: int = 1) -> bool:
    """Tell whether decoding JPEG data would take hours: a scan of a few bytes goes over all pixels.

    parts: JPEG streams in the data
    """
    return data.count(b"\xff\xda") >= _MAX_SCANS + parts


def _named(data: bytes) -> str:
    """Name the kind of file that came instead of a picture, with the way on."""
    kind = kind_of(data)
    if kind in ("NIfTI", "NRRD", "MetaImage"):
        return f"a {kind} volume. Send volumes to POST /jobs, or use `vessa segment`"
    return f"a {kind} file" if kind else f"{len(data)} bytes of another kind"


def _decode_tiff(data: bytes, max_pixels: int, what: str, notes: list[str] | None) -> Pixels:
    with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
        page: Any = file.pages[0]
        _check_size(int(page.imagewidth), int(page.imagelength), max_pixels, what)
        _check_layout(file, page, max_pixels, what)
        if page.compression in _JPEG_IN_TIFF and has_many_scans(data, max(1, len(page.dataoffsets))):
            raise InvalidImage(f"{what} is a TIFF whose JPEG data has {_MAX_SCANS} scans or more")
        if _ORIENTATION in page.tags:
            _say_orientation(page.tags[_ORIENTATION].value, what, notes)
        pixels = page.asarray(maxworkers=1)
        samples = int(page.samplesperpixel)
        if samples > 1 and int(page.planarconfig) == 2:
            pixels = np.moveaxis(pixels, 0, -1)
        return _shown_tiff(pixels, page, what, notes)


def _check_layout(file: tifffile.TiffFile, page: Any, max_pixels: int, what: str) -> None:
    """Refuse what is not one picture of a known kind, by name and before it is decoded."""
    for index in range(1, _MAX_PAGES + 1):
        try:
            other: Any = file.pages[index]
        except IndexError:
            break
        if not int(getattr(other, "subfiletype", 0)) & 1 or index == _MAX_PAGES:
            raise InvalidImage(f"{what} is a TIFF of several frames; expected one. Save each as its own file")
    planes = int(np.prod([n for n in file.series[0].shape if n > 0])) // max(1, int(np.prod(page.shape)))
    if planes > 1 or int(page.imagedepth) > 1:
        raise InvalidImage(
            f"{what} is a TIFF stack of {max(planes, int(page.imagedepth))} planes; expected one. "
            "Save each plane as its own file, or the stack as NIfTI"
        )
    kind = _PHOTOMETRIC.get(int(page.photometric))
    samples, dtype = int(page.samplesperpixel), page.dtype
    colors = {"RGB": 3, "YCbCr": 3, "CMYK": 4}.get(kind or "", 1)
    alpha = samples == colors + 1 and len(page.extrasamples) == 1 and int(page.extrasamples[0]) in (1, 2)
    if (
        kind is None
        or dtype is None
        or np.dtype(dtype).kind not in "buif"
        or not (samples == colors or alpha)
    ):
        photometric = getattr(page.photometric, "name", str(page.photometric))
        raise InvalidImage(
            f"{what} is a TIFF of {samples} channels ({photometric}, {dtype or 'unknown'} pixels), "
            "which is not "
            "read. Save it as gray or RGB"
        )
    tile = int(page.tilewidth or 0) * int(page.tilelength or 0)
    if tile > max(4 * max_pixels, 1 << 20):
        raise TooLarge(f"{what} is a TIFF with tiles of {tile} pixels, more than 4 x {max_pixels}")


def _shown_tiff(pixels: np.ndarray[Any, Any], page: Any, what: str, notes: list[str] | None) -> Pixels:
    """Return decoded TIFF samples as uint8 gray or RGB."""
    kind, bits = _PHOTOMETRIC[int(page.photometric)], int(page.bitspersample)
    if kind == "palette":
        colors = np.asarray(page.colormap)
        colors = colors >> 8 if colors.max() > 255 else colors
        return np.ascontiguousarray(np.moveaxis(colors, 0, -1).astype(np.uint8)[pixels.astype(np.uint16)])
    if kind == "CMYK":
        if pixels.dtype != np.uint8:
            raise InvalidImage(f"{what} is a CMYK TIFF of {bits} bits a sample; save it as RGB")
        return np.array(Image.fromarray(pixels[..., :4], "CMYK").convert("RGB"), dtype=np.uint8)
    if kind in ("RGB", "YCbCr"):
        if pixels.shape[-1] == 4 and int(page.extrasamples[0]) == _ASSOCIATED and pixels.dtype.kind == "u":
            alpha = np.maximum(pixels[..., 3:].astype(np.float64), 1)
            most = np.iinfo(pixels.dtype).max
            pixels = np.minimum(pixels[..., :3] * (most / alpha), most).astype(pixels.dtype)
        pixels = pixels[..., :3]
    elif pixels.ndim == 3:
        pixels = pixels[..., 0]  # the rest is alpha
    if pixels.dtype == np.bool_ or (pixels.dtype == np.uint8 and bits < 8):
        shown = (pixels.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
    elif pixels.dtype == np.uint8:
        shown = np.ascontiguousarray(pixels)
    else:
        precise = pixels.astype(np.float32 if pixels.dtype.itemsize < 8 else np.float64)
        shown = scaled(precise, what, notes)
    white_is_low = int(page.photometric) == 0 and _PHOTOMETRIC_TAG in page.tags
    result: Pixels = 255 - shown if white_is_low else shown
    return result
