"""What one key may take, so that it leaves something for the others: requests at once, images a minute."""

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vessa.errors import LimitReached
from vessa_server.auth.keys import Caller

MINUTE_S = 60.0


@dataclass
class KeyLimits:
    """Counts by the names of keys; a key's own limits go before these.

    requests: in work at once; images_per_minute: 0 for any number. A key that was quiet may spend a minute's
    images at once. Each process counts for itself: of two annotators behind one address each allows as much.
    """

    requests: int
    images_per_minute: int = 0
    clock: Callable[[], float] = time.monotonic
    _working: Counter[str] = field(default_factory=Counter)
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def work(self, caller: Caller) -> Iterator[None]:
        """Count a request while it is in work; LimitReached when the key has as many as it may."""
        most = caller.requests or self.requests
        with self._lock:
            if self._working[caller.name] >= most:
                raise LimitReached(
                    f"key {caller.name!r} has {most} requests in work, as many as it may", retry_after=1.0
                )
            self._working[caller.name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[caller.name] -= 1
                if not self._working[caller.name]:
                    del self._working[caller.name]

    def take(self, caller: Caller, images: int) -> None:
        """Count images; LimitReached while the key has used up its minute.

        A request larger than what is left passes and is paid for afterwards, or the largest would never pass.
        """
        most = caller.images_per_minute or self.images_per_minute
        if not most:
            return
        with self._lock:
            now = self.clock()
            left, when = self._left.get(caller.name, (float(most), now))
            left = min(float(most), left + (now - when) * most / MINUTE_S)
            if left < 1:
                raise LimitReached(
                    f"key {caller.name!r} may send {most} images a minute, and has",
                    retry_after=float(math.ceil((1 - left) * MINUTE_S / most)),
                )
            self._left[caller.name] = (left - images, now)
