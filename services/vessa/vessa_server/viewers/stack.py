"""See a viewer's volume as stacks of slices: rows run along the earlier of the two remaining axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.errors import InvalidImage
from vessa.volumes import Volume


@dataclass(frozen=True, eq=False)
class Stack:
    """Hold the pixels of a volume.

    pixels: uint8 (A, B, C) or (A, B, C, 3); spacing: distance of neighbors along the three axes
    """

    pixels: NDArray[np.uint8]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of_channels(cls, array: NDArray[np.uint8], spacing: Sequence[Any]) -> "Stack":
        """Return the stack of an array (C, X, Y, Z) of one channel, or three of RGB. Raises InvalidImage."""
        if len(array) not in (1, 3):
            raise InvalidImage(f"The image has {len(array)} channels. Send one channel, or three of RGB.")
        try:
            sizes = tuple(float(value) for value in spacing)
        except (TypeError, ValueError):
            sizes = ()
        if len(sizes) != 3 or not all(0 < size < 1e6 for size in sizes):
            sizes = (1.0, 1.0, 1.0)  # a viewer may state none; then only the number of slices counts
        return cls(array[0] if len(array) == 1 else np.moveaxis(array, 0, -1), sizes)

    @classmethod
    def of_volume(cls, volume: Volume) -> "Stack":
        """Return the stack (K, J, I) of a volume that was read from a file."""
        images = [volume.image(2, k) for k in range(volume.shape[2])]
        i, j, k = volume.spacing
        return cls(np.stack(images), (k, j, i))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(A, B, C)."""
        a, b, c = self.pixels.shape[:3]
        return a, b, c

    @property
    def axis(self) -> int:
        """The axis along which slices are cut: one of size 1, else that with the largest spacing.

        Of equal ones (within 1 %) it is that with the fewest slices, then the first.
        """
        if 1 in self.shape:
            return self.shape.index(1)
        longest = max(self.spacing) * 0.99
        return min((a for a in range(3) if self.spacing[a] >= longest), key=lambda a: (self.shape[a], a))

    def image(self, axis: int, index: int) -> NDArray[np.uint8]:
        """Return one slice, uint8 (H, W) or (H, W, 3)."""
        return np.ascontiguousarray(self.pixels.take(index, axis))

    def size(self, axis: int) -> tuple[int, int]:
        """Return (H, W) of the slices along an axis."""
        height, width = (n for a, n in enumerate(self.shape) if a != axis)
        return height, width


def without_voxels(volume: Volume, pixels: NDArray[np.uint8]) -> Volume:
    """Return a volume's geometry over uint8 pixels (K, J, I), a quarter of the memory of its voxels."""
    return replace(volume, voxels=pixels.swapaxes(0, 2))
