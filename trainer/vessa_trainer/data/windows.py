"""Regions of interest: one square window around the structures of a volume.

A window is (x, y, half): its center and half its side on a prepared square, whose sides run from -1 to 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

WHOLE = (0.0, 0.0, 1.0)  # the window that shows the whole square
Window = tuple[float, float, float]


def window_around(box: Sequence[float] | None, size: int, factor: float) -> Window:
    """Return the window around a box, `factor` times as wide as the box's longer side.

    box: XYXY px on the square of `size` px; None, or a box that needs more than the square, gives the whole
    """
    if box is None:
        return WHOLE
    left, top, right, bottom = box
    half = factor * max(right - left, bottom - top) / size
    if half >= 1:
        return WHOLE
    return (left + right) / size - 1, (top + bottom) / size - 1, half


def union_box(masks: Tensor) -> tuple[int, int, int, int] | None:
    """Return the box XYXY px around all classes of (N, H, W) masks; None where nothing is annotated."""
    shown = ((masks > 0) & (masks != 255)).any(0)
    rows, columns = shown.any(1).nonzero(), shown.any(0).nonzero()
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def show(window: Window, values: Tensor, side: int) -> Tensor:
    """Cut a window out of (B, C, S, S) float and resize it to (B, C, side, side); outside is 0."""
    x, y, half = window
    theta = values.new_tensor([[half, 0, x], [0, half, y]]).expand(len(values), -1, -1)
    grid = torch.nn.functional.affine_grid(theta, [len(values), 1, side, side], align_corners=False)
    return torch.nn.functional.grid_sample(values, grid, align_corners=False)


def put_back(window: Window, values: Tensor, size: int) -> Tensor:
    """Undo `show`: place (B, C, side, side) on squares (B, C, size, size); outside of the window is 0."""
    x, y, half = window
    theta = values.new_tensor([[1 / half, 0, -x / half], [0, 1 / half, -y / half]])
    grid = torch.nn.functional.affine_grid(
        theta.expand(len(values), -1, -1), [len(values), 1, size, size], align_corners=False
    )
    return torch.nn.functional.grid_sample(values, grid, align_corners=False)
