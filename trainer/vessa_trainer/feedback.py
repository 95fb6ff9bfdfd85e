"""Teacher-to-VESSA feedback (paper section 3.2): what the teacher knows becomes prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from vessa.client import Prompts
from vessa.datasets import Slice
from vessa.mask_geometry import box_and_point
from vessa_trainer.config import Config, FeedbackConfig
from vessa_trainer.students import checkpoint

if TYPE_CHECKING:
    from vessa_trainer.loop import Run

_SIDE = 64  # px, longest side of the mask logits sent: the annotator resizes them to its own grid
_LIMIT = 6.0  # logits beyond it say nothing more
_MIN_SHARE = 0.0002  # of the image; a smaller component is no structure


def prompts_from(probabilities: Tensor, class_ids: list[int], config: FeedbackConfig) -> Prompts:
    """Turn one image's class probabilities into prompts for K classes.

    probabilities: (C, H, W) float in [0, 1] over class ids, background first; class_ids: the K
    classes in the order of the bank. A class gets prompts only where some component of it is
    confident (mean probability): its box is that of the largest such component, its point the
    deepest pixel there, its mask logits are its log-odds against the rest, clipped to [-6, 6], on a
    grid of at most 64x64. A class without such a component has box -1, point label -1, mask_present 0.
    """
    height, width = probabilities.shape[-2:]
    winner = probabilities.argmax(0)
    boxes = np.full((len(class_ids), 4), -1, np.float32)
    points = np.zeros((len(class_ids), 1, 2), np.float32)
    point_labels = np.full((len(class_ids), 1), -1, np.int8)
    present = np.zeros(len(class_ids), np.uint8)
    logits = torch.logit(probabilities[class_ids], eps=1e-4).clamp(-_LIMIT, _LIMIT)
    scale = min(1.0, _SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = F.interpolate(logits[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    for index, class_id in enumerate(class_ids):
        component = _largest(
            (winner == class_id).numpy(), probabilities[class_id].numpy(), config.min_confidence
        )
        if component is None:
            continue
        boxes[index], points[index, 0] = box_and_point(component)
        point_labels[index, 0] = present[index] = 1
    chosen = set(config.prompts)
    return Prompts(
        boxes=boxes if "boxes" in chosen else None,
        points=points if "points" in chosen else None,
        point_labels=point_labels if "points" in chosen else None,
        mask_logits=small.numpy().astype(np.float16) if "mask_logits" in chosen else None,
        mask_present=present if "mask_logits" in chosen else None,
    )


def _largest(mask: np.ndarray, probability: np.ndarray, min_confidence: float) -> np.ndarray | None:
    """Return the largest component, bool (H, W), whose mean probability is confident, or None."""
    labeled, count = ndimage.label(mask)
    ids = np.arange(1, count + 1)
    areas = ndimage.sum_labels(mask, labeled, ids)
    sure = ndimage.mean(probability, labeled, ids) if count else np.zeros(0)
    good = (areas >= _MIN_SHARE * mask.size) & (np.asarray(sure) >= min_confidence)
    if not good.any():
        return None
    return labeled == ids[good][areas[good].argmax()]


class FeedbackRounds:
    """Sends the source's predictions on the plain images of the coming steps, every so many steps.

    The prompts of a round are kept in files until it is over: a run that is taken up in the middle of a
    round goes on with the very prompts that it had.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        """Plan rounds from `feedback.start` on. folder: for the prompts."""
        self.config, self.folder = config, folder
        self.first = int(config.feedback.start * config.steps)
        self.sent = 0
        self._round = -1

    def due(self, step: int) -> bool:
        """Whether a round begins before this step; after a resume without its file also in its middle."""
        return step >= self.first and self._number(step) != self._round

    def _number(self, step: int) -> int:
        return (step - self.first) // self.config.feedback.every

    def _begin(self, number: int) -> int:
        return self.first + number * self.config.feedback.every

    def _parts(self, number: int) -> list[Path]:
        return sorted(self.folder.glob(f"{number:06d}-*.safetensors"))

    def send_if_due(self, run: "Run") -> None:
        """Predict the images of the coming round and ask the annotator to look again.

        Of several processes each predicts a share, and asks for the images of its own steps.
        """
        if not self.due(run.step) or run.unlabeled is None or run.unlabeled_order is None or run.feed is None:
            return
        self._round = self._number(run.step)
        end = min(self._begin(self._round + 1), self.config.steps)
        coming = run.unlabeled_order.ahead(run.step, end - run.step)
        items = [run.unlabeled.slices[r] for r in dict.fromkeys(r for batch in coming for r in batch)]
        share = items[run.processes.rank :: run.processes.count]
        path = self.folder / f"{self._round:06d}-{run.processes.rank:04d}.safetensors"
        _write(path, [s.name for s in share], predicted_prompts(run, share))
        run.processes.wait()
        self.sent += self._send(run)
        run.student.train()

    def _send(self, run: "Run") -> int:
        """Ask with the prompts of the round under way, as far as this process's steps need them."""
        assert run.feed is not None
        names: list[str] = []
        prompts: list[Prompts] = []
        for path in self._parts(self._round):  # mapped from the file, so that memory stays small
            more = _read(path)
            names += more[0]
            prompts += more[1]
        end = min(self._begin(self._round + 1), self.config.steps)
        by_name = dict(zip(names, prompts, strict=True))
        needed = [n for n in dict.fromkeys(run.names_ahead(end - run.step)) if n in by_name]
        run.feed.refresh(needed, [by_name[n] for n in needed])
        return len(needed)

    def take_up(self, run: "Run") -> None:
        """Ask again for the labels of the round that a run was stopped in; it begins later ones anew."""
        for path in self.folder.glob("*-*.safetensors"):
            if self._begin(int(path.stem.split("-")[0])) >= run.step:
                path.unlink(missing_ok=True)
        if run.step > self.first and self._parts(self._number(run.step)):
            self._round = self._number(run.step)
            self._send(run)

    def forget_older(self, step: int) -> None:
        """Delete rounds that a run taken up at this step has no use for."""
        for path in self.folder.glob("*-*.safetensors"):
            if int(path.stem.split("-")[0]) < self._number(step):
                path.unlink(missing_ok=True)


def predicted_prompts(run: "Run", items: Sequence[Slice]) -> list[Prompts]:
    """Prompts for some slices from what the source of feedback predicts on them."""
    from vessa_trainer.students.inference import predict_slice

    assert run.feed is not None
    config = run.config
    model = run.teacher if config.feedback.source == "teacher" else run.student
    prompts = []
    for start in range(0, len(items), config.batch_eval):
        images = [run.dataset.image(s) for s in items[start : start + config.batch_eval]]
        predicted = predict_slice(model, images, config, run.channels)
        prompts += [prompts_from(p, run.feed.class_ids, config.feedback) for p in predicted]
    return prompts


def _write(path: Path, names: Sequence[str], prompts: Sequence[Prompts]) -> None:
    tensors = {
        f"{index}.{kind}": torch.from_numpy(value)
        for index, one in enumerate(prompts)
        for kind, value in vars(one).items()
        if value is not None
    }
    checkpoint.write(path, tensors, {"names": list(names)})


def _read(path: Path) -> tuple[list[str], list[Prompts]]:
    tensors, metadata = checkpoint.read(path)
    fields: list[dict[str, np.ndarray]] = [{} for _ in metadata["names"]]
    for key, value in tensors.items():
        index, kind = key.split(".")
        fields[int(index)][kind] = value.numpy()
    return metadata["names"], [Prompts(**one) for one in fields]
