"""Fine-tune a copy of the segmenter for one bank (beyond the paper).

Half of the episodes are region tasks, superpixels of the lab's own unlabeled images, as in SSL-ALPNet. The
other half predict the bank's templates from one another, and from augmented views of themselves. The average
of the weights is scored on held-out templates and kept only if it improves their Dice.
"""

import copy
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vessa.schemas import AdaptationFigures
from vessa_server.adaptation.episodes import episodes_of, held_out_pairs
from vessa_server.adaptation.segmenters import parameters_of
from vessa_server.model.geometry import resize
from vessa_server.model.segmenter import Segmenter
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.pretraining.data.pools import Episode, pool_size
from vessa_server.pretraining.losses import LossWeights, iou_loss, mask_loss, presence_loss, soft_dice
from vessa_server.pretraining.step import TaskBatch, encode_episodes, prepare, served
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.retrieval import Bank

LEAST_GAIN = 0.005  # of Dice on held-out templates; less is noise
BATCH = 5  # episodes a step
LR, WARMUP = 1e-4, 20
CHECKS = 6  # of the average on held-out templates, evenly over the time
HELD_PAIRS = 24
AVERAGE = 0.99  # decay of the averaged weights
LANGUAGE_SHARE = 0.5  # of the steps also use the language model's state
QUALITY = 0.1  # weight of the predicted IoU and presence

Progress = Callable[[float, int, float], None]


def adapt(
    model: Vessa,
    bank: Bank,
    unlabeled: NDArray[np.uint8],
    digest: str,
    *,
    seconds: float,
    seed: int = 0,
    progress: Progress = lambda share, step, dice: None,
) -> tuple[Adaptation | None, AdaptationFigures]:
    """Fine-tune a copy of the segmenter for `seconds` at most; `model` is not changed.

    unlabeled: gray squares, uint8 (M, S, S); digest: of the model's weights
    progress(share done, step, best held-out Dice): called between steps, may raise to stop
    Returns the adaptation, None when it does not help, and its figures. Raises InvalidRequest when the bank
    holds too few templates.
    """
    rng = np.random.default_rng(seed)
    size = model.preset.segmenter.image_size
    episodes, whole = episodes_of(bank, _squares(unlabeled, pool_size(size)), pool_size(size), rng)
    started = time.monotonic()
    student = _Student(model)
    exam = student.batches(held_out_pairs(whole, HELD_PAIRS, rng))
    before = best = student.score(exam)
    kept: dict[str, NDArray[np.float16]] | None = None
    step, checks = 0, 0
    while (spent := time.monotonic() - started) < seconds:
        share = spent / seconds
        student.learn([episodes.draw(rng) for _ in range(BATCH)], _rate(step, share), rng)
        step += 1
        if share >= (checks + 1) / CHECKS:
            checks += 1
            dice = student.score(exam)
            if dice > best:
                best, kept = dice, parameters_of(student.average)
        progress(share, step, best)
    dice = student.score(exam)
    if dice > best:
        best, kept = dice, parameters_of(student.average)
    figures = AdaptationFigures(
        before=round(before, 4),
        after=round(best, 4),
        kept=kept is not None and best >= before + LEAST_GAIN,
        steps=step,
        seconds=round(time.monotonic() - started, 1),
        bank_version=bank.version,
        images=len(unlabeled),
    )
    if kept is None or not figures.kept:
        return None, figures
    return Adaptation(kept, digest, figures), figures


def _rate(step: int, share: float) -> float:
    """Return the learning rate: a warm-up, then constant, and a linear decay in the second half."""
    return LR * min(1.0, (step + 1) / WARMUP) * min(1.0, 2 * (1 - share) + 0.02)


def _squares(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize gray squares (M, S, S) uint8 to `size` px."""
    resized = [resize(torch.from_numpy(i)[None, None].float(), (size, size)).round().byte() for i in images]
    return torch.cat([*resized, torch.zeros(0, 1, size, size, dtype=torch.uint8)])[:, 0].numpy()


class _Student:
    """The annotator with a segmenter of its own, and the average of its weights.

    The retriever and the language model are shared and never changed.
    """

    def __init__(self, model: Vessa) -> None:
        own: Segmenter = copy.deepcopy(model.segmenter).requires_grad_()
        self.average: Segmenter = copy.deepcopy(model.segmenter).requires_grad_(False)
        self.model, self.averaged = model.with_segmenter(own), model.with_segmenter(self.average)
        own.train()
        for module in own.modules():
            if isinstance(module, nn.BatchNorm2d):  # a few images give no better statistics than Stage 1
                module.eval()
        self._weights = list(own.parameters())
        self._optimizer = torch.optim.AdamW(self._weights, lr=LR, weight_decay=0.01)
        self._steps = 0
        self._size, self._side = model.preset.segmenter.image_size, 4 * own.side

    def batches(self, pairs: Sequence[Episode]) -> list[TaskBatch]:
        """Augment held-out episodes by fixed seeds."""
        parts = [list(pairs[first : first + BATCH]) for first in range(0, len(pairs), BATCH)]
        return [
            prepare(part, torch.arange(i * BATCH, i * BATCH + len(part)), self._size, self._side)
            for i, part in enumerate(parts)
        ]

    def learn(self, drawn: Sequence[Episode], rate: float, rng: np.random.Generator) -> None:
        """Take one step on episodes; some masks are drawn with the prompts that a student would send."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        seeds = torch.from_numpy(rng.integers(2**62, size=len(drawn)))
        batch = prepare(list(drawn), seeds, self._size, self._side).to(self.model.device)
        loss = self._loss(batch, language=rng.random() < LANGUAGE_SHARE)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=self._weights)
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._steps += 1
        decay = min(AVERAGE, self._steps / (self._steps + 10))
        with torch.no_grad():
            for mean, own in zip(self.average.parameters(), self._weights, strict=True):
                mean.lerp_(own, 1 - decay)

    def _loss(self, batch: TaskBatch, language: bool) -> Tensor:
        with torch.autocast(
            batch.targets.device.type, torch.bfloat16, enabled=_fast_bfloat16(batch.targets.device)
        ):
            features, memories = encode_episodes(self.model.segmenter, batch)
            h_seg = None
            if language and self.model.language is not None:
                seen = overlay(batch.templates[batch.rows, 0], batch.template_masks[:, :1])
                with torch.no_grad():
                    h_seg, _ = self.model.see(
                        seen, batch.targets[batch.rows], batch.spoken, batch.instructions
                    )
            logits, iou, presence = self.model.draw(features, memories, h_seg, batch.prompts, batch.rows)
        logits = logits.float()
        quality = iou_loss(iou.float(), logits, batch.truth) + presence_loss(presence.float(), batch.truth)
        return mask_loss(logits, batch.truth, LossWeights(dice=1.0)) + QUALITY * quality

    @torch.no_grad()
    def score(self, exam: Sequence[TaskBatch]) -> float:
        """Return the mean Dice of the averaged weights on held-out episodes, without prompts."""
        scores = []
        for batch in exam:
            batch = batch.to(self.model.device)
            features, memories, h_seg = served(self.averaged, batch)
            logits, _, _ = self.averaged.draw(features, memories, h_seg, rows=batch.rows)
            scores.append(soft_dice((logits.float() > 0) * 40.0 - 20.0, batch.truth, 1e-3))
        return float(torch.cat(scores).mean())


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32; a processor may emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
