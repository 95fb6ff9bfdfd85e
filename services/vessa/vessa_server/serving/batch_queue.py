"""A bounded queue in front of the worker; one thread takes batches from it.

- Requests submit items from the event loop. The batch thread takes them in batches, bounded in items and in
  pixels. An idle worker starts at once on whatever waits.
- Between batches the thread waits a few milliseconds for as many items as the last batch and the queue held,
  because clients that were just answered often send again. A single client never waits.
- Clients take turns, and so do the requests of one client: one image does not wait behind ten thousand.
- Each item has its own future with its own result or error. An item whose clients have all left is dropped
  before it costs anything. Items with equal keys are computed once.
"""

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vessa.errors import InternalError, NotReady, QueueFull, VessaError
from vessa_server.serving.batch_runner import BatchRunner, Process
from vessa_server.serving.fair_queue import FairQueue

IDLE_BEAT_S = 1.0


@dataclass(eq=False)
class _Entry:
    """A queued item and the futures of all who wait for it. owner: the client and its request's number."""

    item: Any
    owner: tuple[str, int]
    key: Hashable | None
    futures: "list[Future[Any]]" = field(default_factory=list)
    taken: bool = False

    @property
    def wanted(self) -> bool:
        """Whether at least one client still waits for it."""
        return not all(future.cancelled() for future in self.futures)

    def settle(self, result: Any) -> None:
        """Set the result of every waiting future.

        Errors are set as results too: an exception would end the `gather` over the other items.
        """
        for future in self.futures:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_result(result)


