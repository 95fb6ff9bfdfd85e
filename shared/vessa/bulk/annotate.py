"""Bulk annotation: a tree of image files in, a tree of label maps and a manifest out.

Threads read, send and write a few images at a time, each by the replica that it thinks is free; so memory is
bounded by threads x batch, however many files there are. A file has exactly one line in the manifest, written
after its mask: after a kill the job goes on with the files that have none.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa import atomic_write
from vessa.bulk.manifest import Manifest
from vessa.client import AnnotatorClient
from vessa.client.types import Annotation
from vessa.errors import (
    BadResponse,
    DeadlineExceeded,
    InputError,
    InvalidConfig,
    InvalidDataset,
    LimitReached,
    NotReady,
    QueueFull,
    Retryable,
    ServiceError,
    Unreachable,
    VessaError,
)
from vessa.images import read_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
MANIFEST = "manifest.jsonl"
_LOOK_UP = 1000  # names that are looked up in the manifest at once
_LONGEST_GROUP = 128  # characters of a name that the service takes
_REST_S = 1.0  # for a replica that gave no Retry-After
_BROKEN = 3  # times that a request may come to nothing while others are answered


@dataclass(frozen=True)
class AnnotateOptions:
    """What is asked of every image.

    bank: template bank; classes: names, None for all of the bank; by_folder: a file's folder is its patient,
    whose templates are not used; batch: images a request
    """

    bank: str
    classes: tuple[str, ...] | None = None
    by_folder: bool = False
    batch: int = 8

    def settings(self) -> dict[str, Any]:
        """What all lines of a manifest share."""
        return {
            "bank": self.bank,
            "classes": None if self.classes is None else list(self.classes),
            "by_folder": self.by_folder,
        }


@dataclass
class Progress:
    """How far a job has come. files: found; skipped: done by an earlier run; ok, failed: by this one."""

    files: int = 0
    skipped: int = 0
    ok: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self.started


class Replicas:
    """Several annotators that share their banks. A replica that is full or gone rests, the others go on.

    patience: seconds without any answer from any of them after which the job is given up
    """

    def __init__(self, clients: Sequence[AnnotatorClient], patience: float) -> None:
        if not clients or patience <= 0:
            raise ValueError(f"expected annotators and a patience > 0 s, got {len(clients)} and {patience}")
        self._clients = list(clients)
        self._patience = patience
        self._changed = threading.Condition()
        self._at_work = [0] * len(clients)
        self._rests_until = [0.0] * len(clients)
        self._last_answer = time.monotonic()
        self._failure: VessaError | None = None  # the newest, whichever thread had it
        self._stopped = False

    def stop(self) -> None:
        """Let no thread wait any more: their next `call` fails."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def call(self, work: Callable[[AnnotatorClient], list[Annotation]]) -> list[Annotation]:
        """Have the least busy replica do some work, and another one where that cannot; raises what it raises.

        Work that breaks a connection again and again while others are answered, or takes the service too long
        again and again, ends in DeadlineExceeded: it may be to blame.
        """
        began, broken = time.monotonic(), 0
        while True:
            place = self._take(began)
            rest, sent = 0.0, time.monotonic()
            try:
                answer = work(self._clients[place])
                self._last_answer = time.monotonic()
                return answer
            except Retryable as error:
                self._failure, rest = error, error.retry_after or _REST_S
                if isinstance(error, QueueFull | LimitReached | DeadlineExceeded):
                    self._last_answer = time.monotonic()  # full is alive
                if isinstance(error, Unreachable | BadResponse | DeadlineExceeded):
                    broken += self._last_answer > sent
                if broken >= _BROKEN:
                    raise DeadlineExceeded(
                        f"given up after {broken} tries, while others were answered: {error}"
                    ) from error
            finally:
                with self._changed:
                    self._at_work[place] -= 1
                    if rest:
                        self._rests_until[place] = time.monotonic() + rest
                    self._changed.notify_all()

    def _take(self, began: float) -> int:
        with self._changed:
            while True:
                now = time.monotonic()
                silent = now - max(self._last_answer, began)
                if self._stopped or (self._failure and silent > self._patience):
                    raise self._failure or NotReady("the job was stopped")
                free = [i for i, until in enumerate(self._rests_until) if until <= now]
                if free:
                    place = min(free, key=lambda i: self._at_work[i])
                    self._at_work[place] += 1
                    return place
                self._changed.wait(min(1.0, min(self._rests_until) - now))


