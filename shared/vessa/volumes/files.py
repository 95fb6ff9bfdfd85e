"""Volumes from files of any of the formats, and label volumes in the format that fits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vessa.errors import InvalidImage
from vessa.volumes.dicom import is_dicom, read_dicom
from vessa.volumes.dicom_seg import dicom_seg_bytes
from vessa.volumes.grid import Bounds, Source, Volume
from vessa.volumes.nifti import is_nifti, nifti_bytes, read_nifti

_HEAD = 4096


def read_head(source: Source) -> bytes:
    """Return the first bytes of a file, none of a folder. InvalidImage when it cannot be read."""
    if isinstance(source, Path) and source.is_dir():
        return b""
    if isinstance(source, bytes):
        return source[:_HEAD]
    try:
        with source.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        raise InvalidImage("the file cannot be read") from None


def is_volume(path: Path) -> bool:
    """Whether a path is a NIfTI or DICOM file, or a folder that holds DICOM files."""
    if path.is_dir():
        return bool(series_files(path))
    return path.is_file() and (is_nifti(head := read_head(path)) or is_dicom(head))


def series_files(folder: Path) -> list[Path]:
    """Return the DICOM files that lie in a folder, by name, without a directory of them (DICOMDIR)."""
    files = (p for p in sorted(folder.iterdir()) if p.is_file() and p.name.upper() != "DICOMDIR")
    return [p for p in files if is_dicom(read_head(p))]


def read_volume(source: Path | Sequence[Source], bounds: Bounds | None = None) -> Volume:
    """Read a NIfTI or DICOM file, a folder with the files of one DICOM series, or such files themselves.

    What they are is told by their first bytes and not by their names. InvalidImage, TooLarge.
    """
    bounds = bounds or Bounds()
    if isinstance(source, Path):
        source = series_files(source) if source.is_dir() else [source]
    if len(source) == 1 and is_nifti(read_head(source[0])):
        return read_nifti(source[0], bounds)
    if any(not is_dicom(read_head(one)) for one in source) or not source:
        raise InvalidImage("expected one NIfTI file (.nii, .nii.gz), or the DICOM files of one series")
    return read_dicom(source, bounds)


def write_labels(
    volume: Volume,
    labels: np.ndarray[Any, np.dtype[np.uint8]],
    classes: dict[int, str],
    source: str,
    kind: str,
) -> bytes:
    """Return a label volume on the grid of its image. kind: nifti or dicom-seg; labels: uint8 (I, J, K).

    Errors: see `dicom_seg_bytes`.
    """
    if kind == "dicom-seg":
        return dicom_seg_bytes(volume, labels, classes, source)
    return nifti_bytes(labels, volume.affine)
