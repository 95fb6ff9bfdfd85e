"""Read DICOM images: single files, multi-frame files and series of files, with their geometry."""

import gzip
import io
import logging
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.filereader import read_dataset, read_preamble

from vessa.errors import InvalidImage, TooLarge, VessaError
from vessa.volumes.dicom.frames import SlicePlane, affine_of, frames_of, order_of
from vessa.volumes.dicom.header import kept_header
from vessa.volumes.dicom.pixels import (
    COLOR,
    NATIVE,
    DisplayRange,
    check_kind,
    check_syntax,
    decoded_frames,
    shown_of,
)
from vessa.volumes.grid import Allocate, Bounds, Source, Volume, check_affine, empty

# The few values that are used are checked here; pydicom's warnings about others would quote a patient's data.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_SHARED = ("ImageOrientationPatient", "PixelSpacing", "SliceThickness")
_MAX_GUNZIPPED = 1 << 30  # bytes of one gzipped DICOM file


def read_dicom(sources: Sequence[Source], bounds: Bounds, allocate: Allocate = empty) -> Volume:
    """Read one image, one multi-frame file or the files of one series, in any order.

    Values are rescaled, slices sorted along their normal. A window or table counts when all slices have the
    same one. allocate: makes the array of voxels. Raises InvalidImage for several series, missing or uneven
    slices, compression that is not decoded; TooLarge. Errors about one file begin with its name.
    """
    if not sources:
        raise InvalidImage("there is no DICOM file; expected one, or the files of a series")
    if len(sources) > bounds.slices:
        raise TooLarge(f"the series has {len(sources)} files, more than the limit of {bounds.slices}")
    names = [_name(source, index, len(sources)) for index, source in enumerate(sources)]
    headers = [_named(name, _parse, source, False) for name, source in zip(names, sources, strict=True)]
    sizes = [_named(name, _checked_kind, header) for name, header in zip(names, headers, strict=True)]
    _check_one_series(headers, sizes)
    rows, columns, _ = sizes[0]
    # before anything is made for each frame: a header can claim millions
    bounds.check((columns, rows, sum(size[2] for size in sizes)), "DICOM image")
    frames: list[SlicePlane] = []
    shown: list[DisplayRange] = []
    notes: list[str] = []
    for name, header, size in zip(names, headers, sizes, strict=True):
        found, said, looks = _named(name, _geometry, header, size[2])
        frames, notes, shown = frames + found, notes + said, shown + looks
    clean: list[Dataset] = []
    first = 0
    for name, header, size in zip(names, headers, sizes, strict=True):
        one, said = _named(name, _kept, header, frames[first : first + size[2]])
        clean, notes, first = [*clean, one], notes + said, first + size[2]
    if len(clean) > 1:  # the same but for rounding, which a DICOM SEG does not allow
        for one in clean[1:]:
            one.update({e.tag: e for e in clean[0] if e.keyword in _SHARED})
    order = order_of(frames, len(sources))
    affine, said = affine_of([frames[i] for i in order])
    color = headers[0].PhotometricInterpretation in COLOR
    shape = (columns, rows, len(frames))
    voxels = allocate((*shape, 3), np.uint8) if color else allocate(shape, np.float32)
    if len(sources) == 1:
        places = [order.index(i) for i in range(len(frames))]
        _named(names[0], _fill, voxels, sources[0], (rows, columns), places)
        kept, in_file = tuple(clean), tuple(order)
    else:
        for place, index in enumerate(order):
            _named(names[index], _fill, voxels, sources[index], (rows, columns), [place])
        kept, in_file = tuple(clean[i] for i in order), ()
    looks = [shown[i] for i in order]
    windows, tables = {look.window for look in looks}, {look.table for look in looks}
    padding = np.array([look.padding for look in looks], np.float32)
    return Volume(
        voxels,
        check_affine(affine, "DICOM image"),
        windows.pop() if len(windows) == 1 else None,
        headers[0].PhotometricInterpretation == "MONOCHROME1",
        kept,
        in_file,
        padding=None if color or np.isnan(padding).all() else padding,
        table=tables.pop() if len(tables) == 1 else None,
        notes=tuple(dict.fromkeys([*notes, *said])),
    )


def frame_count(source: Source) -> int:
    """Return how many frames a DICOM file declares; InvalidImage."""
    return _checked_kind(_parse(source, False))[2]


def is_compressed(source: Source) -> bool:
    """Tell whether reading a DICOM file runs a decompressor; True also where its beginning is damaged."""
    try:
        with open_dicom(source) as file:
            return not isinstance(file, io.BufferedReader | io.BytesIO) or _syntax(file) not in (*NATIVE, "")
    except VessaError:
        return True


