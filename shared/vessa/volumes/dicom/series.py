"""Find the DICOM series below a folder, and say what was left out."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom

from vessa.errors import InvalidImage, InvalidRequest, VessaError
from vessa.file_kinds import HEAD, kind_of
from vessa.volumes.dicom.reader import open_dicom

_KINDS = ("DICOM", "DICOM without preamble", "gzip of a DICOM", "gzip of a DICOM without preamble")
_TAGS = ["SeriesInstanceUID", "SeriesNumber", "Modality", "Rows", "Columns"]
_OTHER_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".txt", ".json", ".csv", ".xml", ".html", ".h5"}
_SHOWN = 3  # names of files in one note


@dataclass(frozen=True)
class Series:
    """One DICOM series. files: by name; folder: of the first of them, within the folder searched."""

    uid: str
    folder: str
    files: tuple[Path, ...]
    modality: str
    number: str
    size: tuple[int, int]

    def __str__(self) -> str:
        """Describe the series without a patient's data."""
        rows, columns = self.size
        number = f", series number {self.number}" if self.number else ""
        return f"{len(self.files)} files, {self.modality}{number}, {rows} x {columns}, in {self.folder}"


@dataclass(frozen=True)
class DicomFolder:
    """What lies below a folder.

    left_out: (path, why) of files that are no DICOM image; damaged: of files that look as if they should be.
    """

    series: tuple[Series, ...]
    left_out: tuple[tuple[Path, str], ...]
    damaged: tuple[tuple[Path, str], ...]


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file; InvalidImage when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        raise InvalidImage(f"{path.name} cannot be read") from None


def has_dicom(folder: Path) -> bool:
    """Tell whether any file below a folder is DICOM; reads until the first one."""
    for path in _files(folder):
        if path.suffix.lower() in _OTHER_SUFFIXES or path.name.upper() == "DICOMDIR":
            continue
        try:
            if kind_of(head_of(path)) in _KINDS:
                return True
        except VessaError:
            continue
    return False


def find_series(folder: Path) -> DicomFolder:
    """Find all DICOM series below a folder, sorted by folder, number and UID."""
    groups: dict[str, list[tuple[Path, pydicom.Dataset]]] = {}
    left_out: list[tuple[Path, str]] = []
    damaged: list[tuple[Path, str]] = []
    for path in _files(folder):
        if path.name.upper() == "DICOMDIR":
            continue
        try:
            kind = kind_of(head_of(path))
            if kind not in _KINDS:
                bad = not kind and path.suffix.lower() not in _OTHER_SUFFIXES
                why = "empty" if path.stat().st_size == 0 else kind or "of an unknown kind"
                (damaged if bad or why == "empty" else left_out).append((path, why))
                continue
            header = _header(path)
        except VessaError as error:
            damaged.append((path, error.message))
            continue
        if "Rows" not in header:
            left_out.append((path, f"DICOM without an image ({str(header.get('Modality', 'none'))[:16]})"))
            continue
        groups.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    series = [_series(uid, members, folder) for uid, members in groups.items()]
    series.sort(key=lambda one: (one.folder, one.number.zfill(12), one.uid))
    return DicomFolder(tuple(series), tuple(left_out), tuple(damaged))


def series_files(folder: Path, series: int | None = None) -> tuple[list[Path], list[str]]:
    """Return the files of the one DICOM series below a folder, and notes on the files left out.

    series: place of one of several in the list that the error shows, from 1. Raises InvalidImage without any
    series or with damaged files beside it, InvalidRequest when there are several and none was chosen.
    """
    found = find_series(folder)
    name = folder.resolve().name
    if not found.series:
        if found.damaged:
            raise InvalidImage(f"'{name}' holds no readable DICOM image: {_listed(found.damaged)}")
        raise InvalidImage(f"'{name}' holds no DICOM files, nor do the folders below it")
    if series is None and len(found.series) > 1:
        raise InvalidRequest(
            f"'{name}' holds {len(found.series)} DICOM series; choose one by its number (--series N):\n"
            + "\n".join(f"  {place}: {one}" for place, one in enumerate(found.series, 1))
        )
    if series is not None and not 1 <= series <= len(found.series):
        raise InvalidRequest(f"there is no series {series}: '{name}' holds {len(found.series)} DICOM series")
    chosen = found.series[(series or 1) - 1]
    homes = {path.parent for path in chosen.files}
    beside = [(path, why) for path, why in found.damaged if path.parent in homes]
    if beside:
        raise InvalidImage(
            f"{len(beside)} of {len(beside) + len(chosen.files)} files beside this series cannot be "
            "read as DICOM: "
            f"{_listed(beside)}. Copy the folder again, or move these files out of it"
        )
    ignored = [(path, why) for path, why in (*found.left_out, *found.damaged)]
    notes = (
        [f"{len(ignored)} files are no DICOM images and were left out: {_listed(ignored)}"] if ignored else []
    )
    return list(chosen.files), notes


def _listed(files: "list[tuple[Path, str]] | tuple[tuple[Path, str], ...]") -> str:
    shown = ", ".join(f"{path.name} ({why})" for path, why in files[:_SHOWN])
    kinds = Counter(why for _, why in files[_SHOWN:])
    rest = ", ".join(f"{count} more ({why})" for why, count in kinds.most_common(_SHOWN))
    return f"{shown}, {rest}" if rest else shown


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _header(path: Path) -> pydicom.Dataset:
    try:
        with open_dicom(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
            for element in header:  # decode the values now
                _ = element.value
            return header
    except VessaError:
        raise
    except Exception:  # pydicom fails in many ways on damaged bytes
        raise InvalidImage("its DICOM header is damaged or cut off") from None


def _series(uid: str, members: list[tuple[Path, pydicom.Dataset]], folder: Path) -> Series:
    first = members[0][1]

    def number(name: str) -> int:
        value = str(first.get(name) or "0")
        return int(value) if value.isdigit() else 0

    return Series(
        uid,
        str(members[0][0].parent.relative_to(folder)),
        tuple(path for path, _ in members),
        str(first.get("Modality") or "no modality")[:16],
        str(first.get("SeriesNumber") or "")[:12],
        (number("Rows"), number("Columns")),
    )
