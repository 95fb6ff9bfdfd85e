"""DICOM images: single files, multi-frame files and series of files, with their geometry."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom import Dataset, uid
from pydicom.encaps import generate_frames
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import pixel_array

from vessa.errors import InvalidImage, TooLarge, VessaError
from vessa.images import has_many_scans
from vessa.volumes.frames import Frame, affine_of, frames_of, order_of
from vessa.volumes.grid import Bounds, Source, Volume, check_affine

# The few values that are used are checked here; pydicom's warnings about others would quote a patient's data.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

_PLAIN = {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
_PILLOW = {uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.JPEG2000}
_READABLE = {*_PLAIN, *_PILLOW, uid.RLELossless}
_GRAY = ("MONOCHROME1", "MONOCHROME2")
_CONVERT = "convert it first, for instance with `gdcmconv --raw`"


def is_dicom(head: bytes) -> bool:
    """Whether a file begins as DICOM does: 128 bytes of anything, then DICM."""
    return head[128:132] == b"DICM"


def read_dicom(sources: Sequence[Source], bounds: Bounds) -> Volume:
    """Read one image, one multi-frame file or the files of one series, in any order.

    Values are rescaled (slope, intercept), slices sorted along their normal. A window counts when all slices
    have the same one. Errors: InvalidImage for color, several series, missing or uneven slices, compression
    that is not decoded; TooLarge.
    """
    if not sources:
        raise InvalidImage("there is no DICOM file; expected one, or the files of a series")
    if len(sources) > bounds.slices:
        raise TooLarge(f"the series has {len(sources)} files, more than the limit of {bounds.slices}")
    headers = [_parse(source, pixels=False) for source in sources]
    try:
        sizes = [_size(header) for header in headers]
        _check_one_series(headers, sizes)
        rows, columns, _ = sizes[0]
        # before anything is made for each frame: a header can claim millions
        bounds.check((columns, rows, sum(size[2] for size in sizes)), "DICOM image")
        frames = [f for header, size in zip(headers, sizes, strict=True) for f in frames_of(header, size[2])]
    except VessaError:
        raise
    except Exception:  # attributes of wrong types, in more ways than can be listed
        raise InvalidImage("the DICOM header is damaged: its attributes have values of wrong types") from None
    order = order_of(frames, len(sources))
    voxels = np.empty((columns, rows, len(frames)), np.float32)
    if len(sources) == 1:
        _fill(voxels, sources[0], frames, [order.index(i) for i in range(len(frames))])
        kept, places = tuple(headers), tuple(order)
    else:
        for place, index in enumerate(order):
            _fill(voxels, sources[index], [frames[index]], [place])
        kept, places = tuple(headers[i] for i in order), ()
    if not np.isfinite(voxels).all():
        raise InvalidImage("the DICOM image holds values that are not finite numbers")
    ordered = [frames[i] for i in order]
    windows = {frame.window for frame in ordered}
    return Volume(
        voxels,
        check_affine(affine_of(ordered), "DICOM image"),
        windows.pop() if len(windows) == 1 else None,
        headers[0].PhotometricInterpretation == "MONOCHROME1",
        kept,
        places,
    )


def frame_count(source: Source) -> int:
    """Return how many frames a DICOM file declares; InvalidImage."""
    header = _parse(source, pixels=False)
    try:
        return _size(header)[2]
    except (ValueError, TypeError):
        raise InvalidImage("the DICOM header is damaged: its sizes are no numbers") from None


def _parse(source: Source, *, pixels: bool) -> Dataset:
    """Read a data set; its compression is looked at first, for a deflated one grows when it is read."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            read_preamble(file, force=False)
            meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
            syntax = uid.UID(str(meta.TransferSyntaxUID))
            if syntax in _READABLE:
                file.seek(0)
                return pydicom.dcmread(file, stop_before_pixels=not pixels)
    except Exception:  # pydicom fails in many ways on hostile bytes
        raise InvalidImage("the file is no readable DICOM file: damaged, cut off or something else") from None
    name = syntax.name if syntax.name != str(syntax) else "an unknown transfer syntax"
    raise InvalidImage(f"the DICOM file is compressed by {name}, which is not decoded here: {_CONVERT}")


