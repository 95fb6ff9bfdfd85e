"""Batches of weak and strong views with the annotator's labels replayed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vessa_trainer.config import Config
from vessa_trainer.data import augmentation
from vessa_trainer.data.prepared import Prepared
from vessa_trainer.pseudo_labels.types import LabelSource, PseudoLabel
from vessa_trainer.semi_supervised.distributed import ALONE, Processes


@dataclass(frozen=True)
class UnlabeledViews:
    """The views of one step's unlabeled images.

    weak: (B, 1 or 3, H, W) float in [0, 1]; strong: both strong views, CutMix pasted in `boxes` (B, H, W)
    bool each; valid: (B, H, W) bool, False on padding; vessa: labels (B, H, W) int64 and confidence (B, H, W)
    float of the weak view, None without an annotator
    """

    weak: Tensor
    strong: tuple[Tensor, Tensor]
    boxes: tuple[Tensor, Tensor]
    valid: Tensor
    vessa: tuple[Tensor, Tensor] | None
    waited: float = 0.0  # seconds that the step waited for labels


def labeled_batch(
    data: Prepared,
    rows: list[int],
    config: Config,
    generator: torch.Generator,
    processes: Processes = ALONE,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Make weak views of labeled images: (images, masks, valid) of this process's part of the batch.

    Squares go to the device as bytes, and the views are made there, of all images at once.
    """
    crop = config.student.crop
    geometry = augmentation.draw_geometry(len(rows), data.size, crop, config.views, generator)
    mine = processes.places(len(rows))
    geometry, rows = geometry.of(mine).to(device), [rows[i] for i in mine]
    return (
        geometry.image(data.floats(rows, device)),
        geometry.labels(data.masks[rows].to(device)),
        geometry.valid(data.valid[rows].to(device)),
    )


def unlabeled_views(
    data: Prepared,
    rows: list[int],
    config: Config,
    source: LabelSource | None,
    generator: torch.Generator,
    processes: Processes = ALONE,
    device: str | torch.device = "cpu",
) -> UnlabeledViews:
    """Draw the weak view, both strong views and their CutMix boxes; replay VESSA's labels.

    rows: of the whole batch, for which is drawn; what is returned is of this process's part of it. The
    draws are made on the CPU, so that they are the same everywhere, the views on the device.
    """
    crop, count = config.student.crop, len(rows)
    geometry = augmentation.draw_geometry(count, data.size, crop, config.views, generator)
    all_boxes = [
        augmentation.cutmix_boxes(count, (crop, crop), config.views.cutmix_p, generator) for _ in range(2)
    ]
    seeds = [augmentation.draw_seeds(count, generator) for _ in range(2)]
    mine = processes.places(count)
    geometry, rows = geometry.of(mine).to(device), [rows[i] for i in mine]
    weak = geometry.image(data.floats(rows, device))
    boxes = [box[mine].to(device) for box in all_boxes]
    strong = [
        augmentation.paste(augmentation.strong_view(weak, config.views, [seed[i] for i in mine]), box)
        for seed, box in zip(seeds, boxes, strict=True)
    ]
    vessa, waited = None, 0.0
    if source is not None:
        taken = source.take([data.slices[row].name for row in rows])
        labels, confidence = on_squares(data, rows, taken.labels)
        waited = taken.waited
        vessa = (geometry.labels(labels.to(device)), geometry.confidence(confidence.to(device)))
    valid = geometry.valid(data.valid[rows].to(device))
    return UnlabeledViews(weak, (strong[0], strong[1]), (boxes[0], boxes[1]), valid, vessa, waited)


def on_squares(
    data: Prepared, rows: Sequence[int], labels: Sequence[PseudoLabel | None]
) -> tuple[Tensor, Tensor]:
    """Put VESSA's labels and confidence on the prepared squares, as the images are: (B, S, S).

    A late label is background with confidence 0, which has no weight in any loss.
    """
    ids, sure = [], []
    for row, label in zip(rows, labels, strict=True):
        if label is None:
            ids.append(torch.zeros(data.size, data.size, dtype=torch.int64))
            sure.append(torch.zeros(data.size, data.size))
            continue
        frame = data.frames[row]
        ids.append(frame.enter_labels(torch.tensor(label.labels)))
        sure.append(frame.enter(torch.tensor(label.confidence)[None].float())[0] / 255)
    return torch.stack(ids), torch.stack(sure)
