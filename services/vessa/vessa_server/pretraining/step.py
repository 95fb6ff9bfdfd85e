"""Compute one Stage-1 step: augment episodes, run the model, return the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vessa_server.model.geometry import resize
from vessa_server.model.language.instructions import DEFAULT_INSTRUCTION, INSTRUCTIONS
from vessa_server.model.segmenter import ImageFeatures, PromptBatch, Segmenter
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.pretraining.data.augmentation import (
    flip_together,
    invert_together,
    rough_boxes,
    rough_logits,
    rough_points,
    shade,
    warp,
    windows_around,
)
from vessa_server.pretraining.data.pools import Episode
from vessa_server.pretraining.losses import (
    LossWeights,
    iou_loss,
    mask_loss,
    presence_loss,
    retrieval_loss,
    shown,
    soft_dice,
    whereabouts_loss,
)

BOX_SHARE, POINTS_SHARE, LOGITS_SHARE = 0.25, 0.15, 0.25
CLOSE_SHARE = 0.5  # of the episodes are zoomed to a window around the structures, as in the second pass
ANONYMOUS_SHARE = 0.4  # of the class names are hidden: a lab's names differ from those of Stage 1
ANONYMOUS = "structure"


def _moved(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a dataclass, and of those in it, to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if not is_dataclass(batch) or isinstance(batch, type):
        return batch
    return replace(batch, **{f.name: _moved(getattr(batch, f.name), device) for f in fields(batch)})


@dataclass(frozen=True)
class TaskBatch:
    """B augmented episodes of T templates each, and the N masks to draw on their targets.

    templates: (B, T, 3, S, S) float in [0, 1], the most similar one first; targets: (B, 3, S, S);
    template_masks: (N, T, S, S) 0/1; target_masks: (N, 1, S, S) 0/1; truth: (N, 1, 4h, 4w) the target
    masks at the size of the logits; rows: (N,) int64, the episode that each mask belongs to;
    class_names, instructions: N, of which some names are hidden in `spoken`
    """

    templates: Tensor
    template_masks: Tensor
    targets: Tensor
    target_masks: Tensor
    truth: Tensor
    rows: Tensor
    prompts: PromptBatch
    class_names: list[str]
    spoken: list[str]
    instructions: list[str]

    def to(self, device: torch.device) -> "TaskBatch":
        """Return the batch on a device."""
        return _moved(self, device)


@dataclass(frozen=True)
class LayoutBatch:
    """R views for the retriever. views: (R, 3, S, S) in [0, 1]; layouts, kinds: see `retrieval_loss`."""

    views: Tensor
    layouts: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> "LayoutBatch":
        """Return the batch on a device."""
        return _moved(self, device)


def prepare(episodes: list[Episode], seeds: Tensor, size: int, side: int) -> TaskBatch:
    """Augment episodes as squares of `size` px, each by its own seed, and stack them.

    episodes: B with the same number of templates; seeds: (B,) int64; side: 4h, px of the logits. The
    augmentation of an episode does not depend on its batch, so that processes can share a batch.
    """
    parts = [_prepare_one(e, s, size, side) for e, s in zip(episodes, seeds.tolist(), strict=True)]
    counts = torch.tensor([len(e.classes) for e in episodes])

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(p, name) for p in parts])

    def listed(name: str) -> list[str]:
        return [text for p in parts for text in getattr(p, name)]

    prompts = [[getattr(p.prompts, f.name) for p in parts] for f in fields(PromptBatch)]
    return TaskBatch(
        joined("templates").expand(-1, -1, 3, -1, -1),
        joined("template_masks"),
        joined("targets").expand(-1, 3, -1, -1),
        joined("target_masks"),
        joined("truth"),
        torch.arange(len(episodes)).repeat_interleave(counts),
        PromptBatch(*(torch.cat(p) for p in prompts)),
        listed("class_names"),
        listed("spoken"),
        listed("instructions"),
    )


def _prepare_one(episode: Episode, seed: int, size: int, side: int) -> TaskBatch:
    """Augment one episode; its images have one channel."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([float(c) for c in episode.classes]).view(-1, 1, 1, 1)
    close = torch.rand((), generator=generator) < CLOSE_SHARE
    flips = flip_together(generator)
    factor = torch.rand(1, generator=generator) * 1.3 + 1.2

    def move(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], strength: float) -> list[Tensor]:
        """Augment T images: (T, 1, S, S), and masks (K, T, S, S) of K classes."""
        pixels, labels = (torch.from_numpy(np.stack(a))[:, None].float().flip(flips) for a in (images, masks))
        windows = windows_around(torch.isin(labels, classes) & close, factor.expand(len(labels)), generator)
        pixels, labels = warp(pixels / 255, labels, generator, strength=strength, windows=windows, size=size)
        return [shade(pixels, generator), (labels[None, :, 0] == classes).float()]

    templates, template_masks = move(episode.templates, episode.template_masks, 1.0)
    target, target_masks = move([episode.target], [episode.target_mask], 0.7)
    both = invert_together(torch.cat([templates, target]), generator)
    templates, target = both[:-1], both[-1:]
    names = list(episode.classes.values())
    # In a mirrored image left and right names would be wrong, so all names are hidden.
    anonymous = 1.0 if flips else ANONYMOUS_SHARE
    hidden = (torch.rand(len(names), generator=generator) < anonymous).tolist()
    chosen = torch.randint(len(INSTRUCTIONS), (len(names),), generator=generator).tolist()
    return TaskBatch(
        templates[None],
        template_masks,
        target,
        target_masks,
        resize(target_masks, (side, side)),
        torch.zeros(len(names), dtype=torch.int64),
        simulate_prompts(target_masks, side, generator),
        names,
        [ANONYMOUS if hide else name for hide, name in zip(hidden, names, strict=True)],
        [INSTRUCTIONS[i] for i in chosen],
    )


