"""The students: U-Nets from scratch or on a timm encoder, and DINOv2 with a DPT head as in UniMatch V2."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from vessa.errors import InvalidWeights
from vessa_trainer.config import OptimConfig, StudentConfig
from vessa_trainer.students.dropout import Dropout, drop_channels
from vessa_trainer.students.encoder_unet import EncoderUNet


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """UniMatch v1's medical U-Net, trained from scratch. widths: channels of its levels, five in UniMatch v1.

    input (B, channels, H, W) float in [0, 1], H and W multiples of 2 to the number of levels
    less one; output logits (B, C, H, W)
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_channels = list(widths)
        self.down = nn.ModuleList(
            _double(i, o) for i, o in zip((channels, *widths[:-1]), widths, strict=True)
        )
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(deep, skip, 1) for deep, skip in pairs)
        self.up = nn.ModuleList(_double(2 * skip, skip) for _, skip in pairs)
        self.head = nn.Conv2d(widths[0], classes, 3, padding=1)

    def forward(self, x: Tensor, dropout: Dropout = None) -> Tensor:
        """Segment; `dropout` multiplies the channels of each encoder level."""
        features = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            features.append(x)
        features = drop_channels(features, dropout)
        x = features.pop()
        for shrink, block in zip(self.shrink, self.up, strict=True):
            x = F.interpolate(shrink(x), scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([features.pop(), x], dim=1))
        return self.head(x)


_BACKBONES: dict[
    str, tuple[str, dict[str, Any], tuple[int, ...], int, tuple[int, ...]]
] = {  # timm name and options, layers read, DPT features, channels of the four levels
    "tiny": (
        "vit_small_patch14_dinov2",
        {"embed_dim": 48, "depth": 4, "num_heads": 3},
        (0, 1, 2, 3),
        16,
        (8, 16, 24, 32),
    ),
    "small": ("vit_small_patch14_dinov2", {}, (2, 5, 8, 11), 64, (48, 96, 192, 384)),
    "base": ("vit_base_patch14_dinov2", {}, (2, 5, 8, 11), 128, (96, 192, 384, 768)),
    "large": ("vit_large_patch14_dinov2", {}, (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
}


class _Refine(nn.Module):
    """Two residual 3x3 convolutions around a sum with the deeper level, then twice the size."""

    def __init__(self, width: int, *, deepest: bool) -> None:
        super().__init__()
        self.skip = None if deepest else nn.Sequential(*self._block(width))
        self.out = nn.Sequential(*self._block(width))
        self.project = nn.Conv2d(width, width, 1)

    @staticmethod
    def _block(width: int) -> list[nn.Module]:
        return [
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        ]

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if self.skip is not None and skip is not None:
            x = x + skip + self.skip(skip)
        x = x + self.out(x)
        return self.project(F.interpolate(x, size, mode="bilinear", align_corners=True))


class DPT(nn.Module):
    """DINOv2 with a dense-prediction-transformer head.

    input (B, 1, H, W) or (B, 3, H, W) float in [0, 1], H and W multiples of 14; output logits (B, C, H, W)
    """

    def __init__(self, config: StudentConfig, classes: int) -> None:
        super().__init__()
        name, options, self.layers, width, levels = _BACKBONES[config.backbone]
        hub = config.pretrained and config.weights is None
        self.mean: Tensor
        self.std: Tensor
        options = {"num_classes": 0, "dynamic_img_size": True, "img_size": config.crop, **options}
        backbone = _create_backbone(name, pretrained=hub, **options)
        self.backbone = backbone
        if config.weights is not None:
            _load_backbone(backbone, Path(config.weights))
        dim = int(backbone.embed_dim)
        self.feature_channels = [dim]  # one mask serves all four levels, as upstream does
        self.reduce = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in levels)
        self.rescale = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, 4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, 2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, 2, 1),
            ]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in levels)
        self.refine = nn.ModuleList(_Refine(width, deepest=level == 3) for level in range(4))
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, classes, 1)
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, dropout: Dropout = None) -> Tensor:
        """Segment; `dropout` multiplies the channels of all four levels alike."""
        size = x.shape[-2:]
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.std
        features = self.backbone.forward_intermediates(
            x, indices=list(self.layers), norm=True, intermediates_only=True
        )
        features = drop_channels(features, None if dropout is None else dropout * len(features))
        maps = [
            lateral(rescale(reduce(f)))
            for f, reduce, rescale, lateral in zip(
                features, self.reduce, self.rescale, self.lateral, strict=True
            )
        ]
        y = maps[3]
        for level in (3, 2, 1, 0):
            target = maps[level - 1].shape[-2:] if level else (2 * y.shape[-2], 2 * y.shape[-1])
            y = self.refine[level](y, None if level == 3 else maps[level], (target[0], target[1]))
        return F.interpolate(self.head(y), size, mode="bilinear", align_corners=True)


def _create_backbone(name: str, *, pretrained: bool, **options: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise InvalidWeights(
            f"the hub's weights of {name} did not come or do not fit ({type(error).__name__}): give a local "
            "file as student.weights, or student.pretrained=false to start from noise"
        ) from error


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
        backbone.load_state_dict(state)
    except Exception as error:
        raise InvalidWeights(
            f"{path} does not hold the weights of this DINOv2 backbone in timm's safetensors format"
        ) from error


def logits_of(model: nn.Module, images: Tensor, *, bf16: bool, dropout: Dropout = None) -> Tensor:
    """Logits (B, C, H, W) float of images (B, 1 or 3, H, W) in [0, 1], computed under autocast if `bf16`."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits: Tensor = model(images, dropout)
    return logits.float() if bf16 else logits


def build_student(config: StudentConfig, channels: int, classes: int) -> nn.Module:
    """Build the student of a config.

    channels: of the images, 1 or 3, or any number for a U-Net from scratch; classes: with background. Its
    `feature_channels` are the channels of the levels that `complementary_dropout` acts on.
    """
    if config.name == "dpt":
        return DPT(config, classes)
    unet = UNet(channels, classes, config.widths) if config.encoder is None else EncoderUNet(config, classes)
    return unet.to(memory_format=torch.channels_last)


def parameter_groups(student: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: a pretrained backbone or encoder has a learning rate of its own."""
    groups: list[dict[str, Any]] = []
    rest = list(student.parameters())
    for kind, name, rate in (
        (DPT, "backbone", optim.backbone_lr),
        (EncoderUNet, "encoder", optim.encoder_lr * optim.lr),
    ):
        if isinstance(student, kind):
            part = list(student.get_submodule(name).parameters())
            ids = {id(p) for p in part}
            rest = [p for p in rest if id(p) not in ids]
            groups.append({"params": part, "lr": rate})
    groups.append({"params": rest, "lr": optim.lr})
    return [{**g, "betas": (0.9, 0.999), "weight_decay": optim.weight_decay} for g in groups]
