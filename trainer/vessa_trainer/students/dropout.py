"""Dropout of feature channels between encoder and decoder (UniMatch V2's complementary dropout)."""

from torch import Tensor

Dropout = list[Tensor] | None  # per feature level, (B, C) factors of its channels; None drops nothing


def drop_channels(features: list[Tensor], dropout: Dropout) -> list[Tensor]:
    """Multiply the channels of each level, (B, C, H, W), by its factors."""
    if dropout is None:
        return list(features)
    return [f * m[:, :, None, None] for f, m in zip(features, dropout, strict=True)]
