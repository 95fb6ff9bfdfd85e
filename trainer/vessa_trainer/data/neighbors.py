"""Show a slice with its neighbors above and below as channels (2.5D)."""

from collections.abc import Callable, Sequence

import numpy as np

from vessa.datasets import Dataset, Slice
from vessa.errors import InvalidDataset


def stack(read: Callable[[int], np.ndarray], count: int, place: int, reach: int, name: str) -> np.ndarray:
    """Return slice `place` of a volume with `reach` neighbors on each side, uint8 (H, W, 2 * reach + 1).

    read: a slice, uint8 (H, W), by its place among `count`. Beyond the volume, and where a neighbor has
    another size, the slice on the way there is repeated. Raises InvalidDataset for color images, with `name`.
    """
    middle = read(place)
    if middle.ndim == 3:
        raise InvalidDataset(
            f"{name} is a color image; neighboring slices (student.neighbors) need gray images. Set "
            "student.neighbors=0"
        )
    sides = []
    for direction in (-1, 1):
        last, found = middle, []
        for step in range(1, reach + 1):
            other = place + direction * step
            if 0 <= other < count and (image := read(other)).shape == middle.shape:
                last = image
            found.append(last)
        sides.append(found)
    return np.stack([*sides[0][::-1], middle, *sides[1]], -1)


def with_neighbors(images: Sequence[np.ndarray], reach: int) -> list[np.ndarray]:
    """Return all slices of a volume with their neighbors; see `stack`. reach 0 changes nothing."""
    if not reach:
        return list(images)
    count = len(images)
    return [stack(images.__getitem__, count, place, reach, f"slice {place}") for place in range(count)]


class SliceStacks:
    """Reads slices of a data set with their neighbors in the same case."""

    def __init__(self, dataset: Dataset, reach: int) -> None:
        """Remember the cases. reach: neighbors on each side."""
        self._dataset, self._reach = dataset, reach
        self._slices = {case.name: case.slices for case in dataset.cases()}

    def image(self, item: Slice) -> np.ndarray:
        """Return the pixels, uint8 (H, W, 2 * reach + 1). Raises InvalidDataset for color images."""
        slices = self._slices[item.case]

        def read(place: int) -> np.ndarray:
            return self._dataset.image(slices[place])

        return stack(read, len(slices), slices.index(item), self._reach, item.name)
