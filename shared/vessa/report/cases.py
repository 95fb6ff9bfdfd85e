"""Score the labels of whole cases and draw the best, the median and the worst case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vessa.datasets import Case, Dataset
from vessa.datasets.base import IGNORE
from vessa.metrics import Scores, score_volumes

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Labels = Mapping[str, Sequence[Pixels]]  # case name to uint8 (H, W) class ids of its slices


@dataclass(frozen=True)
class Overlay:
    """One row of pictures.

    image: uint8 (H, W[, 3]); masks: column name to uint8 (H, W) class ids; captions: column name to text
    """

    title: str
    image: Pixels
    masks: dict[str, Pixels]
    captions: dict[str, str]


def annotated(dataset: Dataset, cases: Sequence[Case]) -> list[Case]:
    """Return the cases with at least one annotated slice."""
    return [c for c in cases if any(dataset.mask(s) is not None for s in c.slices)]


def score_labels(dataset: Dataset, cases: Sequence[Case], labels: Labels) -> Scores:
    """Score labels case by case; slices without a mask and pixels marked IGNORE are left out.

    A case whose slices differ in size, such as photographs of one patient, is scored image by image.
    """
    volumes = []
    for case in cases:
        pairs = [
            _judged(ours, truth)
            for item, ours in zip(case.slices, labels[case.name], strict=True)
            if (truth := dataset.mask(item)) is not None
        ]
        if len({truth.shape for _, truth in pairs}) > 1:
            volumes += [(ours[None], truth[None], case.spacing) for ours, truth in pairs]
        elif pairs:
            volumes.append((np.stack([p for p, _ in pairs]), np.stack([m for _, m in pairs]), case.spacing))
    return score_volumes(volumes, dataset.classes)


def _judged(ours: Pixels, truth: Pixels) -> tuple[Pixels, Pixels]:
    """Set ignored pixels to background in both, so that they do not affect the scores."""
    ignored = truth == IGNORE
    if not ignored.any():
        return ours, truth
    return np.where(ignored, 0, ours).astype(np.uint8), np.where(ignored, 0, truth).astype(np.uint8)


def best_median_worst(
    dataset: Dataset, cases: Sequence[Case], predicted: Mapping[str, Labels], rank_by: str
) -> list[Overlay]:
    """Return rows for the best, the median and the worst case, ranked by the mean Dice of one column.

    Each row shows the slice whose true mask is largest, and the truth before the predictions. With fewer than
    three cases there are fewer rows.
    predicted: column name to labels; rank_by: name of the column
    """
    dice = {
        name: {c.name: score_labels(dataset, [c], labels).mean["dice"] for c in cases}
        for name, labels in predicted.items()
    }
    ranked = sorted(
        (c for c in cases if dice[rank_by][c.name] is not None), key=lambda c: -(dice[rank_by][c.name] or 0.0)
    )
    if not ranked:
        return []
    named = {"worst": ranked[-1], "median": ranked[len(ranked) // 2], "best": ranked[0]}
    chosen = {case.name: title for title, case in named.items()}  # a case that is best and worst has one row
    rows = []
    for title, case in reversed(named.items()):
        if chosen[case.name] != title:
            continue
        masks = [dataset.mask(s) for s in case.slices]
        index = int(np.argmax([-1 if m is None else int(np.count_nonzero(m)) for m in masks]))
        item, truth = case.slices[index], masks[index]
        assert truth is not None
        columns = {"truth": truth} | {name: labels[case.name][index] for name, labels in predicted.items()}
        captions = {
            name: "" if (value := dice[name][case.name]) is None else f"Dice of the case {value:.3f}"
            for name in predicted
        }
        rows.append(Overlay(f"{title}: {item.name}", dataset.image(item), columns, captions))
    return rows
