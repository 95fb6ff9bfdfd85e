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
    """B augmented pairs of images and the N masks to draw on them.

    templates, targets: (B, 3, S, S) float in [0, 1]; template_masks, target_masks: (N, 1, S, S) 0/1;
    rows: (N,) int64, the pair that each mask belongs to; class_names: N
    """

    templates: Tensor
    template_masks: Tensor
    targets: Tensor
    target_masks: Tensor
    rows: Tensor
    class_names: list[str]


def prepare(pairs: list[Pair], generator: torch.Generator | None, device: torch.device) -> TaskBatch:
    """Stack and augment pairs; without a generator they stay as they are (validation)."""

    def stack(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)[:, None]).to(device).float()

    templates, targets = stack([p.template for p in pairs]) / 255, stack([p.target for p in pairs]) / 255
    template_masks = stack([p.template_mask for p in pairs])
    target_masks = stack([p.target_mask for p in pairs])
    if generator is not None:
        templates, template_masks = warp(templates, template_masks, generator, strength=1.0)
        targets, target_masks = warp(targets, target_masks, generator, strength=0.7)
        templates, targets = shade(templates, generator), shade(targets, generator)
        templates, targets = invert_together(templates, targets, generator)
    tasks = [(row, c, name) for row, p in enumerate(pairs) for c, name in p.classes.items()]
    rows = torch.tensor([row for row, _, _ in tasks], device=device)
    ids = torch.tensor([float(c) for _, c, _ in tasks], device=device).view(-1, 1, 1, 1)
    return TaskBatch(
        templates.expand(-1, 3, -1, -1),
        (template_masks[rows] == ids).float(),
        targets.expand(-1, 3, -1, -1),
        (target_masks[rows] == ids).float(),
        rows,
        [name for _, _, name in tasks],
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
    model: Vessa, batch: TaskBatch, weights: LossWeights, generator: torch.Generator, *, bf16: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss of one batch and the figures worth logging.

    bf16: run the network in bfloat16 where autocast holds it safe; the losses stay in float32
    """
    segmenter, pairs, rows = model.segmenter, batch.targets.shape[0], batch.rows
    count, side = len(rows), 4 * segmenter.side
    prompts = simulate_prompts(batch.target_masks, side, generator)
    with torch.autocast(batch.targets.device.type, torch.bfloat16, enabled=bf16):
        features = segmenter.encode_images(torch.cat([batch.templates, batch.targets]))
        memories: Tensor | None = segmenter.encode_memory(features[rows], batch.template_masks)[:, None]
        if torch.rand((), generator=generator) < NO_MEMORY_SHARE:
            memories = None
        h_seg, text_loss = None, batch.targets.new_zeros(())
        if model.language is not None:
            chosen = torch.randint(len(INSTRUCTIONS), (count,), generator=generator).tolist()
            hidden = torch.rand(count, generator=generator) < ANONYMOUS_SHARE
            names = [
                ANONYMOUS if hide else n for hide, n in zip(hidden.tolist(), batch.class_names, strict=True)
            ]
            seen = overlay(batch.templates[rows], batch.template_masks)
            h_seg, text_loss = model.see(seen, batch.targets[rows], names, [INSTRUCTIONS[i] for i in chosen])
            if memories is not None and torch.rand((), generator=generator) < NO_LANGUAGE_SHARE:
                h_seg = None
        logits, iou, presence = model.draw(features[pairs + rows], memories, h_seg, prompts)
        plain = batch.targets[:, :1]
        other = shade(warp(plain, plain, generator, strength=0.5)[0], generator)
        vectors = model.retriever(batch.targets), model.retriever(other.expand(-1, 3, -1, -1))
    logits, iou, presence = logits.float(), iou.float(), presence.float()
    target = resize(batch.target_masks, (side, side))
    masks = mask_loss(logits, target, weights)
    quality = quality_loss(iou, presence, logits, target)
    retrieval = retrieval_loss(vectors[0].float(), vectors[1].float())
    loss = weights.text * text_loss.float() + masks
    loss = loss + weights.quality * quality + weights.retrieval * retrieval
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
        count, rows = batch.targets.shape[0], batch.rows
        memories = model.segmenter.encode_memory(features[rows], batch.template_masks)[:, None]
        h_seg = None
        if model.language is not None:
            seen = overlay(batch.templates[rows], batch.template_masks)
            instructions = [INSTRUCTIONS[0]] * len(rows)
            h_seg, _ = model.see(seen, batch.targets[rows], batch.class_names, instructions)
        logits, _, _ = model.draw(features[count + rows], memories, h_seg)
        logits = resize(logits, (batch.target_masks.shape[-2], batch.target_masks.shape[-1]))
        scores.append(soft_dice((logits > 0).float() * 40 - 20, batch.target_masks, 1e-3))
    model.train()
    return float(torch.cat(scores).mean())
