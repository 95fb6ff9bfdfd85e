"""Annotate folders with exactly one result per file, through kills, full services and broken files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import bound

from vessa.bulk.annotate import MANIFEST, AnnotateOptions, Counts, annotate_folder
from vessa.bulk.replicas import Replicas
from vessa.client import AnnotatorClient
from vessa.errors import (
    DeadlineExceeded,
    InvalidConfig,
    InvalidRequest,
    LanguageUnavailable,
    LimitReached,
    Unauthorized,
    UnknownBank,
    Unreachable,
    VessaError,
)
from vessa.images import read_image

FILES = 40
BROKEN = {"broken.png": b"\x89PNG no more", "a/empty.jpg": b"", "a/text.tif": b"text"}


def picture(seed: int) -> tuple[Any, Any]:
    """Return a gray image with one bright square and its mask, both uint8 (32, 40)."""
    rng = np.random.default_rng(seed)
    y, x = rng.integers(2, 16), rng.integers(2, 24)
    mask = np.zeros((32, 40), np.uint8)
    mask[y : y + 12, x : x + 12] = 1
    return rng.integers(0, 90, mask.shape, dtype=np.uint8) + mask * 120, mask


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of images in two folders, with three broken ones and a file of another kind."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "a" / "deep").mkdir(parents=True)
    for i in range(FILES):
        Image.fromarray(picture(100 + i)[0]).save(folder / ("a/deep" if i % 2 else "") / f"{i}.png")
    for name, data in BROKEN.items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    return folder


@contextmanager
def seeded(service: Any, bank: str) -> Iterator[AnnotatorClient]:
    """A client of a service whose bank holds two templates."""
    shown = [picture(i) for i in range(2)]
    with AnnotatorClient(service.url, service.api_key, attempts=1) as client:
        client.add_templates(bank, [i for i, _ in shown], [m for _, m in shown], {1: "square"}, ["p0", "p1"])
        yield client


def check(images: Path, out: Path, service: Any, bank: str) -> None:
    """Check that each file has one line and one mask, equal to the service's answer."""
    head, *records = [json.loads(line) for line in (out / MANIFEST).read_text().splitlines()]
    assert head == {"settings": {"bank": bank, "classes": None, "by_folder": False}}
    by_file = {record["file"]: record for record in records}
    assert len(by_file) == len(records) == FILES + len(BROKEN)
    assert {f for f, r in by_file.items() if "error" in r} == BROKEN.keys()
    assert {by_file[f]["error"]["code"] for f in BROKEN} == {"invalid_image"}
    assert all(str(images) not in by_file[f]["error"]["message"] for f in BROKEN)
    done = [f for f in by_file if f not in BROKEN]
    assert {str(p.relative_to(out)) for p in (out / "masks").rglob("*.png")} == {
        f"masks/{f}.png" for f in done
    }
    with AnnotatorClient(service.url, service.api_key, attempts=20) as patient:
        answers = patient.segment([read_image(images / f) for f in done], bank=bank)
    for file, answer in zip(done, answers, strict=True):
        record, mask = by_file[file], read_image(out / by_file[file]["mask"])
        assert answer.labels is not None
        assert (mask != answer.labels).mean() < 2e-3  # batches of another size round otherwise
        assert record["areas"] == {"square": int((mask == 1).sum())}
        assert (record["model"], record["bank_version"]) == (answer.model, 1)
        assert record["templates"]["square"][0]["group"] in {"p0", "p1"}


def command(service: Any, images: Path, out: Path, *options: str) -> list[str]:
    place = [str(images), "--out", str(out), "--url", service.url, "--api-key", service.api_key]
    return [
        sys.executable,
        "-c",
        "from vessa.cli import main; main()",
        "annotate",
        *place,
        "--json",
        *options,
    ]


