"""Turn stored DICOM pixels into values, and values into what is shown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import Dataset, uid
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder
from pydicom.pixels.utils import iter_pixels, pixel_array

from vessa.errors import InvalidImage
from vessa.volumes.dicom.encoded_frames import check_encoded
from vessa.volumes.grid import VoiTable

GRAY = ("MONOCHROME1", "MONOCHROME2")
COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")
NATIVE = {uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian}
_CONVERT = "Convert it first, for instance by `gdcmconv --raw`"
_FLOATS = ("FloatPixelData", "DoubleFloatPixelData")


@dataclass(frozen=True)
class DisplayRange:
    """How the makers of a frame want it shown.

    window: (low, high) values, or None; table: VOI lookup table, or None; padding: (lowest, highest) value
    that means "no image here", NaN where none is stated.
    """

    window: tuple[float, float] | None
    table: VoiTable | None
    padding: tuple[float, float]


def check_syntax(syntax: uid.UID) -> None:
    """Raise InvalidImage, with its name, for a transfer syntax that is not decoded."""
    if syntax in NATIVE or syntax == uid.DeflatedExplicitVRLittleEndian:
        return
    name = syntax.name if syntax.name != str(syntax) else "an unknown transfer syntax"
    try:
        available = get_decoder(syntax).is_available
    except RuntimeError:  # of a syntax that pydicom does not know
        available = False
    if not available:
        raise InvalidImage(f"the DICOM file is compressed by {name}, which is not decoded. {_CONVERT}")


def check_kind(header: Dataset) -> tuple[int, int, int]:
    """Return rows, columns and frames of an image that can be read; InvalidImage names what it is else."""
    modality = str(header.get("Modality", "none"))[:16]
    if "Rows" not in header:
        raise InvalidImage(f"a DICOM file holds no image (modality {modality}); give images alone")
    if modality == "SEG" or header.get("SOPClassUID") == uid.SegmentationStorage:
        raise InvalidImage(
            "the DICOM file is a segmentation (SEG), not an image; give the images it refers to"
        )
    if "TotalPixelMatrixRows" in header and int(header.get("NumberOfFrames") or 1) > 1:
        raise InvalidImage("the DICOM file is a tiled whole-slide image; export a region as PNG or TIFF")
    kind, samples = (
        str(header.get("PhotometricInterpretation", "none")),
        int(header.get("SamplesPerPixel", 1)),
    )
    expected = 3 if kind in COLOR and kind != "PALETTE COLOR" else 1
    if kind not in (*GRAY, *COLOR) or samples != expected:
        raise InvalidImage(
            f"the DICOM image is {kind[:20]} of {samples} samples, not gray or RGB; save a picture "
            "of it as PNG"
        )
    bits = int(header.get("BitsAllocated", 0))
    if bits not in (1, 8, 16, 32, 64) or (kind in COLOR and bits not in (8, 16, 32)):
        raise InvalidImage(f"the DICOM image has {bits} bits a sample; expected 8, 16 or 32: is it an image?")
    rows, columns, frames = (
        int(header.get(n, d) or d) for n, d in (("Rows", 0), ("Columns", 0), ("NumberOfFrames", 1))
    )
    if min(rows, columns, frames) < 1:
        raise InvalidImage(f"the DICOM header declares {rows} rows, {columns} columns and {frames} frames")
    return rows, columns, frames


def decoded_frames(file: Dataset, count: int, size: tuple[int, int]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the frames of a file as values, float32 (rows, columns), or as RGB, uint8 (rows, columns, 3).

    file: with its pixels; count, size: frames and (rows, columns) as the header declares them. Raises
    whatever pydicom and its decoders raise, and InvalidImage for another number of frames.
    """
    color = file.PhotometricInterpretation in COLOR
    shape = (*size, 3) if color and file.PhotometricInterpretation != "PALETTE COLOR" else size
    frames: Iterable[np.ndarray[Any, Any]]
    if file.file_meta.TransferSyntaxUID.is_encapsulated:
        check_encoded(file, count, size)
        frames = pixel_array(file, raw=not color).reshape(-1, *shape)
    else:
        frames = iter_pixels(file, raw=not color)
    produced = 0
    for index, pixels in enumerate(frames):
        if pixels.shape != shape or index >= count:
            raise InvalidImage("the DICOM frames have another size or number than the header declares")
        yield _rgb(pixels, file) if color else _values(pixels, file, index)
        produced += 1
    if produced != count:
        raise InvalidImage(f"the DICOM file holds {produced} frames, and its header declares {count}")


