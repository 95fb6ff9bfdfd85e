"""Find what would spoil training before it starts."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from vessa.codec import image_digest
from vessa.datasets.base import Dataset
from vessa.errors import VessaError


@dataclass(frozen=True)
class Finding:
    """kind: unreadable, size_mismatch, unknown_class, empty_mask, duplicate_image or split_overlap.

    where: the slice, pair of slices or splits; severity: "error" must be mended, "warning" may be meant
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
        if mask.shape != image.shape[:2]:
            text = f"image has size {image.shape[:2]}, its mask {mask.shape}"
            findings.append(Finding("size_mismatch", item.name, text))
        unknown = sorted(set(mask.ravel().tolist()) - set(dataset.classes) - {0})
        if unknown:
            text = f"mask holds class ids {unknown[:5]}; the data set names {sorted(dataset.classes)}"
            findings.append(Finding("unknown_class", item.name, text))
        if not mask.any():
            findings.append(Finding("empty_mask", item.name, "the mask is all background", "warning"))
    for (one, groups), (other, others) in itertools.combinations((splits or {}).items(), 2):
        shared = sorted(set(groups) & set(others))
        if shared:
            text = f"groups in both: {shared[:5]} ({len(shared)})"
            findings.append(Finding("split_overlap", f"{one}, {other}", text))
    return findings
