"""Bound what one key may take, so that other keys get their share."""

import contextlib
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vessa.errors import LimitReached
from vessa_server.auth.keys import Caller, Role

MINUTE_S = 60.0
_ADDRESSES = 10_000  # addresses whose failed keys are counted; the oldest are forgotten


@dataclass
class Allowance:
    """Refill a budget evenly over each minute. A name that was quiet may spend a whole minute at once.

    per_minute: size of the budget, 0 for no bound
    """

    clock: Callable[[], float] = time.monotonic
    _left: "OrderedDict[str, tuple[float, float]]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str, amount: int, per_minute: int) -> float:
        """Spend `amount`. Returns 0, or the seconds to wait when the budget is used up.

        An amount larger than what is left passes and is paid for afterwards, or the largest would never
        pass.
        """
        if not per_minute:
            return 0.0
        with self._lock:
            now = self.clock()
            left, when = self._left.get(name, (float(per_minute), now))
            left = min(float(per_minute), left + (now - when) * per_minute / MINUTE_S)
            if left < 1:
                return float(math.ceil((1 - left) * MINUTE_S / per_minute))
            self._left[name] = (left - amount, now)
            self._left.move_to_end(name)
            if len(self._left) > _ADDRESSES:
                self._left.popitem(last=False)
            return 0.0


@dataclass
class KeyLimits:
    """Count by the names of keys; a key's own limits take precedence.

    requests: in progress at once; share: places that any key may hold of all, also one with a larger limit;
    images_per_minute, changes_per_minute, failures_per_minute (failed keys of one address): 0 for no bound;
    reads: GET requests in progress or waiting. Each process counts for itself: two annotators behind one
    address allow twice as much.
    """

    requests: int
    images_per_minute: int = 0
    share: int = 1 << 30
    reads: int = 16
    changes_per_minute: int = 0
    failures_per_minute: int = 0
    clock: Callable[[], float] = time.monotonic
    _working: Counter[tuple[str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._images, self._changes, self._failures = (Allowance(self.clock) for _ in range(3))

    @contextlib.contextmanager
    def work(self, caller: Caller) -> Iterator[None]:
        """Count a request while it is in progress. Raises LimitReached at the key's limit."""
        with self._place("requests", caller, min(caller.requests or self.requests, self.share)):
            yield

    @contextlib.contextmanager
    def read(self, caller: Caller) -> Iterator[None]:
        """Count a GET request while it waits or is in progress. Raises LimitReached at the limit."""
        with self._place("GET requests", caller, self.reads):
            yield

    def take(self, caller: Caller, images: int) -> None:
        """Count images. Raises LimitReached while the key has used up its minute."""
        most = caller.images_per_minute or self.images_per_minute
        if seconds := self._images.take(caller.name, images, most):
            raise LimitReached(
                f"Key {caller.name!r} has sent {most} images within a minute, its limit. Retry in "
                f"{seconds:g} s.",
                retry_after=seconds,
            )

    def change(self, caller: Caller) -> None:
        """Count a change that the audit log records. Raises LimitReached; admins have no limit."""
        if caller.role is Role.admin:
            return
        most = self.changes_per_minute
        if seconds := self._changes.take(caller.name, 1, most):
            raise LimitReached(
                f"Key {caller.name!r} has made {most} changes within a minute, the limit. Retry in "
                f"{seconds:g} s.",
                retry_after=seconds,
            )

    def failed(self, address: str) -> None:
        """Count a wrong key. Raises LimitReached when its address sent too many within a minute."""
        if seconds := self._failures.take(address, 1, self.failures_per_minute):
            raise LimitReached(
                f"This address has sent {self.failures_per_minute} wrong keys within a minute, the limit. "
                f"Check the key and retry in {seconds:g} s.",
                retry_after=seconds,
            )

    @contextlib.contextmanager
    def _place(self, what: str, caller: Caller, most: int) -> Iterator[None]:
        place = (what, caller.name)
        with self._lock:
            if self._working[place] >= most:
                raise LimitReached(
                    f"Key {caller.name!r} already has {most} {what} in progress, its limit. Retry when one "
                    "has ended.",
                    retry_after=1.0,
                )
            self._working[place] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[place] -= 1
                if not self._working[place]:
                    del self._working[place]
