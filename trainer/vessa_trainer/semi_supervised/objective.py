"""One training step: from a batch of rows to gradients and figures."""

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
    """Masks for both strong views stacked, per feature level: (2B, C). count: of the whole batch."""
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
    """The whole objective, Eq. 6 or Eq. 9, and the figures worth looking at.

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
        term, parts = semisam.unlabeled_term(student, teacher, unlabeled, config, step, processes)
        loss = supervised + semi.lambda_u * term
        return loss, {
            "loss": loss.item(),
            "loss_sup": supervised.item(),
            "loss_unsup": term.item(),
            **parts,
        }
    with torch.no_grad():
        probability = logits_of(teacher, unlabeled.weak, bf16=config.bf16).softmax(1)
        weak_confidence, weak_labels = probability.max(1)
    count = unlabeled.weak.shape[0]
    drawn = _dropout(student, count * processes.count, generator, processes)
    dropout = [mask.to(images.device) for mask in drawn]
    logits = logits_of(student, torch.cat(unlabeled.strong), bf16=config.bf16, dropout=dropout)
    strong = (gather(logits[:count]), gather(logits[count:]))

    def both(labels: Tensor, confidence: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        one, other = (
            (gather(augmentation.paste(labels, b)), gather(augmentation.paste(confidence, b)))
            for b in unlabeled.boxes
        )
        return one, other

    teacher_views = both(weak_labels, weak_confidence)
    valid_views = (
        gather(augmentation.paste(unlabeled.valid, unlabeled.boxes[0])),
        gather(augmentation.paste(unlabeled.valid, unlabeled.boxes[1])),
    )
    weak_valid = gather(unlabeled.valid)
    figures: dict[str, float] = {}
    kind = config.unlabeled_loss
    if unlabeled.vessa is None:
        terms = [
            losses.consistency_loss(s, *t, v, semi.conf_threshold, kind)
            for s, t, v in zip(strong, teacher_views, valid_views, strict=True)
        ]
        unsupervised = (terms[0] + terms[1]) / 2
    else:
        alpha_t, alpha_v = source_weights(step, config.steps, semi.alpha_v_floor)
        unsupervised, teacher_term, vessa_term = losses.joint_loss(
            strong,
            teacher_views,
            both(*unlabeled.vessa),
            valid_views,
            alpha_t=alpha_t,
            alpha_v=alpha_v,
            conf_threshold=semi.conf_threshold,
            vessa_threshold=semi.vessa_threshold,
            gate=semi.vessa_gate,
            kind=kind,
        )
        figures |= {"loss_teacher": teacher_term.item(), "loss_vessa": vessa_term.item(), "eta": alpha_t}
        vessa = (gather(unlabeled.vessa[0]), gather(unlabeled.vessa[1]))
        figures |= _agreement(gather(weak_labels), vessa, weak_valid, semi.vessa_threshold)
        sure = (vessa[1] >= semi.vessa_threshold) & weak_valid
        figures |= _shares("vessa", vessa[0], sure, logits.shape[1])
    loss = supervised + semi.lambda_u * unsupervised
    keep = (gather(weak_confidence) >= semi.conf_threshold) & weak_valid
    figures |= _shares("teacher", gather(weak_labels), keep, logits.shape[1])
    figures |= {
        "loss": loss.item(),
        "loss_sup": supervised.item(),
        "loss_unsup": unsupervised.item(),
        "confident": (keep.sum() / weak_valid.sum().clamp(min=1)).item(),
    }
    return loss, figures


def _agreement(
    teacher: Tensor, vessa: tuple[Tensor, Tensor], valid: Tensor, threshold: float
) -> dict[str, float]:
    """Share of VESSA's confident pixels, and Dice of its foreground with the teacher's (echo check)."""
    labels, confidence = vessa
    ours, theirs = (teacher > 0) & valid, (labels > 0) & valid
    same = ((teacher == labels) & ours).sum()
    dice = 2 * same / (ours.sum() + theirs.sum()).clamp(min=1)
    share = ((confidence >= threshold) & valid).sum() / valid.sum().clamp(min=1)
    return {"vessa_confident": share.item(), "agreement": dice.item()}


def _shares(source: str, labels: Tensor, keep: Tensor, classes: int) -> dict[str, float]:
    """Share of each class but background, of all pixels, in pseudo-labels (B, H, W) where `keep` is True."""
    counts = torch.bincount(labels[keep], minlength=classes)[1:].tolist()
    return {f"share_{source}_{c}": count / labels.numel() for c, count in enumerate(counts, start=1)}
