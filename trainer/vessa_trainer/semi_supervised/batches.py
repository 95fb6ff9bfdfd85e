"""Batches of weak and strong views with the annotator's labels replayed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vessa_trainer.config import Config
from vessa_trainer.data import augmentation
from vessa_trainer.data.prepared import PreparedSlices
from vessa_trainer.data.windows import WHOLE, Window, window_around
from vessa_trainer.pseudo_labels.types import LabelBatch, LabelSource, PseudoLabel
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
    data: PreparedSlices,
    rows: list[int],
    config: Config,
    generator: torch.Generator,
    processes: Processes = ALONE,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Make weak views of labeled images: (images, masks, valid) of this process's part of the batch.

    Squares go to the device as bytes, and the views are made there, of all images at once.
    """
    mine = processes.places(len(rows))
    geometry, whole = _draw_geometry(len(rows), data, config, generator)
    geometry, rows = geometry.of(mine), [rows[i] for i in mine]
    if config.student.window:
        geometry = geometry.on(_or_whole(data.windows(config.student.window)[rows], whole[mine]))
    geometry = geometry.to(device)
    return (
        geometry.image(data.floats(rows, device)),
        geometry.labels(data.masks[rows].to(device)),
        geometry.valid(data.valid[rows].to(device)),
    )


def unlabeled_views(
    data: PreparedSlices,
    rows: list[int],
    config: Config,
    source: LabelSource | None,
    generator: torch.Generator,
    processes: Processes = ALONE,
    device: str | torch.device = "cpu",
    usual: Window = WHOLE,
) -> UnlabeledViews:
    """Draw the weak view, both strong views and their CutMix boxes; replay VESSA's labels.

    rows: of the whole batch; the result is this process's part of it. Random draws are made on the CPU, so
    that they are the same everywhere, the views on the device.
    usual: the region of interest of images for which VESSA's labels give none
    """
    crop, count, stacked = config.student.crop, len(rows), config.student.neighbors > 0
    geometry, whole = _draw_geometry(count, data, config, generator)
    all_boxes = [
        augmentation.cutmix_boxes(count, (crop, crop), config.views.cutmix_p, generator) for _ in range(2)
    ]
    seeds = [augmentation.draw_seeds(count, generator) for _ in range(2)]
    mine = processes.places(count)
    geometry, rows = geometry.of(mine), [rows[i] for i in mine]
    taken = None if source is None else source.take([data.slices[row].name for row in rows])
    if config.student.window:
        windows = _windows(data, rows, taken, config.student.window, usual)
        geometry = geometry.on(_or_whole(windows, whole[mine]))
    geometry = geometry.to(device)
    weak = geometry.image(data.floats(rows, device))
    boxes = [box[mine].to(device) for box in all_boxes]
    strong = [
        augmentation.paste(
            augmentation.strong_view(weak, config.views, [seed[i] for i in mine], color=not stacked), box
        )
        for seed, box in zip(seeds, boxes, strict=True)
    ]
    vessa, waited = None, 0.0
    if taken is not None:
        labels, confidence = on_squares(data, rows, taken.labels)
        vessa = (geometry.labels(labels.to(device)), geometry.confidence(confidence.to(device)))
        waited = taken.waited
    valid = geometry.valid(data.valid[rows].to(device))
    return UnlabeledViews(weak, (strong[0], strong[1]), (boxes[0], boxes[1]), valid, vessa, waited)


def _draw_geometry(
    count: int, data: PreparedSlices, config: Config, generator: torch.Generator
) -> tuple[augmentation.CropGrid, Tensor]:
    """Draw weak views, and which of them show the whole image where others show the region of interest.

    With `student.window` the views are of a window that is yet to be placed (`CropGrid.on`).
    """
    crop = config.student.crop
    if not config.student.window:
        nowhere = torch.zeros(count, dtype=torch.bool)
        return augmentation.draw_geometry(count, data.size, crop, config.views, generator), nowhere
    geometry = augmentation.draw_geometry(count, crop, crop, config.views, generator)
    return geometry, torch.rand(count, generator=generator) < config.views.whole_p


def _or_whole(windows: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole[:, None], torch.tensor(WHOLE), windows)


def _windows(
    data: PreparedSlices, rows: Sequence[int], taken: LabelBatch | None, factor: float, usual: Window
) -> Tensor:
    """Return the region of interest of each unlabeled image, (B, 3), from the box of its volume's labels.

    The usual window serves where there is no annotator or a label is late; an empty volume shows the whole.
    """
    if taken is None:
        return torch.tensor([usual for _ in rows])
    found = []
    for row, label in zip(rows, taken.labels, strict=True):
        box = None if label is None or label.box is None else data.frames[row].box_on_square(label.box)
        found.append(usual if label is None else window_around(box, data.size, factor))
    return torch.tensor(found)


def on_squares(
    data: PreparedSlices, rows: Sequence[int], labels: Sequence[PseudoLabel | None]
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
