"""Keep several requests in progress: with threads for the sync client, with tasks for the async client.

These functions are what the two clients do not share. Everything else in `sync_client.py` is generated from
`async_client.py`.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

from vessa.client.endpoints import Call

_P = ParamSpec("_P")
_T = TypeVar("_T")

in_thread = asyncio.to_thread


def in_place(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in this thread: the sync counterpart of `in_thread`."""
    return function(*args, **kwargs)


def stream_sync(
    send: Callable[[Call[_T]], _T], calls: Iterable[Call[_T]], in_flight: int
) -> Iterator[tuple[Call[_T], _T]]:
    """Send requests with at most `in_flight` in progress and yield each with its result as it arrives.

    The next request is taken from `calls`, and so its body encoded, only when a place is free.
    """
    calls = iter(calls)
    first = list(itertools.islice(calls, in_flight))
    if len(first) == 1:  # a single request needs no thread
        for call in itertools.chain(first, calls):
            yield call, send(call)
        return
    with ThreadPoolExecutor(in_flight, "vessa-client") as pool:
        running = {pool.submit(send, call): call for call in first}
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                call, answer = running.pop(done), done.result()
                running |= {pool.submit(send, more): more for more in itertools.islice(calls, 1)}
                yield call, answer


async def stream_async(
    send: Callable[[Call[_T]], Awaitable[_T]], calls: Iterable[Call[_T]], in_flight: int
) -> AsyncIterator[tuple[Call[_T], _T]]:
    """Do as `stream_sync` does, with a task for each request; bodies are encoded in a thread."""
    calls = iter(calls)
    running: dict[asyncio.Future[_T], Call[_T]] = {}
    try:
        while True:
            free = itertools.islice(calls, in_flight - len(running))
            for call in await in_thread(list, free):
                running[asyncio.ensure_future(send(call))] = call
            if not running:
                return
            for done in (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]:
                yield running.pop(done), done.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
