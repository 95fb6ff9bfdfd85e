"""Find the unlabeled images of a folder: the candidates that `vessa suggest` ranks."""

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

_TOP = "."  # the group of a series in the top folder: its slices belong to one patient
Skip = Callable[[str, VessaError], None]  # (name of a file, why it is skipped)


@dataclass(frozen=True)
class Candidate:
    """An unlabeled image. name: to print; group: its patient, None if unknown; read: returns the pixels."""

    name: str
    group: str | None
    read: Callable[[], Image]


class Pixels(Sequence[Image]):
    """The images of candidates as a sequence that reads an image when it is indexed."""

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
    """Yield the readable unlabeled images of a folder.

    From a data set (see `vessa.datasets`): slices without a mask, grouped by patient. From any other folder
    and its subfolders: PNG, JPEG and TIFF files, ungrouped; slices of NIfTI files, grouped by file; slices of
    DICOM series, grouped by folder.

    by_folder: group image files by their folder; split: only the patients of this split file of a data set;
    skip: called with the name and the error of each file that cannot be read
    Raises InvalidDataset when the folder does not exist or an option does not fit it.
    """
    layout = layout_of(folder)
    if not folder.is_dir():
        raise InvalidDataset(f"the folder {folder} does not exist")
    if layout is None and split is not None:
        raise InvalidDataset(f"{folder} is not a data set and has no splits: leave out --split")
    if layout is not None and by_folder:
        raise InvalidDataset(f"{folder} is a data set with patient names: leave out --by-folder")
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


@lru_cache(maxsize=1)  # the slices of a volume are read one after another
def _volume(path: Path) -> Volume:
    return read_volume(path)
