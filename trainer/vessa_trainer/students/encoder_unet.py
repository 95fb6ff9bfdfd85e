"""A U-Net decoder on a convolutional encoder of timm, by default pretrained on ImageNet."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vessa.errors import InvalidConfig
from vessa_trainer.config import StudentConfig
from vessa_trainer.students.dropout import Dropout, drop_channels
from vessa_trainer.students.pretrained import load_encoder

_DECODER = (96, 64, 48, 32)  # channels of the decoder's levels, from stride 16 to stride 2
_FULL = 16  # channels at full resolution


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class EncoderUNet(nn.Module):
    """A U-Net whose encoder is a timm network with features at strides 2 to 32.

    input (B, 1, H, W) or (B, 3, H, W) float in [0, 1], H and W multiples of 32; output logits (B, C, H, W).
    Each image is normalised by its own mean and deviation: intensities of MR have no fixed scale. The
    decoder does not read the image itself, only features.
    """

    def __init__(self, config: StudentConfig, classes: int) -> None:
        super().__init__()
        name = str(config.encoder)
        self.encoder: Any = _create(name)
        if config.pretrained:
            load_encoder(self.encoder, name, config.weights)
        for module in self.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # timm's copy of TensorFlow's 0.01 is for long runs
        self.feature_channels: list[int] = self.encoder.feature_info.channels()
        inputs = self.feature_channels[-1]
        self.up = nn.ModuleList()
        for width, skip in zip(_DECODER, self.feature_channels[-2::-1], strict=True):
            self.up.append(nn.Sequential(*_convolution(inputs + skip, width), *_convolution(width, width)))
            inputs = width
        self.full = nn.Sequential(*_convolution(inputs, _FULL))
        self.head = nn.Conv2d(_FULL, classes, 1)

    def forward(self, x: Tensor, dropout: Dropout = None) -> Tensor:
        """Segment; `dropout` multiplies the channels of each encoder level."""
        size = x.shape[-2:]
        mean = x.mean((1, 2, 3), keepdim=True)
        deviation = (x - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
        x = ((x - mean) / (deviation + 0.02)).expand(-1, 3, -1, -1)  # 0.02: a flat image stays flat
        features = drop_channels(self.encoder(x.contiguous(memory_format=torch.channels_last)), dropout)
        y = features.pop()
        for block in self.up:
            skip = features.pop()
            y = F.interpolate(y, skip.shape[-2:], mode="bilinear", align_corners=False)
            y = block(torch.cat([y, skip], 1))
        return self.head(self.full(F.interpolate(y, size, mode="bilinear", align_corners=False)))


def _create(name: str) -> Any:
    try:
        encoder: Any = timm.create_model(name, pretrained=False, features_only=True)
    except Exception as error:
        raise InvalidConfig(
            f"timm cannot build an encoder with features from student.encoder '{name}': {error}"
        ) from None
    strides = encoder.feature_info.reduction()
    if strides != [2, 4, 8, 16, 32]:
        raise InvalidConfig(
            f"student.encoder '{name}' has features at strides {strides}: choose one with 2, 4, 8, 16 and 32"
        )
    return encoder
