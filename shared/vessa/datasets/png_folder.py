"""PNG folders: `images/<group>_<slice>.png`, `masks/<same name>.png`, `meta.json`."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa.datasets.base import Case, Dataset, Slice
from vessa.errors import InvalidDataset

_NAME = re.compile(r"(?P<group>.+?)(?P<frame>_frame\w+?)?_(?P<index>\d+)")


class PngFolder(Dataset):
    """Images and masks as PNG files.

    `patient001_frame01_05.png` is slice 5 of the case `patient001_frame01` of the group
    `patient001`; without a frame the case is the group. A name without a number is its own group.
    meta.json: {"classes": {"0": "background", "1": ...}, "modality", "licence"}
    """

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when meta.json or the images are missing."""
        super().__init__(root)
        try:
            meta = json.loads((self.root / "meta.json").read_text())
            self.classes = {int(c): str(n) for c, n in meta["classes"].items() if int(c) != 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataset(
                f'{self.root / "meta.json"} must hold {{"classes": {{"0": "background", "1": "..."}}}}'
            ) from error
        self.modality, self.licence = str(meta.get("modality", "")), str(meta.get("licence", ""))
        if not any((self.root / "images").glob("*.png")):
            raise InvalidDataset(f"{self.root / 'images'} holds no PNG file")

    @cached_property
    def _cases(self) -> tuple[Case, ...]:
        cases: dict[str, list[Slice]] = {}
        for path in sorted((self.root / "images").glob("*.png")):
            match = _NAME.fullmatch(path.stem)
            group = match["group"] if match else path.stem
            case = group + (match["frame"] or "") if match else path.stem
            item = Slice(path.stem, case, group, int(match["index"]) if match else 0)
            cases.setdefault(case, []).append(item)
        return tuple(
            Case(name, items[0].group, tuple(sorted(items, key=lambda s: s.index)))
            for name, items in sorted(cases.items())
        )

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W) or (H, W, 3)."""
        return read_png(self.root / "images" / f"{item.name}.png", color=True)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None where there is no mask file."""
        path = self.root / "masks" / f"{item.name}.png"
        return read_png(path, color=False) if path.is_file() else None


def read_png(path: Path, *, color: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read uint8 (H, W) or, when `color`, also (H, W, 3). Raises InvalidDataset.

    A palette's indices are the class ids of a mask. 16-bit files are refused: which range of theirs
    should fill 8 bits is a choice for the whole volume, and its owner's.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode == "L" or (image.mode == "P" and not color):
                return np.array(image, dtype=np.uint8)
            if not color or image.mode.startswith(("I", "F")):
                wanted = "8-bit gray or color" if color else "8-bit gray with class ids"
                raise InvalidDataset(f"{path} has the PNG mode {image.mode}; expected {wanted}")
            return np.array(image.convert("L" if image.mode in ("1", "LA") else "RGB"), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidDataset(f"{path} is not a readable PNG file") from error
