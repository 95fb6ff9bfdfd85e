"""Template memory: f_memory = E_memory(x_temp, m_temp) of SAM 2 (Sec. 3.1, Template-Driven Memory Encoding).

Templates are encoded once, when they enter a bank, and brought to the device when a query needs them.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vessa.errors import InvalidImage
from vessa.masks.geometry import box_of
from vessa_server.byte_cache import ByteCache
from vessa_server.inference.image_views import ViewEncoder
from vessa_server.inference.query import ClassQuery
from vessa_server.inference.region_of_interest import window_around
from vessa_server.model.geometry import Square, Window
from vessa_server.model.vessa import Vessa
from vessa_server.template_bank.template import Template, View, template_id
from vessa_server.types import TemplateItem


class TemplateEncoder:
    """Makes templates of annotated images: retrieval feature and memories, of the whole and zoomed."""

    def __init__(self, model: Vessa, encoder: ViewEncoder) -> None:
        self._model, self._encoder = model, encoder

    def encode(self, item: TemplateItem, model_digest: str) -> Template:
        """Encode one annotated image. Raises InvalidImage when its mask shows no class.

        model_digest: of the weights, stored with the template
        """
        present = {c: n for c, n in item.classes.items() if (item.mask == c).any()}
        if not present:
            raise InvalidImage("the mask is empty: a template must show at least one of its classes")
        square, window = Square(*item.mask.shape), None
        if self._model.preset.closer:
            window = window_around(box_of(np.isin(item.mask, list(present))), *item.mask.shape)
        return Template(
            id=template_id(item.image, item.mask, present, item.group),
            group=item.group,
            classes=present,
            image=item.image,
            mask=item.mask,
            whole=self._view(item, present, square),
            close=None if window is None else self._view(item, present, replace(square, window=window)),
            model=model_digest,
        )

    def memories(self, template: Template, view: View) -> dict[int, Tensor]:
        """Encode one view of a stored template again: the memory (M, C) of each class that it shows."""
        window = None if view.window is None else Window(*view.window)
        height, width = template.mask.shape
        square = Square(height, width, window)
        _, tokens = self._encode(template.image, template.mask, template.classes, square)
        return dict(zip(template.classes, tokens, strict=True))

    def _view(self, item: TemplateItem, classes: Iterable[int], square: Square) -> View:
        """Encode one square of a template: its feature and the memory of each class."""
        vector, tokens = self._encode(item.image, item.mask, classes, square)
        shown = square.window
        window = None if shown is None else (shown.top, shown.left, shown.side)
        return View(vector, dict(zip(classes, tokens.half().cpu().numpy(), strict=True)), window)

    def _encode(
        self, image: np.ndarray, mask: np.ndarray, classes: Iterable[int], square: Square
    ) -> tuple[np.ndarray, Tensor]:
        """Return the feature (D,) and the memories (K, M, C) of K classes."""
        view = self._encoder.encode([image], [square])[0]
        size, device = self._model.preset.segmenter.image_size, self._model.device
        masks = torch.cat([mask_square(mask, c, square, size, device) for c in classes])
        features = view.features[[0] * len(masks)]
        return view.vector, self._model.segmenter.encode_memory(features, masks)


class MemoryCache:
    """Brings the memories of templates to the device; they serve every later image.

    adapted: encodes them by a bank's own segmenter, whose digest is `adaptation`; None to take those that are
    stored with the templates
    """

    def __init__(
        self,
        device: torch.device,
        cache: ByteCache,
        adapted: TemplateEncoder | None = None,
        adaptation: str | None = None,
    ) -> None:
        self._device, self._cache = device, cache
        self._adapted, self._adaptation = adapted, adaptation

    def stack(self, queries: Sequence[ClassQuery]) -> Tensor:
        """Return the memories (N, T, M, C) of N class queries with T templates each."""
        return torch.stack([torch.stack(self._memories(q)) for q in queries])

    def _memories(self, query: ClassQuery) -> list[Tensor]:
        memories = []
        for (template, _), view in zip(query.matches, query.template_views, strict=True):
            memory = self._cache.get(self._key(template, view, query.class_id))
            memories.append(self._fresh(template, view, query.class_id) if memory is None else memory)
        return memories

    def _fresh(self, template: Template, view: View, class_id: int) -> Tensor:
        """Return the memory (M, C) of one class; an adapted segmenter encodes all classes at once."""
        if self._adapted is None:
            found = {class_id: torch.from_numpy(view.memories[class_id]).to(self._device).float()}
        else:
            found = self._adapted.memories(template, view)
        for key, memory in found.items():
            self._cache.put(self._key(template, view, key), memory.clone())
        return found[class_id]

    def _key(self, template: Template, view: View, class_id: int) -> Hashable:
        return "memory", self._adaptation, template.id, view.window, class_id


def mask_square(mask: np.ndarray, class_id: int, square: Square, size: int, device: torch.device) -> Tensor:
    """Move one class of a mask, uint8 (H, W), onto a square: (1, 1, size, size) float, 1 inside."""
    binary = torch.from_numpy((mask == class_id).astype(np.float32))[None, None].to(device)
    return (square.enter(binary, size) > 0.5).float()
