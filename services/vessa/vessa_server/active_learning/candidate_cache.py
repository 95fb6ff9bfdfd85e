"""Cache features and confidences of candidates, so that a ranking needs their ids only."""

import threading
from collections import OrderedDict
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_K = TypeVar("_K")
_V = TypeVar("_V")


class CandidateCache:
    """Features by image, and confidences by image and state of a bank; the oldest entries are evicted.

    Methods may be called from any thread. capacity: limit of images; a feature takes 1.5 kB with nano, 6 kB
    with the larger presets.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._features: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._confidences: OrderedDict[tuple[str, str, str], float] = OrderedDict()
        self._lock = threading.Lock()

    def put(
        self, image_id: str, feature: NDArray[np.float32], bank: str, digest: str, confidence: float | None
    ) -> None:
        """Store an image's feature (D,) and, unless the bank is empty, its confidence in [0, 1].

        digest: of the bank's contents
        """
        with self._lock:
            _put(self._features, image_id, feature, self.capacity)
            if confidence is not None:
                _put(self._confidences, (image_id, bank, digest), confidence, self.capacity)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._features.clear()
            self._confidences.clear()

    def feature(self, image_id: str) -> NDArray[np.float32] | None:
        """Return an image's feature (D,), None when it is not cached."""
        with self._lock:
            if (found := self._features.get(image_id)) is not None:
                self._features.move_to_end(image_id)
            return found

    def confidence(self, image_id: str, bank: str, digest: str) -> float | None:
        """Return the confidence of an image with this state of a bank, None when it is not cached."""
        with self._lock:
            return self._confidences.get((image_id, bank, digest))


def _put(entries: "OrderedDict[_K, _V]", key: _K, value: _V, capacity: int) -> None:
    entries[key] = value
    entries.move_to_end(key)
    if len(entries) > capacity:
        entries.popitem(last=False)
