"""Clean the labels of answers: of classes that form one component in every template, keep the largest.

Labels that are removed become background with confidence 0: nothing is known of these pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.masks.cleaning import VERSION, CleanedVolume, clean_volume
from vessa.schemas import Cleaning
from vessa_server.template_bank.retrieval import Bank
from vessa_server.types import SegmentResult


def clean_results(results: Sequence[Any], bank: Bank) -> list[Any]:
    """Clean each SegmentResult, image by image; errors are returned unchanged.

    The results themselves stay as they are: equal items of other requests share them. Probabilities are not
    cleaned.
    """
    return [_cleaned(one, bank) if isinstance(one, SegmentResult) else one for one in results]


def _cleaned(result: SegmentResult, bank: Bank) -> SegmentResult:
    names = dict(zip(result.class_ids, result.class_names, strict=True))
    found, cleaning = clean_stack(
        result.labels[None], result.confidence[None], bank, names, neighbor_weight=0.0
    )
    return replace(result, labels=found.labels[0], confidence=found.confidence[0], cleaning=cleaning)


def clean_stack(
    labels: NDArray[np.uint8],
    confidence: NDArray[np.uint8],
    bank: Bank,
    names: dict[int, str],
    *,
    neighbor_weight: float,
) -> tuple[CleanedVolume, Cleaning]:
    """Clean the labels of one volume, (D, H, W) each; returns them and what was done.

    names: of the requested class ids; neighbor_weight: see `clean_volume`
    """
    single = [class_id for class_id in bank.single_classes if class_id in names]
    found = clean_volume(labels, confidence, single=single, neighbor_weight=neighbor_weight)
    cleaning = Cleaning(
        version=VERSION,
        single=[names[class_id] for class_id in single],
        neighbor_weight=neighbor_weight,
        removed={names[class_id]: count for class_id, count in found.removed.items()},
    )
    return found, cleaning
