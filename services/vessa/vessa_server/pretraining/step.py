"""One Stage-1 step: from pairs to a loss."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vessa_server.model.geometry import resize
from vessa_server.model.instructions import INSTRUCTIONS
from vessa_server.model.segmenter import PromptBatch
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.pretraining.augment import invert_together, rough_boxes, rough_logits, shade, warp
from vessa_server.pretraining.losses import (
    LossWeights,
    mask_loss,
    quality_loss,
    retrieval_loss,
    soft_dice,
)
from vessa_server.pretraining.tasks import Pair

BOX_SHARE, LOGITS_SHARE, NO_LANGUAGE_SHARE, NO_MEMORY_SHARE = 0.15, 0.15, 0.1, 0.05
ANONYMOUS_SHARE = 0.4  # of the pairs name no structure: a lab's class names are not those of Stage 1
ANONYMOUS = "structure"


@dataclass(frozen=True)
class TaskBatch:
    """B augmented pairs.

    templates, targets: (B, 3, S, S) float in [0, 1]; template_masks, target_masks: (B, 1, S, S) 0/1
    """

    templates: Tensor
    template_masks: Tensor
    targets: Tensor
    target_masks: Tensor
    class_names: list[str]


def prepare(pairs: list[Pair], generator: torch.Generator | None, device: torch.device) -> TaskBatch:
    """Stack and augment pairs; without a generator they stay as they are (validation)."""

    def stack(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)[:, None]).to(device).float()

    templates, targets = stack([p.template for p in pairs]) / 255, stack([p.target for p in pairs]) / 255
    template_masks = stack([(p.template_mask == p.class_id).astype(np.uint8) for p in pairs])
    target_masks = stack([(p.target_mask == p.class_id).astype(np.uint8) for p in pairs])
    if generator is not None:
        templates, template_masks = warp(templates, template_masks, generator, strength=1.0)
        targets, target_masks = warp(targets, target_masks, generator, strength=0.7)
        templates, targets = shade(templates, generator), shade(targets, generator)
        templates, targets = invert_together(templates, targets, generator)
    return TaskBatch(
        templates.expand(-1, 3, -1, -1),
        template_masks,
        targets.expand(-1, 3, -1, -1),
        target_masks,
        [p.class_name for p in pairs],
    )


def simulate_prompts(masks: Tensor, side: int, generator: torch.Generator) -> PromptBatch:
    """Give a share of the targets a rough box, a share rough mask logits, as a student would."""
    count = masks.shape[0]
    points, labels = rough_boxes(masks, generator)
    labels[torch.rand(count, generator=generator) >= BOX_SHARE] = -1
    present = torch.rand(count, generator=generator) < LOGITS_SHARE
    logits = rough_logits(masks, side, generator)
    return PromptBatch(points, labels, logits, present)


def training_loss(
    model: Vessa, batch: TaskBatch, weights: LossWeights, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss of one batch and the figures worth logging."""
    segmenter, count = model.segmenter, batch.targets.shape[0]
    features = segmenter.encode_images(torch.cat([batch.templates, batch.targets]))
    memories: Tensor | None = segmenter.encode_memory(features[:count], batch.template_masks)[:, None]
    if torch.rand((), generator=generator) < NO_MEMORY_SHARE:
        memories = None
    h_seg, text_loss = None, batch.targets.new_zeros(())
    if model.language is not None:
        chosen = torch.randint(len(INSTRUCTIONS), (count,), generator=generator).tolist()
        seen = overlay(batch.templates, batch.template_masks)
        h_seg, text_loss = model.see(
            seen, batch.targets, batch.class_names, [INSTRUCTIONS[i] for i in chosen]
        )
        if memories is not None and torch.rand((), generator=generator) < NO_LANGUAGE_SHARE:
            h_seg = None
    side = 4 * segmenter.side
    prompts = simulate_prompts(batch.target_masks, side, generator)
    logits, iou, presence = model.draw(features[count:], memories, h_seg, prompts)
    target = resize(batch.target_masks, (side, side))
    masks = mask_loss(logits, target, weights)
    quality = quality_loss(iou, presence, logits, target)
    other = shade(warp(batch.targets[:, :1], batch.target_masks, generator, strength=0.5)[0], generator)
    retrieval = retrieval_loss(model.retriever(batch.targets), model.retriever(other.expand(-1, 3, -1, -1)))
    loss = weights.text * text_loss + masks + weights.quality * quality + weights.retrieval * retrieval
    with torch.no_grad():
        dice = soft_dice((logits > 0).float() * 40 - 20, target).mean()
    figures = {"loss": loss, "text": text_loss, "mask": masks, "retrieval": retrieval, "dice": dice}
    return loss, {k: v.item() for k, v in figures.items()}


@torch.inference_mode()
def validation_dice(model: Vessa, pairs: list[Pair], device: torch.device, size: int = 8) -> float:
    """Mean Dice over fixed pairs whose target shows the class, without prompts."""
    model.eval()
    scores = []
    for start in range(0, len(pairs), size):
        batch = prepare(pairs[start : start + size], None, device)
        features = model.segmenter.encode_images(torch.cat([batch.templates, batch.targets]))
        count = batch.targets.shape[0]
        memories = model.segmenter.encode_memory(features[:count], batch.template_masks)[:, None]
        h_seg = None
        if model.language is not None:
            seen = overlay(batch.templates, batch.template_masks)
            h_seg, _ = model.see(seen, batch.targets, batch.class_names, [INSTRUCTIONS[0]] * count)
        logits, _, _ = model.draw(features[count:], memories, h_seg)
        logits = resize(logits, (batch.target_masks.shape[-2], batch.target_masks.shape[-1]))
        scores.append(soft_dice((logits > 0).float() * 40 - 20, batch.target_masks, 1e-3))
    model.train()
    return float(torch.cat(scores).mean())
