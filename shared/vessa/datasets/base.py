"""One interface over every layout: cases of slices, classes, groups."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vessa.errors import InvalidDataset


@dataclass(frozen=True)
class Slice:
    """One image. name: unique in the data set; case: its volume; group: its patient; index: in the case."""

    name: str
    case: str
    group: str
    index: int


@dataclass(frozen=True)
class Case:
    """One volume, or one image that belongs to none. spacing: (z, y, x) mm, None where unknown."""

    name: str
    group: str
    slices: tuple[Slice, ...]
    spacing: tuple[float, float, float] | None = None


class Dataset(ABC):
    """A folder of images with masks for some or all of them.

    classes: id to name, without background 0; a group is a patient: never in two splits, never
    template and query at once.
    """

    classes: dict[int, str]
    modality: str = ""
    licence: str = ""

    def __init__(self, root: Path) -> None:
        """Open the data set at `root`."""
        self.root = Path(root)
        self.name = self.root.resolve().name

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
        """Read a split file: one group a line; a relative path is looked up in the data folder first.

        Raises InvalidDataset when there is no such file or it names an unknown group.
        """
        path = Path(name_or_path)
        candidates = [path] if path.is_absolute() else [self.root / path, path]
        found = next((p for p in candidates if p.is_file()), None)
        if found is None:
            raise InvalidDataset(
                f"no split file '{name_or_path}' in {self.root} or here: expected one group a line"
            )
        groups = tuple(dict.fromkeys(line.strip() for line in found.read_text().splitlines() if line.strip()))
        unknown = [g for g in groups if g not in self._known_groups]
        if unknown:
            raise InvalidDataset(f"{found.name} names groups that '{self.name}' does not hold: {unknown[:5]}")
        return groups
