"""One Stage-1 step: from pairs to a loss."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vessa_server.model.geometry import resize
from vessa_server.model.instructions import INSTRUCTIONS
from vessa_server.model.segmenter import PromptBatch
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.pretraining.augment import (
    invert_together,
    rough_boxes,
    rough_logits,
    rough_points,
    shade,
    warp,
    windows_around,
)
from vessa_server.pretraining.losses import (
    LossWeights,
    mask_loss,
    quality_loss,
    retrieval_loss,
    soft_dice,
    whereabouts_loss,
)
from vessa_server.pretraining.tasks import Pair

BOX_SHARE, POINTS_SHARE, LOGITS_SHARE = 0.25, 0.15, 0.25
NO_LANGUAGE_SHARE, NO_MEMORY_SHARE = 0.1, 0.15
CLOSE_SHARE = 0.5  # of the pairs are seen as in a second look: in a window around what is to be drawn
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


@dataclass(frozen=True)
class LayoutBatch:
    """R views for the retriever. views: (R, 3, S, S) in [0, 1]; layouts, kinds: see `retrieval_loss`."""

    views: Tensor
    layouts: Tensor
    kinds: Tensor


def prepare(pairs: list[Pair], generator: torch.Generator, device: torch.device, size: int) -> TaskBatch:
    """Stack and augment pairs as squares of `size` px."""

    def stack(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)[:, None]).to(device).float()

    templates, targets = stack([p.template for p in pairs]) / 255, stack([p.target for p in pairs]) / 255
    template_masks = stack([p.template_mask for p in pairs])
    target_masks = stack([p.target_mask for p in pairs])
    ids = [torch.tensor([float(c) for c in p.classes], device=device) for p in pairs]
    close = torch.rand(len(pairs), generator=generator) < CLOSE_SHARE
    factor = torch.rand(len(pairs), generator=generator) * 1.3 + 1.2

    def windows(masks: Tensor) -> Tensor:
        inside = torch.stack([torch.isin(m, i) for m, i in zip(masks, ids, strict=True)])
        return windows_around(inside & close.view(-1, 1, 1, 1), factor, generator)

    templates, template_masks = warp(
        templates, template_masks, generator, strength=1.0, windows=windows(template_masks), size=size
    )
    targets, target_masks = warp(
        targets, target_masks, generator, strength=0.7, windows=windows(target_masks), size=size
    )
    templates, targets = shade(templates, generator), shade(targets, generator)
    templates, targets = invert_together(templates, targets, generator)
    tasks = [(row, c, name) for row, p in enumerate(pairs) for c, name in p.classes.items()]
    rows = torch.tensor([row for row, _, _ in tasks], device=device)
    wanted = torch.tensor([float(c) for _, c, _ in tasks], device=device).view(-1, 1, 1, 1)
    return TaskBatch(
        templates.expand(-1, 3, -1, -1),
        (template_masks[rows] == wanted).float(),
        targets.expand(-1, 3, -1, -1),
        (target_masks[rows] == wanted).float(),
        rows,
        [name for _, _, name in tasks],
    )


def simulate_prompts(masks: Tensor, side: int, generator: torch.Generator) -> PromptBatch:
    """Give shares of the targets a rough box, points or rough mask logits, as a student would."""
    count = masks.shape[0]
    boxes, corners = rough_boxes(masks, generator)
    corners[torch.rand(count, generator=generator) >= BOX_SHARE] = -1
    points, labels = rough_points(masks, generator)
    labels[torch.rand(count, generator=generator) >= POINTS_SHARE] = -1
    points, labels = torch.cat([boxes, points], 1), torch.cat([corners, labels], 1)
    present = torch.rand(count, generator=generator) < LOGITS_SHARE
    logits = rough_logits(masks, side, generator)
    return PromptBatch(points, labels, logits, present)


def prepare_layouts(
    images: np.ndarray, masks: np.ndarray, kinds: int, generator: torch.Generator, size: int
) -> LayoutBatch:
    """Draw two augmented views of each slice that `Tasks.layouts` drew; half of the time seen closely.

    images, masks: (R, S, S) uint8, R / kinds of each kind; size: px of the views
    """
    twice = torch.from_numpy(np.concatenate([images, images])[:, None]).float() / 255
    labels = torch.from_numpy(np.concatenate([masks, masks])[:, None]).float()
    windows = None
    if torch.rand((), generator=generator) < CLOSE_SHARE:
        factor = torch.full((len(labels),), 1.5)
        windows = windows_around(labels > 0, factor, generator)
    views, labels = warp(twice, labels, generator, strength=0.5, windows=windows, size=size)
    shares = [(labels == c).float().mean((1, 2, 3)).sqrt() for c in range(1, int(labels.max()) + 1)]
    kind = torch.arange(kinds).repeat_interleave(len(images) // kinds).repeat(2)
    return LayoutBatch(shade(views, generator).expand(-1, 3, -1, -1), torch.stack(shares, 1), kind)


def training_loss(
    model: Vessa,
    whereabouts: nn.Module,
    batch: TaskBatch,
    layouts: LayoutBatch,
    weights: LossWeights,
    generator: torch.Generator,
    *,
    bf16: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss of one batch and the figures worth logging.

    whereabouts: reads a coarse map of the target's mask off the state at <SEG>, in training alone
    bf16: run the network in bfloat16 where autocast holds it safe; the losses stay in float32
    """
    segmenter, pairs, rows = model.segmenter, batch.targets.shape[0], batch.rows
    count, side, device = len(rows), 4 * segmenter.side, batch.targets.device
    prompts = simulate_prompts(batch.target_masks, side, generator)
    target = resize(batch.target_masks, (side, side))
    text_loss = place_loss = batch.targets.new_zeros(())
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        features = segmenter.encode_images(torch.cat([batch.templates, batch.targets]))
        memories: Tensor | None = segmenter.encode_memory(features[rows], batch.template_masks)[:, None]
        if torch.rand((), generator=generator) < NO_MEMORY_SHARE:
            memories = None
        h_seg = None
        if model.language is not None:
            chosen = torch.randint(len(INSTRUCTIONS), (count,), generator=generator).tolist()
            hidden = torch.rand(count, generator=generator) < ANONYMOUS_SHARE
            names = [
                ANONYMOUS if hide else n for hide, n in zip(hidden.tolist(), batch.class_names, strict=True)
            ]
            seen = overlay(batch.templates[rows], batch.template_masks)
            h_seg, text_loss = model.see(seen, batch.targets[rows], names, [INSTRUCTIONS[i] for i in chosen])
            place_loss = whereabouts_loss(whereabouts(h_seg).float(), target)
            if memories is not None and torch.rand((), generator=generator) < NO_LANGUAGE_SHARE:
                h_seg = None
        logits, iou, presence = model.draw(features[pairs + rows], memories, h_seg, prompts)
        vectors = model.retriever(layouts.views.to(device))
    logits, iou, presence = logits.float(), iou.float(), presence.float()
    masks = mask_loss(logits, target, weights)
    quality = quality_loss(iou, presence, logits, target)
    retrieval = retrieval_loss(vectors.float(), layouts.layouts.to(device), layouts.kinds.to(device))
    loss = weights.text * text_loss.float() + masks + weights.whereabouts * place_loss
    loss = loss + weights.quality * quality + weights.retrieval * retrieval
    with torch.no_grad():
        dice = soft_dice((logits > 0).float() * 40 - 20, target).mean()
    figures = {"loss": loss, "text": text_loss, "whereabouts": place_loss, "mask": masks}
    figures |= {"retrieval": retrieval, "dice": dice}
    return loss, {k: v.item() for k, v in figures.items()}


@torch.inference_mode()
def validation_dice(model: Vessa, pairs: list[Pair], device: torch.device, batch_size: int = 8) -> float:
    """Mean Dice over pairs whose target shows the class, without prompts, augmented the same each time."""
    model.eval()
    scores = []
    size = model.preset.segmenter.image_size
    for start in range(0, len(pairs), batch_size):
        generator = torch.Generator().manual_seed(start)
        batch = prepare(pairs[start : start + batch_size], generator, device, size)
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
