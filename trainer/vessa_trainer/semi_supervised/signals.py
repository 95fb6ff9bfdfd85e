"""Delay Ctrl-C and SIGTERM to the end of a training step, in all processes alike."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block."""
    with noted() as came:
        yield
    if came:
        signal.raise_signal(came[0])  # what it would have done


@contextmanager
def noted() -> Iterator[list[int]]:
    """Collect signals in a list instead of being stopped by them."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came  # signals come to the main thread only
        return
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
