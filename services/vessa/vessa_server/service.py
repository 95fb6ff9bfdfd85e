"""The parts of a running annotator service and their life: load, work, drain. No HTTP here."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from vessa.errors import (
    DeadlineExceeded,
    InternalError,
    LanguageUnavailable,
    NotReady,
    QueueFull,
    StoreUnavailable,
    UnknownBank,
    VessaError,
)
from vessa_server.annotations import Annotations
from vessa_server.batching import DeviceQueue
from vessa_server.device import Device
from vessa_server.observability.metrics import Metrics
from vessa_server.serialization.request_parser import Reader, SeenSizes, SegmentRequest, TemplateRequest
from vessa_server.settings import Settings
from vessa_server.suggesting import Looks
from vessa_server.template_bank.bank import TemplateBanks, merge_classes
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.store import open_store
from vessa_server.template_bank.template import Template, template_id
from vessa_server.types import LABELS_VERSION, DescribeItem, SegmentItem, TemplateItem

log = logging.getLogger(__name__)

STORE_RETRY_S = 2.0
_CLOSE_S = 5.0

Factory = Callable[[Settings, TemplateBanks], Device]


class Loaded:
    """What exists once the weights are loaded and the banks are encoded."""

    def __init__(self, settings: Settings, metrics: Metrics, banks: TemplateBanks, device: Device) -> None:
        """Start the device thread."""
        self.settings, self.banks, self.device, self.metrics = settings, banks, device, metrics
        self.about = device.about
        sizes = SeenSizes()
        self.queue = DeviceQueue(
            self._process,
            settings.queue_items,
            settings.max_batch,
            settings.batch_wait_s,
            metrics.batch,
            max_pixels=settings.max_batch_pixels,
            pixels_of=lambda item: _pixels_of(item, sizes),
            release=device.release_memory,
        )
        metrics.queue_depth.set_function(lambda: self.queue.depth)
        self.annotations = Annotations(settings.annotation_bytes, self.about.model, self.labels_version)
        metrics.show_annotator(
            device.seconds, lambda: {**device.bytes_held(), "annotations": self.annotations.nbytes}
        )
        self.looks = Looks(2 * settings.max_candidates)
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
        seconds = self.settings.request_timeout_s if deadline else None
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


class Service:
    """Loads in a thread of its own, so that /livez answers from the first moment."""

    def __init__(self, settings: Settings, factory: Factory) -> None:
        """Remember how to load; `start` begins. on_failure is called when loading has failed for good."""
        self.settings, self._factory = settings, factory
        self.metrics = Metrics()
        self.failure: VessaError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._loaded: Loaded | None = None
        self._progress = "starting"
        self._stopping = threading.Event()
        self._requests = 0

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self._load, name="vessa-load", daemon=True).start()

    def stop(self) -> None:
        """Take no more work and finish what waits, for at most `drain_s` seconds."""
        self._stopping.set()
        if (loaded := self._loaded) is None:
            return
        drained = loaded.queue.drain(self.settings.drain_s)
        if not drained:
            log.warning("the device was still busy after %g s", self.settings.drain_s)
        loaded.device.close(_CLOSE_S if drained else 0.0)

    def loaded(self) -> Loaded:
        """Return the loaded parts; NotReady until then."""
        if self._loaded is None:
            raise NotReady(f"the service is not ready: {self._progress}", retry_after=5.0)
        return self._loaded

    def check_ready(self) -> None:
        """NotReady unless weights are loaded and the device gives signs of life, which may take a moment."""
        loaded = self.loaded()
        loaded.device.check()
        if loaded.queue.silence() > self.settings.hang_s:
            raise NotReady("the device hangs; the service must be restarted", retry_after=30.0)
        if self._stopping.is_set():
            raise NotReady("the service is shutting down", retry_after=5.0)

    @contextlib.contextmanager
    def permit(self) -> Iterator[Loaded]:
        """Let a request in before its body is read, to bound what bodies take; QueueFull, NotReady."""
        loaded = self.loaded()
        if self._requests >= self.settings.max_requests:
            raise QueueFull(
                f"{self._requests} requests are in work, at most {self.settings.max_requests} may be",
                retry_after=loaded.queue.full_error().retry_after,
                queue_position=loaded.queue.depth,
            )
        self._requests += 1
        try:
            yield loaded
        finally:
            self._requests -= 1

    def _load(self) -> None:
        start = time.monotonic()
        try:
            while not self._stopping.is_set():
                try:
                    loaded = self._load_once()
                except (StoreUnavailable, LanguageUnavailable) as error:
                    # A Redis or a vLLM that starts at the same time may need longer.
                    self._say(f"waiting: {error}")
                    self._stopping.wait(STORE_RETRY_S)
                    continue
                log.info("ready after %.1f s", time.monotonic() - start)
                self._loaded = loaded
                return
        except VessaError as error:
            self._fail(error)
        except Exception:
            log.exception("loading failed")
            self._fail(InternalError("loading failed; the log says why"))

    def _load_once(self) -> Loaded:
        banks = TemplateBanks(open_store(self.settings.store), self.settings.max_templates)
        names = banks.store.names()
        self._say(f"loading weights {self.settings.weights!r}")
        device = self._factory(self.settings, banks)
        about = device.about
        self._say(f"weights {about.model[:16]} are on {about.device}; {len(names)} template banks")
        self._refresh(banks, device)
        return Loaded(self.settings, self.metrics, banks, device)

    def _refresh(self, banks: TemplateBanks, device: Device) -> None:
        def encode(templates: list[Template]) -> Sequence[Template | VessaError]:
            items = [TemplateItem(t.image, t.mask, t.classes, t.group) for t in templates]
            return device.encode_templates(items)

        def progress(done: int, total: int) -> None:
            self._say(f"encoding templates for these weights: {done} of {total}")

        banks.refresh(encode, device.about.model, progress)

    def _say(self, text: str) -> None:
        self._progress = text
        log.info("%s", text)

    def _fail(self, error: VessaError) -> None:
        log.error("the service cannot start: %s", error)
        self.failure, self._progress = error, "it failed to start; its log says why"
        self.on_failure()
