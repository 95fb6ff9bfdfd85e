"""The life of a service: load, serve, drain. No HTTP here."""

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
from vessa_server.serving.engine import Engine
from vessa_server.serving.worker import Worker
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.store import check_store, open_store
from vessa_server.template_bank.template import Template
from vessa_server.types import TemplateItem

log = logging.getLogger(__name__)

STORE_RETRY_S = 2.0
_CLOSE_S = 5.0

WorkerFactory = Callable[[Settings, TemplateBanks], Worker]


class Service:
    """Loads an engine in a thread of its own, so that /livez answers from the start."""

    def __init__(self, settings: Settings, factory: WorkerFactory) -> None:
        """Store how to load; `start` begins. `on_failure` is called when loading has failed for good."""
        self.settings, self._factory = settings, factory
        self.metrics = Metrics()
        self.failure: VessaError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._engine: Engine | None = None
        self._progress = "starting"
        self._stopping = threading.Event()
        self._requests = 0
        self.warnings: list[str] = []  # what an operator should mend, for /info

    def start(self) -> None:
        """Start to load."""
        threading.Thread(target=self._load, name="vessa-load", daemon=True).start()

    def stop(self) -> None:
        """Accept no more requests and finish the waiting ones, for at most `drain_s` seconds."""
        self._stopping.set()
        if (engine := self._engine) is None:
            return
        drained = engine.queue.drain(self.settings.queue.drain_s)
        if not drained:
            log.warning("the worker was still busy after %g s", self.settings.queue.drain_s)
        engine.worker.close(_CLOSE_S if drained else 0.0)

    def engine(self) -> Engine:
        """Return the engine; NotReady until it is loaded."""
        if self._engine is None:
            raise NotReady(f"the service is not ready: {self._progress}", retry_after=5.0)
        return self._engine

    def check_ready(self) -> None:
        """Raise NotReady unless the weights are loaded and the worker responds; this may take seconds."""
        engine = self.engine()
        check_store(self.settings.storage.store)
        engine.worker.check()
        if engine.queue.silence() > self.settings.queue.hang_s:
            seconds = self.settings.queue.hang_s
            raise NotReady(
                f"the worker hangs: no batch ended within {seconds:g} s; restart the service",
                retry_after=30.0,
            )
        if self._stopping.is_set():
            raise NotReady("the service is shutting down", retry_after=5.0)

    @property
    def in_progress(self) -> int:
        """Requests that were admitted and have not been answered."""
        return self._requests

    @contextlib.contextmanager
    def permit(self) -> Iterator[Engine]:
        """Admit a request before its body is read, which bounds the memory of bodies; QueueFull, NotReady."""
        engine = self.engine()
        limit = self.settings.limits.max_requests
        if self._requests >= limit:
            raise QueueFull(
                f"{self._requests} requests are in progress, the limit is {limit}; retry later",
                retry_after=engine.queue.full_error().retry_after,
                queue_position=engine.queue.depth,
            )
        self._requests += 1
        try:
            yield engine
        finally:
            self._requests -= 1

    def _load(self) -> None:
        start = time.monotonic()
        try:
            while not self._stopping.is_set():
                try:
                    engine = self._load_once()
                except (StoreUnavailable, LanguageUnavailable) as error:
                    # A Redis or a vLLM that was started at the same time may need longer.
                    self._report(f"waiting: {error}")
                    self._stopping.wait(STORE_RETRY_S)
                    continue
                log.info("ready after %.1f s", time.monotonic() - start)
                self._engine = engine
                return
        except VessaError as error:
            self._fail(error)
        except Exception:
            log.exception("loading failed")
            self._fail(InternalError("loading failed; see the log"))

    def _load_once(self) -> Engine:
        self.warnings = check_store(self.settings.storage.store)
        for warning in self.warnings:
            log.warning("%s", warning)
        banks = TemplateBanks(open_store(self.settings.storage.store), self.settings.storage.max_templates)
        names = banks.store.names()
        self._report(f"loading weights {self.settings.weights!r}")
        worker = self._factory(self.settings, banks)
        info = worker.info
        self._report(f"weights {info.model[:16]} are on {info.device}; {len(names)} template banks")
        self._refresh(banks, worker)
        return Engine(self.settings, self.metrics, banks, worker)

    def _refresh(self, banks: TemplateBanks, worker: Worker) -> None:
        def encode(templates: list[Template]) -> Sequence[Template | VessaError]:
            return worker.compute([TemplateItem(t.image, t.mask, t.classes, t.group) for t in templates])

        def progress(done: int, total: int) -> None:
            self._report(f"encoding templates for these weights: {done} of {total}")

        banks.refresh(encode, worker.info.model, progress)

    def _report(self, text: str) -> None:
        self._progress = text
        log.info("%s", text)

    def _fail(self, error: VessaError) -> None:
        log.error("the service cannot start: %s", error)
        self.failure, self._progress = error, "it failed to start; see its log"
        self.on_failure()
