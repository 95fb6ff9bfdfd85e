"""Store one annotated example: pixels, mask, and the features and memories of both."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from vessa.schemas import TemplateInfo
from vessa_server.template_bank.index import Entry, blob_digest


@dataclass(frozen=True, eq=False)
class View:
    """Hold the networks' encoding of one square of a template.

    feature: (D,) float32 of unit norm; memories: class id -> (M, C) float16; window: (top, left, side)
    in px of the image, None for the square around all of it
    """

    feature: NDArray[np.float32]
    memories: dict[int, NDArray[np.float16]]
    window: tuple[int, int, int] | None = None


@dataclass(frozen=True, eq=False)
class Template:
    """Hold one annotated example with everything that retrieval and the segmenter need.

    image: (H, W) or (H, W, 3) uint8; mask: (H, W) uint8 class ids, 0 background
    classes: {id: name} of the classes in the mask; group: whose image it is (a patient)
    whole, close: the image as it is, and the part of it that shows the classes, None where that is not
    looked at; model: digest of the weights that made both
    """

    id: str
    group: str
    classes: dict[int, str]
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    whole: View
    model: str
    close: View | None = None

    @cached_property
    def layout(self) -> dict[int, float]:
        """Return the square root of each class's share of the closest view, by class id."""
        side = max(self.mask.shape)
        if self.close is not None and self.close.window is not None:
            side = self.close.window[2]
        return {key: math.sqrt((self.mask == key).sum()) / side for key in self.classes}

    def to_blob(self) -> bytes:
        """Return the template as safetensors bytes."""
        tensors = {"image": self.image, "mask": self.mask} | _tensors(self.whole, "")
        if self.close is not None:
            tensors |= _tensors(self.close, "close.")
        # One entry: several would be written in any order, and equal templates must give equal bytes.
        about = {"id": self.id, "group": self.group, "model": self.model, "classes": self.classes}
        return save_tensors(
            {k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"template": json.dumps(about)}
        )

    @classmethod
    def from_blob(cls, identity: str, entry: Entry, data: bytes) -> "Template":
        """Read what `to_blob` wrote. Raises ValueError when it is something else."""
        try:
            tensors = load_tensors(data)
            close = _view(tensors, "close.") if "close.feature" in tensors else None
            return cls(
                identity,
                entry.group,
                entry.classes,
                tensors["image"],
                tensors["mask"],
                _view(tensors, ""),
                entry.model,
                close,
            )
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"blob of template {identity} is not a template") from error

    def entry(self, blob: bytes) -> Entry:
        """Return the index entry of this template."""
        height, width = self.mask.shape
        return Entry(blob_digest(blob), self.group, self.classes, height, width, self.model, len(blob))

    def info(self, bank: str, *, created: bool = False) -> TemplateInfo:
        """Return the public description."""
        height, width = self.mask.shape
        return TemplateInfo(
            id=self.id,
            bank=bank,
            group=self.group,
            classes=self.classes,
            height=height,
            width=width,
            created=created,
        )


def template_id(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], classes: Mapping[int, str], group: str
) -> str:
    """Return the id of an annotated example, a digest of its content: adding it twice adds it once.

    image: (H, W) or (H, W, 3) uint8; mask: (H, W) uint8. Only the classes that the mask holds count.
    """
    present = {int(key): classes[int(key)] for key in np.unique(mask) if key}
    header = {"image": image.shape, "mask": mask.shape, "classes": sorted(present.items()), "group": group}
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    digest.update(np.ascontiguousarray(image).data)
    digest.update(np.ascontiguousarray(mask).data)
    return digest.hexdigest()


def _tensors(view: View, prefix: str) -> dict[str, NDArray[Any]]:
    named: dict[str, NDArray[Any]] = {f"{prefix}memory.{key}": value for key, value in view.memories.items()}
    named[f"{prefix}feature"] = view.feature
    if view.window is not None:
        named[f"{prefix}window"] = np.array(view.window, np.int32)
    return named


def _view(tensors: Mapping[str, NDArray[Any]], prefix: str) -> View:
    start = f"{prefix}memory."
    memories = {int(k.removeprefix(start)): v for k, v in tensors.items() if k.startswith(start)}
    window = tensors.get(f"{prefix}window")
    if window is None:
        return View(tensors[f"{prefix}feature"], memories)
    top, left, side = window.tolist()
    return View(tensors[f"{prefix}feature"], memories, (top, left, side))
