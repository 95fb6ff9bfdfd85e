"""The <SEG> prompt: the language model's state becomes a prompt vector for the mask decoder.

The conversation holds the template with its class in green, the instruction and the target image (Sec. 3.1,
Reference-Based Prompt). h_seg = MLP(Emb_VLM(<SEG>)) joins the decoder's prompts (Text-to-Mask Embedding
Conversion). As in LISA, the answer is the fixed text that ends in <SEG>, so nothing is generated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vessa_server.byte_cache import ByteCache
from vessa_server.inference.query import ClassQuery
from vessa_server.inference.template_memory import mask_square
from vessa_server.model.geometry import Square, Window, to_tensor
from vessa_server.model.language.instructions import DEFAULT_INSTRUCTION
from vessa_server.model.language.prefix_cache import CachedPrefix, StateReader
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.template_bank.template import Template, View


class LanguagePrompter:
    """Computes h_seg of class queries. What the model read of a template is cached for all images."""

    def __init__(self, model: Vessa, cache: ByteCache) -> None:
        self._model, self._cache = model, cache
        self._size = model.preset.segmenter.image_size

    def prompt(self, queries: Sequence[ClassQuery]) -> Tensor | None:
        """Return h_seg (N, C) of N class queries, each with its most similar template.

        Returns None without a language model.
        """
        reader, projector = self._model.reader, self._model.projector
        if reader is None or projector is None:
            return None
        if not queries:
            return torch.empty(0, self._model.segmenter.preset.dim, device=self._model.device)
        targets = {id(q.view): q.view.pixels for q in queries}  # one image serves all of its classes
        rows = [list(targets).index(id(q.view)) for q in queries]
        pixels = torch.cat(list(targets.values()))
        states = reader.states_after(self._prefixes(reader, queries), pixels, rows)
        h_seg: Tensor = projector(states)
        return h_seg

    def _prefixes(self, reader: StateReader, queries: Sequence[ClassQuery]) -> list[CachedPrefix]:
        """Return the model's state after each query's template; read the templates that are not cached."""
        keys = [
            ("prefix", q.matches[0][0].id, q.template_views[0].window, q.class_id, q.class_name)
            for q in queries
        ]
        prefixes = {key: prefix for key in keys if (prefix := self._cache.get(key)) is not None}
        missing = {key: q for key, q in zip(keys, queries, strict=True) if key not in prefixes}
        if missing:
            some = list(missing.values())
            overlays = torch.cat(
                [self._overlay(q.matches[0][0], q.template_views[0], q.class_id) for q in some]
            )
            names = [q.class_name for q in some]
            read = reader.read_templates(overlays, names, [DEFAULT_INSTRUCTION] * len(some))
            for key, prefix in zip(missing, read, strict=True):
                prefixes[key] = prefix
                self._cache.put(key, prefix)
        return [prefixes[key] for key in keys]

    def _overlay(self, template: Template, view: View, class_id: int) -> Tensor:
        """Return a template with its class in green, (1, 3, S, S) in [0, 1], for the language model."""
        window = None if view.window is None else Window(*view.window)
        height, width = template.mask.shape
        square = Square(height, width, window)
        pixels = square.enter(to_tensor(template.image).to(self._model.device), self._size)
        return overlay(pixels, mask_square(template.mask, class_id, square, self._size, self._model.device))
