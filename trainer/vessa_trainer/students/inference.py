"""Predict slices by a student."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vessa.datasets import Case, Dataset
from vessa.errors import InvalidConfig
from vessa.masks.cleaning import structure_box
from vessa_trainer.config import Config
from vessa_trainer.data.neighbors import with_neighbors
from vessa_trainer.data.prepared import Frame
from vessa_trainer.data.windows import WHOLE, Window, put_back, show, window_around
from vessa_trainer.students import checkpoint
from vessa_trainer.students.networks import build_student, logits_of


def load_best(run: Path, config: Config) -> tuple[nn.Module, int, dict[int, str]]:
    """Return a finished run's best teacher, its channels and its classes."""
    tensors, metadata = checkpoint.read(run / checkpoint.BEST)
    classes = {int(c): n for c, n in metadata["classes"].items()}
    # its weights are in the checkpoint: neither the hub nor a local file is needed
    student = replace(config.student, pretrained=False, weights=None, init=None)
    model = build_student(student, metadata["channels"], max(classes) + 1)
    checkpoint.load_module(model, tensors, "teacher")
    return model.eval().to(open_device(config.device)), metadata["channels"], classes


def open_device(name: str) -> torch.device:
    """Return a device that tensors can be put on. Raises InvalidConfig."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InvalidConfig(
            f"device '{name}' cannot be used here: {why}; expected cpu or cuda[:N]"
        ) from error


@torch.no_grad()
def predict_slices(
    model: nn.Module,
    images: Sequence[np.ndarray],
    config: Config,
    channels: int,
    *,
    flips: bool = False,
    window: Window = WHOLE,
) -> list[Tensor]:
    """Predict class probabilities (C, H, W) of images uint8 (H, W[, 3]), each at its own size.

    With `student.neighbors` each image comes with its neighbors as channels.
    flips: average over the image and its three mirror images, at four times the work
    window: the part of each square that the network sees; the rest is background. Ignored without
    `student.window`, where the network sees squares of `student.size`
    """
    model.eval()
    size, device = config.student.size, next(model.parameters()).device
    frames = [Frame(i.shape[0], i.shape[1], size) for i in images]
    batch = torch.stack(
        [f.enter(with_channels(image, channels)) / 255 for f, image in zip(frames, images, strict=True)]
    ).to(device)
    if config.student.window:
        shown = show(window, batch, config.student.crop)
        foreground = _probabilities(model, shown, config, flips=flips)[:, 1:]
        foreground = put_back(window, foreground, size)
        total = torch.cat([1 - foreground.sum(1, keepdim=True), foreground], 1)
    else:
        total = _probabilities(model, batch, config, flips=flips)
    return [f.leave(p) for f, p in zip(frames, total, strict=True)]


def _probabilities(model: nn.Module, batch: Tensor, config: Config, *, flips: bool) -> Tensor:
    """Compute class probabilities (B, C, S, S) of square images on the CPU, whatever S is."""
    size = batch.shape[-1]
    padding = -size % config.student.multiple
    views: list[list[int]] = [[], [-1], [-2], [-2, -1]] if flips else [[]]
    total = torch.zeros(())
    for turned in views:
        padded = nn.functional.pad(batch.flip(turned), (0, padding, 0, padding))
        probability = logits_of(model, padded, bf16=config.bf16).softmax(1)[..., :size, :size]
        total = total + probability.flip(turned).cpu() / len(views)
    return total


def predict_volume(
    model: nn.Module, images: Sequence[np.ndarray], config: Config, channels: int, *, flips: bool = False
) -> list[Tensor]:
    """Predict class probabilities (C, H, W) of the slices of one volume, each at its own size.

    With `student.window` a first pass on the whole images finds the region of interest of the volume, and a
    second pass predicts it; slices of different sizes are volumes of their own.
    """
    shown = with_neighbors(images, config.student.neighbors)

    def predicted(window: Window) -> list[Tensor]:
        found: list[Tensor] = []
        for start in range(0, len(images), config.batch_eval):
            part = shown[start : start + config.batch_eval]
            found += predict_slices(model, part, config, channels, flips=flips, window=window)
        return found

    if config.student.window and len({image.shape for image in images}) > 1:
        alone = replace(config, student=replace(config.student, neighbors=0))
        return [predict_volume(model, [i], alone, channels, flips=flips)[0] for i in shown]
    first = predicted(WHOLE)
    if not config.student.window or not first:
        return first
    box = structure_box(np.stack([p.argmax(0).byte().numpy() for p in first]))
    frame = Frame(images[0].shape[0], images[0].shape[1], config.student.size)
    on_square = None if box is None else frame.box_on_square(box)
    window = window_around(on_square, frame.size, config.student.window)
    return first if window == WHOLE else predicted(window)


def with_channels(image: np.ndarray, channels: int) -> Tensor:
    """Return an image, uint8 (H, W), (H, W, 3) or (H, W, channels), as float (channels, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if channels == 1:
        return pixels.mean(0, keepdim=True)
    return pixels.expand(channels, -1, -1)


def predict_labels(
    model: nn.Module,
    dataset: Dataset,
    cases: Sequence[Case],
    config: Config,
    channels: int,
    *,
    flips: bool = False,
) -> dict[str, list[np.ndarray]]:
    """Predict class ids uint8 (H, W) of every slice of some cases, each at its own size, by case name."""
    labels: dict[str, list[np.ndarray]] = {}
    for case in cases:
        images = [dataset.image(s) for s in case.slices]
        predicted = predict_volume(model, images, config, channels, flips=flips)
        labels[case.name] = [p.argmax(0).byte().numpy() for p in predicted]
    return labels
