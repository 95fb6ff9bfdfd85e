"""Rank unlabeled images by how much annotating each would improve the coverage of a bank.

Retrieval serves an image by its most similar template, so an image is covered as well as its nearest template
is similar. The ranking is a greedy k-center on the retriever's features: each step takes the image, or the
patient, that lowers the coverage loss most. Only numpy is used: no HTTP, no networks.
"""

import heapq
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vessa.errors import DeadlineExceeded

POWER = 4.0  # chosen on the validation patients of acdc, see docs/results.md
_BLOCK = 4096  # rows of distances computed at once, which bounds the memory
_FARTHEST = 2.0  # 1 - cosine of opposite vectors: the distance of every image from an empty bank

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pick:
    """One suggestion.

    group: the patient; images: rows of the patient's candidates, least covered first
    gain: share in [0, 1] of the total coverage loss that annotating the patient removes
    """

    group: str
    images: tuple[int, ...]
    gain: float


def suggest(
    features: Floats,
    count: int,
    *,
    covered: Floats | None = None,
    groups: Sequence[str] | None = None,
    confidence: Floats | None = None,
    power: float = POWER,
    until: float = math.inf,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Pick]:
    """Rank what to annotate next, best first: at most `count` groups.

    features: (N, D) float32 of unit norm, of the candidates
    covered: (M, D) float32, of the bank's templates; None or empty for an empty bank
    groups: the patient of each candidate; None ranks single images
    confidence: (N,) float32 in [0, 1], of the annotator's present answers; None for an empty bank
    power: exponent of the distance; until: time.monotonic() after which the ranking stops
    stopped: returns True once nobody waits for the ranking any more

    The loss is the sum over candidates of (1 - confidence) x (1 - cosine to the nearest template) ** power.
    A large power counts only the farthest candidates, which is k-center and picks outliers; 1 is k-medians.
    Raises ValueError for arrays that do not fit each other, and DeadlineExceeded.
    """
    number = len(features)
    names = [str(i) for i in range(number)] if groups is None else list(groups)
    weights = np.ones(number, np.float32) if confidence is None else 1 - confidence
    if features.ndim != 2 or len(names) != number or weights.shape != (number,) or count < 1 or power <= 0:
        raise ValueError(
            f"expected features (N, D), a group and a confidence of each, count >= 1 and power > 0, got "
            f"{features.shape}, {len(names)}, {weights.shape}, {count}, {power}"
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    away = np.full(number, _FARTHEST, np.float32)
    if covered is not None and len(covered):
        away = _nearest(features, covered)
    weights = np.maximum(weights, 1e-6)  # so that confident candidates are still ranked by distance
    whole = float((weights * away**power).sum())

    def gain(name: str) -> float:
        if stopped():
            raise DeadlineExceeded("The caller has left.")
        if time.monotonic() > until:
            raise DeadlineExceeded(f"{number} candidates take too long; rank fewer at once")
        return float((weights * (away**power - np.minimum(away, nearest(name)) ** power)).sum())

    def nearest(name: str) -> Floats:
        return _nearest(features, features[rows[name]])

    # The gain of a group only shrinks as others are picked (the loss is submodular). So a gain of an earlier
    # round is an upper bound, and only the few groups at the top of the heap need a new one.
    heap = [(-gain(name), order, name) for order, name in enumerate(rows)]
    heapq.heapify(heap)
    picks: list[Pick] = []
    while heap and len(picks) < count:
        _, order, name = heapq.heappop(heap)
        fresh = (-gain(name), order, name)
        if heap and fresh > heap[0]:
            heapq.heappush(heap, fresh)
            continue
        urgent = sorted(rows[name], key=lambda row: (-float(weights[row] * away[row] ** power), row))
        picks.append(Pick(name, tuple(urgent), -fresh[0] / whole if whole else 0.0))
        away = np.minimum(away, nearest(name))
    return picks


def _nearest(features: Floats, others: Floats) -> Floats:
    """Return (N,) in [0, 2]: 1 - cosine of each feature to its nearest of `others` (M, D)."""
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), _BLOCK):
        found[start : start + _BLOCK] = (features[start : start + _BLOCK] @ others.T).max(axis=1)
    return np.clip(1 - found, 0, _FARTHEST)
