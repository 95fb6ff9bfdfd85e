"""Compute the DINOv2 features that find the most similar template (Eq. 1)."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vessa_server.model.geometry import resize
from vessa_server.model.presets import RetrieverPreset


class Retriever(nn.Module):
    """A vision transformer of the DINOv2 family that maps an image to one unit vector."""

    def __init__(self, preset: RetrieverPreset) -> None:
        super().__init__()
        self.preset = preset
        self.mean: Tensor
        self.std: Tensor
        self.backbone: Any = timm.create_model(
            preset.name, pretrained=False, num_classes=0, img_size=preset.image_size, **preset.options
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) float in [0, 1] to unit vectors (B, 2D).

        The class token describes the content, the mean of the patch tokens its distribution. Together
        they retrieve better than each alone (DINOv2's own recipe for linear probes).
        """
        size = self.preset.image_size
        images = resize(images, (size, size))
        tokens = self.backbone.forward_features((images - self.mean) / self.std)
        prefix = self.backbone.num_prefix_tokens
        return F.normalize(torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=-1), dim=-1)
