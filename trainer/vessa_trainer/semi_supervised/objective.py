"""One training step: from a batch of rows to gradients and figures."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vessa_trainer.config import Config
from vessa_trainer.data import augmentation
from vessa_trainer.semi_supervised import losses, semisam
from vessa_trainer.semi_supervised.batches import UnlabeledViews
from vessa_trainer.semi_supervised.distributed import ALONE, Processes
from vessa_trainer.semi_supervised.schedule import source_weights
from vessa_trainer.students.networks import logits_of


def _dropout(
    student: nn.Module, count: int, generator: torch.Generator, processes: Processes
) -> list[Tensor]:
    """Draw masks for both strong views stacked, per feature level: (2B, C). count: of the whole batch."""
    channels: list[int] = student.feature_channels  # type: ignore[assignment]
    mine = processes.places(count)
    drawn = [augmentation.complementary_dropout(count, c, generator) for c in channels]
    return [torch.cat([first[mine], second[mine]]) for first, second in drawn]


def compute_loss(
    student: nn.Module,
    teacher: nn.Module,
    labeled: tuple[Tensor, Tensor, Tensor],
    unlabeled: UnlabeledViews | None,
    config: Config,
    step: int,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the whole objective, Eq. 6 or Eq. 9, and the figures for the log.

    Models and batches are on one device; generator: of the CPU, so that a run draws the same anywhere. With
    several processes it is the objective of the whole batch, with gradients to this process's part of it.
    """
    images, masks, valid = labeled
    optim, semi, gather = config.optim, config.semi, processes.gather
    supervised = losses.supervised_loss(
        gather(logits_of(student, images, bf16=config.bf16)),
        gather(masks),
        gather(valid),
        optim.lambda_ce,
        optim.lambda_dice,
    )
    if unlabeled is None:
        return supervised, {"loss": supervised.item(), "loss_sup": supervised.item()}
    if semi.method == "semisam":
        term, figures = semisam.unlabeled_term(student, teacher, unlabeled, config, step, processes)
    else:
        gathered = _gather(student, teacher, unlabeled, config, generator, processes)
        term, figures = _unlabeled_term(gathered, config, step)
    loss = supervised + semi.lambda_u * term
    figures |= {"loss": loss.item(), "loss_sup": supervised.item(), "loss_unsup": term.item()}
    return loss, figures


@dataclass(frozen=True)
class GatheredBatch:
    """The unlabeled part of a step, gathered from all processes.

    strong: both strong views with their targets; teacher: class probabilities of the weak view,
    (B, C, H, W); vessa, valid: of the weak view, as in `UnlabeledViews`
    """

    strong: tuple[losses.StrongView, losses.StrongView]
    teacher: Tensor
    vessa: tuple[Tensor, Tensor] | None
    valid: Tensor


def _gather(
    student: nn.Module,
    teacher: nn.Module,
    unlabeled: UnlabeledViews,
    config: Config,
    generator: torch.Generator,
    processes: Processes,
) -> GatheredBatch:
    """Run the teacher on the weak view and the student on both strong ones, and gather everything once."""
    gather, count = processes.gather, unlabeled.weak.shape[0]
    with torch.no_grad():
        probability = logits_of(teacher, unlabeled.weak, bf16=config.bf16).softmax(1)
    dropout = None
    if config.channel_dropout:
        drawn = _dropout(student, count * processes.count, generator, processes)
        dropout = [mask.to(unlabeled.weak.device) for mask in drawn]
    logits = logits_of(student, torch.cat(unlabeled.strong), bf16=config.bf16, dropout=dropout)

    def view(part: Tensor, box: Tensor) -> losses.StrongView:
        def moved(values: Tensor) -> Tensor:
            return gather(augmentation.paste(values, box))

        vessa = unlabeled.vessa and (moved(unlabeled.vessa[0]), moved(unlabeled.vessa[1]))
        return losses.StrongView(gather(part), moved(unlabeled.valid), moved(probability), vessa)

    first, second = (view(*pair) for pair in zip(logits.split(count), unlabeled.boxes, strict=True))
    return GatheredBatch(
        (first, second),
        gather(probability),
        unlabeled.vessa and (gather(unlabeled.vessa[0]), gather(unlabeled.vessa[1])),
        gather(unlabeled.valid),
    )


def _unlabeled_term(gathered: GatheredBatch, config: Config, step: int) -> tuple[Tensor, dict[str, float]]:
    """Average the losses of both strong views: the teacher's (Eq. 6), and VESSA's beside it (Eq. 7 to 9)."""
    semi, strong, classes = config.semi, gathered.strong, gathered.teacher.shape[1]
    kind, threshold = config.unlabeled_loss, semi.conf_threshold
    confidence, labels = gathered.teacher.max(1)
    gate: float | Tensor = threshold
    keep = (confidence >= threshold) & gathered.valid
    if semi.adaptive_threshold:
        gate = losses.class_thresholds(gathered.teacher, gathered.valid, threshold)
        keep = (confidence >= gate[labels]) & gathered.valid
    by_teacher = (losses.teacher_loss(strong[0], kind, gate) + losses.teacher_loss(strong[1], kind, gate)) / 2
    figures = _shares("teacher", labels, keep, classes)
    figures["confident"] = (keep.sum() / gathered.valid.sum().clamp(min=1)).item()
    if gathered.vessa is None:
        return by_teacher, figures
    first, second = (
        losses.vessa_loss(
            view,
            semi.vessa_loss,
            gate=semi.vessa_gate,
            vessa_threshold=semi.vessa_threshold,
            conf_threshold=threshold,
        )
        for view in strong
    )
    by_vessa = (first + second) / 2
    alpha_t, alpha_v = source_weights(step, config.steps, semi.alpha_v_floor)
    figures |= {"loss_teacher": by_teacher.item(), "loss_vessa": by_vessa.item(), "eta": alpha_t}
    figures |= _agreement(labels, gathered.vessa, gathered.valid, semi.vessa_threshold)
    sure = (gathered.vessa[1] >= semi.vessa_threshold) & gathered.valid
    figures |= _shares("vessa", gathered.vessa[0], sure, classes)
    return alpha_t * by_teacher + alpha_v * by_vessa, figures


def _agreement(
    teacher: Tensor, vessa: tuple[Tensor, Tensor], valid: Tensor, threshold: float
) -> dict[str, float]:
    """Compute the share of VESSA's confident pixels, and the Dice of its foreground with the teacher's."""
    labels, confidence = vessa
    ours, theirs = (teacher > 0) & valid, (labels > 0) & valid
    same = ((teacher == labels) & ours).sum()
    dice = 2 * same / (ours.sum() + theirs.sum()).clamp(min=1)
    share = ((confidence >= threshold) & valid).sum() / valid.sum().clamp(min=1)
    return {"vessa_confident": share.item(), "agreement": dice.item()}


def _shares(source: str, labels: Tensor, keep: Tensor, classes: int) -> dict[str, float]:
    """Compute the share of each foreground class in pseudo-labels (B, H, W) where `keep` is True."""
    counts = torch.bincount(labels[keep], minlength=classes)[1:].tolist()
    return {f"share_{source}_{c}": count / labels.numel() for c, count in enumerate(counts, start=1)}
