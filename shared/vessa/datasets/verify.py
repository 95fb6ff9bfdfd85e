"""Find errors of a data set before training."""

import itertools
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vessa.codec import image_digest
from vessa.datasets.base import IGNORE, Dataset
from vessa.datasets.png_folder import PngFolder
from vessa.datasets.registry import LAYOUTS, Collection, fits_patient, recognize
from vessa.errors import InvalidDataset, VessaError

_log = logging.getLogger(__name__)
_MANY = 3  # images of one patient that look like a mistake in the names
ADVICE = {  # what to do about each kind of finding
    "unreadable": "export the file again, or remove it together with its mask",
    "size_mismatch": "replace it by the mask of this image, or resize it by nearest neighbor",
    "unknown_class": "add the class to the description of the data set, or set its pixels to 0",
    "empty_mask": "delete the mask if the image is not annotated; keep it if the structures are absent",
    "absent_class": "remove the class from the description, or look for missing masks",
    "duplicate_image": "remove one of the two, or assign both to one patient",
    "no_masks": "add the masks of at least one patient: they are the templates",
    "unknown_group": "correct the name in the split file, or remove it",
    "split_overlap": "keep each patient in one split only",
    "orphan_mask": "rename the mask like its image, or state the names in `files` of meta.json",
    "left_out": "move it out of the folder, or convert it to a supported format",
    "one_group": "state the pattern of patient names in `files` of meta.json, such as images/{patient}.png",
    "few_groups": "add patients, or exclude this data set",
    "other_layout": "check classes and patients yourself: only the expected layout is compared",
    "class_names": "check that this is the complete collection that the folder is named after",
    "patient_names": "check that patients are distinguished; groups.json may state them (BiomedParse)",
}


@dataclass(frozen=True)
class Finding:
    """Describe one problem of a data set.

    kind: a key of ADVICE
    where: the slice, pair of slices, class, group, splits or data set
    message: observed and expected state
    severity: "error" must be corrected, "warning" may be intended
    """

    kind: str
    where: str
    message: str
    severity: str = "error"

    @property
    def advice(self) -> str:
        """Return how to correct it."""
        return ADVICE[self.kind]


def require_sound(dataset: Dataset, *, min_groups: int) -> None:
    """Check a data set before training. Log its warnings, one line per kind.

    min_groups: smallest number of patients for the training
    Raises InvalidDataset that names the first errors and how to correct them.
    """
    findings = verify(dataset, entry=recognize(dataset.root))
    groups = len(dataset.groups())
    if groups < min_groups:
        text = f"{groups} patients, expected at least {min_groups}"
        findings.append(Finding("few_groups", dataset.name, text))
    warnings = [f for f in findings if f.severity == "warning"]
    for kind, count in Counter(f.kind for f in warnings).items():
        first = next(f for f in warnings if f.kind == kind)
        _log.warning(
            "%s: %d x %s, the first is %s: %s", dataset.name, count, kind, first.where, first.message
        )
    errors = [f for f in findings if f.severity == "error"]
    if errors:
        shown = "; ".join(f"{f.where}: {f.message} ({f.kind}: {f.advice})" for f in errors[:3])
        rest = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise InvalidDataset(f"'{dataset.name}' has errors that would harm the training: {shown}{rest}")


def verify(
    dataset: Dataset,
    splits: Mapping[str, tuple[str, ...]] | None = None,
    entry: Collection | None = None,
) -> list[Finding]:
    """Check every image and mask of a data set, and that no patient is in two splits.

    splits: name to groups, of those that must not overlap; entry: the registered collection that the data
    set is, to compare its layout, its classes and the names of its patients with.
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
            text = f"image has size {image.shape[:2]}, its mask {mask.shape}; expected one size"
            findings.append(Finding("size_mismatch", item.name, text))
        present = set(np.unique(mask).tolist()) - {IGNORE}
        shown |= present
        unknown = sorted(present - set(dataset.classes) - {0})
        if unknown:
            text = f"mask holds class ids {unknown[:5]}; expected 0 or one of {sorted(dataset.classes)}"
            findings.append(Finding("unknown_class", item.name, text))
        if not mask.any():
            findings.append(Finding("empty_mask", item.name, "the mask is all background", "warning"))
    findings += _file_findings(dataset)
    if not annotated:
        findings.append(Finding("no_masks", dataset.name, "no image has a mask; expected some", "warning"))
    for class_id in sorted(set(dataset.classes) - shown) if annotated else ():
        text = f"no mask shows class {class_id}"
        findings.append(Finding("absent_class", dataset.classes[class_id], text, "warning"))
    findings += _split_findings(dataset, splits or {})
    return findings if entry is None else findings + _registry_findings(dataset, entry)


def _file_findings(dataset: Dataset) -> list[Finding]:
    """Report files that take no part, and names that put all images into one patient."""
    texts = {"orphan_mask": "a mask without an image", "left_out": "an unused file"}
    findings = [
        Finding(kind, name, texts[kind], "error" if kind == "orphan_mask" else "warning")
        for name, kind in dataset.leftovers()
    ]
    slices, cases = dataset.slices(), dataset.cases()
    if isinstance(dataset, PngFolder) and len(cases) == 1 and len(slices) >= _MANY:
        text = (
            f"all {len(slices)} images are in one patient, '{cases[0].group}', by the names "
            f"{dataset.listing.pattern}"
        )
        findings.append(Finding("one_group", dataset.name, text, "warning"))
    return findings


def _registry_findings(dataset: Dataset, entry: Collection) -> list[Finding]:
    layout = type(dataset).__name__
    if layout != entry.layout:
        text = f"layout {layout}; expected {entry.layout} for {entry.name}: {LAYOUTS[entry.layout]}"
        return [Finding("other_layout", dataset.name, text, "warning")]
    findings = []
    ours, theirs = set(dataset.classes.values()), set(entry.classes)
    if ours - theirs:
        text = f"classes {sorted(ours - theirs)[:5]}; {entry.name} has {sorted(theirs)}"
        findings.append(Finding("class_names", dataset.name, text, "warning"))
    strange = [g for g in dataset.groups() if not fits_patient(entry, g)]
    if strange:
        text = (
            f"{len(strange)} patients such as {strange[:3]}; expected names like {entry.patient} as in "
            f"{entry.example}"
        )
        findings.append(Finding("patient_names", dataset.name, text, "warning"))
    return findings


def _split_findings(dataset: Dataset, splits: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    findings = []
    known = set(dataset.groups())
    for name, groups in splits.items():
        if missing := sorted(set(groups) - known):
            findings.append(Finding("unknown_group", name, f"unknown groups: {missing[:5]}"))
    for (one, groups), (other, others) in itertools.combinations(splits.items(), 2):
        shared = sorted(set(groups) & set(others))
        if shared:
            text = f"groups in both: {shared[:5]} ({len(shared)})"
            findings.append(Finding("split_overlap", f"{one}, {other}", text))
    return findings
