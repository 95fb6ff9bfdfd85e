"""Take UniMatch V2's training step as its public code does, written from scratch, to be timed beside ours.

The step uses float32 in the usual memory layout. Each image is opened, scaled, cropped, mirrored and
changed alone with PIL. The teacher's average is a Python loop over tensors, and AdamW is torch's default.
Upstream lets worker processes prepare the views; here both steps prepare them in line, so that each step is
the whole work of one process.
"""

import math
import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torchvision import transforms

IGNORED = 255


@dataclass(frozen=True)
class Sample:
    """Files of one image; mask is None where it is not annotated."""

    image: Path
    mask: Path | None


class UpstreamStep:
    """One step a call. network: without the teacher; samples: one epoch after another, shuffled.

    size: long side of an image before the random scale, px; crop: side of the views, px
    """

    def __init__(
        self,
        network: nn.Module,
        labeled: list[Sample],
        unlabeled: list[Sample],
        *,
        size: int,
        crop: int,
        batch: int,
        scale: tuple[float, float],
        lr: float,
        seed: int,
    ) -> None:
        self.network = network.to(memory_format=torch.contiguous_format).train()
        self.teacher = deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01
        )
        self.labeled, self.unlabeled = labeled, unlabeled
        self.size, self.crop, self.batch, self.scale = size, crop, batch, scale
        self.jitter = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25)
        self.rng = random.Random(seed)
        self.iteration = 0

    def __call__(self) -> float:
        """Take one step and return its loss."""
        views_x = [self._weak(self._draw(self.labeled)) for _ in range(self.batch)]
        image_x = torch.stack([_tensor(image) for image, _ in views_x])
        mask_x = torch.stack([torch.from_numpy(np.array(mask)).long() for _, mask in views_x])
        views_u = [self._weak(self._draw(self.unlabeled)) for _ in range(self.batch)]
        image_w = torch.stack([_tensor(image) for image, _ in views_u])
        ignore = torch.stack([torch.from_numpy(np.array(mask)).long() for _, mask in views_u])
        strong = [torch.stack([_tensor(self._strong(image)) for image, _ in views_u]) for _ in range(2)]
        boxes = [torch.stack([self._box() for _ in range(self.batch)]) for _ in range(2)]

        with torch.no_grad():
            prediction = self.teacher(image_w).detach()
            confidence_w = prediction.softmax(dim=1).max(dim=1)[0]
            label_w = prediction.argmax(dim=1)
        for image, box in zip(strong, boxes, strict=True):
            where = box.unsqueeze(1).expand(image.shape) == 1
            image[where] = image.flip(0)[where]
        output_x = self.network(image_x)
        first, second = self.network(torch.cat(strong), self._dropout()).chunk(2)
        loss_u = [
            self._consistency(output, label_w, confidence_w, ignore, box)
            for output, box in zip((first, second), boxes, strict=True)
        ]
        loss_x = F.cross_entropy(output_x, mask_x, ignore_index=IGNORED)
        loss = (loss_x + (loss_u[0] + loss_u[1]) / 2) / 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._average()
        self.iteration += 1
        return loss.item()

    def _draw(self, samples: list[Sample]) -> Sample:
        return samples[self.rng.randrange(len(samples))]

    def _weak(self, sample: Sample) -> tuple[Image.Image, Image.Image]:
        image = Image.open(sample.image).convert("L")
        mask = Image.new("L", image.size) if sample.mask is None else Image.open(sample.mask)
        long_side = int(self.size * self.rng.uniform(*self.scale))
        width, height = image.size
        ratio = long_side / max(width, height)
        resized = (max(1, round(width * ratio)), max(1, round(height * ratio)))
        image, mask = image.resize(resized, Image.BILINEAR), mask.resize(resized, Image.NEAREST)
        pad = (0, 0, max(self.crop - resized[0], 0), max(self.crop - resized[1], 0))
        image, mask = ImageOps.expand(image, pad, fill=0), ImageOps.expand(mask, pad, fill=IGNORED)
        left = self.rng.randint(0, image.width - self.crop)
        top = self.rng.randint(0, image.height - self.crop)
        cut = (left, top, left + self.crop, top + self.crop)
        image, mask = image.crop(cut), mask.crop(cut)
        if self.rng.random() < 0.5:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        return image, mask

    def _strong(self, image: Image.Image) -> Image.Image:
        image = image.copy()
        if self.rng.random() < 0.8:
            image = self.jitter(image)
        if self.rng.random() < 0.2:
            image = ImageOps.grayscale(image)
        if self.rng.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(radius=self.rng.uniform(0.1, 2.0)))
        return image

    def _box(self) -> Tensor:
        box = torch.zeros(self.crop, self.crop)
        if self.rng.random() > 0.5:
            return box
        while True:
            area = self.rng.uniform(0.02, 0.4) * self.crop * self.crop
            aspect = self.rng.uniform(0.3, 1 / 0.3)
            width, height = int(math.sqrt(area / aspect)), int(math.sqrt(area * aspect))
            left, top = self.rng.randint(0, self.crop - 1), self.rng.randint(0, self.crop - 1)
            if left + width <= self.crop and top + height <= self.crop:
                box[top : top + height, left : left + width] = 1
                return box

    def _dropout(self) -> list[Tensor]:
        factors = []
        for channels in self.network.feature_channels:
            one = torch.distributions.Binomial(probs=0.5).sample((self.batch, channels)) * 2
            other = 2 - one
            spared = torch.randperm(self.batch)[: self.batch // 2]
            one[spared], other[spared] = 1.0, 1.0
            factors.append(torch.cat([one, other]))
        return factors

    @staticmethod
    def _consistency(
        output: Tensor, label: Tensor, confidence: Tensor, ignore: Tensor, box: Tensor
    ) -> Tensor:
        label, confidence, ignore = label.clone(), confidence.clone(), ignore.clone()
        where = box == 1
        for values in (label, confidence, ignore):
            values[where] = values.flip(0)[where]
        loss = F.cross_entropy(output, label, reduction="none")
        loss = loss * ((confidence >= 0.95) & (ignore != IGNORED))
        return loss.sum() / (ignore != IGNORED).sum().item()

    def _average(self) -> None:
        ratio = min(1 - 1 / (self.iteration + 1), 0.996)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
                slow.copy_(slow * ratio + fast.detach() * (1 - ratio))
            for slow, fast in zip(self.teacher.buffers(), self.network.buffers(), strict=True):
                slow.copy_(slow * ratio + fast.detach() * (1 - ratio))


def _tensor(image: Image.Image) -> Tensor:
    return transforms.functional.to_tensor(image)
