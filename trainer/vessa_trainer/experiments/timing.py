"""Measure on this machine and these data how long a run will take, before it starts."""

import logging
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from rich.console import Console

from vessa.datasets import Slice
from vessa_trainer.config import Config
from vessa_trainer.data.overview import shows_class
from vessa_trainer.data.prepared import PreparedSlices
from vessa_trainer.data.splits import cases_of, slices_of
from vessa_trainer.experiments.run_data import RunData
from vessa_trainer.pseudo_labels.types import LabelBatch, PseudoLabel
from vessa_trainer.pseudo_labels.view_average import VIEWS
from vessa_trainer.semi_supervised.batches import labeled_batch, unlabeled_views
from vessa_trainer.semi_supervised.objective import compute_loss
from vessa_trainer.semi_supervised.schedule import update_teacher
from vessa_trainer.students.inference import open_device, predict_volume
from vessa_trainer.students.networks import build_student, parameter_groups

_log = logging.getLogger(__name__)

_WORTH_STEPS = 200  # a run of fewer is over before it is measured
_LONG_S = 3600.0
_SMALL = 30  # px of a structure in the resized image, below which its Dice depends on single pixels
_STEPS = 3  # that are measured after a first one, which also allocates


@dataclass(frozen=True)
class Estimate:
    """The time of one run.

    steps, step_s: training steps, and the measured time of one
    validations, validation_s: validations, and the time of one from a measured volume
    labels: requests to the annotator for one image; label_s: the measured time of one, None where it was not
    """

    steps: int
    step_s: float
    validations: int
    validation_s: float
    labels: int
    label_s: float | None

    @property
    def seconds(self) -> float:
        """Time of the whole run; without that of the annotator where it was not measured."""
        waiting = self.labels * (self.label_s or 0.0)
        return self.steps * self.step_s + self.validations * self.validation_s + waiting

    def text(self) -> str:
        """Say the time and what it consists of."""
        parts = [f"{self.steps} steps of {self.step_s:.2f} s"]
        if self.validations:
            parts.append(f"{self.validations} validations of {self.validation_s:.1f} s")
        if self.labels and self.label_s is not None:
            parts.append(f"{self.labels} labels of {self.label_s:.2f} s")
        text = f"about {duration(self.seconds)} on this machine: {', '.join(parts)}"
        if self.labels and self.label_s is None:
            text += f"; besides, the annotator makes {self.labels} labels, whose time was not measured"
        return text


def duration(seconds: float) -> str:
    """Return a time in the unit that fits it."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"


def estimate(config: Config, found: RunData, label_s: float | None = None) -> Estimate:
    """Measure a few steps and one validation volume of a config. label_s: time of one label, s."""
    if config.threads:
        torch.set_num_threads(config.threads)
    step_s, validation_s = _measure(config, found)
    return Estimate(
        steps=config.steps,
        step_s=step_s,
        validations=-(-config.steps // config.eval_every),
        validation_s=validation_s,
        labels=label_requests(config, found),
        label_s=label_s,
    )


def label_requests(config: Config, found: RunData) -> int:
    """Return how many images the annotator will label: each once, and those of each feedback round again.

    With `annotator.views` each view counts as an image; feedback asks for the plain image alone.
    """
    if not config.annotated or config.annotator.labels is not None:
        return 0
    splits = found.plan.splits
    unlabeled = sum(found.examination.patients[g].images for g in splits.unlabeled)
    judged = sum(found.examination.patients[g].images for g in (*splits.val, *splits.test))
    first = (unlabeled + judged) * (1 + len(VIEWS) if config.annotator.views else 1)
    if not config.feedback.enabled or config.semi.method == "vessa_alone":
        return first
    left = config.steps - int(config.feedback.start * config.steps)
    rounds = -(-left // config.feedback.every)
    again = rounds * min(unlabeled, config.feedback.every * config.batch_unlabeled)
    return first + again


def announce_time(configs: Sequence[Config], found: Sequence[RunData], console: Console | None) -> None:
    """Print how long some runs will take together, and log what would make that time badly spent.

    Runs that differ by their random seed alone are measured once. Runs of few steps are not measured, and
    nothing is without a console.
    """
    pairs = [(c, f) for c, f in zip(configs, found, strict=True) if c.steps >= _WORTH_STEPS]
    if console is None or not pairs:
        return
    measured: dict[Config, Estimate] = {}
    total = 0.0
    for config, data in pairs:
        alike = replace(config, seed=0, out="", title="")
        if config.semi.method == "vessa_alone":
            continue
        if alike not in measured:
            measured[alike] = estimate(config, data)
            text = f"{config.semi.method}: {measured[alike].text()}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        total += measured[alike].seconds
    if len(pairs) > 1:
        text = f"{len(pairs)} runs: about {duration(total)}, without the annotator's labels"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for warning in worth_warnings(pairs[0][1], pairs[0][0], total):
        _log.warning("%s", warning)


def worth_warnings(found: RunData, config: Config, seconds: float) -> list[str]:
    """Return what would make the time of runs badly spent."""
    warnings = []
    if seconds >= _LONG_S and not shows_class(found.plan.splits.val, found.examination):
        warnings.append("no validation patient can be scored: annotate some before hours are spent")
    if seconds >= _LONG_S and config.device == "cpu" and torch.cuda.is_available():
        warnings.append("a GPU is there and device is cpu: set device=cuda before hours are spent")
    for name, area in _areas(found, config).items():
        if area < _SMALL:
            warnings.append(
                f"'{name}' covers {area:.0f} px of the median labeled slice at student.size "
                f"{config.student.size}: choose a larger size, or crop the images around it"
            )
    return warnings


def _areas(found: RunData, config: Config) -> dict[str, float]:
    """Return the median area of each class in labeled slices that show it, px of the resized image."""
    areas: dict[int, list[float]] = {}
    for item in slices_of(found.data, found.plan.splits.labeled):
        mask = found.data.mask(item)
        if mask is not None:
            scale = config.student.size / max(mask.shape)
            for class_id in found.data.classes:
                if pixels := int((mask == class_id).sum()):
                    areas.setdefault(class_id, []).append(pixels * scale**2)
    return {found.data.classes[i]: median(values) for i, values in sorted(areas.items())}


class _BlankLabels:
    """Labels of background for all images, which take as long to learn from as others."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        self._shapes = shapes

    def take(self, names: list[str]) -> LabelBatch:
        """Return a label for each name."""
        labels = [np.zeros(self._shapes[name], np.uint8) for name in names]
        return LabelBatch([PseudoLabel(one, np.full_like(one, 255)) for one in labels])


