"""The batch queue: batches, limits, isolation of items, clients that leave, a thread that hangs or dies."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vessa.errors import InternalError, InvalidPrompt, NotReady, QueueFull
from vessa_server.serving.batch_queue import BatchQueue


class Worker:
    """A stand-in for the annotator: doubles numbers, records its batches, waits while `go` is not set."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        assert self.go.wait(20)
        if "poison" in items:
            raise RuntimeError("device error at 0xdeadbeef")
        return [InvalidPrompt("bad") if item == "bad" else item * 2 for item in items]


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def queue_of(worker: Worker) -> Iterator[Callable[..., BatchQueue]]:
    queues: list[BatchQueue] = []

    def make(max_items: int = 16, max_batch: int = 4, wait_s: float = 0.0, **options: Any) -> BatchQueue:
        queues.append(BatchQueue(worker, max_items, max_batch, wait_s, **options))
        return queues[-1]

    yield make
    worker.go.set()
    for queue in queues:
        assert queue.drain(5)


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        await asyncio.sleep(0.005)


def test_an_item_gets_its_result(queue_of: Any) -> None:
    assert asyncio.run(queue_of().submit(3)) == 6


def test_waiting_items_are_processed_together_up_to_the_limit(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=4)

    async def scenario() -> list[Any]:
        worker.go.clear()
        first = asyncio.create_task(queue.submit(0))
        await until(lambda: len(worker.batches) == 1)
        rest = [asyncio.create_task(queue.submit(i)) for i in range(1, 7)]
        await until(lambda: queue.depth == 6)
        worker.go.set()
        return list(await asyncio.gather(first, *rest))

    assert asyncio.run(scenario()) == [0, 2, 4, 6, 8, 10, 12]
    assert worker.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_single_client_never_waits(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=4, wait_s=60)

    async def scenario() -> None:
        async with asyncio.timeout(20):
            await queue.submit(1)
            await queue.submit(2)
            await queue.submit_all([3, 4])
            await queue.submit_all([5, 6])

    asyncio.run(scenario())
    assert worker.batches == [[1], [2], [3, 4], [5, 6]]


def test_clients_that_came_together_share_the_next_batch(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=4, wait_s=60)

    async def scenario() -> None:
        async with asyncio.timeout(20):
            worker.go.clear()
            first = asyncio.create_task(queue.submit(1))
            await until(lambda: len(worker.batches) == 1)
            second = asyncio.create_task(queue.submit(2))
            await until(lambda: queue.depth == 1)
            worker.go.set()
            await first
            await asyncio.sleep(0.1)
            assert len(worker.batches) == 1
            await asyncio.gather(second, queue.submit(3))
            await asyncio.gather(queue.submit(4), queue.submit(5))

    asyncio.run(scenario())
    assert worker.batches == [[1], [2, 3], [4, 5]]


def test_the_queue_waits_only_once_for_clients_that_do_not_return(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=4, wait_s=0.2)

    async def scenario() -> None:
        await queue.submit_all([1, 2, 3])
        await queue.submit(4)
        queue.wait_s = 60
        async with asyncio.timeout(20):
            await queue.submit(5)

    asyncio.run(scenario())
    assert worker.batches == [[1, 2, 3], [4], [5]]


def test_an_error_of_one_item_affects_no_other(queue_of: Any) -> None:
    queue = queue_of()
    results = asyncio.run(queue.submit_all([1, "bad", 2]))
    assert [results[0], results[2]] == [2, 4]
    assert isinstance(results[1], InvalidPrompt)
    with pytest.raises(InvalidPrompt, match="bad"):
        asyncio.run(queue.submit("bad"))


