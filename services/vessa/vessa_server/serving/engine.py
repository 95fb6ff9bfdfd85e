"""The engine of a ready service: worker, batch queue, caches and banks."""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Any

from vessa.errors import DeadlineExceeded, UnknownBank, VessaError
from vessa_server.observability.metrics import Metrics
from vessa_server.serialization.request_parser import Reader, SegmentRequest, TemplateRequest
from vessa_server.serialization.seen_sizes import SeenSizes
from vessa_server.serving.annotation_cache import AnnotationCache
from vessa_server.serving.batch_queue import BatchQueue
from vessa_server.serving.label_cleaning import clean_results
from vessa_server.serving.worker import Worker
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.retrieval import merge_classes
from vessa_server.template_bank.template import Template, template_id
from vessa_server.types import LABELS_VERSION, DescribeItem, Item


class Engine:
    """The parts that exist once the weights are loaded and the banks are encoded."""

    def __init__(self, settings: Settings, metrics: Metrics, banks: TemplateBanks, worker: Worker) -> None:
        """Start the batch thread."""
        self.settings, self.banks, self.worker, self.metrics = settings, banks, worker, metrics
        self.info = worker.info
        sizes = SeenSizes()
        self.queue = BatchQueue(
            worker.compute,
            settings.queue.queue_items,
            settings.queue.max_batch,
            settings.queue.batch_wait_s,
            metrics.batch,
            max_pixels=settings.queue.max_batch_pixels,
            pixels_of=lambda item: _pixels_of(item, sizes),
            release=worker.release_memory,
        )
        metrics.queue_depth.set_function(lambda: self.queue.depth)
        self.annotations = AnnotationCache(
            settings.caches.annotation_bytes, self.info.model, self.labels_version
        )
        metrics.show_annotator(
            worker.stage_seconds, lambda: {**worker.bytes_held(), "annotations": self.annotations.nbytes}
        )
        self.reader = Reader(settings, banks, sizes, worker.holds)

    @property
    def parts(self) -> list[str]:
        """The parts of the model in use, of "language" and "memory"."""
        there = {"memory"} | ({"language"} if self.info.language else set())
        return sorted(there - self.settings.without)

    @property
    def labels_version(self) -> str:
        """Version of labels of the same weights: of pre- and post-processing, and of the parts left out."""
        return "-".join([LABELS_VERSION, *(f"no{part}" for part in sorted(self.settings.without))])

    async def annotate(
        self, request: SegmentRequest, client: str = "", *, deadline: bool = True
    ) -> list[Any]:
        """Return a SegmentResult or VessaError for each image of the request.

        client: whose request it is; clients take turns on the worker; deadline: False for jobs
        """
        places = [i for i, item in enumerate(request.items) if not isinstance(item, VessaError)]
        results: list[Any] = list(request.items)
        items = [item for item in request.items if not isinstance(item, VessaError)]
        for item in items:
            self.metrics.feature(self.worker.holds(item.image_id))
        keys = [item.key(request.bank.digest) for item in items]
        for place, answer in zip(places, await self._submit(items, client, keys, deadline), strict=True):
            results[place] = answer
        if request.clean:
            results = await asyncio.to_thread(clean_results, results, request.bank)
        return results

    async def encode(self, request: TemplateRequest, banks: CallersBanks) -> list[Template]:
        """Return the examples as templates; those that the bank holds already are returned unchanged."""
        known = await asyncio.to_thread(_known_templates, request, banks)
        missing = [i for i, template in enumerate(known) if template is None]
        templates: list[Any] = list(known)
        answers = await self._submit([request.items[i] for i in missing], banks.caller.name)
        for i, answer in zip(missing, answers, strict=True):
            if isinstance(answer, VessaError):
                answer.item = i
                raise answer
            templates[i] = answer
        return templates

    async def describe(self, items: Sequence[DescribeItem], client: str) -> list[Any]:
        """Return the feature (D,) or a VessaError of each image."""
        return await self._submit(items, client)

    async def _submit(
        self,
        items: Sequence[Item],
        client: str = "",
        keys: Sequence[Hashable] | None = None,
        deadline: bool = True,
    ) -> list[Any]:
        if not items:
            return []
        seconds = self.settings.limits.request_timeout_s if deadline else None
        try:
            async with asyncio.timeout(seconds):
                return await self.queue.submit_all(items, client, keys)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {seconds:g} s; send fewer images at once or retry later", retry_after=5.0
            ) from None


def _known_templates(request: TemplateRequest, banks: CallersBanks) -> list[Template | None]:
    """Return the stored templates of a request; raises ClassConflict before the worker computes anything."""
    try:
        bank = banks.get(request.bank)
    except UnknownBank:
        return [None] * len(request.items)
    stored = {template.id: template for template in bank.templates}
    for item in request.items:
        merge_classes(bank.classes, item.classes)
    return [stored.get(template_id(i.image, i.mask, i.classes, i.group)) for i in request.items]


def _pixels_of(item: Item, sizes: SeenSizes) -> int:
    """Return the pixels of the square around an item's image, also when only the image's id was sent."""
    size = sizes.get(item.image_id) if item.image is None else item.image.shape[:2]
    return max(size or (0,)) ** 2
