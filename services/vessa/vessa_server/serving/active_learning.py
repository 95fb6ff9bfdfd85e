"""Which unlabeled images to annotate next: those that bring the bank closest to everything it will be asked.

The bank's retrieval serves an image by its most similar template, so an image is covered as well as its
nearest template is similar. Greedy k-center on the retriever's features: each step takes the image, or the
patient, that lowers the coverage loss most. Numpy alone; no HTTP, no networks.
"""

import heapq
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vessa.errors import DeadlineExceeded

POWER = 4.0  # chosen on the validation patients of acdc, see docs/decisions/
_BLOCK = 4096  # rows of a block of distances, so that memory stays small
_FARTHEST = 2.0  # 1 - cosine of opposite vectors: what an empty bank is away from everything

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pick:
    """One suggestion. group: its patient; images: rows of its candidates, least covered first.

    gain: share in [0, 1] of the loss of all candidates that annotating it takes away
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
) -> list[Pick]:
    """Rank what to annotate next, best first: at most `count` groups.

    features: (N, D) float32 of unit norm, of the candidates; covered: (M, D), of the bank's templates, none
    for an empty bank; groups: the patient of each candidate, None where each is for itself; confidence: (N,)
    in [0, 1], how sure the annotator is of each by now, None when it cannot tell yet.

    The loss is the sum over candidates of (1 - confidence) x (1 - cosine to the nearest template) ** power.
    With a large power only the farthest counts, which is k-center and picks outliers; 1 is k-medians.
    until: time.monotonic() at which it is given up. Raises ValueError for arrays that do not fit each other,
    DeadlineExceeded.
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
    weights = np.maximum(weights, 1e-6)  # of candidates that the annotator is sure of, the farther one first
    whole = float((weights * away**power).sum())

    def gain(name: str) -> float:
        if time.monotonic() > until:
            raise DeadlineExceeded(f"{number} candidates take too long; rank fewer at once")
        return float((weights * (away**power - np.minimum(away, nearest(name)) ** power)).sum())

    def nearest(name: str) -> Floats:
        return _nearest(features, features[rows[name]])

    # What a group brings only shrinks as others are taken (the loss is submodular), so that a gain of an
    # earlier round is a bound, and the few at the top of the heap are all that must be computed anew.
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
    """Return (N,): 1 - cosine of each to its nearest of `others` (M, D), in [0, 2]."""
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), _BLOCK):
        found[start : start + _BLOCK] = (features[start : start + _BLOCK] @ others.T).max(axis=1)
    return np.clip(1 - found, 0, _FARTHEST)


class Looks:
    """What is known of candidates by now: features by image, confidence by image and state of a bank.

    The least recently used go first; a feature of the nano preset is 1.5 kB, of the larger ones 6 kB.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._features: OrderedDict[str, Floats] = OrderedDict()
        self._sure: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, image_id: str, feature: Floats, bank: str, digest: str, sure: float | None) -> None:
        """Keep an image's feature (D,) and, where the bank could segment it, the confidence in [0, 1]."""
        with self._lock:
            _put(self._features, image_id, feature, self.capacity)
            if sure is not None:
                _put(self._sure, (image_id, bank, digest), sure, self.capacity)

    def feature(self, image_id: str) -> Floats | None:
        """Return an image's feature, None when it is not known."""
        with self._lock:
            if (found := self._features.get(image_id)) is not None:
                self._features.move_to_end(image_id)
            return found

    def confidence(self, image_id: str, bank: str, digest: str) -> float | None:
        """Return how sure the annotator was of an image by this state of a bank, None when not known."""
        with self._lock:
            return self._sure.get((image_id, bank, digest))


_K = TypeVar("_K")
_V = TypeVar("_V")


def _put(held: "OrderedDict[_K, _V]", key: _K, value: _V, capacity: int) -> None:
    held[key] = value
    held.move_to_end(key)
    if len(held) > capacity:
        held.popitem(last=False)
