"""Find what would spoil training before it starts."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vessa.codec import image_digest
from vessa.datasets.base import Dataset
from vessa.errors import VessaError


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    kind: unreadable, size_mismatch, unknown_class, empty_mask, absent_class, duplicate_image,
    no_masks, unknown_group or split_overlap; where: the slice, pair of slices, class, group or splits;
    severity: "error" must be mended, "warning" may be meant
    """

    kind: str
    where: str
    message: str
    severity: str = "error"


def verify(dataset: Dataset, splits: Mapping[str, tuple[str, ...]] | None = None) -> list[Finding]:
    """Check every image and mask of a data set, and that no patient is in two splits.

    splits: name to groups, of those that must not overlap.
    """
    findings: list[Finding] = []
    first_seen: dict[str, tuple[str, str]] = {}
    shown: set[int] = set()
    annotated = False
    for item in dataset.slices():
        try:
            image, mask = dataset.image(item), dataset.mask(item)
        except VessaError as error:
            findings.append(Finding("unreadable", item.name, error.message))
            continue
        digest = image_digest(image)
        if digest in first_seen and image.std() > 0:
            name, group = first_seen[digest]
            severity = "warning" if group == item.group else "error"
            text = "the same pixels" + ("" if group == item.group else f" in groups {group} and {item.group}")
            findings.append(Finding("duplicate_image", f"{name}, {item.name}", text, severity))
        first_seen.setdefault(digest, (item.name, item.group))
        if mask is None:
            continue
        annotated = True
        if mask.shape != image.shape[:2]:
            text = f"image has size {image.shape[:2]}, its mask {mask.shape}"
            findings.append(Finding("size_mismatch", item.name, text))
        present = set(np.unique(mask).tolist())
        shown |= present
        unknown = sorted(present - set(dataset.classes) - {0})
        if unknown:
            text = f"mask holds class ids {unknown[:5]}; the data set names {sorted(dataset.classes)}"
            findings.append(Finding("unknown_class", item.name, text))
        if not mask.any():
            findings.append(Finding("empty_mask", item.name, "the mask is all background", "warning"))
    if not annotated:
        findings.append(Finding("no_masks", dataset.name, "no image has a mask", "warning"))
    for class_id in sorted(set(dataset.classes) - shown) if annotated else ():
        text = f"no mask shows class {class_id}"
        findings.append(Finding("absent_class", dataset.classes[class_id], text, "warning"))
    return findings + _split_findings(dataset, splits or {})


def _split_findings(dataset: Dataset, splits: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    findings = []
    known = set(dataset.groups())
    for name, groups in splits.items():
        if missing := sorted(set(groups) - known):
            findings.append(Finding("unknown_group", name, f"groups that are not there: {missing[:5]}"))
    for (one, groups), (other, others) in itertools.combinations(splits.items(), 2):
        shared = sorted(set(groups) & set(others))
        if shared:
            text = f"groups in both: {shared[:5]} ({len(shared)})"
            findings.append(Finding("split_overlap", f"{one}, {other}", text))
    return findings
