"""Choose on validation patients which components of a mask to keep, and apply that to predictions."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from vessa import atomic_write
from vessa.datasets.base import IGNORE

FILE = "postprocessing.json"
_GAIN = 0.002  # mean Dice of a class on validation that a rule must add: less is chance
_SHARES = (0.1, 0.3)  # of the median true volume of a class: the smallest components that may be kept
Labels = np.ndarray


@dataclass(frozen=True)
class Rule:
    """What happens to the components of one class.

    largest: keep the largest component alone; smallest: remove components of fewer pixels or voxels
    before, after: mean Dice of the class on validation without and with the rule
    """

    largest: bool
    smallest: int
    before: float
    after: float


@dataclass(frozen=True)
class Postprocessing:
    """Rules by class id 1..K. by_volume: components are those of whole volumes, else of single images."""

    rules: Mapping[int, Rule]
    by_volume: bool

    def apply(self, slices: Sequence[Labels]) -> list[Labels]:
        """Return the labels of one case after all rules. slices: class ids, uint8 (H, W) each."""
        if not self.rules:
            return list(slices)
        if self.by_volume and len({s.shape for s in slices}) == 1:
            return list(_cleaned(np.stack(slices), self.rules))
        return [_cleaned(one[None], self.rules)[0] for one in slices]

    def write(self, run: Path) -> None:
        """Write the rules into a run's folder."""
        data = {
            "by_volume": self.by_volume,
            "rules": {str(i): asdict(rule) for i, rule in self.rules.items()},
        }
        atomic_write.write_text(run / FILE, json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> "Postprocessing":
        """Read a run's rules; a run without any has none."""
        path = run / FILE
        if not path.is_file():
            return cls({}, by_volume=False)
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls({int(i): Rule(**rule) for i, rule in data["rules"].items()}, data["by_volume"])


def choose(
    truths: Sequence[Sequence[Labels | None]],
    predictions: Sequence[Sequence[Labels]],
    class_ids: Sequence[int],
    *,
    by_volume: bool,
    single: Collection[int] = (),
) -> Postprocessing:
    """Choose, class by class, the rule that adds most Dice on the validation cases, or none.

    truths: of each case the masks of its slices, None where not annotated
    predictions: likewise, complete
    single: classes that form one component in every labeled volume. Their largest component alone is kept
        unless validation loses by it: few validation cases seldom show a stray component, new ones do.
    """
    rules = {}
    for class_id in class_ids:
        before = _dice(truths, predictions, class_id)
        if before is None:
            continue
        best = Rule(largest=False, smallest=0, before=before, after=before)
        for largest, smallest in _candidates(truths, class_id, by_volume=by_volume):
            rule = Rule(largest, smallest, before, before)
            tried = Postprocessing({class_id: rule}, by_volume)
            after = _dice(truths, [tried.apply(case) for case in predictions], class_id)
            if after is not None and after >= before + _GAIN and after > best.after:
                best = Rule(largest, smallest, before, after)
            if largest and class_id in single and after is not None and after >= best.after:
                best = Rule(largest, smallest, before, after)
        if best.largest or best.smallest:
            rules[class_id] = best
    return Postprocessing(rules, by_volume)


def _candidates(
    truths: Sequence[Sequence[Labels | None]], class_id: int, *, by_volume: bool
) -> list[tuple[bool, int]]:
    areas = [[int((mask == class_id).sum()) for mask in case if mask is not None] for case in truths]
    sizes = [sum(case) for case in areas] if by_volume else [area for case in areas for area in case]
    shown = [size for size in sizes if size]
    median = float(np.median(shown)) if shown else 0.0
    return [(True, 0), *((False, round(share * median)) for share in _SHARES if share * median >= 2)]


def _cleaned(labels: Labels, rules: Mapping[int, Rule]) -> Labels:
    """Return labels (D, H, W) without the components that the rules remove."""
    cleaned = labels.copy()
    for class_id, rule in rules.items():
        components, count = ndimage.label(labels == class_id)
        if count == 0:
            continue
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        keep = sizes >= max(rule.smallest, 1)
        if rule.largest:
            keep &= np.arange(count + 1) == 1 + sizes[1:].argmax()
        keep[0] = True
        cleaned[~keep[components]] = 0
    return cleaned


def _dice(
    truths: Sequence[Sequence[Labels | None]], predictions: Sequence[Sequence[Labels]], class_id: int
) -> float | None:
    """Return the mean Dice of a class over the cases that show it in truth or prediction."""
    found = []
    for masks, labels in zip(truths, predictions, strict=True):
        overlap = total = 0
        for mask, ours in zip(masks, labels, strict=True):
            if mask is not None:
                one, other = (ours == class_id) & (mask != IGNORE), mask == class_id
                overlap += int((one & other).sum())
                total += int(one.sum()) + int(other.sum())
        if total:
            found.append(2 * overlap / total)
    return float(np.mean(found)) if found else None
