"""A bounded queue in front of the one thread that uses the device.

Requests submit items from the event loop; the device thread takes them in batches. An idle device starts at
once with whatever is there; a busy one waits a few milliseconds for a fuller batch. Each item has its own
future: it gets its own result or its own error, and one that nobody waits for any more is dropped before it
costs anything.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vessa.errors import InternalError, NotReady, QueueFull, VessaError

log = logging.getLogger(__name__)

IDLE_BEAT_S = 1.0

Process = Callable[[list[Any]], Sequence[Any]]


@dataclass
class _Entry:
    item: Any
    future: "Future[Any]" = field(default_factory=Future)


class DeviceQueue:
    """Bounded queue and device thread; `submit` and `submit_all` are for any event loop.

    process: items -> one result or VessaError for each, in order; runs in the device thread only.
    max_items: how many may wait; max_batch: how many are processed at once; wait_s: how long a busy device
    waits for a fuller batch. observe(batch size, seconds): called after each batch.
    """

    def __init__(
        self,
        process: Process,
        max_items: int,
        max_batch: int,
        wait_s: float = 0.005,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """Start the device thread; ValueError when a limit is not positive."""
        if max_items < 1 or max_batch < 1 or wait_s < 0:
            raise ValueError(
                f"expected limits >= 1 and a wait >= 0 s, got {max_items}, {max_batch}, {wait_s}"
            )
        self.max_items, self.max_batch, self.wait_s = max_items, max_batch, wait_s
        self._process, self._observe = process, observe
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()
        self._closed = self._drained = False
        self._beat = time.monotonic()
        self._seconds_per_item = 0.05  # a moving average; this first guess only words the first Retry-After
        self._thread = threading.Thread(target=self._run, name="vessa-device", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many items wait."""
        return len(self._entries)

    def silence(self) -> float:
        """Return the seconds since the device thread last gave a sign of life; inf when it is dead."""
        return time.monotonic() - self._beat if self._thread.is_alive() else math.inf

    async def submit(self, item: Any) -> Any:
        """Return the item's result or raise its error; cancelling this drops the item if it still waits.

        QueueFull (with retry_after and queue_position) when there is no place, NotReady when draining.
        """
        result = (await self.submit_all([item]))[0]
        if isinstance(result, VessaError):
            raise result
        return result

    async def submit_all(self, items: Sequence[Any]) -> list[Any]:
        """Return one result or VessaError for each item. All are queued together, or none (QueueFull)."""
        entries = [_Entry(item) for item in items]
        with self._changed:
            self._admit(len(entries))
            self._entries.extend(entries)
            self._changed.notify_all()
        futures = [asyncio.wrap_future(entry.future) for entry in entries]
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for entry in entries:
                entry.future.cancel()

    def full_error(self) -> QueueFull:
        """Return the QueueFull of this moment: how many wait, and when a place should be free."""
        waiting = self.depth
        seconds = math.ceil(max(1.0, waiting * self._seconds_per_item))
        return QueueFull(
            f"the queue is full: {waiting} items wait, at most {self.max_items} may",
            retry_after=float(min(seconds, 60)),
            queue_position=waiting,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more, finish what waits; return whether that was done within `timeout` seconds.

        What is still waiting then fails with NotReady.
        """
        with self._changed:
            self._closed = self._drained = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            while self._entries:
                _settle(self._entries.popleft(), NotReady("the service is shutting down", retry_after=5.0))
        return not self._thread.is_alive()

    def _admit(self, count: int) -> None:
        if not self._thread.is_alive() and not self._drained:
            raise _dead()
        if self._closed:
            raise NotReady("the service is shutting down", retry_after=5.0)
        if len(self._entries) + count > self.max_items:
            # Those whose client has left hold no place.
            self._entries = deque(entry for entry in self._entries if not entry.future.cancelled())
        if len(self._entries) + count > self.max_items:
            raise self.full_error()

    def _run(self) -> None:
        busy = False
        while (batch := self._take(busy)) is not None:
            busy = bool(batch)
            if batch:
                start = time.monotonic()
                try:
                    self._answer(batch)
                except BaseException:
                    # The thread dies of it: nobody may wait for results that will never come.
                    with self._changed:
                        self._closed = True
                        for entry in (*batch, *self._entries):
                            _settle(entry, _dead())
                    raise
                seconds = time.monotonic() - start
                self._seconds_per_item += 0.2 * (seconds / len(batch) - self._seconds_per_item)
                self._observe(len(batch), seconds)

    def _take(self, busy: bool) -> list[_Entry] | None:
        """Return the next batch, [] when idle for a while, None when drained.

        busy: a batch has just ended, so requests are likely on their way and a short wait fills the next one.
        """
        with self._changed:
            self._beat = time.monotonic()
            if busy and not self._closed:
                self._changed.wait_for(lambda: self._closed or self.depth >= self.max_batch, self.wait_s)
            if not self._entries and not self._closed:
                self._changed.wait(IDLE_BEAT_S)
            if not self._entries:
                return None if self._closed else []
            batch: list[_Entry] = []
            while self._entries and len(batch) < self.max_batch:
                entry = self._entries.popleft()
                if entry.future.set_running_or_notify_cancel():
                    batch.append(entry)
            self._beat = time.monotonic()
            return batch

    def _answer(self, batch: list[_Entry]) -> None:
        """Process a batch; should that fail as a whole, halve it until the item to blame stands alone."""
        try:
            results = self._process([entry.item for entry in batch])
            if len(results) != len(batch):
                raise ValueError(f"expected {len(batch)} results, got {len(results)}")
        except Exception as error:
            if len(batch) > 1:
                log.warning("a batch of %d failed (%s); trying its halves", len(batch), type(error).__name__)
                middle = len(batch) // 2
                self._answer(batch[:middle])
                self._answer(batch[middle:])
                return
            if not isinstance(error, VessaError):
                log.exception("an item failed on the device")
                error = InternalError("the annotator failed on this item; the service's log says why")
            results = [error]
        for entry, result in zip(batch, results, strict=True):
            _settle(entry, result)


def _dead() -> InternalError:
    return InternalError("the device thread has died; the service must be restarted")


def _settle(entry: _Entry, result: Any) -> None:
    # Errors are results here, so that one item's error does not end the `gather` of its neighbors.
    if entry.future.done():
        return
    if entry.future.running() or entry.future.set_running_or_notify_cancel():
        entry.future.set_result(result)
