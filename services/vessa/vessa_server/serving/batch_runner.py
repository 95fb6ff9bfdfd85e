"""Run a batch, and when it fails as a whole isolate the item to blame."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vessa.errors import InternalError, TooLarge, VessaError

log = logging.getLogger(__name__)

Process = Callable[[list[Any]], Sequence[Any]]


class BatchRunner:
    """Calls `process` on batches and halves those that fail. Only the batch thread uses it.

    process: items -> one result or VessaError for each, in order
    release(everything): frees device memory after an out-of-memory error; `everything` is True when one
    item alone did not fit, and then all cached features go too
    """

    def __init__(self, process: Process, release: Callable[[bool], None]) -> None:
        self._process, self._release = process, release

    def run(self, items: list[Any]) -> Iterator[Sequence[Any]]:
        """Yield the results of consecutive parts of a batch; the parts together cover all items.

        A batch that raises is halved until one item stands alone; that item's result is its error.
        """
        outcome = self._try(items)
        if isinstance(outcome, _OutOfMemory):
            self._release(len(items) == 1)
            if len(items) == 1:
                outcome = self._try(items)
                outcome = [_too_large()] if isinstance(outcome, _OutOfMemory) else outcome
            else:
                outcome = None
        if outcome is None:
            middle = len(items) // 2
            yield from self.run(items[:middle])
            yield from self.run(items[middle:])
        else:
            yield outcome

    def _try(self, items: list[Any]) -> "Sequence[Any] | _OutOfMemory | None":
        """Return the results, or None when the batch must be halved.

        No exception leaves this function: its traceback would keep tensors alive.
        """
        try:
            results = self._process(items)
            if len(results) != len(items):
                raise ValueError(f"expected {len(items)} results, got {len(results)}")
            return results
        except Exception as error:
            name = type(error).__name__
            if is_out_of_memory(error):
                log.warning("out of device memory on a batch of %d (%s)", len(items), name)
                return _OutOfMemory()
            if len(items) > 1:
                log.warning("a batch of %d failed (%s); retrying its halves", len(items), name)
                return None
            if isinstance(error, VessaError):
                return [error.with_traceback(None)]
            log.exception("an item failed on the device")
            return [InternalError("the annotator failed on this item; see the service's log")]


class _OutOfMemory:
    """The outcome of a batch that did not fit into the device's memory."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error reports that the device's memory did not suffice."""
    # torch is not imported in this process, so its error is recognized by name. On a CPU torch raises a
    # RuntimeError with this text.
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def _too_large() -> TooLarge:
    return TooLarge("this image does not fit into the device's memory, even alone; send a smaller one")
