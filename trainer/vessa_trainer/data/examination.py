"""Open every image and mask of a data set once, in parallel, before anything is trained on them."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vessa.codec import image_digest
from vessa.datasets import Case, Dataset
from vessa.datasets.base import IGNORE
from vessa.errors import VessaError

_THREADS = 4  # decoders release the interpreter's lock; more would hold too many volumes at once


@dataclass(frozen=True)
class Problem:
    """One file that cannot be used. in_mask: the image itself is sound."""

    name: str
    group: str
    message: str
    in_mask: bool


@dataclass
class Patient:
    """The contents of one group's files.

    images: how many; masks: how many of them are annotated; classes: ids that some mask shows; ignored: masks
    with IGNORE pixels; unannotated: names of the slices without a mask; image_digest, mask_digest: of all
    pixels, in the order of the slices
    """

    images: int = 0
    masks: int = 0
    classes: set[int] = field(default_factory=set)
    ignored: int = 0
    unannotated: list[str] = field(default_factory=list)
    image_digest: str = ""
    mask_digest: str = ""

    @property
    def annotated(self) -> bool:
        """Tell whether a mask shows a class: such a patient can be learned from and scored."""
        return bool(self.classes)


@dataclass(frozen=True)
class Examination:
    """The contents of a data set's files, by patient, after all of them were opened."""

    patients: dict[str, Patient]
    problems: tuple[Problem, ...]

    def annotated(self) -> list[str]:
        """Names of the patients of whom a mask shows a class, sorted."""
        return sorted(name for name, patient in self.patients.items() if patient.annotated)


_done: dict[str, Examination] = {}


def examine(dataset: Dataset) -> Examination:
    """Open every file of a data set, with a progress bar; what this process has examined is remembered.

    Files count as changed when their names, sizes or times have changed.
    """
    key = _signature(dataset)
    if key not in _done:
        cases = dataset.cases()
        total = sum(len(case.slices) for case in cases)
        with Progress(transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task("opening every image and mask", total=total)
            with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
                parts = []
                for case, part in zip(
                    cases, pool.map(lambda c: _examine_case(dataset, c), cases), strict=True
                ):
                    parts.append((case, *part))
                    bar.advance(task, len(case.slices))
        _done[key] = _joined(parts)
    return _done[key]


def _signature(dataset: Dataset) -> str:
    root = dataset.root.resolve()
    stats = [
        (str(p), s.st_size, s.st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file() and (s := p.stat())
    ]
    parts = [type(dataset).__name__, sorted(dataset.classes.items()), stats]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _examine_case(dataset: Dataset, case: Case) -> tuple[Patient, list[Problem]]:
    found, problems = Patient(), []
    digests: tuple[list[str], list[str]] = ([], [])
    for item in case.slices:
        found.images += 1
        try:
            image = dataset.image(item)
        except (VessaError, OSError) as error:
            problems.append(Problem(item.name, case.group, str(error), in_mask=False))
            continue
        digests[0].append(f"{item.name} {image.shape} {image_digest(image)}")
        try:
            mask = dataset.mask(item)
        except (VessaError, OSError) as error:
            problems.append(Problem(item.name, case.group, str(error), in_mask=True))
            continue
        if mask is None:
            found.unannotated.append(item.name)
            continue
        digests[1].append(f"{item.name} {image_digest(mask)}")
        if mask.shape != image.shape[:2]:
            text = f"the image of {item.name} has {_size(image.shape)} px, its mask {_size(mask.shape)} px"
            problems.append(Problem(item.name, case.group, text, in_mask=True))
            continue
        present = set(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())
        found.masks += 1
        found.ignored += IGNORE in present
        found.classes |= present - {0, IGNORE}
    found.image_digest, found.mask_digest = (_digest(d) for d in digests)
    return found, problems


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else ""


def _joined(parts: Sequence[tuple[Case, Patient, list[Problem]]]) -> Examination:
    patients: dict[str, Patient] = {}
    problems: list[Problem] = []
    for case, part, found in parts:
        problems += found
        known = patients.setdefault(case.group, Patient())
        known.images += part.images
        known.masks += part.masks
        known.ignored += part.ignored
        known.classes |= part.classes
        known.unannotated += part.unannotated
        known.image_digest = _digest([known.image_digest, part.image_digest])
        known.mask_digest = _digest([known.mask_digest, part.mask_digest])
    return Examination(patients, tuple(problems))
