"""A cache with a budget of bytes that evicts the least recently used entries."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any, Protocol


class Sized(Protocol):
    """A value that knows its size."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


class ByteCache:
    """Values by key within one budget of bytes; the least recently used are evicted first.

    Only one thread may change it at a time; `in` may be used from any thread.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._held: OrderedDict[Hashable, Sized] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self.nbytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[tuple[Hashable, Sized]]:
        return iter(list(self._held.items()))

    def get(self, key: Hashable) -> Any:
        """Return a value, which becomes the most recently used, or None."""
        held = self._held.get(key)
        if held is not None:
            self._held.move_to_end(key)
        return held

    def put(self, key: Hashable, value: Sized) -> None:
        """Store a value, or update its size; evict others until all fit the budget.

        A value larger than the whole budget is not stored, and evicts nothing.
        """
        size = value.nbytes
        self.nbytes -= self._sizes.pop(key, 0)
        self._held.pop(key, None)
        if size > self.budget:
            return
        self.nbytes += size
        self._held[key], self._sizes[key] = value, size
        while self.nbytes > self.budget:
            oldest, _ = self._held.popitem(last=False)
            self.nbytes -= self._sizes.pop(oldest)

    def drop(self, key: Hashable) -> None:
        """Remove one entry, if it is there."""
        if self._held.pop(key, None) is not None:
            self.nbytes -= self._sizes.pop(key)

    def clear(self) -> None:
        """Evict everything."""
        self._held.clear()
        self._sizes.clear()
        self.nbytes = 0
