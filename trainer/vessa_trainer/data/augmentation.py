"""Draw weak and strong views of a batch, and apply one geometry to images, masks and labels alike.

A prepared image is a square; a view is a crop of it at a random scale, angle and side. The geometry is drawn
once and applied to the image, its mask, VESSA's label and its confidence, so that they stay aligned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from vessa_trainer.config import ViewsConfig


@dataclass(frozen=True)
class CropGrid:
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

    def of(self, places: Sequence[int]) -> "CropGrid":
        """Return the geometry of some images of the batch."""
        return CropGrid(self.grid[list(places)])

    def on(self, windows: Tensor) -> "CropGrid":
        """Move views of whole squares onto windows: (B, 3) float, center x, y and half the side."""
        return CropGrid(self.grid * windows[:, None, None, 2:] + windows[:, None, None, :2])

    def to(self, device: str | torch.device) -> "CropGrid":
        """Return the same on a device."""
        return CropGrid(self.grid.to(device))

    def valid(self, valid: Tensor) -> Tensor:
        """Move (B, S, S) bool; outside the square is False."""
        return self.labels(valid) > 0


def draw_geometry(
    count: int, size: int, crop: int, config: ViewsConfig, generator: torch.Generator
) -> CropGrid:
    """Draw the weak view: scale, position, mirror, rotation.

    size: side of the squares, px; crop: side of the views, px. Where the scaled square is smaller
    than the crop it lies anywhere within it, and the rest is padding.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    span = crop / (size * uniform(*config.scale))  # of the crop, in units of the square
    room = (1 - span).abs()
    center_x, center_y = uniform(-1, 1) * room, uniform(-1, 1) * room
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < config.flip_p).float()
    cosine, sine = torch.ones(count), torch.zeros(count)
    if config.rotate_p:
        turned = torch.rand(count, generator=generator) < config.rotate_p
        angle = torch.deg2rad(uniform(-config.rotate, config.rotate)) * turned
        cosine, sine = angle.cos(), angle.sin()
    rows = [
        torch.stack([span * mirror * cosine, -span * sine, center_x], 1),
        torch.stack([span * mirror * sine, span * cosine, center_y], 1),
    ]
    return CropGrid(F.affine_grid(torch.stack(rows, 1), [count, 1, crop, crop], align_corners=False))


