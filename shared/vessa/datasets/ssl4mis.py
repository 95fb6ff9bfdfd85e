"""SSL4MIS HDF5: `data/slices/*.h5` (ACDC as UniMatch and its peers use it)."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.errors import InvalidDataset

_NAME = re.compile(r"(?P<group>[^_]+)(?P<frame>_frame\w+?)?_slice_(?P<index>\d+)")
_ACDC = {1: "right ventricle cavity", 2: "left ventricle myocardium", 3: "left ventricle cavity"}


def slices_folder(root: Path) -> Path | None:
    """Return the folder of slice files under `root`, or None."""
    for name in ("data/slices", "slices", "ACDC_training_slices"):
        if any((root / name).glob("*_slice_*.h5")):
            return root / name
    return None


class Ssl4mis(Dataset):
    """Slices as HDF5 files with `image` (H, W) float in [0, 1] and `label` (H, W) class ids.

    `patient001_frame01_slice_5.h5` is slice 5 of the case `patient001_frame01` of `patient001`.
    Images become uint8 by their case's own range, so that the slices of a volume stay comparable.
    """

    classes = _ACDC
    modality = "cine cardiac MRI short-axis"
    licence = "as its source: see the ACDC challenge"

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when it holds no slice files."""
        super().__init__(root)
        folder = slices_folder(self.root)
        if folder is None:
            raise InvalidDataset(f"{self.root} holds no data/slices/*_slice_*.h5")
        self._folder = folder
        self._ranges: dict[str, tuple[float, float]] = {}

    @cached_property
    def _cases(self) -> tuple[Case, ...]:
        cases: dict[str, list[Slice]] = {}
        for path in sorted(self._folder.glob("*.h5")):
            match = _NAME.fullmatch(path.stem)
            if match is None:
                raise InvalidDataset(f"{path.name} is not named <patient>_frame<NN>_slice_<number>.h5")
            case = match["group"] + (match["frame"] or "")
            cases.setdefault(case, []).append(Slice(path.stem, case, match["group"], int(match["index"])))
        return tuple(
            Case(name, items[0].group, tuple(sorted(items, key=lambda s: s.index)))
            for name, items in sorted(cases.items())
        )

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def _read(self, item: Slice, key: str) -> np.ndarray[Any, Any] | None:
        path = self._folder / f"{item.name}.h5"
        try:
            with h5py.File(path, "r") as file:
                return np.asarray(file[key]) if key in file else None
        except OSError as error:
            raise InvalidDataset(f"{path} is not a readable HDF5 file") from error

    def _range(self, item: Slice) -> tuple[float, float]:
        if item.case not in self._ranges:
            case = next(c for c in self._cases if c.name == item.case)
            arrays = [a for s in case.slices if (a := self._read(s, "image")) is not None]
            self._ranges[item.case] = (
                min(float(a.min()) for a in arrays),
                max(float(a.max()) for a in arrays),
            )
        return self._ranges[item.case]

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W)."""
        pixels = self._read(item, "image")
        if pixels is None:
            raise InvalidDataset(f"{item.name}.h5 has no dataset 'image'")
        low, high = self._range(item)
        return ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None where the file has no `label`."""
        labels = self._read(item, "label")
        return None if labels is None else labels.astype(np.uint8)

    def split(self, name_or_path: str | Path) -> tuple[str, ...]:
        """Read a split file; SSL4MIS's lists of slices or volumes count as their patients."""
        path = self.root / name_or_path
        if path.suffix == ".list" and path.is_file():
            names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
            groups = tuple(dict.fromkeys(n.split("_")[0] for n in names))
            unknown = set(groups) - self._known_groups
            if unknown:
                raise InvalidDataset(f"{path.name} names patients that are not here: {sorted(unknown)[:5]}")
            return groups
        return super().split(name_or_path)
