"""Fine-tune the mask decoder on one bank's own templates (beyond the paper).

Each template is predicted from others, augmented as in Stage 1. A third of the patients is held out, or of
the slices when there are fewer than three patients. The adaptation is kept only if it improves the Dice of
the held-out templates, so that a bank never gets worse masks.
"""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vessa.errors import InvalidRequest
from vessa.schemas import AdaptationFigures
from vessa_server.model.segmenter import ImageFeatures, PromptBatch
from vessa_server.model.vessa import Vessa
from vessa_server.pretraining.data.pools import Episode, Pool, pool_size, squares_of
from vessa_server.pretraining.losses import LossWeights, mask_loss, soft_dice
from vessa_server.pretraining.step import TaskBatch, prepare, served
from vessa_server.template_bank.decoder_weights import Adaptation
from vessa_server.template_bank.retrieval import Bank

LEAST_TEMPLATES = 6
LEAST_GAIN = 0.005  # of Dice on held-out templates; less is noise
HELD_PAIRS, BATCH, LR, WARMUP = 24, 4, 3e-5, 10
CHECK_EVERY = 20  # steps

Progress = Callable[[float, int, float], None]


def adapt(
    model: Vessa,
    bank: Bank,
    digest: str,
    *,
    seconds: float,
    lock: AbstractContextManager[object],
    seed: int = 0,
    progress: Progress = lambda share, step, dice: None,
) -> tuple[Adaptation | None, AdaptationFigures]:
    """Fine-tune a copy of the mask decoder for a bank, for `seconds` at most; `model` is not changed.

    digest: of the model's weights; lock: held while the decoder is copied
    progress(share done, step, best held-out Dice): called between steps, may raise to stop
    Returns the adaptation, None when it does not help, and its figures. Raises InvalidRequest when the bank
    holds too few templates.
    """
    rng = np.random.default_rng(seed)
    train, held = _pools(model, bank, rng)
    started = time.monotonic()
    with lock:
        student = _Student(model)
    pairs = _held_pairs(held, rng)
    size, side = model.preset.segmenter.image_size, 4 * model.segmenter.side
    exam = []
    for first in range(0, len(pairs), BATCH):
        some = pairs[first : first + BATCH]
        exam.append(student.see(prepare(some, torch.arange(first, first + len(some)), size, side)))
    before = best = student.score(exam)
    kept: dict[str, Tensor] | None = None
    weights = list(student.decoder.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.01)
    step = 0
    while (spent := time.monotonic() - started) < seconds:
        share = spent / seconds
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP) * (1 - 0.9 * share)
        train.bank = rng.permutation(len(train.group_names))[: max(1, len(train.group_names) // 2)]
        drawn = [p for p in (train.draw(rng) for _ in range(4 * BATCH)) if p is not None][:BATCH]
        if drawn:
            seeds = torch.from_numpy(rng.integers(2**62, size=len(drawn)))
            loss = student.loss(student.see(prepare(drawn, seeds, size, side)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=weights)  # the prompt encoder, which is shared, gets no gradient
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
        step += 1
        if step % CHECK_EVERY == 0:
            dice = student.score(exam)
            if dice > best:
                best = dice
                kept = {k: v.detach().clone() for k, v in student.decoder.state_dict().items()}
        progress(share, step, best)
    figures = AdaptationFigures(
        before=round(before, 4),
        after=round(best, 4),
        kept=kept is not None and best >= before + LEAST_GAIN,
        steps=step,
        seconds=round(time.monotonic() - started, 1),
        bank_version=bank.version,
    )
    if kept is None or not figures.kept:
        return None, figures
    return Adaptation({k: v.float().cpu().numpy() for k, v in kept.items()}, digest, figures), figures


@dataclass(frozen=True)
class _EncodedBatch:
    """A batch with all inputs of the decoder; nothing here has a gradient."""

    batch: TaskBatch
    embedding: Tensor
    h_seg: Tensor | None
    features: ImageFeatures


class _Student:
    """The annotator with its own decoder; everything else is shared, in eval mode and never changed."""

    def __init__(self, model: Vessa) -> None:
        self.model = model
        self.segmenter = copy.copy(model.segmenter)
        self.segmenter._modules = dict(model.segmenter._modules)
        sam = copy.copy(model.segmenter.sam)
        sam._modules = dict(model.segmenter.sam._modules)
        self.decoder = copy.deepcopy(model.segmenter.sam.sam_mask_decoder).requires_grad_()
        sam.sam_mask_decoder = self.decoder
        self.segmenter.sam = sam

    @torch.no_grad()
    def see(self, batch: TaskBatch) -> _EncodedBatch:
        """Run the frozen parts: encoders, memory attention and language model."""
        batch = batch.to(self.model.device)
        features, memories, h_seg = served(self.model, batch)
        embedding = self.segmenter.attend(features, memories, batch.rows)
        return _EncodedBatch(batch, embedding, h_seg, features[batch.rows])

    def loss(self, seen: _EncodedBatch) -> Tensor:
        """Eq. 3; a share of the masks is drawn with the prompts that a student would send."""
        self.segmenter.training = True  # of this copy alone: logits keep their gradient where nothing is
        logits, _, _ = self.segmenter.decode(
            seen.embedding, seen.features.details, seen.h_seg, seen.batch.prompts
        )
        return mask_loss(logits.float(), seen.batch.truth, LossWeights(dice=1.0))

    @torch.no_grad()
    def score(self, exam: list[_EncodedBatch]) -> float:
        """Mean Dice without prompts."""
        self.segmenter.training = False
        scores = []
        for seen in exam:
            logits, _, _ = self.segmenter.decode(
                seen.embedding, seen.features.details, seen.h_seg, PromptBatch()
            )
            scores.append(soft_dice((logits.float() > 0) * 40.0 - 20.0, seen.batch.truth, 1e-3))
        return float(torch.cat(scores).mean())


def _pools(model: Vessa, bank: Bank, rng: np.random.Generator) -> tuple[Pool, Pool]:
    """Return the pool to learn from, and the pool of the whole bank with held-out slices as targets."""
    templates = bank.templates
    if len(templates) < LEAST_TEMPLATES:
        raise InvalidRequest(
            f"bank '{bank.name}' holds {len(templates)} templates; "
            f"adaptation needs at least {LEAST_TEMPLATES}: add more annotated slices"
        )
    size = pool_size(model.preset.segmenter.image_size)
    images, masks = zip(*(squares_of(t.image, t.mask, size) for t in templates), strict=True)
    patients = sorted({t.group for t in templates})
    keys = [t.group for t in templates] if len(patients) >= 3 else [f"{i:05d}" for i in range(len(templates))]
    names = rng.permutation(sorted(set(keys))).tolist()
    held = set(names[: max(1, len(names) // 3)])
    rows = [i for i, key in enumerate(keys) if key not in held]
    all_images, all_masks = np.stack(images), np.stack(masks)
    train = Pool(bank.name, all_images[rows], all_masks[rows], [keys[i] for i in rows], bank.classes)
    whole = Pool(bank.name, all_images, all_masks, keys, bank.classes)
    whole.bank = np.flatnonzero([name not in held for name in whole.group_names])
    if not train.classes or not whole.classes:
        raise InvalidRequest(
            f"no class of bank '{bank.name}' is shown, and not too small, by enough of its templates "
            "to learn from some and be tested on others"
        )
    return train, whole


def _held_pairs(pool: Pool, rng: np.random.Generator) -> list[Episode]:
    drawn = (pool.draw(rng) for _ in range(20 * HELD_PAIRS))
    pairs = [p for p in drawn if p is not None and all((p.target_mask == c).any() for c in p.classes)]
    if not pairs:
        raise InvalidRequest(
            f"the held-out templates of bank '{pool.name}' show no class that the others show"
        )
    return pairs[:HELD_PAIRS]
