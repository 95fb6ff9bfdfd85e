"""A convolutional trunk for SAM 2's image encoder.

Trained from scratch on few images it learns several times faster than a small Hiera (measured, see
docs/decisions/). It returns four levels, each half the size of the previous one, as Hiera does.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions to a shortcut; `stride` 2 halves the map."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, stride)
        self.second = _convolution(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), _convolution(inputs, outputs, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ConvolutionalTrunk(nn.Module):
    """Compute levels at `first_stride` x 1, 2, 4, 8 with `width` x 1, 2, 4, 8 channels."""

    def __init__(self, width: int, first_stride: int) -> None:
        super().__init__()
        self.channel_list = [width * 8, width * 4, width * 2, width]  # SAM 2 expects the coarsest first
        stem = [_convolution(3, width // 2, 2 if first_stride > 1 else 1), nn.ReLU()]
        stem += [_convolution(width // 2, width, 2 if first_stride > 2 else 1), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        levels = [nn.Sequential(ResidualBlock(width, width))]
        for level in range(1, 4):
            channels = width << level
            levels.append(
                nn.Sequential(ResidualBlock(channels // 2, channels, 2), ResidualBlock(channels, channels))
            )
        self.levels = nn.ModuleList(levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, S, S) to four levels, the finest one first."""
        x = self.stem(x)
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return maps
