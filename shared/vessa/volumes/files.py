"""Read volumes of any format, and write label volumes in the format that fits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from vessa.errors import InvalidImage, InvalidRequest
from vessa.file_kinds import HEAD, is_nifti, kind_of
from vessa.volumes import isolated
from vessa.volumes.dicom.reader import is_compressed, read_dicom
from vessa.volumes.dicom.segmentation import dicom_seg_bytes
from vessa.volumes.dicom.series import has_dicom, head_of, series_files
from vessa.volumes.grid import Allocate, Bounds, Source, Volume, empty
from vessa.volumes.nifti import nifti_bytes, read_nifti
from vessa.volumes.nrrd_seg import nrrd_bytes

LabelFormat = Literal["nifti", "dicom-seg", "nrrd"]
LABEL_FORMATS: tuple[str, ...] = get_args(LabelFormat)
SUFFIXES = {".nii.gz": "nifti", ".nii": "nifti", ".dcm": "dicom-seg", ".seg.nrrd": "nrrd", ".nrrd": "nrrd"}
_DICOM = ("DICOM", "DICOM without preamble", "gzip of a DICOM", "gzip of a DICOM without preamble")


def format_of(name: str) -> LabelFormat:
    """Return the label format that a file's name asks for; InvalidRequest for another suffix."""
    for suffix, kind in SUFFIXES.items():
        if name.lower().endswith(suffix) and suffix != ".nii":
            return kind  # type: ignore[return-value]
    raise InvalidRequest(
        f"labels of a volume are written as .nii.gz, .seg.nrrd, .nrrd or .dcm (DICOM SEG), not as '{name}'"
    )


def read_head(source: Source) -> bytes:
    """Return the first bytes of a file, none of a folder. InvalidImage when it cannot be read."""
    if isinstance(source, bytes):
        return source[:HEAD]
    return b"" if source.is_dir() else head_of(source)


def is_nifti_file(path: Path) -> bool:
    """Tell whether a path is a NIfTI file, compressed or not."""
    return path.is_file() and is_nifti(read_head(path))


def is_volume(path: Path) -> bool:
    """Tell whether a path is a NIfTI or DICOM file, or a folder with DICOM files in it or below."""
    if path.is_dir():
        return has_dicom(path)
    return path.is_file() and kind_of(read_head(path)) in ("NIfTI", *_DICOM)


def read_volume(
    source: Path | Sequence[Source], bounds: Bounds | None = None, series: int | None = None
) -> Volume:
    """Read a NIfTI or DICOM file, a folder with one DICOM series in it or below, or such files themselves.

    What they are is told by their first bytes and not by their names. series: chooses one of several series
    of a folder, counted from 1. Compressed DICOM is decoded in a child process. Raises InvalidImage,
    TooLarge, and InvalidRequest when a folder holds several series and none was chosen.
    """
    bounds, notes = bounds or Bounds(), list[str]()
    sources: Sequence[Source]
    if isinstance(source, Path):
        sources, notes = series_files(source, series) if source.is_dir() else ([source], [])
    else:
        sources = source
    dicom = not (len(sources) == 1 and is_nifti(read_head(sources[0])))
    read = isolated.read_volume if dicom and any(is_compressed(one) for one in sources) else read_here
    volume = read(sources, bounds)
    return replace(volume, notes=(*notes, *volume.notes)) if notes else volume


def read_here(sources: Sequence[Source], bounds: Bounds, allocate: Allocate = empty) -> Volume:
    """Read the files of one volume in this process; see `read_volume`."""
    if len(sources) == 1 and is_nifti(read_head(sources[0])):
        return read_nifti(sources[0], bounds, allocate)
    for place, one in enumerate(sources, 1):
        kind = kind_of(read_head(one))
        if kind not in _DICOM:
            which = one.name if isinstance(one, Path) else f"file {place} of {len(sources)}"
            raise InvalidImage(
                f"expected one NIfTI file (.nii, .nii.gz), or the DICOM files of one series; {which} is "
                + _other(kind)
            )
    if not sources:
        raise InvalidImage(
            "expected one NIfTI file (.nii, .nii.gz), or the DICOM files of one series; got none"
        )
    return read_dicom(sources, bounds, allocate)


def _other(kind: str) -> str:
    if kind == "NIfTI":
        return "NIfTI, and a request holds one NIfTI file at most. Send each in a request of its own"
    if kind in ("PNG", "JPEG", "TIFF"):
        return f"a {kind} picture. Send pictures to POST /segment"
    if kind in ("Analyze", "NRRD", "MetaImage", "MGH"):
        return f"{kind}. Convert it to NIfTI, for instance with SimpleITK or nibabel"
    return f"{kind or 'of an unknown kind'}"


def write_labels(
    volume: Volume,
    labels: np.ndarray[Any, np.dtype[np.uint8]],
    classes: dict[int, str],
    source: str,
    kind: str,
) -> bytes:
    """Return a label volume on the grid of its image.

    labels: uint8 (I, J, K) class ids; kind: nifti, dicom-seg or nrrd. Errors: see `dicom_seg_bytes`.
    """
    if kind == "dicom-seg":
        return dicom_seg_bytes(volume, labels, classes, source)
    if kind == "nrrd":
        return nrrd_bytes(volume, labels, classes)
    return nifti_bytes(labels, volume)
