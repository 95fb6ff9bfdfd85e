"""Augmentation of templates and targets (paper section 7), in batch on tensors.

Geometry: rotation, crops of scale 0.7 to 1, and a smooth deformation; flips of a whole episode, since a
left kidney that is mirrored alone is a right one. Intensity: blur or sharpening, noise, gamma and
contrast. Masks move with nearest-neighbor interpolation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vessa_server.model.geometry import resize


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def _corners(inside: Tensor) -> Tensor:
    """Return the corners (B, 2, 2), (x, y) px, of the boxes around (B, S, S) bool; the image's if empty."""
    ends = []
    for reduce in (1, 2):  # columns, then rows
        line = inside.any(reduce).float()
        ends.append(torch.stack([line.argmax(1).float(), line.shape[1] - line.flip(1).argmax(1).float()], 1))
    return torch.stack(ends, 2)


def windows_around(inside: Tensor, factor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw square windows around structures, as inexact as those of a first pass.

    inside: (B, 1, S, S) bool; factor: (B,) side of a window over the structure's longer side
    Returns (B, 3): center (x, y) in [-1, 1] and half side. Empty masks get the whole image, half side 1.
    """
    count, size = inside.shape[0], inside.shape[-1]
    windows = torch.tensor([0.0, 0.0, 1.0]).repeat(count, 1)
    low, high = _corners(inside[:, 0]).unbind(1)
    jitter = torch.rand(count, 3, generator=generator) - 0.5
    extent = (high - low).amax(1) / size
    half = (extent * factor * (1 + 0.3 * jitter[:, 2])).clamp(0.15, 1.0)
    middle = (low + high) / size - 1
    found = torch.cat([middle + 0.3 * extent[:, None] * jitter[:, :2], half[:, None]], 1)
    return torch.where(inside.flatten(1).any(1)[:, None], found, windows)


def warp(
    images: Tensor,
    masks: Tensor,
    generator: torch.Generator,
    *,
    strength: float,
    windows: Tensor | None = None,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Move images and masks by the same random rotation, crop and deformation.

    images: (B, 1, S, S) float; masks: (B, 1, S, S) float class ids; strength: 1 for templates;
    windows: (B, 3) of `windows_around`, None for the whole images; size: px of the results, S unless
    given
    """
    count, _, side, _ = images.shape
    size = size or side
    windows = torch.tensor([[0.0, 0.0, 1.0]]).expand(count, -1) if windows is None else windows
    angle = _uniform(count, -0.5, 0.5, generator) * strength
    scale = _uniform(count, 1 - 0.3 * strength, 1 + 0.15 * strength, generator)
    shift = _uniform(2 * count, -0.12, 0.12, generator).view(count, 2) * strength
    scale, shift = scale * windows[:, 2], shift * windows[:, 2:] + windows[:, :2]
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, size, size], align_corners=False)
    bend = torch.randn(count, 2, 5, 5, generator=generator) * _uniform(count, 0, 0.03, generator).view(
        -1, 1, 1, 1
    )
    bend = F.interpolate(bend, (size, size), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    grid = grid + bend * windows[:, 2].view(-1, 1, 1, 1)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved, F.grid_sample(masks, grid, mode="nearest", align_corners=False)


def shade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change the intensities of (B, 1, S, S) float in [0, 1]; the result stays in [0, 1]."""
    count = images.shape[0]

    def per_image(low: float, high: float) -> Tensor:
        return _uniform(count, low, high, generator).view(-1, 1, 1, 1)

    def some(share: float) -> Tensor:
        return (torch.rand(count, generator=generator) < share).view(-1, 1, 1, 1)

    images = images.clamp(0, 1) ** per_image(0.6, 1.6)
    images = images * per_image(0.75, 1.25) + per_image(-0.1, 0.1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.where(some(0.25), blurred, images)
    images = torch.where(some(0.2), images + (images - blurred) * per_image(0.3, 1.2), images)
    noise = torch.randn(images.shape, generator=generator) * per_image(0.0, 0.07)
    return (images + torch.where(some(0.5), noise, torch.zeros(()))).clamp(0, 1)


def flip_together(generator: torch.Generator) -> list[int]:
    """Draw the axes of (..., H, W) along which all images and masks of an episode are mirrored."""
    vertical, horizontal = torch.rand(2, generator=generator).tolist()
    return [axis for axis, drawn in ((-2, vertical < 0.06), (-1, horizontal < 0.15)) if drawn]


def invert_together(images: Tensor, generator: torch.Generator, share: float = 0.1) -> Tensor:
    """Invert the contrast of an episode's images (T + 1, 1, S, S) alike, in a share of the episodes."""
    return 1 - images if torch.rand((), generator=generator) < share else images


def rough_logits(masks: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Turn true masks into mask logits like those of a half-trained student.

    masks: (B, 1, S, S) float 0/1. Returns (B, 1, side, side) logits: blurred, displaced, uncertain.
    """
    moved, _ = warp(masks, masks, generator, strength=0.12)
    cells = side // (1, 2, 4)[int(torch.randint(3, (), generator=generator))]
    coarse = resize(resize(moved, (side, side)), (cells, cells))
    soft = resize(coarse, (side, side)).clamp(0.03, 0.97)
    noise = F.interpolate(
        torch.randn(masks.shape[0], 1, 8, 8, generator=generator),
        (side, side),
        mode="bilinear",
        align_corners=False,
    )
    return torch.logit(soft) + noise * 0.8


def rough_points(masks: Tensor, generator: torch.Generator, count: int = 2) -> tuple[Tensor, Tensor]:
    """Draw points inside true masks as SAM's point prompt.

    masks: (B, 1, S, S). Returns points (B, count, 2) (x, y) px and labels (B, count): 1, or -1 where
    the mask is empty.
    """
    inside = masks[:, 0].flatten(1) > 0.5
    empty = ~inside.any(1)
    chance = (inside | empty[:, None]).float()
    drawn = torch.multinomial(chance, count, replacement=True, generator=generator)
    size = masks.shape[-1]
    points = torch.stack([drawn % size, drawn // size], -1).float() + 0.5
    labels = torch.where(empty, -1, 1)[:, None].expand(-1, count).clone()
    return points, labels


def rough_boxes(masks: Tensor, generator: torch.Generator, jitter: float = 0.05) -> tuple[Tensor, Tensor]:
    """Return boxes with jittered corners around true masks as SAM's box prompt.

    masks: (B, 1, S, S). Returns points (B, 2, 2) (x, y) px and labels (B, 2): 2 and 3, or -1 where
    the mask is empty.
    """
    inside = masks[:, 0] > 0.5
    size = masks.shape[-1]
    corners = _corners(inside)
    corners = corners + torch.randn(corners.shape, generator=generator) * jitter * size * 0.3
    labels = torch.tensor([[2, 3]]).expand(masks.shape[0], -1).clone()
    labels[~inside.flatten(1).any(1)] = -1
    return corners.clamp(0, size), labels