def test_an_item_that_breaks_the_batch_does_not_harm_its_neighbors(
    queue_of: Any, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    queue = queue_of(max_batch=8)
    with caplog.at_level(logging.WARNING):
        results = asyncio.run(queue.submit_all([1, 2, 3, "poison", 5, 6, 7]))
    assert isinstance(results[3], InternalError)
    assert "0xdeadbeef" not in str(results[3])
    assert "0xdeadbeef" in caplog.text
    assert [r for r in results if not isinstance(r, InternalError)] == [2, 4, 6, 10, 12, 14]
    assert asyncio.run(queue.submit(8)) == 16


def test_a_wrong_number_of_results_is_an_internal_error() -> None:
    queue = BatchQueue(lambda items: [], 4, 4)
    with pytest.raises(InternalError):
        asyncio.run(queue.submit(1))
    assert queue.drain(5)


def test_a_full_queue_gives_a_retry_time_and_admits_requests_whole_or_not(
    queue_of: Any, worker: Worker
) -> None:
    queue = queue_of(max_items=3, max_batch=1)

    async def scenario() -> QueueFull:
        worker.go.clear()
        tasks = [asyncio.create_task(queue.submit(0))]
        await until(lambda: len(worker.batches) == 1)
        tasks.append(asyncio.create_task(queue.submit_all([1, 2])))
        await until(lambda: queue.depth == 2)
        with pytest.raises(QueueFull, match="2 items wait, the limit is 3") as caught:
            await queue.submit_all([3, 4])
        assert queue.depth == 2
        tasks.append(asyncio.create_task(queue.submit(5)))
        await until(lambda: queue.depth == 3)
        worker.go.set()
        assert await asyncio.gather(*tasks) == [0, [2, 4], 10]
        return caught.value

    error = asyncio.run(scenario())
    assert error.queue_position == 2
    assert error.retry_after is not None
    assert error.retry_after >= 1


def test_an_abandoned_item_costs_nothing_and_frees_its_place(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_items=2, max_batch=1)

    async def scenario() -> None:
        worker.go.clear()
        first = asyncio.create_task(queue.submit("first"))
        await until(lambda: len(worker.batches) == 1)
        left = asyncio.create_task(queue.submit_all(["left", "left"]))
        await until(lambda: queue.depth == 2)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        stays = asyncio.create_task(queue.submit("stays"))
        await asyncio.sleep(0.01)
        first.cancel()  # it is being processed: its result is dropped
        await asyncio.gather(first, return_exceptions=True)
        worker.go.set()
        assert await stays == "staysstays"

    asyncio.run(scenario())
    assert worker.batches == [["first"], ["stays"]]


def test_three_times_the_capacity_loses_and_doubles_nothing(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_items=20, max_batch=4, wait_s=0.001)

    async def call(number: int) -> int:
        while True:
            try:
                return int(await queue.submit(number))
            except QueueFull:
                await asyncio.sleep(0.002)

    async def scenario() -> list[int]:
        return list(await asyncio.gather(*(call(number) for number in range(60))))

    assert asyncio.run(scenario()) == [2 * number for number in range(60)]
    assert sorted(item for batch in worker.batches for item in batch) == list(range(60))


def test_draining_finishes_waiting_items_and_admits_no_more(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=1)

    async def scenario() -> None:
        worker.go.clear()
        tasks = [asyncio.create_task(queue.submit(i)) for i in range(3)]
        await until(lambda: queue.depth == 2)
        drained = asyncio.create_task(asyncio.to_thread(queue.drain, 5))
        await asyncio.sleep(0.05)
        with pytest.raises(NotReady, match="shutting down"):
            await queue.submit(9)
        worker.go.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4]
        assert await drained

    asyncio.run(scenario())


def test_a_drain_that_takes_too_long_fails_the_waiting_items(queue_of: Any, worker: Worker) -> None:
    queue = queue_of(max_batch=1)

    async def scenario() -> None:
        worker.go.clear()
        tasks = [asyncio.create_task(queue.submit(i)) for i in range(2)]
        await until(lambda: queue.depth == 1)
        assert not await asyncio.to_thread(queue.drain, 0.05)
        with pytest.raises(NotReady):
            await tasks[1]
        worker.go.set()
        assert await tasks[0] == 0

    asyncio.run(scenario())


def test_a_hanging_worker_falls_silent_and_an_idle_one_does_not(queue_of: Any, worker: Worker) -> None:
    queue = queue_of()

    async def scenario() -> None:
        await asyncio.sleep(1.5)
        assert queue.silence() < 1.4  # idle: it beats once a second
        worker.go.clear()
        task = asyncio.create_task(queue.submit(1))
        await until(lambda: len(worker.batches) == 1)
        await asyncio.sleep(0.3)
        assert queue.silence() >= 0.3
        worker.go.set()
        await task
        await until(lambda: queue.silence() < 0.2)

    asyncio.run(scenario())


def test_a_dead_batch_thread_is_noticed() -> None:
    class Fatal(BaseException):
        pass

    def die(items: list[Any]) -> list[Any]:
        raise Fatal

    hook, threading.excepthook = threading.excepthook, lambda args: None
    try:
        queue = BatchQueue(die, 4, 4)

        async def scenario() -> None:
            task = asyncio.create_task(queue.submit(1))
            await until(lambda: queue.silence() == float("inf"))
            with pytest.raises(InternalError, match="died"):
                await queue.submit(2)
            with pytest.raises(InternalError):
                await task

        asyncio.run(scenario())
    finally:
        threading.excepthook = hook


def test_batches_are_observed(queue_of: Any) -> None:
    seen: list[tuple[int, float]] = []
    queue = queue_of(observe=lambda size, seconds: seen.append((size, seconds)))

    async def scenario() -> None:
        await queue.submit_all([1, 2])
        await until(lambda: len(seen) == 1)

    asyncio.run(scenario())
    assert seen[0][0] == 2
    assert seen[0][1] >= 0


@pytest.mark.parametrize("limits", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_limits_must_be_positive(limits: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="expected limits"):
        BatchQueue(lambda items: items, *limits)
