"""Calibrate a bank: learn from its templates when a class is absent and what an island is (beyond the paper).

The networks draw something of nearly every class they are asked for. A class that is really there almost
always has a pixel of high probability, its peak. How high depends on the bank. So templates of the bank are
segmented by the others, and a class is called absent where its peak is far below the peaks of classes that
the templates show.

A class that the templates show as one piece has one piece in an image too: smaller pieces are errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from vessa_server.template_bank.retrieval import Bank
from vessa_server.template_bank.template import Template
from vessa_server.types import SegmentResult

MOST_TEMPLATES = 16  # segmented to calibrate a bank: about 2 s on a CPU for three classes
LEAST_PEAKS = 8  # of classes that are shown; fewer tell too little of a bank
QUANTILE = 0.05  # share of the shown classes whose peak may be lower than the reference peak
MARGIN = 3.0  # the threshold is this much further below 1 than the reference peak
HIGHEST = 0.95
LEAST_SHOWN = 12  # templates that show a class; with 8 the rule hurt polyps
PIECE = 0.1  # share of the largest piece from which another one counts
SEVERAL = 0.1  # share of the templates that may show a further piece of a class of one piece
LEAST_PATIENTS = 3  # with fewer, a template is held out alone and not with all of its patient's


@dataclass(frozen=True)
class Calibration:
    """What a bank's own templates say about its answers.

    absence: a class without prompts whose peak probability is below this is absent; 0 for no such rule
    single: ids of the classes that have one piece in an image
    """

    absence: float = 0.0
    single: frozenset[int] = frozenset()


def sample_of(bank: Bank) -> list[Template]:
    """Return at most `MOST_TEMPLATES` templates of a bank, the same ones in every process."""
    return sorted(bank.templates, key=lambda t: t.id)[:MOST_TEMPLATES]


def held_out(bank: Bank, sample: Sequence[Template]) -> list[tuple[Template, Bank]]:
    """Return templates, each with a bank without it, or without its patient."""
    patients = len({t.group for t in bank.templates}) >= LEAST_PATIENTS
    pairs = []
    for template in sample:
        left = tuple(
            t for t in bank.templates if (t.group != template.group if patients else t is not template)
        )
        # Retrieval leaves out templates of other weights, so they answer for nothing here.
        if any(bank.model in (None, t.model) for t in left):
            pairs.append((template, replace(bank, templates=left)))
    return pairs


def absence_threshold(pairs: Sequence[tuple[Template, SegmentResult]]) -> float:
    """Learn `Calibration.absence` from templates and their results, which hold probabilities."""
    peaks = [
        float(result.probabilities[row].max())
        for template, result in pairs
        for row, class_id in enumerate(result.class_ids, 1)
        if result.probabilities is not None and class_id in template.classes
    ]
    if len(peaks) < LEAST_PEAKS:
        return 0.0
    reference = float(np.quantile(peaks, QUANTILE))
    return round(min(HIGHEST, max(0.0, 1 - MARGIN * (1 - reference))), 4)


def classes_of_one_piece(sample: Sequence[Template]) -> frozenset[int]:
    """Return the ids of the classes that the templates' masks show as one piece."""
    single = set()
    for class_id in {c for template in sample for c in template.classes}:
        shown = [t.mask == class_id for t in sample if class_id in t.classes]
        several = sum(_second_piece(mask) > PIECE for mask in shown)
        if len(shown) >= LEAST_SHOWN and several <= SEVERAL * len(shown):
            single.add(class_id)
    return frozenset(single)


def islands(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return all pieces of a mask (H, W) but the largest; pixels that touch at a corner are one piece."""
    pieces, sizes = _pieces(mask)
    if len(sizes) < 2:
        return np.zeros_like(mask)
    others: NDArray[np.bool_] = mask & (pieces != 1 + sizes.argmax())
    return others


def _pieces(mask: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the number of each pixel's piece (H, W), 0 outside, and the px of each piece."""
    pieces, _ = ndimage.label(mask, np.ones((3, 3)))
    return pieces, np.bincount(pieces.ravel())[1:]


def _second_piece(mask: NDArray[np.bool_]) -> float:
    """Return the second largest piece's share of the largest one, 0 when there is one piece."""
    sizes = np.sort(_pieces(mask)[1])
    return float(sizes[-2] / sizes[-1]) if len(sizes) > 1 else 0.0
