"""Weak and strong views of a batch, and the same geometry for whatever belongs to an image.

A prepared image is a square; a view is a crop of it at a random scale, perhaps mirrored. The
geometry is drawn once and then applied to the image, its mask, VESSA's label and its confidence
alike, so that they stay aligned to the pixel.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vessa_trainer.config import ViewsConfig


@dataclass(frozen=True)
class Geometry:
    """Crops of B squares. grid: (B, crop, crop, 2) sampling points in [-1, 1] of the square."""

    grid: Tensor

    def image(self, images: Tensor) -> Tensor:
        """Move (B, C, S, S) float; outside is 0."""
        return F.grid_sample(images, self.grid, mode="bilinear", align_corners=False)

    def labels(self, labels: Tensor) -> Tensor:
        """Move (B, S, S) class ids of any integer type to int64; outside is 0."""
        moved = F.grid_sample(labels[:, None].float(), self.grid, mode="nearest", align_corners=False)
        return moved[:, 0].long()

    def confidence(self, confidence: Tensor) -> Tensor:
        """Move (B, S, S) float by nearest neighbor, so that a label keeps its own confidence."""
        return F.grid_sample(confidence[:, None], self.grid, mode="nearest", align_corners=False)[:, 0]

    def valid(self, valid: Tensor) -> Tensor:
        """Move (B, S, S) bool; outside the square is False."""
        return self.labels(valid) > 0


def draw_geometry(
    count: int, size: int, crop: int, config: ViewsConfig, generator: torch.Generator
) -> Geometry:
    """Draw the weak view: scale, position, mirror.

    size: side of the squares, px; crop: side of the views, px. Where the scaled square is smaller
    than the crop it lies anywhere within it, and the rest is padding.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    span = crop / (size * uniform(*config.scale))  # of the crop, in units of the square
    room = (1 - span).abs()
    center_x, center_y = uniform(-1, 1) * room, uniform(-1, 1) * room
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < config.flip_p).float()
    zero = torch.zeros(count)
    rows = [torch.stack([span * mirror, zero, center_x], 1), torch.stack([zero, span, center_y], 1)]
    return Geometry(F.affine_grid(torch.stack(rows, 1), [count, 1, crop, crop], align_corners=False))


def full_geometry(count: int, size: int, crop: int) -> Geometry:
    """The whole square resized to the crop, for evaluation and labels without augmentation."""
    theta = torch.eye(2, 3).expand(count, -1, -1)
    return Geometry(F.affine_grid(theta, [count, 1, crop, crop], align_corners=False))


def strong_view(images: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    """Change the intensities of (B, C, H, W) float in [0, 1], each image by its own draw.

    Gray images get gamma, contrast and brightness where color images get jitter and grayscale:
    hue and saturation do nothing to gray. Both get blur; gray ones noise besides.
    """
    return torch.stack([_strong(image, config, generator) for image in images]).clamp(0, 1)


def _strong(image: Tensor, config: ViewsConfig, generator: torch.Generator) -> Tensor:
    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    def uniform(bounds: tuple[float, float]) -> float:
        return float(torch.rand((), generator=generator)) * (bounds[1] - bounds[0]) + bounds[0]

    gray = image.shape[0] == 1
    if chance(config.jitter_p):
        if gray:
            image = image.clamp(0, 1) ** uniform(config.gamma)
            image = (image - image.mean()) * uniform(config.contrast) + image.mean()
            image = image * uniform(config.brightness)
        else:
            image = TF.adjust_brightness(image, uniform((0.5, 1.5)))
            image = TF.adjust_contrast(image, uniform((0.5, 1.5)))
            image = TF.adjust_saturation(image, uniform((0.5, 1.5)))
            image = TF.adjust_hue(image, uniform((-0.25, 0.25)))
    if not gray and chance(config.grayscale_p):
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if chance(config.blur_p):
        sigma = uniform(config.blur_sigma)
        image = TF.gaussian_blur(image, [2 * round(2 * sigma) + 1] * 2, [sigma, sigma])
    if gray and chance(config.noise_p):
        image = image + torch.randn(image.shape, generator=generator).to(image) * uniform(config.noise_std)
    return image


def cutmix_boxes(count: int, size: tuple[int, int], share: float, generator: torch.Generator) -> Tensor:
    """Draw where CutMix pastes: (B, H, W) bool, all False for the images without it.

    Area 2-40 % of the image, aspect 0.3 to 1/0.3, wholly inside (UniMatch V2).
    """
    height, width = size
    boxes = torch.zeros(count, height, width, dtype=torch.bool)
    for row in range(count):
        if torch.rand((), generator=generator) >= share:
            continue
        while True:
            area = (0.02 + 0.38 * float(torch.rand((), generator=generator))) * height * width
            aspect = 0.3 + (1 / 0.3 - 0.3) * float(torch.rand((), generator=generator))
            box_height, box_width = int((area * aspect) ** 0.5), int((area / aspect) ** 0.5)
            if box_height <= height and box_width <= width:
                break
        top = int(torch.randint(height - box_height + 1, (), generator=generator))
        left = int(torch.randint(width - box_width + 1, (), generator=generator))
        boxes[row, top : top + box_height, left : left + box_width] = True
    return boxes


def paste(values: Tensor, boxes: Tensor) -> Tensor:
    """Paste from the batch in reverse order inside the boxes; a batch of one stays as it is.

    values: (B, H, W) or (B, C, H, W) of anything; boxes: (B, H, W) bool
    """
    where = boxes if values.ndim == 3 else boxes[:, None]
    return torch.where(where, values.flip(0), values)


def complementary_dropout(count: int, channels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw channel masks (B, C) for the two strong streams: M * 2 and (1 - M) * 2.

    A random half of the samples is exempt in both streams (UniMatch V2).
    """
    first = torch.bernoulli(torch.full((count, channels), 0.5), generator=generator) * 2
    second = 2 - first
    exempt = torch.randperm(count, generator=generator)[: count // 2]
    first[exempt] = 1.0
    second[exempt] = 1.0
    return first, second
