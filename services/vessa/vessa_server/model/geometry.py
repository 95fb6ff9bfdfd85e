"""Convert between the pixels of an image and the square that the networks see.

Every network sees a resized square: the whole image padded with black, or a window of it. Prompts are
moved into that square and logits are moved back to the image.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A square part of an image, in px of the image. It may extend beyond the image's edges."""

    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Square:
    """The square of an image of `height` x `width` px that the networks see: the whole, or `window`."""

    height: int
    width: int
    window: Window | None = None

    @property
    def whole(self) -> Window:
        """The square around the image. Its side is the longer side of the image."""
        side = max(self.height, self.width)
        return Window(-((side - self.height) // 2), -((side - self.width) // 2), side)

    @property
    def shown(self) -> Window:
        """The part of the image that is seen, as a window."""
        return self.window or self.whole

    @property
    def side(self) -> int:
        """Side of the square in native px."""
        return self.shown.side

    def pad(self, array: Tensor) -> Tensor:
        """Cut (..., height, width) to (..., side, side); pixels outside of the image are 0."""
        shown = self.shown
        right, bottom = shown.left + shown.side - self.width, shown.top + shown.side - self.height
        return F.pad(array, (-shown.left, right, -shown.top, bottom))

    def enter(self, array: Tensor, size: int, mode: str = "bilinear") -> Tensor:
        """Move (N, C, height, width) float onto the square, resized to (N, C, size, size)."""
        return resize(self.pad(array), (size, size), mode)

    @property
    def seen(self) -> tuple[slice, slice]:
        """Rows and columns of the image that are seen."""
        shown = self.shown
        rows = slice(max(shown.top, 0), min(shown.top + shown.side, self.height))
        return rows, slice(max(shown.left, 0), min(shown.left + shown.side, self.width))

    def leave(self, logits: Tensor) -> Tensor:
        """Move (N, C, s, s) float back to the `seen` pixels of the image, (N, C, h, w)."""
        (rows, columns), shown = self.seen, self.shown
        square = resize(logits, (shown.side, shown.side))
        square = square[..., rows.start - shown.top : rows.stop - shown.top, :]
        return square[..., columns.start - shown.left : columns.stop - shown.left]

    def points(self, xy: Tensor, size: int) -> Tensor:
        """Move (..., 2) points (x, y) in native px to px of the resized square."""
        offset = torch.tensor([self.shown.left, self.shown.top], dtype=xy.dtype, device=xy.device)
        return (xy - offset) * (size / self.side)


def resize(array: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize (N, C, H, W) float. Bilinear interpolation uses antialiasing when it shrinks."""
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
