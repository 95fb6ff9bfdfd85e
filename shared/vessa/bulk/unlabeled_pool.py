"""The unlabeled images of a folder: candidates for what to annotate next."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import overload

from vessa.bulk.annotate import SUFFIXES, group_of
from vessa.client.types import Image
from vessa.datasets import Dataset, layout_of
from vessa.errors import InvalidDataset, VessaError
from vessa.file_kinds import is_dicom, is_nifti
from vessa.images import read_image
from vessa.volumes import Volume, read_volume
from vessa.volumes.files import read_head

_TOP = "."  # the group of a series in the topmost folder: its slices are one patient's
Skip = Callable[[str, VessaError], None]  # (name of a file, why it is no candidate)


@dataclass(frozen=True)
class Candidate:
    """An unlabeled image. name: for people; group: its patient, None where unknown; read: its pixels."""

    name: str
    group: str | None
    read: Callable[[], Image]


class Pixels(Sequence[Image]):
    """The images of candidates, read when they are asked for."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = candidates

    def __len__(self) -> int:
        return len(self._candidates)

    @overload
    def __getitem__(self, place: int) -> Image: ...
    @overload
    def __getitem__(self, place: slice) -> "Pixels": ...
    def __getitem__(self, place: int | slice) -> "Image | Pixels":
        if isinstance(place, slice):
            return Pixels(self._candidates[place])
        return self._candidates[place].read()


def find_candidates(
    folder: Path, *, by_folder: bool = False, split: str | None = None, skip: Skip
) -> Iterator[Candidate]:
    """Yield what can be read of a folder's unlabeled images.

    Of a data set (see `vessa.datasets`): the slices without a mask, by patient; split: only of these. Of any
    other folder, with all below it: PNG, JPEG and TIFF files, each for itself or, by_folder, by the folder it
    lies in; the slices of NIfTI files, by file; those of DICOM series, by folder. Raises InvalidDataset.
    """
    layout = layout_of(folder)
    if not folder.is_dir():
        raise InvalidDataset(f"no such folder: {folder}")
    if layout is None and split is not None:
        raise InvalidDataset(f"{folder} is no data set, and has no splits")
    if layout is not None and by_folder:
        raise InvalidDataset(f"{folder} is a data set that knows its patients; its folders are none")
    found = _of_files(folder, by_folder, skip) if layout is None else _of_dataset(layout(folder), split, skip)
    for candidate in found:
        try:
            candidate.read()
        except VessaError as error:
            skip(candidate.name, error)
            continue
        yield candidate


def _of_dataset(dataset: Dataset, split: str | None, skip: Skip) -> Iterator[Candidate]:
    groups = set(dataset.groups() if split is None else dataset.split(split))
    for item in dataset.slices():
        if item.group not in groups:
            continue
        try:
            unlabeled = dataset.mask(item) is None
        except VessaError as error:
            skip(item.name, error)
            continue
        if unlabeled:
            yield Candidate(item.name, item.group, partial(dataset.image, item))


def _of_files(folder: Path, by_folder: bool, skip: Skip) -> Iterator[Candidate]:
    series: set[Path] = set()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, parent = str(path.relative_to(folder)), str(path.parent.relative_to(folder))
        if path.suffix.lower() in SUFFIXES:
            yield Candidate(name, group_of(parent) if by_folder else None, partial(read_image, path))
            continue
        try:
            head = read_head(path)
            if is_nifti(head):
                yield from _of_volume(path, name)
            elif is_dicom(head) and path.parent not in series:
                series.add(path.parent)
                yield from _of_volume(path.parent, parent)
        except VessaError as error:
            skip(name, error)


def _of_volume(path: Path, name: str) -> Iterator[Candidate]:
    volume = _volume(path)
    axis = volume.axis()
    for index in range(volume.shape[axis]):
        yield Candidate(f"{name}:{index}", group_of(name) or _TOP, partial(_slice, path, axis, index))


def _slice(path: Path, axis: int, index: int) -> Image:
    return _volume(path).image(axis, index)


@lru_cache(maxsize=1)  # its slices are read one after another
def _volume(path: Path) -> Volume:
    return read_volume(path)
