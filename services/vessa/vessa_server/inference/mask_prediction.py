"""Predict masks: memory attention, then the mask decoder with the <SEG> prompt and the caller's prompts.

q = Attention(f_img, f_memory), then m_pred = D_mask(p, q) (Sec. 3.1); with the teacher's prompts
m_v = D_mask(p_VESSA, q_prompt) (Sec. 3.2, Teacher-to-VESSA Feedback). q and h_seg do not depend on prompts
and are cached with the image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vessa_server.byte_cache import ByteCache
from vessa_server.inference.image_views import ConditionedFeatures
from vessa_server.inference.language_prompt import LanguagePrompter
from vessa_server.inference.query import ClassQuery
from vessa_server.inference.template_memory import MemoryCache
from vessa_server.model.prompt_encoding import hold_to_box, prompt_batch
from vessa_server.model.segmenter import ImageFeatures, PromptBatch
from vessa_server.model.vessa import Vessa
from vessa_server.observability.stage_timer import StageTimer

# Class queries in one forward pass: eight images of three classes. This bounds memory, not a request.
_CONCURRENT_MASKS = 24
_EXCLUDED = -20.0  # mask logit outside a box prompt


class MaskPredictor:
    """Predicts the masks of class queries. Only the batch thread uses it.

    cache: holds what the language model read of templates; without: parts left out, see `Annotator`
    """

    def __init__(self, model: Vessa, timer: StageTimer, cache: ByteCache, memory: MemoryCache) -> None:
        self._model, self._timer = model, timer
        self._language = LanguagePrompter(model, cache)
        self._memory = memory
        self.without: frozenset[str] = frozenset()

    def predict(self, queries: Sequence[ClassQuery]) -> list[tuple[Tensor, float]]:
        """Return logits (1, 1, h, w) on its view's square and the predicted IoU of each class query."""
        outputs: list[tuple[Tensor, float]] = []
        for start in range(0, len(queries), _CONCURRENT_MASKS):
            outputs += self._decode(queries[start : start + _CONCURRENT_MASKS])
        return outputs

    def _decode(self, queries: Sequence[ClassQuery]) -> list[tuple[Tensor, float]]:
        missing = {(id(q.view), q.key): q for q in queries if q.key not in q.view.conditioned}
        self._condition(list(missing.values()))
        with self._timer.stage("draw"):
            states = [q.view.conditioned[q.key] for q in queries]
            embedding = torch.cat([s.embedding for s in states])
            vectors = [s.h_seg for s in states if s.h_seg is not None]
            h_seg = torch.cat(vectors) if vectors else None
            details = [
                torch.cat(level) for level in zip(*(q.view.features.details for q in queries), strict=True)
            ]
            logits, iou, _ = self._model.segmenter.decode(embedding, details, h_seg, self._prompts(queries))
        masks = [
            one if (box := q.prompts.box) is None else hold_to_box(one, box, q.view.square, _EXCLUDED)
            for one, q in zip(logits.float().split(1), queries, strict=True)
        ]
        return list(zip(masks, iou.tolist(), strict=True))

    def _condition(self, queries: list[ClassQuery]) -> None:
        """Condition views on templates: h_seg by the language model, q by memory attention."""
        for count in {len(q.matches) for q in queries}:  # the top 3 of a small bank may be fewer
            some = [q for q in queries if len(q.matches) == count]
            with self._timer.stage("language"):
                h_seg = None if "language" in self.without else self._language.prompt(some)
            with self._timer.stage("attend"):
                memories = None if "memory" in self.without else self._memory.stack(some)
                images = {id(q.view): q.view.features for q in some}  # an image serves all of its classes
                order = {view: row for row, view in enumerate(images)}
                rows = torch.tensor([order[id(q.view)] for q in some], device=self._model.device)
                embedding = self._model.segmenter.attend(_join(list(images.values())), memories, rows)
            for row, q in enumerate(some):
                vector = None if h_seg is None else h_seg[row : row + 1].clone()
                q.view.conditioned[q.key] = ConditionedFeatures(embedding[row : row + 1].clone(), vector)

    def _prompts(self, queries: Sequence[ClassQuery]) -> PromptBatch:
        squares = [q.view.square for q in queries]
        size, side = self._model.preset.segmenter.image_size, 4 * self._model.segmenter.side
        return prompt_batch([q.prompts for q in queries], squares, size, side, self._model.device)


def _join(features: Sequence[ImageFeatures]) -> ImageFeatures:
    return ImageFeatures(
        torch.cat([f.embedding for f in features]),
        torch.cat([f.position for f in features], dim=1),
        torch.cat([f.fine for f in features]),
        torch.cat([f.finer for f in features]),
    )
