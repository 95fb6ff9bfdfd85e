"""The parts of a running annotator service and their life: load, work, drain. No HTTP here."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from vessa.errors import (
    InternalError,
    LanguageUnavailable,
    NotReady,
    QueueFull,
    StoreUnavailable,
    VessaError,
)
from vessa_server.observability.metrics import Metrics
from vessa_server.serving.engine import Loaded
from vessa_server.serving.worker import Device
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.store import open_store
from vessa_server.template_bank.template import Template
from vessa_server.types import TemplateItem

log = logging.getLogger(__name__)

STORE_RETRY_S = 2.0
_CLOSE_S = 5.0

Factory = Callable[[Settings, TemplateBanks], Device]


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
        drained = loaded.queue.drain(self.settings.queue.drain_s)
        if not drained:
            log.warning("the device was still busy after %g s", self.settings.queue.drain_s)
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
        if loaded.queue.silence() > self.settings.queue.hang_s:
            raise NotReady("the device hangs; the service must be restarted", retry_after=30.0)
        if self._stopping.is_set():
            raise NotReady("the service is shutting down", retry_after=5.0)

    @contextlib.contextmanager
    def permit(self) -> Iterator[Loaded]:
        """Let a request in before its body is read, to bound what bodies take; QueueFull, NotReady."""
        loaded = self.loaded()
        if self._requests >= self.settings.limits.max_requests:
            raise QueueFull(
                f"{self._requests} requests are in work, at most {self.settings.limits.max_requests} may be",
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
        banks = TemplateBanks(open_store(self.settings.storage.store), self.settings.storage.max_templates)
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