def _size(header: Dataset) -> tuple[int, int, int]:
    """Return rows, columns and frames, of an image that has one gray value a pixel."""
    if "Rows" not in header:
        what = str(header.get("Modality", "none"))[:16]
        raise InvalidImage(f"a DICOM file holds no image (modality {what}); give images alone")
    kind = str(header.get("PhotometricInterpretation", "none"))
    if kind not in _GRAY or int(header.get("SamplesPerPixel", 1)) != 1:
        raise InvalidImage(
            f"the DICOM image is {kind[:20]}, not gray ({' or '.join(_GRAY)}): save a picture in color as PNG"
        )
    if "ModalityLUTSequence" in header:
        raise InvalidImage("the DICOM image has a modality lookup table; only slope and intercept are read")
    bits = int(header.get("BitsAllocated", 0))
    if bits not in (8, 16, 32):
        raise InvalidImage(f"the DICOM image has {bits} bits a pixel; expected 8, 16 or 32: is it an image?")
    rows, columns, frames = (
        int(header.get(n, d) or d) for n, d in (("Rows", 0), ("Columns", 0), ("NumberOfFrames", 1))
    )
    if min(rows, columns, frames) < 1:
        raise InvalidImage(f"the DICOM header declares {rows} rows, {columns} columns and {frames} frames")
    return rows, columns, frames


def _check_one_series(headers: list[Dataset], sizes: list[tuple[int, int, int]]) -> None:
    if len(headers) == 1:
        return
    for name, what in (("SeriesInstanceUID", "series"), ("FrameOfReferenceUID", "frames of reference")):
        found = {str(header.get(name, "")) for header in headers}
        if len(found) > 1:
            raise InvalidImage(f"the {len(headers)} DICOM files are of {len(found)} {what}; give one alone")
    if any(frames > 1 for _, _, frames in sizes):
        raise InvalidImage("several DICOM files came, and one holds several frames itself; give it alone")
    if len({size[:2] for size in sizes}) > 1 or len({h.PhotometricInterpretation for h in headers}) > 1:
        raise InvalidImage("the DICOM files of the series differ in size or in photometric interpretation")


def _fill(voxels: np.ndarray[Any, Any], source: Source, frames: list[Frame], places: list[int]) -> None:
    """Decode the frames of one file into their places along K."""
    file = _parse(source, pixels=True)
    try:
        if file.file_meta.TransferSyntaxUID not in _PLAIN:
            _check_encoded(file, len(frames))
        stored = pixel_array(file, raw=True).reshape(len(frames), file.Rows, file.Columns)
    except VessaError:
        raise
    except Exception:
        raise InvalidImage("the DICOM pixels cannot be decoded: they do not fill the declared size") from None
    for frame, place, pixels in zip(frames, places, stored, strict=True):
        voxels[:, :, place] = (pixels.astype(np.float32) * frame.slope + frame.intercept).T


def _check_encoded(file: Dataset, count: int) -> None:
    """Compare what compressed frames say of themselves with the header, before a decoder believes them."""
    size = (int(file.Columns), int(file.Rows))
    encoded = list(generate_frames(file.PixelData, number_of_frames=count))
    if file.file_meta.TransferSyntaxUID == uid.RLELossless:
        # at its worst RLE adds one byte to 128
        longest = size[0] * size[1] * file.BitsAllocated // 8 * 129 // 128 + size[1] * 8 + 1024
        fits = all(len(frame) <= longest for frame in encoded)
    else:
        fits = True
        for frame in encoded:
            with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as picture:
                fits = fits and picture.size == size
                if picture.format == "JPEG" and has_many_scans(frame):
                    raise InvalidImage("a DICOM frame is a JPEG of more scans than any picture has")
    if not fits or len(encoded) != count:
        raise InvalidImage("the compressed DICOM frames have another size or number than the header declares")
