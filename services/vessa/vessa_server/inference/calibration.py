"""Calibrate a bank: learn from its own templates when a class is absent (beyond the paper).

The networks draw something of nearly every class they are asked for. A class that is really there almost
always has a pixel of high probability, its peak. How high depends on the bank. So templates of the bank are
segmented by the others, and a class is called absent where its peak is far below the peaks of classes that
the templates show.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vessa_server.template_bank.retrieval import Bank
from vessa_server.template_bank.template import Template
from vessa_server.types import SegmentResult

MOST_TEMPLATES = 16  # segmented to calibrate a bank: about 2 s on a CPU for three classes
LEAST_PEAKS = 8  # of classes that are shown; fewer tell too little of a bank
QUANTILE = 0.05  # share of the shown classes whose peak may be lower than the reference peak
MARGIN = 3.0  # the threshold is this much further below 1 than the reference peak
HIGHEST = 0.95
LEAST_PATIENTS = 3  # with fewer, a template is held out alone and not with all of its patient's


@dataclass(frozen=True)
class Calibration:
    """What a bank's own templates say about its answers.

    absence: a class without prompts whose peak probability is below this is absent; 0 for no such rule
    """

    absence: float = 0.0


def held_out(bank: Bank) -> list[tuple[Template, Bank]]:
    """Return at most `MOST_TEMPLATES` templates, each with a bank without it, or without its patient."""
    patients = len({t.group for t in bank.templates}) >= LEAST_PATIENTS
    pairs = []
    for template in sorted(bank.templates, key=lambda t: t.id)[:MOST_TEMPLATES]:
        left = tuple(
            t for t in bank.templates if (t.group != template.group if patients else t is not template)
        )
        # `model` leaves templates of other weights out of the retrieval, and they must not be asked for.
        if any(bank.model in (None, t.model) for t in left):
            pairs.append((template, replace(bank, templates=left)))
    return pairs


def calibrate(pairs: Sequence[tuple[Template, SegmentResult]]) -> Calibration:
    """Learn from templates and their results, which hold probabilities."""
    peaks = [
        float(result.probabilities[row].max())
        for template, result in pairs
        for row, class_id in enumerate(result.class_ids, 1)
        if result.probabilities is not None and class_id in template.classes
    ]
    if len(peaks) < LEAST_PEAKS:
        return Calibration()
    reference = float(np.quantile(peaks, QUANTILE))
    return Calibration(round(min(HIGHEST, max(0.0, 1 - MARGIN * (1 - reference))), 4))