class BatchQueue:
    """Bounded queue and batch thread; `submit` and `submit_all` may be called from any event loop.

    process: items -> one result or VessaError for each, in order; runs in the batch thread only
    max_items: limit of waiting items; max_batch: limit of items in one batch
    wait_s: how long the batch thread waits, in s, between batches for items that are likely to come
    max_pixels, pixels_of: limit of the summed pixels of a batch; the first item is always taken
    observe(batch size, seconds): called after each batch
    release(everything): see `BatchRunner`
    """

    def __init__(
        self,
        process: Process,
        max_items: int,
        max_batch: int,
        wait_s: float = 0.005,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
        *,
        max_pixels: int | None = None,
        pixels_of: Callable[[Any], int] = lambda item: 0,
        release: Callable[[bool], None] = lambda everything: None,
    ) -> None:
        """Start the batch thread; ValueError when a limit is not positive."""
        if max_items < 1 or max_batch < 1 or wait_s < 0 or (max_pixels is not None and max_pixels < 1):
            raise ValueError(
                f"expected limits >= 1 and a wait >= 0 s, got {max_items} items, {max_batch} a batch, "
                f"{max_pixels} px and {wait_s} s"
            )
        self.max_items, self.max_batch, self.wait_s = max_items, max_batch, wait_s
        self._runner, self._observe = BatchRunner(process, release), observe
        self._release, self._dropping = release, threading.Event()
        self._max_pixels, self._pixels_of = max_pixels, pixels_of
        self._waiting: FairQueue[_Entry] = FairQueue()
        self._in_flight: dict[Hashable, _Entry] = {}  # entries that wait or are processed, by key
        self._requests = itertools.count()
        self._changed = threading.Condition()
        self._closed = self._drained = False
        self._expected = 0  # items that are likely to wait soon after a batch
        self._beat = time.monotonic()
        self._seconds_per_item = 0.05  # a moving average; this start value only affects the first Retry-After
        self._thread = threading.Thread(target=self._run, name="vessa-batches", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Number of waiting items."""
        return len(self._waiting)

    def silence(self) -> float:
        """Return the seconds since the batch thread's last sign of life; inf when the thread is dead."""
        return time.monotonic() - self._beat if self._thread.is_alive() else math.inf

    async def submit(self, item: Any, client: str = "") -> Any:
        """Return the item's result or raise its error; cancelling drops the item while it still waits.

        Raises QueueFull (with retry_after and queue_position), and NotReady while draining.
        """
        result = (await self.submit_all([item], client))[0]
        if isinstance(result, VessaError):
            raise result
        return result

    async def submit_all(
        self, items: Sequence[Any], client: str = "", keys: Sequence[Hashable] | None = None
    ) -> list[Any]:
        """Return one result or VessaError for each item. Either all are queued or none (QueueFull).

        client: whose items they are; clients take turns
        keys: items with equal keys have equal results, which are computed once
        """
        futures: list[Future[Any]] = [Future() for _ in items]
        try:
            with self._changed:
                self._enter(items, futures, client, [None] * len(items) if keys is None else keys)
                self._changed.notify_all()
            return list(await asyncio.gather(*(asyncio.wrap_future(future) for future in futures)))
        finally:
            for future in futures:
                future.cancel()

    def _enter(
        self, items: Sequence[Any], futures: "list[Future[Any]]", client: str, keys: Sequence[Hashable | None]
    ) -> None:
        """Queue new items and join those in flight. On refusal the caller cancels the futures."""
        owner = (client, next(self._requests))
        fresh: list[_Entry] = []
        own: dict[Hashable, _Entry] = {}
        for item, future, key in zip(items, futures, keys, strict=True):
            entry = None if key is None else own.get(key) or self._in_flight.get(key)
            if entry is None:
                fresh.append(entry := _Entry(item, owner, key))
                if key is not None:
                    own[key] = entry
            if entry.taken:  # an item that is being processed cannot be cancelled
                future.set_running_or_notify_cancel()
            entry.futures.append(future)
        self._admit(len(fresh), client)
        self._in_flight |= own
        for entry in fresh:
            self._waiting.add(entry, *owner)

    def full_error(self) -> QueueFull:
        """Return a QueueFull with the current depth and the expected time until a place is free."""
        waiting = self.depth
        seconds = math.ceil(max(1.0, waiting * self._seconds_per_item))
        return QueueFull(
            f"the queue is full: {waiting} items wait, the limit is {self.max_items}; retry later",
            retry_after=float(min(seconds, 60)),
            queue_position=waiting,
        )

    def drain(self, timeout: float | None = None) -> bool:
        """Accept no more items and finish the waiting ones; return whether that took at most `timeout` s.

        Items that still wait after the timeout fail with NotReady.
        """
        with self._changed:
            self._closed = self._drained = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            for entry in self._waiting.clear():
                entry.settle(NotReady("the service is shutting down", retry_after=5.0))
        return not self._thread.is_alive()

    def _admit(self, count: int, client: str) -> None:
        if not self._thread.is_alive() and not self._drained:
            raise _dead()
        if self._closed:
            raise NotReady("the service is shutting down", retry_after=5.0)
        # The last eighth of the places is reserved for clients without waiting items.
        reserved = self.max_items // 8 if self._waiting.holds(client) else 0
        if self.depth + count > self.max_items - reserved:
            # Items whose clients have left hold no place.
            for entry in self._waiting.drop(lambda entry: not entry.wanted):
                self._forget(entry)
        if self.depth + count > self.max_items - reserved:
            raise self.full_error()

    def _forget(self, entry: _Entry) -> None:
        if entry.key is not None and self._in_flight.get(entry.key) is entry:
            del self._in_flight[entry.key]

    def release_memory(self) -> None:
        """Let the batch thread drop all cached images and templates before its next batch, within seconds."""
        self._dropping.set()

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if self._dropping.is_set():
                self._dropping.clear()
                self._release(True)
            if batch:
                start = time.monotonic()
                try:
                    self._process(batch)
                except BaseException:
                    # This thread ends here: no client may wait for results that will never come.
                    with self._changed:
                        self._closed = True
                        for entry in (*batch, *self._waiting.clear()):
                            entry.settle(_dead())
                    raise
                seconds = time.monotonic() - start
                self._seconds_per_item += 0.2 * (seconds / len(batch) - self._seconds_per_item)
                self._observe(len(batch), seconds)

    def _take(self) -> list[_Entry] | None:
        """Return the next batch, [] after a while without items, None when drained."""
        with self._changed:
            self._beat = time.monotonic()
            expected, self._expected = min(self._expected, self.max_batch), 0
            if self.depth < expected:
                self._changed.wait_for(lambda: self._closed or self.depth >= expected, self.wait_s)
            if not self.depth and not self._closed:
                self._changed.wait(IDLE_BEAT_S)
            if not self.depth:
                return None if self._closed else []
            batch, pixels = list[_Entry](), 0
            while self.depth and len(batch) < self.max_batch:
                weight = self._pixels_of(self._waiting.first().item)
                if batch and self._max_pixels is not None and pixels + weight > self._max_pixels:
                    break
                entry = self._waiting.take()
                # A list, not a generator: every future must be marked as running, or a later cancel would
                # succeed on those that `any` skipped.
                if any([future.set_running_or_notify_cancel() for future in entry.futures]):
                    entry.taken = True
                    batch.append(entry)
                    pixels += weight
                else:
                    self._forget(entry)
            self._beat = time.monotonic()
            return batch

    def _process(self, batch: list[_Entry]) -> None:
        """Run a batch and answer each part of it as soon as its results exist."""
        start = 0
        for results in self._runner.run([entry.item for entry in batch]):
            part = batch[start : start + len(results)]
            start += len(results)
            with self._changed:
                for entry in part:
                    self._forget(entry)
                # Set before any client is answered, since an answered client may submit at once.
                self._expected = len(part) + self.depth
            for entry, result in zip(part, results, strict=True):
                entry.settle(result)


def _dead() -> InternalError:
    return InternalError("the batch thread has died; restart the service")
