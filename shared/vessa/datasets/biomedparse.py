"""BiomedParse: `train/`, `train_mask/`, `test/`, `test_mask/` with one binary mask a target."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.datasets.png_folder import read_picture
from vessa.datasets.registry import recognize
from vessa.errors import InvalidDataset

_PARTS = ("train", "test")
_GROUPS_FILE = "groups.json"


def group_of(identity: str) -> tuple[str, int]:
    """Return the group and the slice number that an image's id means.

    The id is read up to the first of its parts with a digit: that names the subject, and the last
    number after it the slice. `amos_0004_12` is slice 12 of `amos_0004`, `LIDC-IDRI-0140_143_280`
    slice 280 of `LIDC-IDRI-0140`, `patient001_frame01_5` slice 5 of `patient001`; `covid_1585` is a
    group of its own. Rather too coarse than too fine: two groups never share a subject.
    """
    match = re.match(r"(?:[^_\d]+_)*[^_]*\d[^_]*", identity)
    if match is None:
        return identity, 0
    numbers = re.findall(r"_(\d+)(?=_|$)", identity[match.end() :])
    return match[0], int(numbers[-1]) if numbers else 0


class BiomedParse(Dataset):
    """Images `<id>_<modality>_<site>.png`, masks `<id>_<modality>_<site>_<target>.png`.

    Targets are joined by "+" where they have several words. Class ids are the targets' places in the
    alphabet. The group follows from the id by `group_of`; where that does not fit a collection, a file
    `groups.json` {image name without .png: group} says otherwise. Where masks overlap the smaller one
    wins, since a part lies within its whole. Splits are "train" and "test", or split files. The
    licence is that of the registered collection whose folder name this one has.
    """

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when it holds no image, or masks without one."""
        super().__init__(root)
        if not self._images:
            raise InvalidDataset(f"{self.root} holds no PNG files in train/ or test/")
        sample = next(iter(self._images))
        self.modality = " ".join(sample.split("_")[-2:])
        entry = recognize(self.root)
        self.licence = "" if entry is None else entry.licence
        targets = sorted({t for targets in self._targets.values() for t in targets})
        if len(targets) > 254:
            raise InvalidDataset(f"{self.root} holds {len(targets)} targets; a label map has room for 254")
        self.classes = {i: t.replace("+", " ") for i, t in enumerate(targets, 1)}
        self._ids = {t: i for i, t in enumerate(targets, 1)}

    @cached_property
    def _images(self) -> dict[str, Path]:
        images: dict[str, Path] = {}
        for path in (p for part in _PARTS for p in sorted((self.root / part).glob("*.png"))):
            if path.stem in images:
                raise InvalidDataset(f"{path.name} is in train/ and in test/")
            if path.stem.count("_") < 2:
                raise InvalidDataset(f"{path.name} is not named <id>_<modality>_<site>.png")
            images[path.stem] = path
        return images

    @cached_property
    def _targets(self) -> dict[str, dict[str, Path]]:
        targets: dict[str, dict[str, Path]] = {}
        for path in (p for part in _PARTS for p in sorted((self.root / f"{part}_mask").glob("*.png"))):
            image, _, target = path.stem.rpartition("_")
            if image not in self._images:
                raise InvalidDataset(f"{path.name} is a mask of {image}.png, which is not there")
            targets.setdefault(image, {})[target] = path
        return targets

    @cached_property
    def _stated_groups(self) -> dict[str, str]:
        path = self.root / _GROUPS_FILE
        if not path.is_file():
            return {}
        try:
            return {
                str(image): str(group)
                for image, group in json.loads(path.read_text(encoding="utf-8-sig")).items()
            }
        except (OSError, ValueError, AttributeError) as error:
            raise InvalidDataset(f"{path} must hold {{image name: group}} as JSON") from error

    @cached_property
    def _cases(self) -> tuple[Case, ...]:
        cases: dict[str, list[Slice]] = {}
        for name in sorted(self._images):
            group, index = group_of(name.rsplit("_", 2)[0])
            group = self._stated_groups.get(name, group)
            cases.setdefault(group, []).append(Slice(name, group, group, index))
        return tuple(Case(g, g, tuple(sorted(s, key=lambda i: i.index))) for g, s in sorted(cases.items()))

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W) or (H, W, 3)."""
        return read_picture(self._images[item.name])

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None where no target is annotated."""
        targets = self._targets.get(item.name)
        if not targets:
            return None
        binary = {t: read_picture(p) for t, p in targets.items()}
        flat = {t: (m if m.ndim == 2 else m.max(-1)) > 0 for t, m in binary.items()}
        sizes = {t: m.shape for t, m in flat.items()}
        if len(set(sizes.values())) > 1:
            raise InvalidDataset(f"the masks of {item.name} differ in size: {sizes}")
        labels = np.zeros(next(iter(flat.values())).shape, np.uint8)
        for target in sorted(flat, key=lambda t: -int(flat[t].sum())):
            labels[flat[target]] = self._ids[target]
        return labels

    def has_split(self, name_or_path: str | Path) -> bool:
        """Tell whether `split` would find patients."""
        if str(name_or_path) in _PARTS:
            return any((self.root / str(name_or_path)).glob("*.png"))
        return super().has_split(name_or_path)

    def split(self, name_or_path: str | Path) -> tuple[str, ...]:
        """Return the groups of "train" or "test", or read a split file."""
        if str(name_or_path) in _PARTS:
            part = self.root / str(name_or_path)
            return tuple(
                sorted(
                    {c.group for c in self._cases for s in c.slices if self._images[s.name].parent == part}
                )
            )
        return super().split(name_or_path)
