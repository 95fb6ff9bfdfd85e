"""A bounded queue in front of the device, which one thread asks.

Requests submit items from the event loop; the device thread takes them in batches, bounded in items and in
pixels. An idle device starts at once with whatever is there. Between batches it waits a few milliseconds for
as many items as the last one and the queue held, since who was answered often comes again; one client alone
waits for nobody. Clients take turns, and so do the requests of a client, so that one image need not wait
behind ten thousand. Each item has its own future: it gets its own result or its own error, and one that
nobody waits for any more is dropped before it costs anything. Items that are the same are computed once.
"""

import asyncio
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vessa.errors import InternalError, NotReady, QueueFull, TooLarge, VessaError
from vessa_server.serving.fair_queue import Turns

log = logging.getLogger(__name__)

IDLE_BEAT_S = 1.0

Process = Callable[[list[Any]], Sequence[Any]]


@dataclass(eq=False)
class _Entry:
    """An item in the queue and all who wait for it. owner: the client and the request it came with."""

    item: Any
    owner: tuple[str, int]
    key: Hashable | None
    futures: "list[Future[Any]]" = field(default_factory=list)
    taken: bool = False

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not all(future.cancelled() for future in self.futures)

    def settle(self, result: Any) -> None:
        """Give the result to all who wait. Errors are results here: one must not end a `gather`."""
        for future in self.futures:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_result(result)


