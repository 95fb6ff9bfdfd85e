"""Define the presets: sizes of the annotator. All presets share one code and differ in these numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vessa.errors import InvalidWeights


@dataclass(frozen=True)
class SegmenterPreset:
    """Sizes of a SAM 2.1 graph. `config` names an official one; None builds nano's from the sizes."""

    image_size: int = 160  # px, side of the square input
    stride: int = 8  # px per embedding position
    width: int = 24  # channels of the first trunk level
    dim: int = 128
    attention_layers: int = 2
    trunk: str | None = None  # timm's name of nano's trunk; None is `ConvolutionalTrunk` of `width`
    correlation_heads: int = 4  # 0: without `Correlation`, which official weights lack
    config: str | None = None
    per_image_normalization: bool = True  # False: ImageNet statistics, as the official weights expect


@dataclass(frozen=True)
class LanguagePreset:
    """Sizes of a Qwen3-VL graph. Only nano uses them: official directories state their own sizes."""

    image_size: int = 128  # px; one vision token per 32 x 32 px
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    vision_hidden: int = 96
    vision_layers: int = 3


@dataclass(frozen=True)
class RetrieverPreset:
    """A timm vision transformer of the DINOv2 family; `options` go to `timm.create_model`."""

    name: str = "vit_small_patch14_dinov2"
    image_size: int = 112
    options: dict[str, Any] = field(default_factory=lambda: {"embed_dim": 96, "depth": 4, "num_heads": 3})


@dataclass(frozen=True)
class Preset:
    """All sizes of one annotator.

    language None: DINOv2 retrieval and SAM 2.1 memory alone; closer: whether the region of
    interest is segmented a second time, magnified (see `vessa_server.inference.region_of_interest`)
    """

    name: str = "nano"
    closer: bool = True
    segmenter: SegmenterPreset = field(default_factory=SegmenterPreset)
    language: LanguagePreset | None = field(default_factory=LanguagePreset)
    retriever: RetrieverPreset = field(default_factory=RetrieverPreset)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for `vessa.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Preset":
        """Read what `to_dict` wrote. Raises InvalidWeights when a field is unknown or missing."""
        try:
            language = data["language"]
            return cls(
                name=data["name"],
                closer=data.get("closer", False),  # older weights were not trained for zoomed views
                segmenter=SegmenterPreset(**data["segmenter"]),
                language=None if language is None else LanguagePreset(**language),
                retriever=RetrieverPreset(**data["retriever"]),
            )
        except (KeyError, TypeError) as error:
            raise InvalidWeights(
                f"vessa.json does not describe a preset this version knows: {error}"
            ) from error


_OFFICIAL = {"tiny": "t", "small": "s", "base_plus": "b+", "large": "l"}


def full(name: str, sam: str, dino: str, image_size: int = 1024, *, language: bool = False) -> Preset:
    """Sizes of a preset made of official parts.

    sam: tiny, small, base_plus or large; dino: timm's name; image_size: px, a multiple of 32, below
    1024 for small machines; language: whether a Qwen3-VL is among the parts. DINOv2 and Qwen3-VL see
    no more px than the segmenter.
    """
    return Preset(
        name=name,
        closer=False,
        segmenter=SegmenterPreset(
            image_size=image_size,
            stride=16,
            dim=256,
            attention_layers=4,
            correlation_heads=0,
            config=f"configs/sam2.1/sam2.1_hiera_{_OFFICIAL[sam]}.yaml",
            per_image_normalization=False,
        ),
        language=LanguagePreset(image_size=min(448, image_size)) if language else None,
        retriever=RetrieverPreset(name=dino, image_size=min(518, image_size // 14 * 14), options={}),
    )


PRESETS: dict[str, Preset] = {
    "nano": Preset(),
    "base": full("base", "tiny", "vit_small_patch14_dinov2"),
    "large": full("large", "large", "vit_base_patch14_dinov2"),
}
