"""Break the service: a device that hangs or dies, a full disk, damaged weights, one bad item."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scans import nifti

from vessa.client import AnnotatorClient
from vessa.errors import StoreUnavailable, VessaError

SICK = Path(__file__).with_name("sick.py")
SIZE = (32, 40)


def example(seed: int) -> tuple[Any, Any]:
    """Return a gray image with a bright square and its mask, both uint8; all seeds differ."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SIZE, np.uint8)
    mask[8:20, 10:26] = 1
    return rng.integers(0, 90, SIZE, dtype=np.uint8) + mask * 120, mask


def add(client: AnnotatorClient, bank: str, seed: int) -> None:
    image, mask = example(seed)
    client.add_templates(bank, [image], [mask], {1: "square"}, [f"p{seed}"])


def failure(client: AnnotatorClient, image: Any) -> VessaError:
    """Return the error of a request or of its one item."""
    try:
        error = client.segment([image], bank="b")[0].error
    except VessaError as whole:
        return whole
    assert error is not None
    return error


def ready(service: Any) -> int:
    return httpx.get(f"{service.url}/readyz", timeout=10).status_code


def wait_until_not_ready(service: Any) -> str:
    deadline = time.monotonic() + 60
    while ready(service) == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx.get(f"{service.url}/livez").status_code == 200
    return str(httpx.get(f"{service.url}/readyz").json()["error"]["message"])


def test_a_hanging_device_is_told_by_readyz_and_a_restart_recovers(
    start_annotator: Any, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    limits = {"VESSA_HANG_S": "1.5", "VESSA_REQUEST_TIMEOUT_S": "4", "VESSA_DRAIN_S": "1"}
    service = start_annotator(tmp_path, program=[str(SICK), str(told)], **limits)
    with AnnotatorClient(service.url, service.api_key, attempts=1) as client, ThreadPoolExecutor(1) as pool:
        add(client, "b", 0)
        before = client.segment([example(1)[0]], bank="b")[0].labels
        told.write_text("hang")
        waiting = pool.submit(client.segment, [example(2)[0]], bank="b")
        assert wait_until_not_ready(service) == (
            "the worker hangs: no batch ended within 1.5 s; restart the service"
        )
        assert client.bank("b").templates == 1  # what needs no device still answers
        with pytest.raises(VessaError) as caught:
            waiting.result(60)
        assert caught.value.code == "deadline_exceeded"
    service.process.terminate()
    service.process.wait(60)  # it ends although the worker hangs
    again = start_annotator(tmp_path)
    with AnnotatorClient(again.url, again.api_key) as client:
        assert np.array_equal(client.segment([example(1)[0]], bank="b")[0].labels, before)


def test_a_worker_process_that_dies_harms_only_what_it_died_of(start_annotator: Any, tmp_path: Path) -> None:
    told = tmp_path / "told"
    service = start_annotator(tmp_path, program=[str(SICK), str(told)])
    with AnnotatorClient(service.url, service.api_key, attempts=1) as client, ThreadPoolExecutor(1) as pool:
        add(client, "b", 0)
        before = client.segment([example(1)[0]], bank="b")[0].labels
        told.write_text("die")
        error = failure(client, example(2)[0])
        assert error.code == "internal"
        assert "failed on this item" in str(error)
        later = pool.submit(client.segment, [example(1)[0]], bank="b")  # waits for the new process
        told.unlink()
        assert np.array_equal(later.result(120)[0].labels, before)
    assert ready(service) == 200
    log = (service.folder / "log").read_text()
    assert "the worker process ended with exit code" in log
    assert "the worker process is back" in log
    assert_a_killed_service_leaves_no_worker_process(service)


def assert_a_killed_service_leaves_no_worker_process(service: Any) -> None:
    pid = service.process.pid
    tasks = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    started = [int(child) for children in tasks for child in children]
    workers = [p for p in started if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(workers) == 1
    service.process.kill()
    service.process.wait(10)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{workers[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of four megabytes; the store holds one back for deletions."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "none", place]).returncode:
        pytest.skip("only root can mount a small file system here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_takes_nothing_and_loses_nothing(
    start_annotator: Any, small_disk: Path, tmp_path: Path
) -> None:
    service = start_annotator(tmp_path, VESSA_STORE=f"folder:{small_disk / 'banks'}")
    headers = {"Authorization": f"Bearer {service.api_key}"}
    volume = nifti(np.stack([example(i)[0] for i in range(3)], axis=-1), np.eye(4))
    with (
        AnnotatorClient(service.url, service.api_key, attempts=1) as client,
        httpx.Client(base_url=service.url, headers=headers, timeout=60) as http,
    ):
        add(client, "b", 0)
        add(client, "c", 0)
        before, labels = client.bank("b"), client.segment([example(1)[0]], bank="b")[0].labels
        fill = small_disk / "fill"
        with pytest.raises(OSError, match="No space"):
            fill.write_bytes(bytes(8 << 20))  # as much as fits is written
        with pytest.raises(StoreUnavailable) as caught:
            add(client, "b", 2)
        assert "No space left" in str(caught.value)
        refused = http.post("/jobs", files={"image": ("v.nii", volume)}, data={"bank": "b"})
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert "Retry-After" in refused.headers
        assert http.delete("/banks/c").status_code == 204  # space is held back for deletions
        assert client.bank("b") == before
        assert np.array_equal(client.segment([example(1)[0]], bank="b")[0].labels, labels)
        assert ready(service) == 200
        fill.unlink()
        add(client, "b", 2)
        assert client.bank("b").templates == 2
        begun = http.post("/jobs", files={"image": ("v.nii", volume)}, data={"bank": "b"})
        assert begun.status_code == 202
        with pytest.raises(OSError, match="No space"):
            fill.write_bytes(bytes(8 << 20))
        time.sleep(1)  # the job meets a full disk, at whatever it is about to write, or is done before
        fill.unlink()
        deadline = time.monotonic() + 60
        while (job := http.get(begun.headers["Location"]).json())["state"] != "done":
            assert job["state"] in {"queued", "running"}, job
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_damaged_weights_do_not_serve(nano_weights: Path, tmp_path: Path) -> None:
    """Flip one bit of a tensor file; test_model.py damages all files."""
    weights = tmp_path / "weights"
    shutil.copytree(nano_weights, weights)
    damaged = weights / "segmenter.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    settings = {"VESSA_WEIGHTS": str(weights), "VESSA_STORE": f"folder:{tmp_path}", "VESSA_PORT": "0",
                "XDG_CONFIG_HOME": str(tmp_path), "VESSA_DEVICE": "cpu"}  # fmt: skip
    command = [sys.executable, "-m", "vessa_server", "serve"]
    ended = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1
    assert "weights" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("place", [0, 13, 31])
def test_a_poisoned_item_among_31_good_ones_fails_alone(annotator: Any, place: int) -> None:
    images = [example(100 + i)[0] for i in range(32)]
    with AnnotatorClient(annotator.url, annotator.api_key, timeout=280) as client:
        add(client, "poison", 0)
        good = client.segment(images, bank="poison")
        alone = client.segment([images[(place + 1) % 32]], bank="poison")[0]
        groups: list[str | None] = [None] * 32
        groups[place] = "p0"  # whose templates are all there are
        answers = client.segment(images, bank="poison", groups=groups)
    for i, (one, other) in enumerate(zip(answers, good, strict=True)):
        if i == place:
            assert one.error is not None
            assert one.error.code == "no_template"
            continue
        assert one.error is None
        assert np.array_equal(one.labels, other.labels)
    assert (alone.labels != good[(place + 1) % 32].labels).mean() < 1e-2