def annotate_folder(
    source: Path,
    out: Path,
    options: AnnotateOptions,
    clients: Sequence[AnnotatorClient],
    *,
    threads: int = 4,
    patience: float = 300.0,
    retry: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Annotate every PNG, JPEG or TIFF file below `source`; returns the counts.

    `out` gets `masks/<path of the file>.png`, 8-bit label maps of the bank's class ids, and `manifest.jsonl`,
    whose first line holds the settings and each other one a file: its mask, classes, scores, areas in px,
    mean confidence, templates with their similarity, digest of the weights, bank version; or its error. What
    has a line is not done again; retry: but for what failed. clients: annotators with `attempts=1`, since it
    is decided here who is asked next. A file that cannot be read or segmented does not end the job; a wrong
    key, an unknown bank, or no annotator for `patience` seconds does, and it can be taken up again. report:
    called in this thread now and then. Raises InvalidDataset, InvalidConfig and errors of the service.
    """
    if not source.is_dir():
        raise InvalidDataset(f"{source} is no folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise InvalidConfig(f"{out} lies within {source}: its masks would be taken for images")
    if threads < 1 or not 1 <= options.batch <= 64:
        raise ValueError(f"expected threads >= 1 and a batch of 1 to 64, got {threads} and {options.batch}")
    replicas, progress = Replicas(clients, patience), Progress()
    with Manifest(out / MANIFEST, options.settings(), retry=retry) as manifest:
        atomic_write.remove_leftovers(out / "masks")
        chunks = _chunks(_pending(source, manifest, progress), options.batch)
        with ThreadPoolExecutor(threads, thread_name_prefix="vessa-bulk") as pool:
            try:
                for records in _in_flight(
                    pool, chunks, 2 * threads, lambda c: _work(source, out, options, replicas, c)
                ):
                    manifest.add(records)
                    failed = sum("error" in record for record in records)
                    progress.failed += failed
                    progress.ok += len(records) - failed
                    report(progress)
            except BaseException:
                replicas.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    report(progress)
    return progress


def find_images(folder: Path) -> Iterator[str]:
    """Yield the image files below a folder by their path in it, one folder's names in memory at a time.

    Links are not followed, so that nothing is found twice.
    """
    folders = [""]
    while folders:
        inside = folders.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                path = os.path.join(inside, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif entry.is_file(follow_symlinks=False) and os.path.splitext(path)[1].lower() in SUFFIXES:
                    yield path


def _pending(source: Path, manifest: Manifest, progress: Progress) -> Iterator[str]:
    for names in _chunks(find_images(source), _LOOK_UP):
        missing = manifest.missing(names)
        progress.files += len(names)
        progress.skipped += len(names) - len(missing)
        yield from missing


def _chunks(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _in_flight(
    pool: ThreadPoolExecutor,
    chunks: Iterator[list[str]],
    limit: int,
    work: Callable[[list[str]], list[dict[str, Any]]],
) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of chunks as they come, with at most `limit` of them begun."""
    begun: set[Future[list[dict[str, Any]]]] = set()
    while True:
        begun |= {pool.submit(work, chunk) for chunk in islice(chunks, limit - len(begun))}
        if not begun:
            return
        done, begun = wait(begun, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _work(
    source: Path, out: Path, options: AnnotateOptions, replicas: Replicas, files: list[str]
) -> list[dict[str, Any]]:
    """Annotate some files and write their masks; returns their lines."""
    records: dict[str, dict[str, Any]] = {}
    images: dict[str, Any] = {}
    for file in files:
        try:
            images[file] = read_image(source / file)
        except VessaError as error:
            records[file] = _failed(file, error, source)
    for file, answer in _segment(options, replicas, images).items():
        if isinstance(answer, VessaError):
            records[file] = _failed(file, answer, source)
            continue
        mask = Path("masks") / f"{file}.png"
        _write_mask(out / mask, answer)
        records[file] = _done(file, mask, answer, options)
    return [records[file] for file in files]


def _segment(
    options: AnnotateOptions, replicas: Replicas, images: dict[str, Any]
) -> dict[str, Annotation | VessaError]:
    """Have images segmented together; should that fail as a whole, one by one, to see for whose sake."""
    if not images:
        return {}
    groups = [group_of(os.path.dirname(file)) for file in images] if options.by_folder else None

    def ask(client: AnnotatorClient) -> list[Annotation]:
        answers = client.segment(
            list(images.values()), bank=options.bank, classes=options.classes, groups=groups
        )
        for answer in answers:
            if isinstance(answer.error, Retryable):
                raise answer.error  # it says nothing about the image: all are sent again
        return answers

    try:
        answers = replicas.call(ask)
        return {f: a.error or a for f, a in zip(images, answers, strict=True)}
    except VessaError as error:
        if not isinstance(error, InputError | ServiceError | DeadlineExceeded):
            raise  # no image of the batch is the cause
        if len(images) == 1:
            return {next(iter(images)): error}
        alone: dict[str, Annotation | VessaError] = {}
        for file, image in images.items():
            alone |= _segment(options, replicas, {file: image})
        return alone


def _write_mask(path: Path, answer: Annotation) -> None:
    assert answer.labels is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write.replacing(path) as fresh:
        Image.fromarray(answer.labels).save(fresh, "PNG")


def _done(file: str, mask: Path, answer: Annotation, options: AnnotateOptions) -> dict[str, Any]:
    assert answer.labels is not None
    assert answer.confidence is not None
    counts = np.bincount(answer.labels.ravel(), minlength=256)
    return {
        "file": file,
        "mask": str(mask),
        "image_id": answer.image_id,
        "size": list(answer.labels.shape),
        "classes": {str(key): name for key, name in answer.classes.items()},
        "areas": {name: int(counts[key]) for key, name in answer.classes.items()},
        "scores": {name: round(score, 4) for name, score in answer.scores.items()},
        "confidence": round(float(answer.confidence.mean()) / 255, 4),
        "templates": {
            name: [{"id": u.id, "group": u.group, "similarity": round(u.similarity, 4)} for u in used]
            for name, used in answer.templates.items()
        },
        "model": answer.model,
        "labels_version": answer.labels_version,
        "bank": options.bank,
        "bank_version": answer.bank_version,
        "annotation_id": answer.annotation_id,
    }


def _failed(file: str, error: VessaError, source: Path) -> dict[str, Any]:
    message = error.message.replace(str(source / file), file)  # where the files lie is nobody's business
    return {"file": file, "error": {"code": error.code, "message": message}}


def group_of(folder: str) -> str | None:
    """Return the group of the images in a folder, None in the topmost one ("" or ".").

    folder: its path below the topmost one. A path that is no name to the service (1 to 128 printable
    characters without blanks at its ends) stands by its SHA-256, in hex.
    """
    if folder in ("", "."):
        return None
    if len(folder) <= _LONGEST_GROUP and folder.isprintable() and folder == folder.strip():
        return folder
    return hashlib.sha256(os.fsencode(folder)).hexdigest()
