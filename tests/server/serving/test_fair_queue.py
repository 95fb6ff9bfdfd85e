"""The batch queue between clients: turns, pixels, equal items, and a device without enough memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from vessa.errors import QueueFull, TooLarge
from vessa_server.serving.batch_queue import BatchQueue
from vessa_server.serving.fair_queue import FairQueue
from vessa_server.types import SegmentItem


class Worker:
    """Doubles numbers, at most `room` of them at once; waits while `go` is not set."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.released: list[bool] = []
        self.room = 99
        self.held: weakref.ref[Any] | None = None
        self.go = threading.Event()
        self.go.set()

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        assert self.go.wait(20)
        if len(items) > self.room:
            scratch = np.zeros(9)
            self.held = weakref.ref(scratch)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [item * 2 for item in items]

    def release(self, everything: bool) -> None:
        # Arrays of the failed try must be freed first, or emptying the cache would return nothing.
        assert self.held is None or self.held() is None
        self.released.append(everything)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def queue_of(worker: Worker) -> Iterator[Callable[..., BatchQueue]]:
    queues: list[BatchQueue] = []

    def make(max_items: int = 64, max_batch: int = 4, **options: Any) -> BatchQueue:
        queues.append(BatchQueue(worker, max_items, max_batch, 0.0, release=worker.release, **options))
        return queues[-1]

    yield make
    worker.go.set()
    for queue in queues:
        assert queue.drain(5)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.005)


async def occupy(queue: BatchQueue, worker: Worker) -> asyncio.Task[Any]:
    """Stop the worker at an item, so that everything after it queues up."""
    worker.go.clear()
    task = asyncio.create_task(queue.submit(1000))
    await until(lambda: len(worker.batches) == 1)
    return task


def test_clients_and_the_requests_of_each_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("t1a", "t1b", "t1c"):
        queue.add(item, "trainer", 1)
    queue.add("t2a", "trainer", 2)
    queue.add("c", "curl", 3)
    assert queue.first() == "t1a"
    assert queue.holds("curl")
    assert [queue.take() for _ in range(5)] == ["t1a", "c", "t2a", "t1b", "t1c"]
    assert not len(queue)
    assert not queue.holds("curl")
    with pytest.raises(IndexError):
        queue.take()


def test_dropping_keeps_the_order_of_the_others() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(4):
        queue.add(number, "a", 0)
    queue.add(9, "b", 1)
    assert queue.drop(lambda number: number in {1, 9}) == [1, 9]
    assert [queue.take() for _ in range(len(queue))] == [0, 2, 3]
    queue.add(5, "a", 0)
    assert queue.clear() == [5]
    assert not len(queue)


def test_one_image_does_not_wait_behind_a_trainers_many(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=4)

    async def scenario() -> None:
        first = await occupy(queue, worker)
        many = asyncio.create_task(queue.submit_all(list(range(40)), "trainer"))
        await until(lambda: queue.depth == 40)
        other = asyncio.create_task(queue.submit(500, "curl"))
        same_key = asyncio.create_task(queue.submit(600, "trainer"))
        await until(lambda: queue.depth == 42)
        worker.go.set()
        await asyncio.gather(first, other, same_key)
        assert await many == [2 * number for number in range(40)]

    asyncio.run(scenario())
    assert {500, 600} <= set(worker.batches[1])
    assert [i for batch in worker.batches for i in batch if i < 40] == list(range(40))


def test_the_last_places_are_reserved_for_clients_without_items(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_items=16)

    async def scenario() -> None:
        first = await occupy(queue, worker)
        tasks = [asyncio.create_task(queue.submit_all(list(range(14)), "trainer"))]
        await until(lambda: queue.depth == 14)
        with pytest.raises(QueueFull):
            await queue.submit(1, "trainer")
        tasks.append(asyncio.create_task(queue.submit_all([1, 2], "curl")))
        await until(lambda: queue.depth == 16)
        worker.go.set()
        await asyncio.gather(first, *tasks)

    asyncio.run(scenario())


