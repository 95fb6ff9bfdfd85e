"""The parts of a running annotator service and their life: load, work, drain. No HTTP here."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
from vessa_server.access import CallersBanks
from vessa_server.adapting import Adapting
from vessa_server.annotations import Annotations
from vessa_server.bank import TemplateBanks, merge_classes
from vessa_server.batching import DeviceQueue
from vessa_server.settings import Settings
from vessa_server.store import open_store
from vessa_server.suggesting import Looks
from vessa_server.telemetry import Metrics
from vessa_server.template import Template, template_id
from vessa_server.wire.reading import Reader, SeenSizes, SegmentRequest, TemplateRequest

if TYPE_CHECKING:
    from vessa_server.annotator import Annotator
    from vessa_server.items import DescribeItem, SegmentItem, TemplateItem

log = logging.getLogger(__name__)

STORE_RETRY_S = 2.0

Factory = Callable[[Settings, TemplateBanks], "Annotator"]


class Loaded:
    """What exists once the weights are loaded and the banks are encoded."""

    def __init__(
        self, settings: Settings, metrics: Metrics, banks: TemplateBanks, annotator: "Annotator"
    ) -> None:
        """Start the device thread."""
        self.settings, self.banks, self.annotator, self.metrics = settings, banks, annotator, metrics
        sizes = SeenSizes()
        self.queue = DeviceQueue(
            self._process,
            settings.queue_items,
            settings.max_batch,
            settings.batch_wait_s,
            metrics.batch,
            max_pixels=settings.max_batch_pixels,
            pixels_of=lambda item: _pixels_of(item, sizes),
            release=annotator.release_memory,
        )
        metrics.queue_depth.set_function(lambda: self.queue.depth)
        self.annotations = Annotations(settings.annotation_bytes, annotator.model_digest, self.labels_version)
        metrics.show_annotator(
            lambda: annotator.clock.seconds,
            lambda: {**annotator.bytes_held(), "annotations": self.annotations.nbytes},
        )
        self.adapting = Adapting(banks, annotator)
        self.looks = Looks(2 * settings.max_candidates)
        self.reader = Reader(settings, banks, sizes, annotator.holds)

    def _process(self, items: list[Any]) -> list[Any]:
        """Run a batch in the device thread: all kinds of items may be mixed in it."""
        from vessa_server.items import DescribeItem, SegmentItem, TemplateItem

        annotator = self.annotator
        results: list[Any] = [None] * len(items)
        kinds: dict[type, Callable[[list[Any]], Sequence[Any]]] = {
            TemplateItem: annotator.encode_templates,
            DescribeItem: annotator.describe,
            SegmentItem: annotator.segment,
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
        there = {"memory"} | ({"language"} if self.annotator.model.reader is not None else set())
        return sorted(there - self.settings.without)

    @property
    def labels_version(self) -> str:
        """Tell labels of the same weights apart: by pre- and post-processing, and by the parts left out."""
        from vessa_server.annotator import LABELS_VERSION

        return "-".join([LABELS_VERSION, *(f"no{part}" for part in sorted(self.settings.without))])

    async def segment(self, request: SegmentRequest, client: str = "", *, deadline: bool = True) -> list[Any]:
        """Return a SegmentResult or VessaError for each image of the request.

        client: whose request it is; clients take turns on the device; deadline: False for jobs
        """
        places = [i for i, item in enumerate(request.items) if not isinstance(item, VessaError)]
        for i in places:
            self.metrics.feature(self.annotator.holds(request.ids[i]))
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

    async def describe(self, items: "Sequence[DescribeItem]", client: str) -> list[Any]:
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


def _pixels_of(item: "SegmentItem | TemplateItem | DescribeItem", sizes: SeenSizes) -> int:
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
        if self._loaded is not None:
            self._loaded.adapting.stop(self.settings.drain_s)
        if self._loaded is not None and not self._loaded.queue.drain(self.settings.drain_s):
            log.warning("the device thread was still busy after %g s", self.settings.drain_s)
        if self._loaded is not None and (reader := self._loaded.annotator.model.reader) is not None:
            reader.close()

    def loaded(self) -> Loaded:
        """Return the loaded parts; NotReady until then."""
        if self._loaded is None:
            raise NotReady(f"the service is not ready: {self._progress}", retry_after=5.0)
        return self._loaded

    def check_ready(self) -> None:
        """NotReady unless weights are loaded and the device thread gives signs of life."""
        silence = self.loaded().queue.silence()
        if silence > self.settings.hang_s:
            raise NotReady("the device thread hangs; the service must be restarted", retry_after=30.0)
        if (reader := self.loaded().annotator.model.reader) is not None:
            reader.check()
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
        annotator = self._factory(self.settings, banks)
        self._say(
            f"weights {annotator.model_digest[:16]} are on {annotator.device}; {len(names)} template banks"
        )
        self._refresh(banks, annotator)
        return Loaded(self.settings, self.metrics, banks, annotator)

    def _refresh(self, banks: TemplateBanks, annotator: "Annotator") -> None:
        from vessa_server.items import TemplateItem

        def encode(templates: list[Template]) -> Sequence[Template | VessaError]:
            items = [TemplateItem(t.image, t.mask, t.classes, t.group) for t in templates]
            return annotator.encode_templates(items)

        def progress(done: int, total: int) -> None:
            self._say(f"encoding templates for these weights: {done} of {total}")

        banks.refresh(encode, annotator.model_digest, progress)

    def _say(self, text: str) -> None:
        self._progress = text
        log.info("%s", text)

    def _fail(self, error: VessaError) -> None:
        log.error("the service cannot start: %s", error)
        self.failure, self._progress = error, "it failed to start; its log says why"
        self.on_failure()