class DeviceQueue:
    """Bounded queue and device thread; `submit` and `submit_all` are for any event loop.

    process: items -> one result or VessaError for each, in order; runs in the device thread only.
    max_items: how many may wait; max_batch: how many are processed at once; wait_s: how long the device
    waits between batches for items that are likely to come. max_pixels, pixels_of: bound a batch by what its
    items weigh; one item is always taken. observe(batch size, seconds): called after each batch.
    release(everything): called when the memory of the device did not suffice, with True when one item alone
    was too much for it.
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
        """Start the device thread; ValueError when a limit is not positive."""
        if max_items < 1 or max_batch < 1 or wait_s < 0 or (max_pixels is not None and max_pixels < 1):
            raise ValueError(
                f"expected limits >= 1 and a wait >= 0 s, got {max_items} items, {max_batch} a batch, "
                f"{max_pixels} px and {wait_s} s"
            )
        self.max_items, self.max_batch, self.wait_s = max_items, max_batch, wait_s
        self._process, self._observe, self._release = process, observe, release
        self._max_pixels, self._pixels_of = max_pixels, pixels_of
        self._waiting: Turns[_Entry] = Turns()
        self._in_work: dict[Hashable, _Entry] = {}  # what waits or is processed, by its key
        self._requests = itertools.count()
        self._changed = threading.Condition()
        self._closed = self._drained = False
        self._likely = 0  # items that should be there soon after a batch
        self._beat = time.monotonic()
        self._seconds_per_item = 0.05  # a moving average; this first guess only words the first Retry-After
        self._thread = threading.Thread(target=self._run, name="vessa-device", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    def silence(self) -> float:
        """Return the seconds since the device thread last gave a sign of life; inf when it is dead."""
        return time.monotonic() - self._beat if self._thread.is_alive() else math.inf

    async def submit(self, item: Any, client: str = "") -> Any:
        """Return the item's result or raise its error; cancelling this drops the item if it still waits.

        QueueFull (with retry_after and queue_position) when there is no place, NotReady when draining.
        """
        result = (await self.submit_all([item], client))[0]
        if isinstance(result, VessaError):
            raise result
        return result

    async def submit_all(
        self, items: Sequence[Any], client: str = "", keys: Sequence[Hashable] | None = None
    ) -> list[Any]:
        """Return one result or VessaError for each item. All are queued together, or none (QueueFull).

        client: clients take turns; keys: items with equal ones have the same result, which is computed once
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
        """Queue what is not in work yet, join what is. When it is refused the caller cancels the futures."""
        owner = (client, next(self._requests))
        fresh: list[_Entry] = []
        own: dict[Hashable, _Entry] = {}
        for item, future, key in zip(items, futures, keys, strict=True):
            entry = None if key is None else own.get(key) or self._in_work.get(key)
            if entry is None:
                fresh.append(entry := _Entry(item, owner, key))
                if key is not None:
                    own[key] = entry
            if entry.taken:  # what is processed can be cancelled no more
                future.set_running_or_notify_cancel()
            entry.futures.append(future)
        self._admit(len(fresh), client)
        self._in_work |= own
        for entry in fresh:
            self._waiting.add(entry, *owner)

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
            for entry in self._waiting.clear():
                entry.settle(NotReady("the service is shutting down", retry_after=5.0))
        return not self._thread.is_alive()

    def _admit(self, count: int, client: str) -> None:
        if not self._thread.is_alive() and not self._drained:
            raise _dead()
        if self._closed:
            raise NotReady("the service is shutting down", retry_after=5.0)
        # The last eighth of the places is for clients that have none.
        kept = self.max_items // 8 if self._waiting.holds(client) else 0
        if self.depth + count > self.max_items - kept:
            # Those whose client has left hold no place.
            for entry in self._waiting.drop(lambda entry: not entry.wanted):
                self._forget(entry)
        if self.depth + count > self.max_items - kept:
            raise self.full_error()

    def _forget(self, entry: _Entry) -> None:
        if entry.key is not None and self._in_work.get(entry.key) is entry:
            del self._in_work[entry.key]

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            if batch:
                start = time.monotonic()
                try:
                    self._answer(batch)
                except BaseException:
                    # The thread dies of it: nobody may wait for results that will never come.
                    with self._changed:
                        self._closed = True
                        for entry in (*batch, *self._waiting.clear()):
                            entry.settle(_dead())
                    raise
                seconds = time.monotonic() - start
                self._seconds_per_item += 0.2 * (seconds / len(batch) - self._seconds_per_item)
                self._observe(len(batch), seconds)

    def _take(self) -> list[_Entry] | None:
        """Return the next batch, [] when idle for a while, None when drained."""
        with self._changed:
            self._beat = time.monotonic()
            likely, self._likely = min(self._likely, self.max_batch), 0
            if self.depth < likely:
                self._changed.wait_for(lambda: self._closed or self.depth >= likely, self.wait_s)
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
                # Every future is told, since one that was not could still be cancelled.
                if any([future.set_running_or_notify_cancel() for future in entry.futures]):
                    entry.taken = True
                    batch.append(entry)
                    pixels += weight
                else:
                    self._forget(entry)
            self._beat = time.monotonic()
            return batch

    def _answer(self, batch: list[_Entry], *, released: bool = False) -> None:
        """Process a batch; should that fail as a whole, halve it until the item to blame stands alone.

        Where the memory did not suffice, what is held on the device is released before the next try.
        """
        results = self._try(batch)
        if isinstance(results, _OutOfMemory):
            alone = len(batch) == 1
            if not (alone and released):
                self._release(alone)
            if alone and not released:
                self._answer(batch, released=True)
                return
            results = None if len(batch) > 1 else [_too_large()]
        if results is None:
            middle = len(batch) // 2
            self._answer(batch[:middle])
            self._answer(batch[middle:])
            return
        with self._changed:
            for entry in batch:
                self._forget(entry)
            self._likely = len(batch) + self.depth  # before anybody is answered and comes again
        for entry, result in zip(batch, results, strict=True):
            entry.settle(result)

    def _try(self, batch: list[_Entry]) -> "Sequence[Any] | _OutOfMemory | None":
        """Return the results, None for a batch to be halved. No traceback, which holds tensors, gets out."""
        try:
            results = self._process([entry.item for entry in batch])
            if len(results) != len(batch):
                raise ValueError(f"expected {len(batch)} results, got {len(results)}")
            return results
        except Exception as error:
            name = type(error).__name__
            if is_out_of_memory(error):
                log.warning("the device's memory did not suffice for a batch of %d (%s)", len(batch), name)
                return _OutOfMemory()
            if len(batch) > 1:
                log.warning("a batch of %d failed (%s); trying its halves", len(batch), name)
                return None
            if isinstance(error, VessaError):
                return [error.with_traceback(None)]
            log.exception("an item failed on the device")
            return [InternalError("the annotator failed on this item; the service's log says why")]


class _OutOfMemory:
    """The outcome of a batch that was too much for the device's memory."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device's memory did not suffice."""
    # By its name, since torch is not known here; on a CPU it raises a RuntimeError that says so.
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _too_large() -> TooLarge:
    return TooLarge("the device's memory does not suffice for this image, even alone; send a smaller one")


def _dead() -> InternalError:
    return InternalError("the device thread has died; the service must be restarted")
