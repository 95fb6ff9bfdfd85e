"""A queue in which clients take turns, and so do the requests of each client; items stay in order."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class FairQueue(Generic[_Item]):
    """Serves one item of each client in turn, and of each of a client's requests in turn.

    Not thread-safe: the caller holds a lock.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[int, deque[_Item]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def holds(self, client: str) -> bool:
        """Whether any item of a client waits."""
        return client in self._clients

    def add(self, item: _Item, client: str, request: int) -> None:
        """Append an item to its request."""
        self._clients.setdefault(client, OrderedDict()).setdefault(request, deque()).append(item)
        self._count += 1

    def first(self) -> _Item:
        """Return the next item without removing it. Raises IndexError when no item waits."""
        return self._next()[2][0]

    def take(self) -> _Item:
        """Remove and return the next item; its client and its request move to the end of their circles."""
        client, request, items = self._next()
        item = items.popleft()
        self._count -= 1
        requests = self._clients[client]
        if items:
            requests.move_to_end(request)
        else:
            del requests[request]
        if requests:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        return item

    def drop(self, unwanted: Callable[[_Item], bool]) -> list[_Item]:
        """Remove and return all unwanted items; the others keep their order."""
        kept: list[tuple[_Item, str, int]] = []
        dropped: list[_Item] = []
        for client, requests in self._clients.items():
            for request, items in requests.items():
                for item in items:
                    if unwanted(item):
                        dropped.append(item)
                    else:
                        kept.append((item, client, request))
        self.clear()
        for item, client, request in kept:
            self.add(item, client, request)
        return dropped

    def clear(self) -> list[_Item]:
        """Remove and return all items."""
        items = list(self._all())
        self._clients.clear()
        self._count = 0
        return items

    def _all(self) -> Iterator[_Item]:
        for requests in self._clients.values():
            for items in requests.values():
                yield from items

    def _next(self) -> tuple[str, int, deque[_Item]]:
        if not self._clients:
            raise IndexError("the queue is empty")
        client, requests = next(iter(self._clients.items()))
        request, items = next(iter(requests.items()))
        return client, request, items
