"""Remember the sizes of images that callers name by id."""

import threading
from collections import OrderedDict


class SeenSizes:
    """Remember the (H, W) of images by id, to check prompts that come without pixels."""

    def __init__(self, capacity: int = 16384) -> None:
        """Set the capacity. An older image must be sent again, even if the worker holds its features."""
        self._sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._capacity = capacity
        self._lock = threading.Lock()

    def add(self, image_id: str, size: tuple[int, int]) -> None:
        """Remember a size."""
        with self._lock:
            self._sizes[image_id] = size
            self._sizes.move_to_end(image_id)
            if len(self._sizes) > self._capacity:
                self._sizes.popitem(last=False)

    def get(self, image_id: str) -> tuple[int, int] | None:
        """Return a size, None when it is unknown or evicted."""
        with self._lock:
            return self._sizes.get(image_id)
