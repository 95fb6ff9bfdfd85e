"""Between an image as it came and the square the networks see.

Every network sees the image centered on a black square and resized. Prompts travel into that
square, logits travel back out of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Square:
    """The square around an image of `height` x `width` px; its side is the longer of the two."""

    height: int
    width: int

    @property
    def side(self) -> int:
        """Side of the square in native px."""
        return max(self.height, self.width)

    @property
    def top(self) -> int:
        """Rows above the image."""
        return (self.side - self.height) // 2

    @property
    def left(self) -> int:
        """Columns left of the image."""
        return (self.side - self.width) // 2

    def pad(self, array: Tensor) -> Tensor:
        """Pad (..., height, width) with zeros to (..., side, side)."""
        right, bottom = self.side - self.width - self.left, self.side - self.height - self.top
        return F.pad(array, (self.left, right, self.top, bottom))

    def enter(self, array: Tensor, size: int, mode: str = "bilinear") -> Tensor:
        """Move (N, C, height, width) float onto the square, resized to (N, C, size, size)."""
        return resize(self.pad(array), (size, size), mode)

    def leave(self, logits: Tensor) -> Tensor:
        """Move (N, C, s, s) float back to (N, C, height, width)."""
        square = resize(logits, (self.side, self.side))
        return square[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def points(self, xy: Tensor, size: int) -> Tensor:
        """Move (..., 2) points (x, y) in native px to px of the resized square."""
        offset = torch.tensor([self.left, self.top], dtype=xy.dtype, device=xy.device)
        return (xy + offset) * (size / self.side)


def resize(array: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize (N, C, H, W) float, with antialiasing where bilinear interpolation shrinks."""
    if array.shape[-2:] == size:
        return array
    if mode != "bilinear":
        return F.interpolate(array, size=size, mode=mode)
    shrinks = array.shape[-1] > size[1] or array.shape[-2] > size[0]
    return F.interpolate(array, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def to_tensor(image: np.ndarray) -> Tensor:
    """Turn uint8 (H, W) or (H, W, 3) into float (1, 3, H, W) in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).float().div_(255)
    return tensor.expand(3, -1, -1)[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)[None]