def test_a_batch_is_bounded_in_pixels_but_takes_one_item_always(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=8, max_pixels=10, pixels_of=lambda item: item)

    async def scenario() -> list[Any]:
        first = await occupy(queue, worker)
        task = asyncio.create_task(queue.submit_all([4, 5, 3, 50, 1, 2]))
        await until(lambda: queue.depth == 6)
        worker.go.set()
        await first
        return list(await task)

    assert asyncio.run(scenario()) == [8, 10, 6, 100, 2, 4]
    assert worker.batches[1:] == [[4, 5], [3], [50], [1, 2]]


def test_equal_items_are_computed_once(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=1)

    async def scenario() -> None:
        first = await occupy(queue, worker)
        one = asyncio.create_task(queue.submit_all([7, 8, 7], "a", ["x", "y", "x"]))
        await until(lambda: queue.depth == 2)
        other = asyncio.create_task(queue.submit_all([7], "b", ["x"]))
        leaves = asyncio.create_task(queue.submit_all([8], "c", ["y"]))
        await asyncio.sleep(0.05)
        assert queue.depth == 2
        one.cancel()  # the other still waits for the first item
        await asyncio.gather(one, return_exceptions=True)
        leaves.cancel()  # and no client for the second item
        await asyncio.gather(leaves, return_exceptions=True)
        worker.go.set()
        assert await other == [14]
        await first
        assert await queue.submit_all([7], "b", ["x"]) == [14]  # no longer in flight: computed again

    asyncio.run(scenario())
    assert worker.batches == [[1000], [7], [7]]


def test_a_client_that_joins_an_item_in_progress_gets_its_result(queue_of: Any, worker: Worker) -> None:
    queue = queue_of()

    async def scenario() -> None:
        worker.go.clear()
        one = asyncio.create_task(queue.submit_all([3], "a", ["x"]))
        await until(lambda: len(worker.batches) == 1)
        other = asyncio.create_task(queue.submit_all([3], "b", ["x"]))
        await asyncio.sleep(0.05)
        one.cancel()
        worker.go.set()
        assert await other == [6]

    asyncio.run(scenario())
    assert worker.batches == [[3]]


def test_a_refused_request_leaves_nothing_behind(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_items=1, max_batch=1)

    async def scenario() -> None:
        first = await occupy(queue, worker)
        waits = asyncio.create_task(queue.submit_all([1], "a", ["x"]))
        await until(lambda: queue.depth == 1)
        with pytest.raises(QueueFull):
            await queue.submit_all([1, 2], "b", ["x", "y"])
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        worker.go.set()
        await first
        assert await queue.submit_all([2], "b", ["y"]) == [4]

    asyncio.run(scenario())
    assert worker.batches == [[1000], [2]]


def test_a_batch_that_exceeds_the_memory_is_halved(queue_of: Any, worker: Worker) -> None:
    worker.room = 2
    queue = queue_of(max_batch=8)
    assert asyncio.run(queue.submit_all(list(range(8)))) == [2 * number for number in range(8)]
    assert set(worker.released) == {False}
    gc.collect()
    assert worker.held is not None
    assert worker.held() is None


def test_an_item_that_exceeds_the_memory_alone_is_retried_with_empty_caches(
    queue_of: Any, worker: Worker
) -> None:
    worker.room = 0
    queue = queue_of()
    with pytest.raises(TooLarge, match="does not fit into the device"):
        asyncio.run(queue.submit(1))
    assert worker.released == [True]
    assert worker.batches == [[1], [1]]
    worker.room = 99
    assert asyncio.run(queue.submit(2)) == 4


def test_the_key_of_an_item_covers_everything_its_result_depends_on() -> None:
    image = np.zeros((4, 4), np.uint8)
    box = np.array([[0, 0, 2, 2]], np.float32)

    def key(version: int = 1, **changes: Any) -> str:
        given: dict[str, Any] = {"image_id": "i", "image": image, "bank": "b", "boxes": box}
        return SegmentItem(**{**given, **changes}).key(version)

    changes: list[dict[str, Any]] = [
        {"version": 2}, {"image_id": "j"}, {"image": None}, {"bank": "c"}, {"classes": ("x",)},
        {"group": "g"}, {"boxes": box + 1}, {"boxes": None}, {"template_choice": "top3"}, {"seed": 1},
        {"probabilities": True}, {"mask_logits": box}, {"points": box[None], "boxes": None},
    ]  # fmt: skip
    keys = [key(), *(key(**change) for change in changes)]
    assert len(set(keys)) == len(keys)
    assert key() == key()
