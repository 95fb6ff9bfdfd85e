"""Views of images: encode a square of an image once and cache what the networks computed of it.

The features of a view serve every later request on its image. Its conditioned features serve every later
request that differs in prompts only.
"""

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vessa_server.model.geometry import Square, Window, to_tensor
from vessa_server.model.segmenter import ImageFeatures
from vessa_server.model.vessa import Vessa
from vessa_server.observability.stage_timer import StageTimer

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in px of the image

_ZOOMED_VIEWS = 4  # cached per image, so that prompts that move around do not fill the memory
_SEGMENTERS = 4  # whose views of an image are cached


@dataclass(frozen=True)
class FirstPass:
    """The result of a first pass.

    box: around all classes, in px of the image, None when no class was found
    areas: px of the image that each class id covers
    """

    box: Box | None
    areas: dict[int, float]

    def layout(self, window: Window) -> dict[int, float] | None:
        """Return the root of each class's share of a window, as `Template.layout`; None without classes."""
        if self.box is None:
            return None
        return {key: math.sqrt(area) / window.side for key, area in self.areas.items()}


@dataclass(frozen=True)
class ConditionedFeatures:
    """An image view conditioned on the templates of one class; the mask decoder adds only the prompts.

    embedding: (1, C, h, w), after memory attention; h_seg: (1, C), None without a language model
    """

    embedding: Tensor
    h_seg: Tensor | None


@dataclass
class ImageView:
    """A square of an image, the whole or a zoomed part, as the networks saw it.

    image: uint8 (H, W[, 3]), always the whole image; pixels: (1, 3, S, S) in [0, 1], the square
    vector: (D,) float32 of unit norm, the retrieval feature
    conditioned: by class and templates; first_passes: by what a first pass depends on, see `Query`
    zoomed: views of parts of the image, by window
    """

    image: np.ndarray
    square: Square
    pixels: Tensor
    features: ImageFeatures
    vector: np.ndarray
    conditioned: dict[Hashable, ConditionedFeatures] = field(default_factory=dict)
    first_passes: dict[Hashable, FirstPass] = field(default_factory=dict)
    zoomed: "OrderedDict[Window, ImageView]" = field(default_factory=OrderedDict)

    def add_zoomed(self, window: Window, view: "ImageView") -> None:
        """Cache a zoomed view; the oldest one beyond the limit is dropped."""
        self.zoomed[window] = view
        if len(self.zoomed) > _ZOOMED_VIEWS:
            self.zoomed.popitem(last=False)

    def drop_conditioned(self) -> None:
        """Keep only what does not depend on any template."""
        self.conditioned.clear()
        self.first_passes.clear()
        for view in self.zoomed.values():
            view.drop_conditioned()

    @property
    def nbytes(self) -> int:
        """Bytes of the view and of everything cached with it."""
        tensors = [self.pixels, self.features.embedding, self.features.fine, self.features.finer]
        for state in self.conditioned.values():
            tensors += [state.embedding] if state.h_seg is None else [state.embedding, state.h_seg]
        zoomed = sum(view.nbytes - view.image.nbytes for view in self.zoomed.values())
        return self.image.nbytes + zoomed + sum(t.nbytes for t in tensors)


@dataclass
class CachedImage:
    """An image with its whole view by each segmenter that encoded it.

    views: by digest of the adaptation, None for the common segmenter
    """

    image: np.ndarray
    views: "OrderedDict[str | None, ImageView]" = field(default_factory=OrderedDict)

    def add(self, adaptation: str | None, view: ImageView) -> None:
        """Store a view; the oldest one beyond the limit is dropped."""
        self.views[adaptation] = view
        if len(self.views) > _SEGMENTERS:
            self.views.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the image and of all views."""
        return self.image.nbytes + sum(v.nbytes - v.image.nbytes for v in self.views.values())


class ViewEncoder:
    """Encodes image views: f_img = E_vision(x_img) of SAM 2, and the DINOv2 feature (Sec. 3.1)."""

    def __init__(self, model: Vessa, timer: StageTimer) -> None:
        self._model, self._timer = model, timer
        self._size = model.preset.segmenter.image_size

    def encode(self, images: Sequence[np.ndarray], squares: Sequence[Square]) -> list[ImageView]:
        """Encode one square of each image, as one batch.

        images: uint8 (H, W[, 3]), of any sizes; squares: of the same number
        """
        if not images:
            return []
        with self._timer.stage("encode"):
            pixels = torch.cat(
                [
                    s.enter(to_tensor(i).to(self._model.device), self._size)
                    for s, i in zip(squares, images, strict=True)
                ]
            )
            features = self._model.segmenter.encode_images(pixels)
            vectors = self._model.retriever(pixels).float().cpu().numpy()
        return [
            ImageView(image, square, pixels[i : i + 1].clone(), _own(features[i : i + 1]), vectors[i])
            for i, (image, square) in enumerate(zip(images, squares, strict=True))
        ]


def _own(features: ImageFeatures) -> ImageFeatures:
    """Copy, so that caching one image does not keep its batch alive; details in the layout `decode` reads."""
    fine, finer = (
        level.clone(memory_format=torch.channels_last) for level in (features.fine, features.finer)
    )
    return ImageFeatures(features.embedding.clone(), features.position.clone(), fine, finer)
