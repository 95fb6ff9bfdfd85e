"""Define the interface of all data set readers: cases of slices, classes, groups."""

import unicodedata
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vessa.errors import InvalidDataset
from vessa.masks.files import IGNORE

__all__ = ["IGNORE", "Case", "Dataset", "Slice"]


@dataclass(frozen=True)
class Slice:
    """Identify one image. name: unique in the data set; case: volume; group: patient; index: in the case."""

    name: str
    case: str
    group: str
    index: int


@dataclass(frozen=True)
class Case:
    """Identify a volume, or an image without a volume. spacing: (z, y, x) mm, None where unknown."""

    name: str
    group: str
    slices: tuple[Slice, ...]
    spacing: tuple[float, float, float] | None = None


class Dataset(ABC):
    """Read a folder of images with masks for some or all of them.

    A group is a patient. It belongs to one split at most, and it is never template and query at once.

    classes: id to name, without background 0
    """

    classes: dict[int, str]
    modality: str = ""
    licence: str = ""

    def __init__(self, root: Path) -> None:
        """Open the data set at `root`."""
        self.root = Path(root)
        self.name = self.root.resolve().name

    def leftovers(self) -> tuple[tuple[str, str], ...]:
        """Return (file name, reason) of unused files: masks without an image and files of other kinds."""
        return ()

    @abstractmethod
    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""

    @abstractmethod
    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W) or (H, W, 3)."""

    @abstractmethod
    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None where the image is not annotated."""

    def slices(self) -> tuple[Slice, ...]:
        """Return all slices, case by case."""
        return tuple(s for case in self.cases() for s in case.slices)

    def groups(self) -> tuple[str, ...]:
        """Return the names of all groups, sorted."""
        return tuple(sorted({case.group for case in self.cases()}))

    @cached_property
    def _known_groups(self) -> frozenset[str]:
        return frozenset(self.groups())

    def split(self, name_or_path: str | Path) -> tuple[str, ...]:
        """Read a split file: one group per line.

        A relative path is looked up in the data folder first, then here; a bare name such as `test`
        also means `splits/test.txt` of the data folder. Raises InvalidDataset when there is no such
        file or it names an unknown group.
        """
        found = next((p for p in self._split_files(Path(name_or_path)) if p.is_file()), None)
        if found is None:
            raise InvalidDataset(
                f"No split file '{name_or_path}' in {self.root} or here. Write one with one group per line."
            )
        try:
            lines = [line.strip() for line in found.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidDataset(f"{found} is not a readable text file.") from error
        # macOS writes names in another Unicode form than editors do.
        known = {unicodedata.normalize("NFC", group): group for group in self._known_groups}
        entries = (self._split_entry(line) for line in lines if line)
        groups = tuple(dict.fromkeys(known.get(unicodedata.normalize("NFC", e), e) for e in entries))
        unknown = [g for g in groups if g not in self._known_groups]
        if unknown:
            raise InvalidDataset(f"{found.name} names groups that '{self.name}' does not have: {unknown[:5]}")
        return groups

    def has_split(self, name_or_path: str | Path) -> bool:
        """Return whether `split` would find a file."""
        return any(p.is_file() for p in self._split_files(Path(name_or_path)))

    def _split_files(self, path: Path) -> list[Path]:
        """Return the possible places of a split file, in the order of search."""
        if path.is_absolute():
            return [path]
        return [self.root / path, self.root / "splits" / path, self.root / "splits" / f"{path}.txt", path]

    def _split_entry(self, line: str) -> str:
        """Return the group that a line of a split file names."""
        return line