def full_geometry(count: int, size: int, crop: int) -> CropGrid:
    """The whole square resized to the crop, for evaluation and labels without augmentation."""
    theta = torch.eye(2, 3).expand(count, -1, -1)
    return CropGrid(F.affine_grid(theta, [count, 1, crop, crop], align_corners=False))


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Draw a seed for each image of a batch, so that part of a batch can be drawn like the whole."""
    return torch.randint(2**62, (count,), generator=generator).tolist()


@dataclass(frozen=True)
class Changes:
    """The intensity changes of one strong view; the defaults change nothing.

    gamma is an exponent, brightness, contrast and saturation are factors, hue is a turn in [-0.5, 0.5];
    sigma: of the blur, px; noise: its standard deviation, drawn from noise_seed
    """

    gamma: float = 1.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grayscale: bool = False
    sigma: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0


COLOR_JITTER = {
    "brightness": (0.5, 1.5),
    "contrast": (0.5, 1.5),
    "saturation": (0.5, 1.5),
    "hue": (-0.25, 0.25),
}


def draw_changes(config: ViewsConfig, gray: bool, seed: int) -> Changes:
    """Draw the strong view of one image from its own seed, with one channel if gray.

    Gray images get gamma, contrast and brightness where color images get jitter and grayscale:
    hue and saturation do nothing to gray. Both get blur; gray ones noise besides.
    """
    generator = torch.Generator().manual_seed(seed)

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    def uniform(bounds: tuple[float, float]) -> float:
        return float(torch.rand((), generator=generator)) * (bounds[1] - bounds[0]) + bounds[0]

    gray_jitter = {"gamma": config.gamma, "contrast": config.contrast, "brightness": config.brightness}
    drawn: dict[str, Any] = {}
    if chance(config.jitter_p):
        drawn = {name: uniform(bounds) for name, bounds in (gray_jitter if gray else COLOR_JITTER).items()}
    if not gray:
        drawn["grayscale"] = chance(config.grayscale_p)
    if chance(config.blur_p):
        drawn["sigma"] = uniform(config.blur_sigma)
    if gray and chance(config.noise_p):
        drawn["noise"] = uniform(config.noise_std)
        drawn["noise_seed"] = int(torch.randint(2**62, (), generator=generator))
    return Changes(**drawn)


def strong_view(images: Tensor, config: ViewsConfig, seeds: Sequence[int], *, color: bool = True) -> Tensor:
    """Change the intensities of (B, C, H, W) float in [0, 1], each image by the draws of its own seed.

    color: whether three channels are red, green and blue, and not neighboring slices
    The same on every device but for the noise, of which each device has draws of its own.
    """
    gray = images.shape[1] == 1 or not color
    changes = [draw_changes(config, gray, seed) for seed in seeds]
    changed = _jitter_gray(images, changes) if gray else _jitter_color(images, changes)
    changed = _blur(changed, changes)
    for image, change in zip(changed, changes, strict=True):
        if change.noise:
            generator = torch.Generator(image.device).manual_seed(change.noise_seed)
            noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
            image.add_(noise, alpha=change.noise)
    return changed.clamp(0, 1)


def _jitter_gray(images: Tensor, changes: Sequence[Changes]) -> Tensor:
    def each(name: str) -> Tensor:
        return images.new_tensor([getattr(change, name) for change in changes])[:, None, None, None]

    powered = images.clamp(0, 1) ** each("gamma")
    mean = powered.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, powered, each("contrast")) * each("brightness")


def _jitter_color(images: Tensor, changes: Sequence[Changes]) -> Tensor:
    # torchvision's take one factor for all images of a call
    def jittered(image: Tensor, change: Changes) -> Tensor:
        image = TF.adjust_brightness(image, change.brightness)
        image = TF.adjust_contrast(image, change.contrast)
        image = TF.adjust_saturation(image, change.saturation)
        image = TF.adjust_hue(image, change.hue)
        return TF.rgb_to_grayscale(image, num_output_channels=3) if change.grayscale else image

    return torch.stack([jittered(image, change) for image, change in zip(images, changes, strict=True)])


def _blur(images: Tensor, changes: Sequence[Changes]) -> Tensor:
    """Blur each image by its own Gaussian, cut off at two sigma: columns and rows, one after the other."""
    rows = [row for row, change in enumerate(changes) if round(2 * change.sigma)]
    if not rows:
        return images
    # float64: the sum of the taps runs to the widest kernel of the batch, and in float32 it would round
    # differently in each part of a batch that several processes share.
    sigma = torch.tensor([changes[row].sigma for row in rows], device=images.device, dtype=torch.float64)[
        :, None
    ]
    radius = (2 * sigma).round()
    reach = int(radius.max())
    steps = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float64)
    taps = torch.exp(-((steps / sigma) ** 2) / 2) * (steps.abs() <= radius)
    taps = (taps / taps.sum(1, keepdim=True)).T.to(images.dtype)[:, :, None, None, None]
    blurred = F.pad(images[rows], [reach] * 4, mode="reflect")
    for dim, length in ((2, images.shape[2]), (3, images.shape[3])):
        # a convolution with a kernel for each image is many times slower on a CPU than this sum
        shifted = [blurred.narrow(dim, step, length) for step in range(len(steps))]
        blurred = shifted[0] * taps[0]
        for part, tap in zip(shifted[1:], taps[1:], strict=True):
            blurred.addcmul_(part, tap)
    return images.index_copy(0, torch.tensor(rows, device=images.device), blurred)


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
