"""Choose the settings of a run from its data and this machine, measure a step, and explain each choice."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from vessa import atomic_write
from vessa.errors import InvalidConfig
from vessa_trainer.config import Config, load_config, shareable, to_dict
from vessa_trainer.data.overview import shows_class
from vessa_trainer.data.splits import slices_of
from vessa_trainer.experiments.run import RunData, open_run_data
from vessa_trainer.students.networks import build_student, logits_of

_CPU_SIDE, _GPU_SIDE = 160, 256  # px, the largest squares that a run is planned with
_LONGEST, _SHORTEST = 30_000, 200  # steps: UniMatch V2's schedule, and the fewest that teach anything
_VALIDATIONS = 20
_SMALL = 30  # px of a structure in the resized image, below which its Dice depends on single pixels
_LONG_S = 3600.0
_STEPS_MEASURED = 3


@dataclass(frozen=True)
class Plan:
    """A config and why it is so.

    config: the whole of it; reasons: setting to reason; warnings: what to change before time is spent;
    step_s, seconds: measured time of a step, estimate of the run
    """

    config: Config
    reasons: dict[str, str]
    warnings: list[str]
    step_s: float
    seconds: float

    def lines(self) -> list[str]:
        """Return the settings with their reasons, and the time."""
        tree = to_dict(self.config)
        shown = [f"{key}: {_value(tree, key)}  ({reason})" for key, reason in self.reasons.items()]
        label = " without waiting for the annotator" if self.config.annotated else ""
        return [*shown, f"about {_duration(self.seconds)}{label}, {self.step_s:.2f} s a step measured here"]

    def write(self, path: Path) -> None:
        """Write the planned settings as a YAML file to edit, each with its reason. Raises InvalidConfig."""
        if path.exists():
            raise InvalidConfig(f"{path} exists. Choose another --out, or delete it")
        text = "# Written by `vessa-trainer plan`. Edit it, then: vessa-trainer fit --config " + f"{path}\n"
        text += "".join(f"# {key}: {reason}\n" for key, reason in self.reasons.items())
        chosen = _other_than(shareable(self.config), to_dict(Config()), set(self.reasons))
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write.write_text(path, text + yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))


def _other_than(
    tree: dict[str, Any], defaults: dict[str, Any], always: set[str], prefix: str = ""
) -> dict[str, Any]:
    """Return the settings that differ from the defaults, and those in `always`."""
    kept = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            if inner := _other_than(value, defaults[key], always, f"{key}."):
                kept[key] = inner
        elif value != defaults[key] or f"{prefix}{key}" in always:
            kept[key] = value
    return kept


def make_plan(base: Config, minutes: float) -> Plan:
    """Plan a run on the data of a config. minutes: the time that it may take here.

    Raises InvalidDataset as a run would.
    """
    found = open_run_data(base)
    cuda = torch.cuda.is_available()
    threads = len(os.sched_getaffinity(0))
    shapes = [found.data.image(item).shape for item in _sample(found)]
    long_side = int(median(max(shape[:2]) for shape in shapes))
    size = _side(long_side, base, _GPU_SIDE if cuda else _CPU_SIDE)
    batch = _batch(found)
    config = replace(
        base,
        student=replace(base.student, size=size, crop=size),
        batch_labeled=batch,
        batch_unlabeled=batch,
        device="cuda" if cuda else "cpu",
        threads=0 if cuda else threads,
    )
    step_s = measure_step(config, channels=max((*shape, 1)[2] for shape in shapes))
    steps = int(min(_LONGEST, max(_SHORTEST, minutes * 60 / step_s)))
    every = max(1, steps // _VALIDATIONS)
    config = replace(config, steps=steps, eval_every=every, checkpoint_every=every)
    seconds = steps * step_s
    reasons = {
        "student.size": f"images are {long_side} px long; at most {_GPU_SIDE if cuda else _CPU_SIDE} px "
        f"{'on a GPU' if cuda else 'on a CPU'}, a multiple of {base.student.multiple}",
        "student.crop": "the whole square",
        "batch_labeled": f"{_count(found, 'labeled')} labeled images",
        "batch_unlabeled": "as many unlabeled images",
        "device": "a GPU is there" if cuda else "no GPU is there",
        "threads": "torch chooses" if cuda else f"{threads} cores may be used",
        "steps": f"fit into {minutes:g} minutes, between {_SHORTEST} and {_LONGEST}",
        "eval_every": f"{_VALIDATIONS} validations",
        "checkpoint_every": "as often as validations",
    }
    return Plan(config, reasons, _warnings(found, config, seconds, minutes), step_s, seconds)


def measure_step(config: Config, channels: int) -> float:
    """Return the median time of a step's network passes on random images, s."""
    if config.threads:
        torch.set_num_threads(config.threads)
    student_config = replace(config.student, pretrained=False, weights=None, init=None)
    student = build_student(student_config, channels, 2).to(config.device)
    teacher = build_student(student_config, channels, 2).to(config.device).eval()
    side, unlabeled = config.student.crop, config.batch_unlabeled
    semi = config.semi.method != "supervised"
    images = torch.rand(
        config.batch_labeled + 2 * unlabeled * semi, channels, side, side, device=config.device
    )
    times = []
    for _ in range(_STEPS_MEASURED):
        started = time.perf_counter()
        if semi:
            with torch.no_grad():
                logits_of(teacher, images[:unlabeled], bf16=config.bf16)
        logits_of(student, images, bf16=config.bf16).square().mean().backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return median(times)


def plan_file(data: str, overrides: Sequence[str], minutes: float, out: Path) -> Plan:
    """Plan a run on a data folder and write its YAML file."""
    config = load_config(None, overrides)
    plan = make_plan(replace(config, data=replace(config.data, root=data)), minutes)
    plan.write(out)
    return plan


def _sample(found: RunData) -> list[Any]:
    items = slices_of(found.data, [*found.plan.splits.labeled, *found.plan.splits.val])
    return items[:: max(1, len(items) // 50)]


def _side(long_side: int, base: Config, limit: int) -> int:
    multiple = base.student.multiple
    return max(multiple, min(long_side, limit) // multiple * multiple)


def _count(found: RunData, part: str) -> int:
    return sum(found.examination.patients[g].images for g in getattr(found.plan.splits, part))


def _batch(found: RunData) -> int:
    return 8 if _count(found, "labeled") >= 8 else 4


def _warnings(found: RunData, config: Config, seconds: float, minutes: float) -> list[str]:
    warnings = []
    if seconds > minutes * 60 * 1.1:
        warnings.append(
            f"even {_SHORTEST} steps take about {_duration(seconds)} here: lower student.size, or use a GPU"
        )
    elif config.steps == _SHORTEST or (config.device == "cpu" and config.steps < 1000):
        warnings.append(f"{config.steps} steps are few: give more --minutes, or lower student.size")
    if seconds >= _LONG_S and not shows_class(found.plan.splits.val, found.examination):
        warnings.append("no validation patient can be scored: annotate some before hours are spent")
    for name, area in _areas(found, config).items():
        if area < _SMALL:
            warnings.append(
                f"'{name}' covers {area:.0f} px of the median labeled slice at student.size "
                f"{config.student.size}: "
                "choose a larger size, or crop the images around it"
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


def _value(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"