def _measure(config: Config, found: RunData) -> tuple[float, float]:
    """Return the median time of a whole step, and the time of a validation, s."""
    device, splits, data = open_device(config.device), found.plan.splits, found.data
    neighbors = config.student.neighbors

    def prepare(items: Sequence[Slice], count: int, *, need_masks: bool) -> PreparedSlices:
        chosen = items[:: max(1, len(items) // count)][:count]
        return PreparedSlices(data, chosen, config.student.size, need_masks=need_masks, neighbors=neighbors)

    labeled = prepare(slices_of(data, splits.labeled), config.batch_labeled, need_masks=True)
    unlabeled = None
    if config.semi.method != "supervised":
        unlabeled = prepare(slices_of(data, splits.unlabeled), config.batch_unlabeled, need_masks=False)
        channels = max(labeled.channels, unlabeled.channels)
        for part in (labeled, unlabeled):
            part.show_as(channels)
    # From noise: the time is the same, and no weights are needed yet.
    fresh = replace(config.student, pretrained=False, weights=None, init=None)
    torch.manual_seed(0)
    student = build_student(fresh, labeled.channels, max(data.classes) + 1).to(device)
    teacher = deepcopy(student).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(parameter_groups(student, config.optim), fused=True)
    generator = torch.Generator().manual_seed(0)
    source = None
    if config.annotated and unlabeled is not None:
        frames = zip(unlabeled.slices, unlabeled.frames, strict=True)
        source = _BlankLabels({item.name: (frame.height, frame.width) for item, frame in frames})

    def step() -> None:
        student.train()
        rows = [i % len(labeled) for i in range(config.batch_labeled)]
        views = None
        if unlabeled is not None:
            other = [i % len(unlabeled) for i in range(config.batch_unlabeled)]
            usual = labeled.usual_window(config.student.window)
            views = unlabeled_views(unlabeled, other, config, source, generator, device=device, usual=usual)
        batch = labeled_batch(labeled, rows, config, generator, device=device)
        loss, _ = compute_loss(student, teacher, batch, views, config, 0, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        update_teacher(teacher, student, 0.9)
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    times = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return median(times), _validation(teacher, config, found, labeled.channels)


def _validation(model: torch.nn.Module, config: Config, found: RunData, channels: int) -> float:
    """Return the time of a validation: student and teacher predict all cases; one case is measured."""
    cases = cases_of(found.data, found.plan.splits.val)
    slices = sum(len(case.slices) for case in cases)
    if not slices:
        return 0.0
    images = [found.data.image(item) for item in cases[0].slices]
    started = time.perf_counter()
    predict_volume(model, images, config, channels)
    return 2 * (time.perf_counter() - started) * slices / len(images)