def _name(source: Source, index: int, count: int) -> str:
    if isinstance(source, Path):
        return source.name
    return f"file {index + 1} of {count}" if count > 1 else ""


def _named(name: str, work: Any, *arguments: Any) -> Any:
    """Run some work on one file; an error begins with the file's name."""
    try:
        return work(*arguments)
    except VessaError as error:
        if name:
            raise type(error)(f"{name}: {error.message}") from None
        raise


def open_dicom(source: Source) -> BinaryIO:
    """Open a DICOM file; one that is gzipped as a whole is inflated within a limit."""
    try:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        if file.read(2) == b"\x1f\x8b":
            file.seek(0)
            with file, gzip.GzipFile(fileobj=file) as packed:
                data = packed.read(_MAX_GUNZIPPED + 1)
            if len(data) > _MAX_GUNZIPPED:
                raise TooLarge(f"the gzipped DICOM file inflates to more than {_MAX_GUNZIPPED} bytes")
            return io.BytesIO(data)
        file.seek(0)
    except VessaError:
        raise
    except (OSError, EOFError, ValueError, zlib.error):
        raise InvalidImage("the DICOM file cannot be read, or its gzip data is damaged") from None
    return file  # type: ignore[no-any-return]


def _syntax(file: BinaryIO) -> uid.UID:
    """Return the transfer syntax stated in a file's meta information, "" where none is; rewinds the file."""
    try:
        read_preamble(file, force=True)
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        return uid.UID(str(meta.get("TransferSyntaxUID", "")).strip("\0 "))
    except Exception:  # pydicom fails in many ways on hostile bytes
        raise InvalidImage("the file is no readable DICOM file: damaged, cut off or something else") from None
    finally:
        file.seek(0)


def _parse(source: Source, pixels: bool) -> Dataset:
    """Read a data set, with or without its pixels. Files without preamble or transfer syntax are read too."""
    with open_dicom(source) as file:
        syntax = _syntax(file)
        if syntax:
            check_syntax(syntax)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pydicom's words would quote the file
                data = pydicom.dcmread(file, stop_before_pixels=not pixels, force=True)
            if not syntax:
                implicit, little = data.original_encoding
                data.file_meta.TransferSyntaxUID = (
                    uid.ImplicitVRLittleEndian if implicit
                    else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
                )  # fmt: skip
        except MemoryError:
            raise TooLarge("the DICOM file needs more memory than is allowed for one file") from None
        except Exception:  # pydicom fails in many ways on hostile bytes
            raise InvalidImage(
                "the file is no readable DICOM file: damaged, cut off or something else"
            ) from None
    if not data:
        raise InvalidImage("the file is no readable DICOM file: it holds no attribute")
    return data


def _checked_kind(header: Dataset) -> tuple[int, int, int]:
    try:
        return check_kind(header)
    except VessaError:
        raise
    except Exception:
        raise InvalidImage("the DICOM header is damaged: its sizes are no numbers") from None


def _geometry(header: Dataset, count: int) -> tuple[list[SlicePlane], list[str], list[DisplayRange]]:
    try:
        frames, notes = frames_of(header, count)
        return frames, notes, [shown_of(header, index) for index in range(count)]
    except VessaError:
        raise
    except Exception:  # attributes of wrong types, in more ways than can be listed
        raise InvalidImage("the DICOM header is damaged: its attributes have values of wrong types") from None


def _kept(header: Dataset, frames: list[SlicePlane]) -> tuple[Dataset, list[str]]:
    try:
        return kept_header(header, frames)
    except Exception:
        raise InvalidImage("the DICOM header is damaged: its attributes have values of wrong types") from None


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


def _fill(voxels: np.ndarray[Any, Any], source: Source, size: tuple[int, int], places: list[int]) -> None:
    """Decode the frames of one file into their places along K."""
    file = _parse(source, True)
    if not any(name in file for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise InvalidImage("the DICOM file has no pixels: it is cut off, or only a header")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for place, pixels in zip(places, decoded_frames(file, len(places), size), strict=True):
                if not np.isfinite(pixels).all():
                    raise InvalidImage("the DICOM image holds values that are not finite numbers")
                voxels[:, :, place] = pixels.swapaxes(0, 1)
    except VessaError:
        raise
    except MemoryError:
        raise TooLarge("the DICOM pixels need more memory than is allowed for one file") from None
    except Exception:
        raise InvalidImage(
            "the DICOM pixels cannot be decoded: they are damaged, or do not fill the declared size"
        ) from None
