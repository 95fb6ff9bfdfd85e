"""The worker process answers like an annotator in this process, and is started again when it dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vessa.codec import image_digest
from vessa.errors import InvalidWeights, NotReady, QueueFull, UnknownBank, UnknownImage
from vessa_server.serving.batch_queue import BatchQueue
from vessa_server.serving.worker import Worker, load
from vessa_server.serving.worker_main import portable_error
from vessa_server.serving.worker_process import WorkerProcess
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import DescribeItem, SegmentItem, SegmentResult, TemplateItem

CLASSES = {1: "ventricle", 2: "wall"}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def usable(worker: WorkerProcess) -> bool:
    try:
        worker.check()
    except NotReady:
        return False
    return True


@pytest.fixture(scope="module")
def settings(nano_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(nano_weights, folder / "weights")
    store, weights = f"folder:{folder / 'banks'}", str(folder / "weights")
    return Settings(
        insecure=True, weights=weights, device="cpu", threads=torch.get_num_threads(), store=store
    )


@pytest.fixture(scope="module")
def banks(settings: Settings) -> TemplateBanks:
    return TemplateBanks(FolderStore(settings.storage.store.removeprefix("folder:")))


@pytest.fixture(scope="module")
def local(settings: Settings, banks: TemplateBanks) -> Worker:
    return load(settings, banks)


@pytest.fixture(scope="module")
def remote(settings: Settings) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(settings)
    yield worker
    worker.close(5)


@pytest.fixture(scope="module", autouse=True)
def seeded(banks: TemplateBanks, local: Worker, remote: WorkerProcess, example: Any) -> None:
    """Add a bank of eight patients, which the worker process finds in the store."""
    items = [TemplateItem(*example(seed), CLASSES, f"p{seed}") for seed in range(8)]
    ours, theirs = local.compute(items), remote.compute(items)
    assert [t.to_blob() for t in theirs] == [t.to_blob() for t in ours]
    banks.add("b", ours)
    banks.model = local.info.model


def query(example: Any, seed: int, **more: Any) -> SegmentItem:
    image = example(seed)[0]
    return SegmentItem(image_digest(image), image, "b", **more)


def test_both_answer_alike(local: Worker, remote: WorkerProcess, example: Any) -> None:
    assert remote.info == local.info
    items = [
        query(example, 10, probabilities=True),
        query(example, 11, classes=("nothing",)),
        query(example, 12),
    ]
    for ours, theirs in zip(local.compute(items), remote.compute(items), strict=True):
        assert type(theirs) is type(ours)
        if isinstance(ours, SegmentResult):
            for name in ("labels", "confidence"):
                assert np.array_equal(getattr(theirs, name), getattr(ours, name))
            assert (theirs.scores, theirs.templates) == (ours.scores, ours.templates)
        else:
            assert str(theirs) == str(ours)
    described = DescribeItem("i", example(13)[0])
    assert np.array_equal(remote.compute([described])[0], local.compute([described])[0])


def test_the_service_knows_which_images_the_worker_holds(remote: WorkerProcess, example: Any) -> None:
    item = query(example, 20)
    assert not remote.holds(item.image_id)
    remote.compute([item])
    assert remote.holds(item.image_id)
    assert remote.stage_seconds()["draw"] > 0
    assert remote.bytes_held()["features"] > 0
    assert remote.bytes_held()["worker_process"] > 100 << 20
    remote.release_memory(True)
    assert not remote.holds(item.image_id)
    assert remote.bytes_held()["features"] == 0
    (gone,) = remote.compute([SegmentItem(item.image_id, None, "b")])
    assert isinstance(gone, UnknownImage)


def test_adaptations_run_beside_batches(remote: WorkerProcess, example: Any) -> None:
    with pytest.raises(UnknownBank):
        remote.adapt("nothing", 1.0)
    assert remote.adapt("b", 4.0).state == "running"
    with pytest.raises(QueueFull) as caught:
        remote.adapt("b", 4.0)
    assert caught.value.retry_after == 30.0
    assert isinstance(remote.compute([query(example, 30)])[0], SegmentResult)
    wait_until(lambda: remote.adaptation("b").state != "running")
    done = remote.adaptation("b")
    assert done.state == "done", done.error
    assert done.figures is not None
    assert done.figures.bank_version == 1
    remote.forget_adaptation("b")


def test_a_killed_process_is_started_again_and_the_batch_is_answered(
    local: Worker, remote: WorkerProcess, example: Any
) -> None:
    items = [query(example, seed) for seed in range(40, 43)]
    expected = local.compute(items)
    remote.compute([query(example, 44)])
    killed = []

    def process(some: list[Any]) -> list[Any]:
        if not killed:
            killed.append(remote.pid)
            os.kill(remote.pid or 0, signal.SIGKILL)
        return remote.compute(some)

    queue = BatchQueue(process, 8, 8)
    try:
        answers = asyncio.run(queue.submit_all(items))
    finally:
        queue.drain(10)
    for answer, one in zip(answers, expected, strict=True):
        assert np.array_equal(answer.labels, one.labels)
    assert remote.pid != killed[0]
    assert not remote.holds(query(example, 44).image_id)


def test_a_worker_that_is_down_reports_it_and_does_not_return_with_damaged_weights(
    settings: Settings, remote: WorkerProcess, example: Any
) -> None:
    description = Path(settings.weights) / "vessa.json"
    kept = description.read_bytes()
    description.write_text("{")
    try:
        os.kill(remote.pid or 0, signal.SIGKILL)
        wait_until(lambda: not usable(remote))
        with pytest.raises(NotReady, match="being started again"):
            remote.adaptation("b")
    finally:
        description.write_bytes(kept)
    wait_until(lambda: usable(remote))
    assert isinstance(remote.compute([query(example, 50)])[0], SegmentResult)


def test_weights_that_do_not_load_raise_the_same_error_as_in_this_process(
    settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(InvalidWeights) as caught:
        WorkerProcess(settings.model_copy(update={"weights": str(tmp_path / "none")}))
    with pytest.raises(InvalidWeights) as here:
        load(settings.model_copy(update={"weights": str(tmp_path / "none")}), None)  # type: ignore[arg-type]
    assert str(caught.value) == str(here.value)


def test_errors_arrive_without_torch() -> None:
    full = QueueFull("full", retry_after=3.0, queue_position=2, item=1)
    here, there = Pipe()
    with here, there:
        here.send(portable_error(full, ""))
        sent = there.recv()
    assert (type(sent), sent.retry_after, sent.queue_position, sent.item) == (QueueFull, 3.0, 2, 1)
    assert isinstance(portable_error(torch.OutOfMemoryError("no room"), ""), MemoryError)
    other = portable_error(torch.linalg.LinAlgError("singular"), "segment failed")
    assert type(other) is RuntimeError
    assert "singular" in str(other)


def test_a_closed_worker_accepts_nothing_more(settings: Settings, example: Any) -> None:
    worker = WorkerProcess(settings)
    pid = worker.pid
    worker.close(5)
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(NotReady, match="shutting down"):
        worker.compute([query(example, 60)])