def simulate_prompts(masks: Tensor, side: int, generator: torch.Generator) -> PromptBatch:
    """Give some targets a rough box, points or rough mask logits, as a student would send them."""
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
    """Draw two augmented views of each slice of `Tasks.layouts`; half of the time zoomed.

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


@dataclass(frozen=True)
class Shares:
    """Weights of a part of a batch: its share of all answer tokens, masks and present masks.

    Losses are means over the whole batch, however it is divided into processes and passes.
    retrieval: the share of the retriever's loss, which is not divided
    """

    tokens: float = 1.0
    masks: float = 1.0
    present: float = 1.0
    retrieval: float = 1.0


def counted(model: Vessa, batch: TaskBatch) -> Tensor:
    """Count answer tokens, masks and present masks of a batch: (3,) float64, for `Shares`."""
    tokens = 0 if model.language is None else model.language.answer_tokens(batch.spoken, batch.instructions)
    present = int(shown(batch.truth).sum())
    return torch.tensor([tokens, len(batch.rows), present], dtype=torch.float64)


def training_loss(
    model: Vessa,
    whereabouts: nn.Module,
    batch: TaskBatch,
    layouts: LayoutBatch | None,
    weights: LossWeights,
    shares: Shares,
    *,
    memory: bool = True,
    language: bool = True,
    bf16: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a batch, or of a part of one, and the figures for the log.

    whereabouts: head that reads a coarse map of the target's mask from the state at <SEG>
    layouts: None when the retriever is not trained; memory, language: False leaves that input out
    bf16: run the network in bfloat16 by autocast; the losses stay in float32
    """
    segmenter, rows = model.segmenter, batch.rows
    truth, device = batch.truth, batch.targets.device
    text_loss = place_loss = retrieval = batch.targets.new_zeros(())
    vectors = None
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        features, memories = encode_episodes(segmenter, batch)
        h_seg = None
        if model.language is not None:
            seen = overlay(batch.templates[rows, 0], batch.template_masks[:, :1])
            h_seg, text_loss = model.see(seen, batch.targets[rows], batch.spoken, batch.instructions)
            place_loss = whereabouts_loss(whereabouts(h_seg).float(), truth)
        logits, iou, presence = model.draw(
            features,
            memories if memory else None,
            h_seg if language or not memory else None,
            batch.prompts,
            rows,
        )
        if layouts is not None:
            vectors = model.retriever(layouts.views)
    logits, iou, presence = logits.float(), iou.float(), presence.float()
    masks = mask_loss(logits, truth, weights)
    quality = shares.present * iou_loss(iou, logits, truth)
    quality = quality + shares.masks * presence_loss(presence, truth)
    if layouts is not None and vectors is not None:
        retrieval = retrieval_loss(vectors.float(), layouts.layouts, layouts.kinds)
    with torch.no_grad():
        dice = soft_dice((logits > 0).float() * 40 - 20, truth).mean()
    figures = {
        "text": shares.tokens * text_loss.float(),
        "whereabouts": shares.masks * place_loss,
        "mask": shares.masks * masks,
        "retrieval": shares.retrieval * retrieval,
    }
    loss = weights.text * figures["text"] + figures["mask"] + weights.whereabouts * figures["whereabouts"]
    loss = loss + weights.quality * quality + weights.retrieval * figures["retrieval"]
    figures = {"loss": loss, **figures, "dice": shares.masks * dice}
    return loss, {k: v.detach() for k, v in figures.items()}


def encode_episodes(segmenter: Segmenter, batch: TaskBatch) -> tuple[ImageFeatures, Tensor]:
    """Encode the B targets, and the templates of N masks as memories (N, T, M, memory_width)."""
    episodes, count = batch.templates.shape[:2]
    features = segmenter.encode_images(torch.cat([batch.templates.flatten(0, 1), batch.targets]))
    shown = (batch.rows[:, None] * count + torch.arange(count, device=batch.rows.device)).flatten()
    memories = segmenter.encode_memory(features[shown], batch.template_masks.flatten(0, 1)[:, None])
    return features[episodes * count :], memories.unflatten(0, (-1, count))


def served(model: Vessa, batch: TaskBatch) -> tuple[ImageFeatures, Tensor, Tensor | None]:
    """Encode B targets and N masks' templates as the service does: features, memories, states at <SEG>."""
    features, memories = encode_episodes(model.segmenter, batch)
    h_seg = None
    if model.language is not None:
        seen = overlay(batch.templates[batch.rows, 0], batch.template_masks[:, :1])
        instructions = [DEFAULT_INSTRUCTION] * len(batch.rows)
        h_seg, _text_loss = model.see(seen, batch.targets[batch.rows], batch.class_names, instructions)
    return features, memories, h_seg


def validation_scores(model: Vessa, _: nn.Module, batch: TaskBatch) -> Tensor:
    """Return the Dice (N,) of masks that are predicted without prompts."""
    features, memories, h_seg = served(model, batch)
    logits, _iou, _presence = model.draw(features, memories, h_seg, rows=batch.rows)
    logits = resize(logits, (batch.target_masks.shape[-2], batch.target_masks.shape[-1]))
    return soft_dice((logits > 0).float() * 40 - 20, batch.target_masks, 1e-3)


def retrieval_vectors(model: Vessa, _: nn.Module, images: Tensor) -> Tensor:
    """Return the retriever's unit vectors (B, D) of images (B, 3, S, S) in [0, 1]."""
    vectors: Tensor = model.retriever(images)
    return vectors
