"""Convert official files into a weights directory: SAM 2.1 checkpoints, timm's DINOv2, Qwen3-VL."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from vessa.errors import InvalidRequest, InvalidWeights
from vessa_server.model.language.vlm import SEG, stored_state
from vessa_server.model.presets import full
from vessa_server.model.retriever import Retriever
from vessa_server.model.segmenter import Segmenter
from vessa_server.model.weights import directory

_TRUNK = "image_encoder.trunk."
_SAM_OF_TRUNK = {(96, 12): "tiny", (96, 16): "small", (112, 24): "base_plus", (144, 48): "large"}
_DINO_OF_WIDTH = {384: "vit_small_patch14_dinov2", 768: "vit_base_patch14_dinov2"}
_ALLOWED = {
    "base": ({"tiny", "small", "base_plus"}, set(_DINO_OF_WIDTH.values())),
    "large": ({"large"}, {"vit_base_patch14_dinov2"}),
}
_DINO_SIDE = 37  # patches along a side of the published weights: 518 px


def build(
    out: Path,
    name: str,
    sam: Path,
    dino: Path,
    qwen: Path | None,
    *,
    image_size: int = 1024,
    provenance: dict[str, Any],
) -> str:
    """Write the weights directory of a full preset and return its digest.

    name: base or large; sam: sam2.1_hiera_*.pt; dino: timm's safetensors file; qwen: a Qwen3-VL
    directory, or None for a preset without a language model. Large files are hard-linked where the file
    system supports it. The projector is created by Stage 1. Raises InvalidWeights with the keys that do
    not fit, InvalidRequest for files that belong to another preset.
    """
    if name not in _ALLOWED or image_size % 32 or not 256 <= image_size <= 1024:
        raise InvalidRequest(
            f"expected preset base or large and an image size of 256 to 1024 px that is a multiple of 32, "
            f"got {name} and {image_size}"
        )
    sam_state, dino_state = _sam_state(sam), _safetensors(dino)
    sam_name, dino_name = _sam_name(sam, sam_state), _dino_name(dino, dino_state)
    if sam_name not in _ALLOWED[name][0] or dino_name not in _ALLOWED[name][1]:
        raise InvalidRequest(
            f"preset {name} takes SAM 2.1 {sorted(_ALLOWED[name][0])} and {sorted(_ALLOWED[name][1])}; "
            f"the files are {sam_name} and {dino_name}"
        )
    preset = full(name, sam_name, dino_name, image_size, language=qwen is not None)
    files = [sam, dino] + ([] if qwen is None else [qwen])
    with directory.fresh_folder(out, preset, {**provenance, "from": [p.name for p in files]}) as folder:
        segmenter = Segmenter(preset.segmenter)
        directory.fit(segmenter.sam, sam_state, sam.name)
        save_file(stored_state(segmenter, half=False), folder / "segmenter.safetensors")
        retriever = Retriever(preset.retriever)
        side = preset.retriever.image_size // 14
        dino_state["pos_embed"] = resample_abs_pos_embed(dino_state["pos_embed"], [side, side])
        directory.fit(retriever.backbone, dino_state, dino.name)
        save_file(stored_state(retriever, half=False), folder / "retriever.safetensors")
        if qwen is not None and preset.language is not None:
            place_language(qwen, folder / "language", preset.language.image_size)
    return directory.digest(out)


def place_language(source: Path, folder: Path, image_size: int) -> None:
    """Copy a Qwen3-VL directory and put <SEG> into a spare row of its vocabulary; no tensor changes.

    image_size: px; the processor is configured to leave images of that size unchanged. Raises
    InvalidWeights.
    """
    try:
        config = Qwen3VLConfig.from_pretrained(source, local_files_only=True)
        processor = Qwen3VLProcessor.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidWeights(f"'{source.name}' is not a Qwen3-VL directory: {error}") from error
    _check_tensors(source, config)
    text: Any = config.text_config
    rows = text.vocab_size
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [SEG]})
    if len(processor.tokenizer) > rows:
        raise InvalidWeights(
            f"no spare row for {SEG}: '{source.name}' has {rows} and its tokenizer needs all"
        )
    processor.image_processor.size = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    folder.mkdir()
    processor.save_pretrained(folder)
    for path in [source / "config.json", *sorted(source.glob("*.safetensors*"))]:
        target = folder / path.name
        try:
            os.link(path.resolve(), target)
        except OSError:
            shutil.copyfile(path, target)


def _check_tensors(source: Path, config: Qwen3VLConfig) -> None:
    """Compare the names and shapes in the files' headers with the architecture, without reading gigabytes."""
    index = source / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    found: dict[str, tuple[int, ...]] = {}
    try:
        for name in sorted(names):
            with safe_open(source / name, "pt") as file:
                found |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidWeights(f"'{source.name}' is incomplete or damaged: {error}") from error
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in Qwen3VLForConditionalGeneration(config).state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
        found.pop("lm_head.weight", None)
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [k for k in wanted if k in found and wanted[k] != found[k]]
    if missing or unknown or shapes:
        raise InvalidWeights(
            f"'{source.name}' does not fit its config.json: missing {missing[:5]}, unknown {unknown[:5]}, "
            f"wrong shape {shapes[:5]} ({len(missing)}, {len(unknown)} and {len(shapes)} keys)"
        )


def _sam_state(path: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the errors of refused and damaged files have no common base class
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise InvalidWeights(f"{path.name} is not a SAM 2.1 checkpoint: {reason}") from error
    state = data.get("model") if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidWeights(f"{path.name} is not a SAM 2.1 checkpoint: it has no tensors under 'model'")
    return state


def _sam_name(path: Path, state: dict[str, Tensor]) -> str:
    """Identify the size by the trunk; the file name is not trusted."""
    first = state.get(_TRUNK + "patch_embed.proj.weight")
    blocks = {k.split(".")[3] for k in state if k.startswith(_TRUNK + "blocks.")}
    name = None if first is None else _SAM_OF_TRUNK.get((first.shape[0], len(blocks)))
    if name is None:
        raise InvalidWeights(
            f"{path.name} has no SAM 2.1 trunk: expected the keys {_TRUNK}patch_embed.proj.weight and "
            f"{_TRUNK}blocks.*, it has {sorted(state)[:5]}"
        )
    return name


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidWeights(f"{path.name} is not a readable safetensors file: {error}") from error


def _dino_name(path: Path, state: dict[str, Tensor]) -> str:
    position = state.get("pos_embed")
    if position is None or position.ndim != 3 or math.prod(position.shape[:2]) != _DINO_SIDE**2 + 1:
        raise InvalidWeights(
            f"{path.name} is not DINOv2 in timm's format: expected the key pos_embed of shape "
            f"(1, {_DINO_SIDE**2 + 1}, D), it has {sorted(state)[:5]}"
        )
    if position.shape[-1] not in _DINO_OF_WIDTH:
        raise InvalidWeights(f"{path.name}: expected DINOv2 S or B, got a width of {position.shape[-1]}")
    return _DINO_OF_WIDTH[position.shape[-1]]
