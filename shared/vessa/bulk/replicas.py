"""Share the work of a bulk job among several annotators with the same template banks."""

import threading
import time
from collections.abc import Callable, Sequence

from vessa.client import AnnotatorClient
from vessa.client.types import Annotation
from vessa.errors import (
    BadResponse,
    DeadlineExceeded,
    LimitReached,
    NotReady,
    QueueFull,
    Retryable,
    Unreachable,
    VessaError,
)

_PAUSE_S = 1.0  # for a replica that gave no Retry-After
_MOST_FAILURES = 3  # of one piece of work while the replicas answer others


class Replicas:
    """Annotators with the same banks. A replica that is full or away pauses; the others continue.

    patience: seconds without a response from any replica after which work fails
    All methods may be called from several threads.
    """

    def __init__(self, clients: Sequence[AnnotatorClient], patience: float) -> None:
        if not clients or patience <= 0:
            raise ValueError(f"expected annotators and a patience > 0 s, got {len(clients)} and {patience}")
        self._clients = list(clients)
        self._patience = patience
        self._changed = threading.Condition()
        self._in_progress = [0] * len(clients)
        self._paused_until = [0.0] * len(clients)
        self._last_response = time.monotonic()
        self._failure: VessaError | None = None  # the newest one of any thread
        self._stopped = False

    def stop(self) -> None:
        """Make the next `call` of every thread fail, also of threads that wait for a replica."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def call(self, work: Callable[[AnnotatorClient], list[Annotation]]) -> list[Annotation]:
        """Do some work with the least busy replica, and repeat it with another one on a Retryable error.

        Raises what `work` raises. Raises DeadlineExceeded when the work itself seems to be the cause: it
        broke the connection or exceeded the time limit several times while other requests succeeded.
        """
        began, failures = time.monotonic(), 0
        while True:
            place = self._reserve(began)
            pause, sent = 0.0, time.monotonic()
            try:
                annotations = work(self._clients[place])
                self._last_response = time.monotonic()
                return annotations
            except Retryable as error:
                self._failure, pause = error, error.retry_after or _PAUSE_S
                if isinstance(error, QueueFull | LimitReached | DeadlineExceeded):
                    self._last_response = time.monotonic()  # the replica is up
                if isinstance(error, Unreachable | BadResponse | DeadlineExceeded):
                    failures += self._last_response > sent
                if failures >= _MOST_FAILURES:
                    raise DeadlineExceeded(
                        f"failed {failures} times while other requests succeeded; the last error was: {error}"
                    ) from error
            finally:
                self._release(place, pause)

    def _reserve(self, began: float) -> int:
        """Wait for a replica that is not paused; returns the index of the least busy one."""
        with self._changed:
            while True:
                now = time.monotonic()
                silent = now - max(self._last_response, began)
                if self._stopped or (self._failure and silent > self._patience):
                    raise self._failure or NotReady("the job was stopped")
                free = [i for i, until in enumerate(self._paused_until) if until <= now]
                if free:
                    place = min(free, key=lambda i: self._in_progress[i])
                    self._in_progress[place] += 1
                    return place
                self._changed.wait(min(1.0, min(self._paused_until) - now))

    def _release(self, place: int, pause: float) -> None:
        with self._changed:
            self._in_progress[place] -= 1
            if pause:
                self._paused_until[place] = time.monotonic() + pause
            self._changed.notify_all()
