"""Annotate a tree of image files: write a tree of label maps and a manifest.

Each thread reads, sends and writes one batch of images at a time, so memory is bounded by threads x batch for
any number of files. Every file has exactly one line in the manifest, written after its mask; a job that was
killed resumes with the files that have none.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa import atomic_write
from vessa.bulk.manifest import Manifest
from vessa.bulk.replicas import Replicas
from vessa.client import AnnotatorClient
from vessa.client.types import Annotation
from vessa.errors import (
    BadResponse,
    DeadlineExceeded,
    InputError,
    InvalidConfig,
    InvalidDataset,
    Retryable,
    ServiceError,
    VessaError,
)
from vessa.images import read_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
MANIFEST = "manifest.jsonl"
_LOOK_UP = 1000  # files per search in the manifest
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_LONGEST_GROUP = 128  # characters of a group name that the service accepts


@dataclass(frozen=True)
class AnnotateOptions:
    """Options that all images of a job share.

    bank: template bank; classes: names, None: all classes of the bank; by_folder: a file's folder is its
    patient, whose templates are not used; batch: images per request, 1 to 64; clean: keep the largest
    component of classes that have one in every template
    """

    bank: str
    classes: tuple[str, ...] | None = None
    by_folder: bool = False
    batch: int = 8
    clean: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the options that all lines of a manifest share."""
        return {
            "bank": self.bank,
            "classes": None if self.classes is None else list(self.classes),
            "by_folder": self.by_folder,
            **({"clean": True} if self.clean else {}),  # manifests of earlier versions do not name it
        }


@dataclass
class Counts:
    """Counts of files.

    files: found; skipped: finished by an earlier run; ok, failed: by this run; failed_before: by an earlier
    run, not annotated again; damaged: finished by an earlier run, but the mask is missing or cut off, so this
    run annotates them again; errors: number of this run's failures by error code
    """

    files: int = 0
    skipped: int = 0
    failed_before: int = 0
    damaged: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    ok: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started