def _rgb(pixels: np.ndarray[Any, Any], file: Dataset) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if file.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, file)[..., :3]
        stored = 16 if pixels.dtype.itemsize == 2 else 8
    else:
        stored = int(file.BitsStored)
    return (pixels >> (stored - 8) if stored > 8 else pixels).astype(np.uint8)


def _values(pixels: np.ndarray[Any, Any], file: Dataset, index: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    if "ModalityLUTSequence" in file and not any(name in file for name in _FLOATS):
        table: np.ndarray[Any, Any] = apply_modality_lut(pixels, file)
        return table.astype(np.float32)
    slope, intercept = rescale_of(file, index)
    return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def rescale_of(header: Dataset, index: int) -> tuple[float, float]:
    """Return slope and intercept of a frame."""
    values = _functional_group(header, index, "PixelValueTransformationSequence")
    slope, intercept = values.get("RescaleSlope"), values.get("RescaleIntercept")
    return (1.0 if slope in (None, "") else float(slope)), (
        0.0 if intercept in (None, "") else float(intercept)
    )


def shown_of(header: Dataset, index: int) -> DisplayRange:
    """Return how a frame is to be shown; a VOI lookup table counts before a window."""
    voi = _functional_group(header, index, "FrameVOILUTSequence")
    slope, intercept = rescale_of(header, index)
    signed = intercept < 0 or int(header.get("PixelRepresentation", 0)) == 1
    return DisplayRange(_window(voi), _table(voi, signed), _padding(header, slope, intercept))


def _functional_group(header: Dataset, index: int, sequence: str) -> Dataset:
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for group in (*own[index : index + 1], *shared[:1]):
        if group.get(sequence):
            return group[sequence][0]  # type: ignore[no-any-return]
    return header


def _window(source: Dataset) -> tuple[float, float] | None:
    """Return the (low, high) values of the first window (PS3.3 C.11.2.1.2); SIGMOID is shown as if LINEAR."""
    centers, widths = source.get("WindowCenter"), source.get("WindowWidth")
    if centers is None or widths is None or centers == "" or widths == "":
        return None
    center, width = (float(v[0] if isinstance(v, Sequence) else v) for v in (centers, widths))
    if not np.isfinite([center, width]).all():
        return None
    if source.get("VOILUTFunction", "LINEAR") == "LINEAR_EXACT":
        return (center - width / 2, center + width / 2) if width > 0 else None
    return (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2) if width > 1 else None


def _table(source: Dataset, signed: bool) -> VoiTable | None:
    if not source.get("VOILUTSequence"):
        return None
    item = source.VOILUTSequence[0]
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    data = item.LUTData
    kind = "<u2" if source.is_little_endian is not False else ">u2"
    if isinstance(data, bytes):
        entries = np.frombuffer(data, np.uint8 if bits <= 8 and len(data) == (count or 65536) else kind)
    else:
        entries = np.asarray(data)
    entries = entries[: count or 65536].astype(np.int64) & 0xFFFF
    if entries.size != (count or 65536):
        raise InvalidImage("the DICOM file's VOI lookup table has fewer entries than it declares")
    largest = int(entries.max())
    full = (
        (1 << bits) - 1 if 8 <= bits <= 16 and (1 << bits) > largest > (1 << bits) // 2 else max(largest, 1)
    )
    if signed and first >= 1 << 15:
        first -= 1 << 16
    return VoiTable(float(first), np.rint(entries * (255 / full)).astype(np.uint8))


def _padding(header: Dataset, slope: float, intercept: float) -> tuple[float, float]:
    value = header.get("PixelPaddingValue")
    if value in (None, "") or "ModalityLUTSequence" in header:
        return float("nan"), float("nan")
    limit = header.get("PixelPaddingRangeLimit")
    stored = [int(value), int(value if limit in (None, "") else limit)]
    bits = int(header.get("BitsAllocated", 16))
    if int(header.get("PixelRepresentation", 0)) == 1:
        stored = [v - (1 << bits) if v >= 1 << (bits - 1) else v for v in stored]
    ends = np.asarray(stored, np.float32) * np.float32(slope) + np.float32(intercept)
    return float(ends.min()), float(ends.max())
