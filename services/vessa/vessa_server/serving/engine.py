"""The loaded annotator: its queue, caches and banks."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from vessa.errors import (
    DeadlineExceeded,
    UnknownBank,
    VessaError,
)
from vessa_server.observability.metrics import Metrics
from vessa_server.serialization.request_parser import Reader, SeenSizes, SegmentRequest, TemplateRequest
from vessa_server.serving.active_learning import Looks
from vessa_server.serving.annotation_cache import Annotations
from vessa_server.serving.batch_queue import DeviceQueue
from vessa_server.serving.worker import Device
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks, merge_classes
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.template import Template, template_id
from vessa_server.types import LABELS_VERSION, DescribeItem, SegmentItem, TemplateItem


class Loaded:
    """What exists once the weights are loaded and the banks are encoded."""

    def __init__(self, settings: Settings, metrics: Metrics, banks: TemplateBanks, device: Device) -> None:
        """Start the device thread."""
        self.settings, self.banks, self.device, self.metrics = settings, banks, device, metrics
        self.about = device.about
        sizes = SeenSizes()
        self.queue = DeviceQueue(
            self._process,
            settings.queue.queue_items,
            settings.queue.max_batch,
            settings.queue.batch_wait_s,
            metrics.batch,
            max_pixels=settings.queue.max_batch_pixels,
            pixels_of=lambda item: _pixels_of(item, sizes),
            release=device.release_memory,
        )
        metrics.queue_depth.set_function(lambda: self.queue.depth)
        self.annotations = Annotations(
            settings.caches.annotation_bytes, self.about.model, self.labels_version
        )
        metrics.show_annotator(
            device.seconds, lambda: {**device.bytes_held(), "annotations": self.annotations.nbytes}
        )
        self.looks = Looks(2 * settings.limits.max_candidates)
        self.reader = Reader(settings, banks, sizes, device.holds)

    def _process(self, items: list[Any]) -> list[Any]:
        """Run a batch in the device thread: all kinds of items may be mixed in it."""
        results: list[Any] = [None] * len(items)
        kinds: dict[type, Callable[[list[Any]], Sequence[Any]]] = {
            TemplateItem: self.device.encode_templates,
            DescribeItem: self.device.describe,
            SegmentItem: self.device.segment,
        }
        for kind, run in kinds.items():
            places = [i for i, item in enumerate(items) if isinstance(item, kind)]
            answers = run([items[i] for i in places]) if places else []
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
        return results

    @property
    def parts(self) -> list[str]:
        """What takes part in the answers, of "language" and "memory"."""
        there = {"memory"} | ({"language"} if self.about.language else set())
        return sorted(there - self.settings.without)

    @property
    def labels_version(self) -> str:
        """Tell labels of the same weights apart: by pre- and post-processing, and by the parts left out."""
        return "-".join([LABELS_VERSION, *(f"no{part}" for part in sorted(self.settings.without))])

    async def segment(self, request: SegmentRequest, client: str = "", *, deadline: bool = True) -> list[Any]:
        """Return a SegmentResult or VessaError for each image of the request.

        client: whose request it is; clients take turns on the device; deadline: False for jobs
        """
        places = [i for i, item in enumerate(request.items) if not isinstance(item, VessaError)]
        for i in places:
            self.metrics.feature(self.device.holds(request.ids[i]))
        results: list[Any] = list(request.items)
        items = [request.items[i] for i in places]
        keys = [item.key(request.bank.version) for item in items if not isinstance(item, VessaError)]
        for place, answer in zip(places, await self._work(items, client, keys, deadline), strict=True):
            results[place] = answer
        return results

    async def encode(self, request: TemplateRequest, banks: CallersBanks) -> list[Template]:
        """Return the examples as templates, those that the bank holds already as they are in it."""
        held = await asyncio.to_thread(_held, request, banks)
        missing = [i for i, template in enumerate(held) if template is None]
        templates: list[Any] = list(held)
        worked = await self._work([request.items[i] for i in missing], banks.caller.name)
        for i, answer in zip(missing, worked, strict=True):
            if isinstance(answer, VessaError):
                answer.item = i
                raise answer
            templates[i] = answer
        return templates

    async def describe(self, items: Sequence[DescribeItem], client: str) -> list[Any]:
        """Return the feature (D,) or a VessaError of each image."""
        return await self._work(items, client)

    async def _work(
        self,
        items: Sequence[Any],
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
                f"no answer within {seconds:g} s; send fewer images at once or try later", retry_after=5.0
            ) from None


def _held(request: TemplateRequest, banks: CallersBanks) -> list[Template | None]:
    """Return the templates that are there already; ClassConflict early, before the device is bothered."""
    try:
        bank = banks.get(request.bank)
    except UnknownBank:
        return [None] * len(request.items)
    there = {template.id: template for template in bank.templates}
    for item in request.items:
        merge_classes(bank.classes, item.classes)
    return [there.get(template_id(i.image, i.mask, i.classes, i.group)) for i in request.items]


def _pixels_of(item: SegmentItem | TemplateItem | DescribeItem, sizes: SeenSizes) -> int:
    """Return the pixels of the square around an item's image, also when only its id came."""
    size = sizes.get(item.image_id) if item.image is None else item.image.shape[:2]
    return max(size or (0,)) ** 2
