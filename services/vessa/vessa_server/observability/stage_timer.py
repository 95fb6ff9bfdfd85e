"""Sum the time of each stage of inference, for /metrics and the benchmarks."""

import contextlib
import time
from collections.abc import Callable, Iterator

STAGES = ("encode", "retrieve", "language", "attend", "draw", "fuse")


class StageTimer:
    """Sums the time spent in each stage of inference. Only the batch thread times stages.

    synchronize: waits until the device has finished its queued work, so that a stage ends with its kernels
    seconds: by stage, since the start
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to a stage; a block that raises is not counted."""
        started = time.perf_counter()
        yield
        self._synchronize()
        self.seconds[name] += time.perf_counter() - started
