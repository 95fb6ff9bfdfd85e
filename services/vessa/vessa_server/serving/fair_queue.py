"""Whose turn it is: clients in a circle, the requests of each in a circle of its own, items in order."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class Turns(Generic[_Item]):
    """A queue that serves one item of each client in turn, and of each of a client's requests. No locks."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[int, deque[_Item]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def holds(self, client: str) -> bool:
        """Whether anything of a client waits."""
        return client in self._clients

    def add(self, item: _Item, client: str, request: int) -> None:
        """Queue an item at the end of its request."""
        self._clients.setdefault(client, OrderedDict()).setdefault(request, deque()).append(item)
        self._count += 1

    def first(self) -> _Item:
        """Return the item whose turn it is. IndexError when nothing waits."""
        return self._turn()[2][0]

    def take(self) -> _Item:
        """Remove the item whose turn it is; its client and its request go to the end of their circles."""
        client, request, items = self._turn()
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
        """Remove and return all items that are unwanted; the others keep their order."""
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

    def _turn(self) -> tuple[str, int, deque[_Item]]:
        if not self._clients:
            raise IndexError("nothing waits")
        client, requests = next(iter(self._clients.items()))
        request, items = next(iter(requests.items()))
        return client, request, items
