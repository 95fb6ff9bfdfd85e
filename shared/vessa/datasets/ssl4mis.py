"""SSL4MIS HDF5: `data/slices/*.h5`, `data/*.h5` volumes (ACDC as UniMatch and its peers use it)."""

import json
import logging
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vessa.datasets.base import IGNORE, Case, Dataset, Slice
from vessa.errors import InvalidDataset, UnknownClass, VessaError
from vessa.masks.files import check_background, class_ids

_SLICE = re.compile(r"(?P<case>(?P<group>.+?)(_frame[^_]+)?)_slice_(?P<index>\d+)")
_VOLUME = re.compile(r"(?!.*_slice_\d+$)(?P<case>(?P<group>.+?)(_frame[^_]+)?)")
_ACDC = {1: "right ventricle cavity", 2: "left ventricle myocardium", 3: "left ventricle cavity"}
_ACDC_CASE = re.compile(r"patient\d{3}_frame\d+")
_log = logging.getLogger(__name__)


def slices_folder(root: Path) -> Path | None:
    """Return the folder of slice files under `root`, or None."""
    for name in ("data/slices", "slices", "ACDC_training_slices"):
        if any((root / name).glob("*_slice_*.h5")):
            return root / name
    return None


def volumes_folder(root: Path) -> Path | None:
    """Return the folder of volume files under `root`, or None."""
    for name in ("data", "volumes", "ACDC_training_volumes"):
        if any(_VOLUME.fullmatch(p.stem) for p in (root / name).glob("*.h5")):
            return root / name
    return None