def test_a_killed_job_resumes_and_repeats_no_file(annotator: Any, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with seeded(annotator, "bulk") as client:
        line = command(annotator, images, out, "--bank", "bulk", "--batch", "1", "--threads", "2")
        process = subprocess.Popen(bound(line), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        manifest = out / MANIFEST
        while not manifest.exists() or manifest.read_bytes().count(b"\n") < 8:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        before = manifest.read_bytes()
        done = subprocess.run(line, capture_output=True, text=True, timeout=240)
        assert done.returncode == 1, done.stderr  # the broken files
        assert f"{len(BROKEN)} files failed" in done.stderr or "failed in an" in done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        skipped = before.count(b"\n") - 1
        assert (found["files"], found["skipped"]) == (FILES + len(BROKEN), skipped)
        assert manifest.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
        check(images, out, annotator, "bulk")
        again = annotate_folder(images, out, AnnotateOptions("bulk"), [client])
        assert (again.skipped, again.ok, again.failed) == (FILES + len(BROKEN), 0, 0)
        retried = annotate_folder(images, out, AnnotateOptions("bulk"), [client], retry=True)
        assert (retried.skipped, retried.ok, retried.failed) == (FILES, 0, len(BROKEN))
        gone, cut, empty, zeros = sorted((out / "masks").rglob("*.png"))[:4]
        gone.unlink()
        cut.write_bytes(cut.read_bytes()[:-5])
        empty.write_bytes(b"")
        zeros.write_bytes(bytes(zeros.stat().st_size))
        mended = annotate_folder(images, out, AnnotateOptions("bulk"), [client])
        assert (mended.damaged, mended.ok, mended.skipped) == (4, 4, FILES + len(BROKEN) - 4)
        check(images, out, annotator, "bulk")


def test_full_and_dying_replicas_lose_no_file(
    start_annotator: Any, redis_url: str, images: Path, tmp_path: Path
) -> None:
    """One service accepts one request at a time and returns 429 otherwise; the other is killed."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    narrow, dying = (
        start_annotator(folder, VESSA_STORE=redis_url, VESSA_MAX_REQUESTS=places)
        for folder, places in zip(folders, ("1", "32"), strict=True)
    )

    def report(progress: Counts) -> None:
        if progress.ok >= 6 and dying.process.poll() is None:
            os.kill(dying.process.pid, signal.SIGKILL)

    job, out = AnnotateOptions("bulk-replicas", batch=2), tmp_path / "out"
    with (
        seeded(narrow, "bulk-replicas") as client,
        AnnotatorClient(dying.url, dying.api_key, attempts=1) as other,
    ):
        found = annotate_folder(images, out, job, [client, other], threads=4, report=report)
        assert (found.ok, found.failed) == (FILES, len(BROKEN))
        assert dying.process.wait(10) == -signal.SIGKILL
        check(images, out, narrow, "bulk-replicas")


def test_errors_that_no_file_causes_end_the_job(
    annotator: Any, images: Path, tmp_path: Path, port: int
) -> None:
    with AnnotatorClient(annotator.url, annotator.api_key, attempts=1) as client:
        for bank, error in (("nobody", UnknownBank), ("no name!", InvalidRequest)):
            with pytest.raises(error):
                annotate_folder(images, tmp_path / bank, AnnotateOptions(bank), [client])
        with pytest.raises(InvalidConfig, match="is inside"):
            annotate_folder(images, images / "out", AnnotateOptions("b"), [client])
    with (
        AnnotatorClient(annotator.url, "wrong-key-0123456789", attempts=1) as client,
        pytest.raises(Unauthorized),
    ):
        annotate_folder(images, tmp_path / "key", AnnotateOptions("b"), [client])
    with AnnotatorClient(f"http://127.0.0.1:{port}", "k", attempts=1) as client, pytest.raises(Unreachable):
        annotate_folder(images, tmp_path / "gone", AnnotateOptions("b"), [client], patience=0.5)


def test_a_waiting_thread_raises_the_error_of_the_others(port: int) -> None:
    gone = Unreachable("nobody is there")
    gone.retry_after = 60.0  # the only replica rests for longer than anybody is patient
    with AnnotatorClient(f"http://127.0.0.1:{port}", "k", attempts=1) as client:
        replicas = Replicas([client], patience=0.2)

        def fails(_: AnnotatorClient) -> list[Any]:
            raise gone

        for work in (fails, lambda _: pytest.fail("asked a replica that rests")):
            with pytest.raises(Unreachable, match="nobody is there"):
                replicas.call(work)


@pytest.mark.parametrize("error", [LimitReached, LanguageUnavailable, DeadlineExceeded])
def test_retryable_errors_fail_no_file(error: type[VessaError], port: int) -> None:
    refusals = [error("not now", retry_after=0.01) for _ in range(2)]
    with AnnotatorClient(f"http://127.0.0.1:{port}", "k", attempts=1) as client:
        replicas = Replicas([client], patience=5.0)

        def work(_: AnnotatorClient) -> list[Any]:
            if refusals:
                raise refusals.pop()
            return []

        assert replicas.call(work) == []
