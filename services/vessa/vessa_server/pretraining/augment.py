"""Augmentation of templates and targets (paper section 7), in batch on tensors.

Geometry: flips, rotation, crops of scale 0.7 to 1, and a smooth deformation. Intensity: Gaussian
blur or sharpening, noise, gamma and contrast. Masks move with nearest-neighbor interpolation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vessa_server.model.geometry import resize


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def warp(
    images: Tensor, masks: Tensor, generator: torch.Generator, *, strength: float
) -> tuple[Tensor, Tensor]:
    """Move images and masks by the same random flip, rotation, crop and deformation.

    images: (B, 1, S, S) float; masks: (B, 1, S, S) float class ids; strength: 1 for templates
    """
    count, _, size, _ = images.shape
    angle = _uniform(count, -0.5, 0.5, generator) * strength
    scale = _uniform(count, 1 - 0.3 * strength, 1 + 0.15 * strength, generator)
    shift = _uniform(2 * count, -0.12, 0.12, generator).view(count, 2) * strength
    flip_x = 1 - 2 * (torch.rand(count, generator=generator) < 0.12).float()
    flip_y = 1 - 2 * (torch.rand(count, generator=generator) < 0.06).float()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cosine * flip_x, -sine * flip_y, shift[:, 0]], 1)]
    rows.append(torch.stack([sine * flip_x, cosine * flip_y, shift[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [count, 1, size, size], align_corners=False)
    bend = torch.randn(count, 2, 5, 5, generator=generator) * _uniform(count, 0, 0.03, generator).view(
        -1, 1, 1, 1
    )
    grid = grid + F.interpolate(bend, (size, size), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
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


def invert_together(
    a: Tensor, b: Tensor, generator: torch.Generator, share: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Invert the contrast of template and target alike in a share of the pairs."""
    chosen = (torch.rand(a.shape[0], generator=generator) < share).view(-1, 1, 1, 1)
    return torch.where(chosen, 1 - a, a), torch.where(chosen, 1 - b, b)


def rough_logits(masks: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Turn true masks into the kind of mask logits a half-trained student sends.

    masks: (B, 1, S, S) float 0/1. Returns (B, 1, side, side) logits: blurred, displaced, uncertain.
    """
    moved, _ = warp(masks, masks, generator, strength=0.12)
    coarse = resize(moved, (side // 4, side // 4))
    soft = resize(coarse, (side, side)).clamp(0.03, 0.97)
    noise = F.interpolate(
        torch.randn(masks.shape[0], 1, 8, 8, generator=generator),
        (side, side),
        mode="bilinear",
        align_corners=False,
    )
    return torch.logit(soft) + noise * 0.8


def rough_boxes(masks: Tensor, generator: torch.Generator, jitter: float = 0.05) -> tuple[Tensor, Tensor]:
    """Boxes around true masks with jittered corners, as SAM's box prompt.

    masks: (B, 1, S, S). Returns points (B, 2, 2) (x, y) px and labels (B, 2): 2 and 3, or -1 where
    the mask is empty.
    """
    inside = masks[:, 0] > 0.5
    size = masks.shape[-1]
    corners = torch.zeros(masks.shape[0], 2, 2)
    for axis, reduce in ((0, 1), (1, 2)):
        line = inside.any(reduce).float()
        corners[:, 0, axis] = line.argmax(1)
        corners[:, 1, axis] = size - line.flip(1).argmax(1).float()
    corners = corners + torch.randn(corners.shape, generator=generator) * jitter * size * 0.3
    labels = torch.tensor([[2, 3]]).expand(masks.shape[0], -1).clone()
    labels[~inside.flatten(1).any(1)] = -1
    return corners.clamp(0, size), labels
