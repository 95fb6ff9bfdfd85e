"""Folders of pictures: `images/`, `masks/` and `meta.json`, or files told apart by a pattern or a CSV."""

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.datasets.file_pattern import CSV, Entry, Listing, list_files
from vessa.errors import InvalidDataset, VessaError
from vessa.images import MAX_PIXELS, read_image
from vessa.masks.files import class_ids, decode_mask, read_classes, read_value_map

META = "meta.json"
ORPHAN = "orphan_mask"
OTHER = "left_out"
_log = logging.getLogger(__name__)


class PngFolder(Dataset):
    """Pictures (PNG, JPEG, TIFF) and their masks (PNG); names are told by `vessa.datasets.file_pattern`.

    meta.json: {"classes": {"0": "background", "1": ...}, "modality", "licence"}, and optionally "files"
    (patterns of names) and "values": {"255": "lesion", "1-20": "background"}, the meaning of stored mask
    values. With one class, masks of the values 0 and 255 show it. See `vessa.masks.files`.
    """

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when meta.json or the images are missing."""
        super().__init__(root)
        path = self.root / META
        try:
            meta = json.loads(path.read_text(encoding="utf-8-sig"))
            self.classes = read_classes({int(c): str(n) for c, n in meta["classes"].items()})
            values = meta.get("values")
            self._values = None if values is None else read_value_map(values, self.classes)
        except VessaError as error:
            raise InvalidDataset(f"{META} of '{self.name}': {error.message}") from error
        except UnicodeDecodeError as error:
            raise InvalidDataset(
                f"{META} of '{self.name}' is not in UTF-8; save it in that encoding"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataset(
                f'{META} of \'{self.name}\' must hold {{"classes": {{"0": "background", "1": "..."}}}}'
            ) from error
        self.modality, self.licence = str(meta.get("modality", "")), str(meta.get("licence", ""))
        self._meta = meta
        if not self.listing.entries:
            raise InvalidDataset(
                f"'{self.name}' holds no PNG, JPEG or TIFF images by the names {self.listing.pattern}"
            )

    @cached_property
    def listing(self) -> Listing:
        """The files, the pattern by which they were told apart, and those that fit nothing."""
        return list_files(self.root, self._meta)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.listing.entries}

    @cached_property
    def _cases(self) -> tuple[Case, ...]:
        cases: dict[str, list[Slice]] = {}
        for entry in sorted(self.listing.entries, key=lambda e: e.name):
            item = Slice(entry.name, entry.case, entry.group, entry.index)
            cases.setdefault(entry.case, []).append(item)
        return tuple(
            Case(name, items[0].group, tuple(sorted(items, key=lambda s: s.index)))
            for name, items in sorted(cases.items())
        )

    def leftovers(self) -> tuple[tuple[str, str], ...]:
        """Return (file name, why) of masks without an image and of files that are no pictures."""
        orphans = [(path.name, ORPHAN) for path in self.listing.orphans]
        return (*orphans, *((path.name, OTHER) for path in self.listing.others))

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W) or (H, W, 3)."""
        return read_picture(self._entries[item.name].image)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W), 255 for pixels to ignore; None where there is no mask file."""
        path = self._entries[item.name].mask
        if path is None:
            return None
        formats = ("PNG",) if self._values is None else ("PNG", "JPEG", "BMP", "TIFF")
        try:
            values = decode_mask(path.read_bytes(), MAX_PIXELS, f"the mask {path.name}", formats=formats)
            return class_ids(values, self.classes, self._values, f"the mask {path.name}")
        except OSError as error:
            raise InvalidDataset(f"the mask {path.name} cannot be read: {error.strerror}") from error
        except VessaError as error:
            raise InvalidDataset(error.message) from error


def is_picture_folder(root: Path) -> bool:
    """Tell whether a folder is described by a meta.json of this layout."""
    if not (root / META).is_file():
        return False
    if (root / "images").is_dir() or (root / CSV).is_file():
        return True
    try:
        return "files" in json.loads((root / META).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, TypeError):
        return False


def read_picture(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a picture of a data set as `vessa.images.read_image` does; InvalidDataset."""
    try:
        return read_image(path)
    except VessaError as error:
        raise InvalidDataset(error.message) from error
