"""Store the slices of a job and their labels, each with a checksum."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from vessa.atomic_write import write_bytes
from vessa.errors import InternalError
from vessa.masks import files as mask_files
from vessa.schemas import Provenance
from vessa.volumes import Volume
from vessa.volumes.grid import slice_of
from vessa_server.serialization.image_files import decode_mask, label_png
from vessa_server.volume_jobs.store import Job, JobStore, digest_of_file

log = logging.getLogger(__name__)

IMAGES = "images.npy"
CONFIDENCE = ".sure"  # suffix of the confidence of a slice, a PNG file that only cleaning reads


def write_images(folder: Path, volume: Volume, axis: int) -> str:
    """Write the slices along an axis as uint8 (S, H, W); return the SHA-256 of the file.

    A job reads a few slices at a time, so that jobs of several keys take turns without their volumes in
    memory.
    """
    count = volume.shape[axis]
    first = volume.image(axis, 0)
    images = np.lib.format.open_memmap(
        folder / IMAGES, mode="w+", dtype=np.uint8, shape=(count, *first.shape)
    )
    for index in range(count):
        images[index] = first if index == 0 else volume.image(axis, index)
    images.flush()
    del images
    (folder / IMAGES).chmod(0o600)
    return digest_of_file(folder / IMAGES)


def read_images(folder: Path, places: Sequence[int]) -> NDArray[np.uint8]:
    """Read some slices, uint8 (len(places), H, W)."""
    images = np.load(folder / IMAGES, mmap_mode="r")
    return np.array(images[list(places)])


def check_inputs(folder: Path, job: Job) -> None:
    """Compare the uploaded files and the slices with their checksums. Raises InternalError."""
    paths = [(folder / f"{i:05d}.input", digest) for i, digest in enumerate(job.files)]
    for path, digest in [*paths, (folder / IMAGES, job.images)]:
        if digest_of_file(path) != digest:
            raise InternalError("A stored file of the job is damaged. Send the volume again.")


def write_slice(
    folder: Path,
    place: int,
    labels: NDArray[np.uint8],
    made: Provenance,
    doubt: float,
    confidence: NDArray[np.uint8] | None = None,
) -> None:
    """Write the labels (H, W) of one slice, provenance, doubt and, where cleaning needs it, confidence."""
    png = label_png(labels)
    digest = hashlib.sha256(png).hexdigest()
    record: dict[str, Any] = {"png": digest, "made": made.model_dump_json(), "doubt": doubt}
    if confidence is not None:
        sure = label_png(confidence)
        record["confidence"] = hashlib.sha256(sure).hexdigest()
        write_bytes(folder / f"{place:05d}{CONFIDENCE}", sure, 0o600)
    write_bytes(folder / f"{place:05d}.png", png, 0o600)
    write_bytes(folder / f"{place:05d}.made", json.dumps(record).encode(), 0o600)


def finished_slices(folder: Path, job: Job) -> set[int]:
    """Return the slices whose labels are complete; damaged ones are removed, with a warning in the log."""
    done = set()
    for path in folder.glob("*.made"):
        labels = path.with_suffix(".png")
        try:
            record = json.loads(path.read_bytes())
            Provenance.model_validate_json(record["made"])
            if digest_of_file(labels) != record["png"]:
                raise ValueError("the labels do not match")
            if job.clean and digest_of_file(path.with_suffix(CONFIDENCE)) != record["confidence"]:
                raise ValueError("the confidence does not match")
            done.add(int(path.stem))
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            log.warning("job %s: slice %s is damaged; it is segmented again", job.id, path.stem)
            path.unlink(missing_ok=True)
            labels.unlink(missing_ok=True)
    return done


def read_provenance(folder: Path) -> list[Provenance]:
    """Return the provenance of each finished slice, in their order. Raises OSError, ValueError."""
    records = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.made"))]
    return [Provenance.model_validate_json(record["made"]) for record in records]


def erase_patient(store: JobStore, group: str) -> int:
    """Delete the jobs of a patient and its name in the provenance of others; return how many were deleted."""
    erased = 0
    for job in store.all():
        if job.group == group:
            store.remove(job.id)
            erased += 1
        else:
            _forget_patient(store.path(job), group)
    return erased


def _forget_patient(folder: Path, group: str) -> None:
    """Replace a patient's name among the templates that guided the slices of a job."""
    for path in folder.glob("*.made"):
        try:
            record = json.loads(path.read_bytes())
            made = Provenance.model_validate_json(record["made"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            continue  # deleted, or damaged: `finished_slices` removes it then
        without = made.without_patient(group)
        if without != made:
            write_bytes(path, json.dumps(record | {"made": without.model_dump_json()}).encode(), 0o600)


def read_doubts(folder: Path) -> list[float]:
    """Read the doubt of each finished slice, in their order. Raises OSError, ValueError, KeyError."""
    return [float(json.loads(path.read_bytes())["doubt"]) for path in sorted(folder.glob("*.made"))]


def read_stack(job: Job, folder: Path) -> NDArray[np.uint8]:
    """Return the labels of all slices, (S, H, W)."""
    stack = np.zeros((job.slices, *job.size), np.uint8)
    for index in range(job.slices):
        data = (folder / f"{index:05d}.png").read_bytes()
        stack[index] = decode_mask(data, job.size, stack[index].size)
    return stack


def read_confidence(job: Job, folder: Path) -> NDArray[np.uint8]:
    """Return the confidence of all slices, (S, H, W), 0 to 255."""
    stack = np.zeros((job.slices, *job.size), np.uint8)
    for index in range(job.slices):
        data = (folder / f"{index:05d}{CONFIDENCE}").read_bytes()
        stack[index] = mask_files.decode_mask(data, stack[index].size, "the confidence", size=job.size)
    return stack


def assemble(volume: Volume, job: Job, stack: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the labels of all slices, (S, H, W), on the grid of the volume."""
    labels = np.zeros(volume.shape, np.uint8)
    for index in range(job.slices):
        slice_of(labels, job.axis, index)[...] = stack[index]
    return labels