def annotate_folder(
    source: Path,
    out: Path,
    options: AnnotateOptions,
    clients: Sequence[AnnotatorClient],
    *,
    threads: int = 4,
    patience: float = 300.0,
    retry: bool = False,
    report: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Annotate every PNG, JPEG or TIFF file below `source`; returns the counts.

    Writes to `out` the label maps `masks/<path of the file>.png`, 8-bit with the bank's class ids, and
    `manifest.jsonl`. Its first line has the options. Each other line is for one file: mask, classes, scores,
    areas in px, mean confidence, templates with similarity, digest of the weights, version and digest of
    the bank, or the error. A file with a line is not annotated again, unless its mask is missing or cut off.

    clients: annotators with the same banks, made with `attempts=1`, since retries are decided here
    threads: requests in progress at once
    patience: seconds without a response from any annotator after which the job stops
    retry: whether to annotate files with an error again
    report: called with the counts, in this thread, after each batch

    A file that cannot be read or segmented does not stop the job. An invalid key, an unknown bank or a
    service that is away for `patience` seconds does; call again to resume.
    Raises InvalidDataset, InvalidConfig and errors of the service.
    """
    if not source.is_dir():
        raise InvalidDataset(f"{source} is not a folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise InvalidConfig(
            f"{out} is inside {source}: its masks would be read as images; choose another --out"
        )
    if threads < 1 or not 1 <= options.batch <= 64:
        raise ValueError(f"expected threads >= 1 and a batch of 1 to 64, got {threads} and {options.batch}")
    replicas, counts = Replicas(clients, patience), Counts()
    annotate_batch = partial(_annotate_batch, source, out, options, replicas)

    def valid(record: dict[str, Any]) -> bool:
        if "error" in record:
            counts.failed_before += not retry
            return not retry
        whole = _is_whole(out / str(record.get("mask")))
        counts.damaged += not whole
        return whole

    with Manifest(out / MANIFEST, options.settings(), valid=valid) as manifest:
        atomic_write.remove_leftovers(out / "masks")
        chunks = _chunks(_pending(source, manifest, counts), options.batch)
        with ThreadPoolExecutor(threads, thread_name_prefix="vessa-bulk") as pool:
            try:
                for records in _in_flight(pool, chunks, 2 * threads, annotate_batch):
                    manifest.add(records)
                    errors = [record["error"]["code"] for record in records if "error" in record]
                    counts.errors.update(errors)
                    counts.failed += len(errors)
                    counts.ok += len(records) - len(errors)
                    report(counts)
            except BaseException:
                replicas.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    report(counts)
    return counts


def find_images(folder: Path) -> Iterator[str]:
    """Yield the paths of the image files below a folder, relative to it.

    Only one folder's names are in memory at a time. Links are not followed, so no file is found twice.
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


def _pending(source: Path, manifest: Manifest, counts: Counts) -> Iterator[str]:
    for names in _chunks(find_images(source), _LOOK_UP):
        missing = manifest.missing(names)
        counts.files += len(names)
        counts.skipped += len(names) - len(missing)
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
    """Yield the results of chunks as they arrive, with at most `limit` of them in progress."""
    running: set[Future[list[dict[str, Any]]]] = set()
    while True:
        running |= {pool.submit(work, chunk) for chunk in islice(chunks, limit - len(running))}
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _annotate_batch(
    source: Path, out: Path, options: AnnotateOptions, replicas: Replicas, files: list[str]
) -> list[dict[str, Any]]:
    """Annotate some files and write their masks; returns their manifest lines."""
    records: dict[str, dict[str, Any]] = {}
    images: dict[str, Any] = {}
    for file in files:
        try:
            images[file] = read_image(source / file)
        except VessaError as error:
            records[file] = _error_line(file, error, source)
    for file, answer in _segment(options, replicas, images).items():
        if isinstance(answer, VessaError):
            records[file] = _error_line(file, answer, source)
            continue
        mask = Path("masks") / f"{file}.png"
        _write_mask(out / mask, answer)
        records[file] = _line(file, mask, answer, options)
    return [records[file] for file in files]


def _segment(
    options: AnnotateOptions, replicas: Replicas, images: dict[str, Any]
) -> dict[str, Annotation | VessaError]:
    """Segment images in one request; if it fails, one by one, to find the image that is the cause."""
    if not images:
        return {}
    groups = [group_of(os.path.dirname(file)) for file in images] if options.by_folder else None

    def request(client: AnnotatorClient) -> list[Annotation]:
        answers = client.segment(
            list(images.values()),
            bank=options.bank,
            classes=options.classes,
            groups=groups,
            clean=options.clean,
        )
        for answer in answers:
            if isinstance(answer.error, Retryable):
                raise answer.error  # the image is not the cause: send all again
        return answers

    try:
        answers = replicas.call(request)
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


def _is_whole(mask: Path) -> bool:
    """Return whether a mask is there and ends as a PNG file does. Only its ends are read."""
    try:
        with mask.open("rb") as file:
            head = file.read(len(_PNG_START))
            file.seek(-len(_PNG_END), os.SEEK_END)
            return head == _PNG_START and file.read() == _PNG_END
    except OSError:
        return False


def _write_mask(path: Path, answer: Annotation) -> None:
    if answer.labels is None:
        raise BadResponse("the annotator returned neither labels nor an error")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write.replacing(path) as fresh:
        Image.fromarray(answer.labels).save(fresh, "PNG")


def _line(file: str, mask: Path, answer: Annotation, options: AnnotateOptions) -> dict[str, Any]:
    if answer.labels is None or answer.confidence is None:
        raise BadResponse("the annotator returned labels without confidence")
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
        "bank_digest": answer.bank_digest,
        "annotation_id": answer.annotation_id,
        "cleaning": None if answer.cleaning is None else answer.cleaning.model_dump(),
    }


def _error_line(file: str, error: VessaError, source: Path) -> dict[str, Any]:
    message = error.message.replace(
        str(source / file), file
    )  # the manifest does not show where the folder is
    return {"file": file, "error": {"code": error.code, "message": message}}


def group_of(folder: str) -> str | None:
    """Return the group name for the images of a folder, None for the top folder ("" or ".").

    folder: path relative to the top folder. The service accepts names of 1 to 128 printable characters
    without spaces at the ends; any other path is replaced by its SHA-256 in hex.
    """
    if folder in ("", "."):
        return None
    if len(folder) <= _LONGEST_GROUP and folder.isprintable() and folder == folder.strip():
        return folder
    return hashlib.sha256(os.fsencode(folder)).hexdigest()
