"""BiomedParse: `train/`, `train_mask/`, `test/`, `test_mask/` with one binary mask a target."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.datasets.png_folder import read_png
from vessa.errors import InvalidDataset


class BiomedParse(Dataset):
    """Images `<id>_<modality>_<site>.png`, masks `<id>_<modality>_<site>_<target>.png`.

    Targets are joined by "+" where they have several words. Class ids are the targets' places in the
    alphabet. The group is the id up to its last number when it has several parts (`amos_0004_12` is
    slice 12 of the group `amos_0004`), else the whole id. Where masks overlap the smaller one wins,
    since a part lies within its whole. Splits are "train" and "test".
    """

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when it holds no image."""
        super().__init__(root)
        if not self._images:
            raise InvalidDataset(f"{self.root} holds no PNG files in train/ or test/")
        sample = next(iter(self._images))
        self.modality = " ".join(sample.split("_")[-2:])
        targets = sorted({t for targets in self._targets.values() for t in targets})
        self.classes = {i: t.replace("+", " ") for i, t in enumerate(targets, 1)}
        self._ids = {t: i for i, t in enumerate(targets, 1)}

    @cached_property
    def _images(self) -> dict[str, Path]:
        return {p.stem: p for part in ("train", "test") for p in sorted((self.root / part).glob("*.png"))}

    @cached_property
    def _targets(self) -> dict[str, dict[str, Path]]:
        targets: dict[str, dict[str, Path]] = {}
        for part in ("train", "test"):
            for path in sorted((self.root / f"{part}_mask").glob("*.png")):
                image, _, target = path.stem.rpartition("_")
                if image not in self._images:
                    raise InvalidDataset(f"{path.name} is a mask of {image}.png, which is not there")
                targets.setdefault(image, {})[target] = path
        return targets

    @cached_property
    def _cases(self) -> tuple[Case, ...]:
        cases: dict[str, list[Slice]] = {}
        for name in sorted(self._images):
            identity = name.rsplit("_", 2)[0]
            match = re.fullmatch(r"(.+_.*\d.*)_(\d+)", identity)
            group, index = (match[1], int(match[2])) if match else (identity, 0)
            cases.setdefault(group, []).append(Slice(name, group, group, index))
        return tuple(Case(g, g, tuple(sorted(s, key=lambda i: i.index))) for g, s in sorted(cases.items()))

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W) or (H, W, 3)."""
        return read_png(self._images[item.name], color=True)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None where no target is annotated."""
        targets = self._targets.get(item.name)
        if not targets:
            return None
        binary = {t: read_png(p, color=True) for t, p in targets.items()}
        flat = {t: (m if m.ndim == 2 else m.max(-1)) > 0 for t, m in binary.items()}
        labels = np.zeros(next(iter(flat.values())).shape, np.uint8)
        for target in sorted(flat, key=lambda t: -int(flat[t].sum())):
            labels[flat[target]] = self._ids[target]
        return labels

    def split(self, name_or_path: str | Path) -> tuple[str, ...]:
        """Return the groups of "train" or "test", or read a split file."""
        if str(name_or_path) in ("train", "test"):
            part = self.root / str(name_or_path)
            return tuple(
                sorted(
                    {c.group for c in self._cases for s in c.slices if self._images[s.name].parent == part}
                )
            )
        return super().split(name_or_path)