class Ssl4mis(Dataset):
    """HDF5 files with `image` (H, W) or (D, H, W), float in [0, 1], and `label` of the same shape.

    `patient001_frame01_slice_5.h5` is slice 5 of the case `patient001_frame01` of `patient001`;
    `patient001_frame01.h5` is the whole case. The copy that the field shares has slices of the
    training patients and volumes of all: a case is read from its slices where it has them. Images
    become uint8 by their case's own range, so that the slices of a volume stay comparable.

    meta.json names the classes: {"classes": {"0": "background", "1": ...}, "modality", "licence"}. Without it
    a folder whose cases are named as ACDC's has ACDC's classes; in any other the ids found in the labels are
    called "class 1" and so on, with a warning.
    """

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when it holds no slice or volume files."""
        super().__init__(root)
        self._slices, self._volumes = slices_folder(self.root), volumes_folder(self.root)
        if self._slices is None and self._volumes is None:
            raise InvalidDataset(f"{self.root} holds neither data/slices/*_slice_*.h5 nor data/*.h5")
        self._ranges: dict[str, tuple[float, float]] = {}
        self.classes = {}
        self._name_classes()

    def _name_classes(self) -> None:
        path = self.root / "meta.json"
        if path.is_file():
            try:
                meta = json.loads(path.read_text(encoding="utf-8-sig"))
                stated = {int(c): str(n) for c, n in meta["classes"].items()}
                check_background(stated)
                self.classes = {number: name for number, name in stated.items() if number != 0}
            except UnknownClass as error:
                raise InvalidDataset(f"{path}: {error.message}") from error
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidDataset(
                    f'{path} must hold {{"classes": {{"0": "background", "1": "..."}}}}'
                ) from error
            self.modality, self.licence = str(meta.get("modality", "")), str(meta.get("licence", ""))
        elif all(_ACDC_CASE.fullmatch(name) for name in self._cases):
            self.classes = dict(_ACDC)
            self.modality = "cine cardiac MRI short-axis"
            self.licence = "as its source: see the ACDC challenge"
        else:
            self.classes = {i: f"class {i}" for i in self._ids_in_labels()}
            example = {"classes": {"0": "background", **{str(i): n for i, n in self.classes.items()}}}
            names = ", ".join(self.classes.values())
            text = "'%s' names no classes: the ids in its labels are called %s. Name them in %s: %s"
            _log.warning(text, self.name, names, path.name, json.dumps(example))

    def _ids_in_labels(self) -> list[int]:
        """Return the ids above 0 that occur in some label, sorted."""
        found: set[int] = set()
        for case in self._cases.values():
            for item in case.slices:
                with suppress(InvalidDataset):  # `verify` names the file
                    mask = self.mask(item)
                    found |= set() if mask is None else set(np.unique(mask).tolist())
        return sorted(found - {0, IGNORE})

    @cached_property
    def _cases(self) -> dict[str, Case]:
        cases: dict[str, list[Slice]] = {}
        for path in sorted(self._slices.glob("*.h5")) if self._slices else ():
            match = _SLICE.fullmatch(path.stem)
            if match is None:
                raise InvalidDataset(f"{path.name} is not named <patient>_slice_<number>.h5")
            item = Slice(path.stem, match["case"], match["group"], int(match["index"]))
            cases.setdefault(item.case, []).append(item)
        for path in sorted(self._volumes.glob("*.h5")) if self._volumes else ():
            match = _VOLUME.fullmatch(path.stem)
            if match is not None and match["case"] not in cases:
                depth = self._depth(path)
                cases[path.stem] = [
                    Slice(f"{path.stem}_slice_{z}", path.stem, match["group"], z) for z in range(depth)
                ]
        return {
            name: Case(name, items[0].group, tuple(sorted(items, key=lambda s: s.index)))
            for name, items in sorted(cases.items())
        }

    @staticmethod
    def _depth(path: Path) -> int:
        try:
            with h5py.File(path, "r") as file:
                shape = file["image"].shape
        except (OSError, KeyError, AttributeError) as error:
            raise InvalidDataset(f"{path} is not an HDF5 file with a dataset 'image'") from error
        if len(shape) != 3:
            raise InvalidDataset(f"{path} holds an image of shape {shape}; a volume is (D, H, W)")
        return int(shape[0])

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return tuple(self._cases.values())

    def _read(self, item: Slice, key: str) -> np.ndarray[Any, Any] | None:
        """Return one slice (H, W) of `image` or `label`; None when the file has no such dataset."""
        path = (self._slices or self.root) / f"{item.name}.h5"
        whole = self._volumes is not None and not path.is_file()
        if whole:
            path = (self._volumes or self.root) / f"{item.case}.h5"
        try:
            with h5py.File(path, "r") as file:
                if key not in file:
                    return None
                array = np.asarray(file[key][item.index] if whole else file[key])
        except (OSError, ValueError, IndexError) as error:
            raise InvalidDataset(f"{path} is not a readable HDF5 file with {item.name}") from error
        if array.ndim != 2 or array.size == 0:
            raise InvalidDataset(
                f"{path} holds '{key}' of shape {array.shape} for one slice; expected (H, W)"
            )
        return array

    def _pixels(self, item: Slice) -> np.ndarray[Any, Any]:
        pixels = self._read(item, "image")
        if pixels is None:
            raise InvalidDataset(f"the file of {item.name} has no dataset 'image'")
        if not np.isfinite(pixels).all():
            raise InvalidDataset(f"{item.name} holds pixels that are not finite")
        return pixels

    def _range(self, case: str) -> tuple[float, float]:
        if case not in self._ranges:
            arrays = [self._pixels(s) for s in self._cases[case].slices]
            self._ranges[case] = min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays)
        return self._ranges[case]

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W)."""
        pixels = self._pixels(item)
        low, high = self._range(item.case)
        return ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None where the file has no `label`."""
        labels = self._read(item, "label")
        if labels is None:
            return None
        try:
            return class_ids(labels, self.classes, what=f"the label of {item.name}")
        except VessaError as error:
            raise InvalidDataset(error.message) from error

    def _split_files(self, path: Path) -> list[Path]:
        """SSL4MIS's own lists too: `train` means train_slices.list, `val` val.list."""
        lists = (
            [] if path.is_absolute() else [self.root / f"{path}{end}" for end in ("_slices.list", ".list")]
        )
        return [*super()._split_files(path), *lists]

    def _split_entry(self, line: str) -> str:
        """A slice or a volume in SSL4MIS's lists means its patient."""
        name = line.removesuffix(".h5")
        match = _SLICE.fullmatch(name) or _VOLUME.fullmatch(name)
        return match["group"] if match is not None else name
