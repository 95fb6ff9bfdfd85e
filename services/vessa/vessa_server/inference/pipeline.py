"""The steps of inference with one segmenter: first pass, region of interest, retrieval, masks, fusion."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from vessa.codec import image_digest
from vessa.errors import VessaError
from vessa_server.byte_cache import ByteCache
from vessa_server.inference.calibration import (
    Calibration,
    absence_threshold,
    classes_of_one_piece,
    held_out,
    sample_of,
)
from vessa_server.inference.first_pass import run_first_pass
from vessa_server.inference.fusion import fuse
from vessa_server.inference.image_views import ViewEncoder
from vessa_server.inference.mask_prediction import MaskPredictor
from vessa_server.inference.query import Query
from vessa_server.inference.region_of_interest import zoom
from vessa_server.inference.retrieval import class_queries
from vessa_server.inference.template_memory import MemoryCache, TemplateEncoder
from vessa_server.model.geometry import Square
from vessa_server.model.vessa import Vessa
from vessa_server.observability.stage_timer import StageTimer
from vessa_server.template_bank.retrieval import Bank
from vessa_server.types import SegmentItem, SegmentResult

_CALIBRATIONS = 256  # kept; one is a number
_CALIBRATION_BATCH = 4  # templates, whose probabilities are in memory at once

_Result = TypeVar("_Result")


class Pipeline:
    """Predicts queries with one segmenter. Only the batch thread uses it.

    cache: holds what was computed of templates; adaptation: digest of a bank's own segmenter, None for the
    common one
    """

    def __init__(
        self, model: Vessa, timer: StageTimer, cache: ByteCache, adaptation: str | None = None
    ) -> None:
        self._model, self._timer = model, timer
        self.encoder = ViewEncoder(model, timer)
        self.template_encoder = TemplateEncoder(model, self.encoder)
        adapted = None if adaptation is None else self.template_encoder
        memory = MemoryCache(model.device, cache, adapted, adaptation)
        self.predictor = MaskPredictor(model, timer, cache, memory)
        self._calibrations: OrderedDict[tuple[str, str], Calibration] = OrderedDict()

    def leave_out(self, parts: frozenset[str]) -> None:
        """Leave out parts, "language" or "memory", from now on."""
        self.predictor.without = parts
        self._calibrations.clear()

    def segment(self, queries: Sequence[Query]) -> list[SegmentResult | VessaError]:
        """Segment queries by their calibrated banks; an error of one does not affect the others."""
        for query in queries:
            query.calibration = self._calibration(query.bank, query.item.template_choice)
        return self._predict(queries)

    def _predict(self, queries: Sequence[Query]) -> list[SegmentResult | VessaError]:
        if self._model.preset.closer:
            run_first_pass(queries, self.predictor)
            zoom(queries, self.encoder)
        with self._timer.stage("retrieve"):
            plans = [or_error(class_queries, query) for query in queries]
        flat = [one for plan in plans if not isinstance(plan, VessaError) for one in plan]
        masks = iter(self.predictor.predict(flat))
        results: list[SegmentResult | VessaError] = []
        for query, plan in zip(queries, plans, strict=True):
            if isinstance(plan, VessaError):
                results.append(plan)
                continue
            with self._timer.stage("fuse"):
                results.append(fuse(query, plan, [next(masks) for _ in plan]))
        return results

    def _calibration(self, bank: Bank, template_choice: str) -> Calibration:
        """Return the calibration of a bank's state; its first query computes it.

        It depends on the bank's contents and the weights alone, so every annotator computes the same. One
        template in memory gives other peaks than three.
        """
        choice = "top3" if template_choice == "top3" else "top1"
        found = self._calibrations.get((bank.digest, choice))
        if found is None:
            found = self._calibrate(bank, choice)
            if len(self._calibrations) >= _CALIBRATIONS:
                self._calibrations.popitem(last=False)
        self._calibrations[bank.digest, choice] = found
        self._calibrations.move_to_end((bank.digest, choice))
        return found

    def _calibrate(self, bank: Bank, choice: str) -> Calibration:
        sample = sample_of(bank)
        held = held_out(bank, sample)
        results = []
        for start in range(0, len(held), _CALIBRATION_BATCH):
            some = held[start : start + _CALIBRATION_BATCH]
            images = [template.image for template, _ in some]
            views = self.encoder.encode(images, [Square(*i.shape[:2]) for i in images])
            queries = [
                Query(
                    SegmentItem(
                        image_digest(template.image),
                        None,
                        bank.name,
                        tuple(others.classes.values()),
                        template_choice=choice,
                        probabilities=True,
                    ),
                    others,
                    view,
                )
                for (template, others), view in zip(some, views, strict=True)
            ]
            results += list(zip([t for t, _ in some], self._predict(queries), strict=True))
        threshold = absence_threshold([(t, r) for t, r in results if not isinstance(r, VessaError)])
        return Calibration(threshold, classes_of_one_piece(sample))


def or_error(call: Callable[..., _Result], *arguments: object) -> _Result | VessaError:
    """Return the result of a call, or the VessaError that it raised."""
    try:
        return call(*arguments)
    except VessaError as error:
        return error
