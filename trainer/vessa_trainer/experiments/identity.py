"""Tell whether two runs are the same experiment: the same settings on the same data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vessa import atomic_write
from vessa.errors import InvalidConfig
from vessa_trainer.config import Config, to_dict
from vessa_trainer.data.examination import Examination
from vessa_trainer.data.splits import PARTS, SplitPlan
from vessa_trainer.data.training_data import TrainingData

DATA_FILE = "data.json"
# These settings may differ between the starts of one run: where things are, and how fast.
_PLACE = ("title", "out", "device", "threads", "batch_eval", "checkpoint_every", "cache", "trackers")
_DATA_PLACE = ("root", "prepared", "prepared_gb")  # the data's contents are compared, not their place
_ANNOTATOR_PLACE = (
    "url",
    "api_key",
    "serves",
    "batch",
    "lookahead_batches",
    "patience_s",
    "labels",
    "allow_change",
)
_MOST = 4  # differences in one message

Identity = dict[str, Any]


def require_same_config(config: Config, there: Config, run: Path) -> None:
    """Raise InvalidConfig that names the settings in which a run's config differs."""
    ours, theirs = _settings(config), _settings(there)
    differences = [
        f"{key} {theirs[key]!r} there, {ours[key]!r} here"
        for key in sorted(ours.keys() & theirs.keys())  # keys of one side show only that the method differs
        if ours[key] != theirs[key]
    ]
    if differences:
        raise InvalidConfig(
            f"{run} holds a run of another config ({_listed(differences)}). Choose another --out, or delete "
            "the run"
        )


def _settings(config: Config) -> dict[str, Any]:
    """Return all settings that change a run's result, as flat keys."""
    tree = to_dict(config)
    for key in _PLACE:
        del tree[key]
    for key in _DATA_PLACE:
        del tree["data"][key]
    for key in _ANNOTATOR_PLACE:
        del tree["annotator"][key]
    if not config.annotated:  # settings of the annotator change nothing here
        del tree["annotator"], tree["feedback"]
        tree["semi"] = {
            k: v for k, v in tree["semi"].items() if not k.startswith("vessa_") and k != "alpha_v_floor"
        }
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            flat[key] = value
    return flat


def data_identity(data: TrainingData, plan: SplitPlan, examination: Examination) -> Identity:
    """Return what a run's data are: classes, patients of each split, digests of images and masks.

    Masks of unlabeled patients are left out: nothing is learned from them.
    """
    spacings: dict[str, list[Any]] = {}
    for case in data.cases():
        spacings.setdefault(case.group, []).append(None if case.spacing is None else list(case.spacing))
    patients: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        for group in getattr(plan.splits, part):
            patient = examination.patients[group]
            patients[group] = {"images": patient.images, "image_digest": patient.image_digest}
            patients[group]["spacing"] = spacings[group]  # HD95 depends on it
            if part != "unlabeled":
                patients[group] |= {"masks": patient.masks, "mask_digest": patient.mask_digest}
    return {
        "classes": {str(i): name for i, name in data.source.classes.items()},
        "splits": {part: list(getattr(plan.splits, part)) for part in PARTS},
        "sources": dict(plan.sources),
        "patients": patients,
    }


def write_identity(run: Path, identity: Identity) -> None:
    """Write a run's data identity, whole or not at all."""
    atomic_write.write_text(run / DATA_FILE, json.dumps(identity, indent=1) + "\n")


def read_identity(run: Path) -> Identity | None:
    """Return a run's data identity; None for a run of an earlier version, which recorded none."""
    path = run / DATA_FILE
    if not path.is_file():
        return None
    try:
        identity: Identity = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidConfig(f"{path} is damaged. Choose another --out, or delete the run") from error
    return identity


def require_same_data(ours: Identity, run: Path) -> None:
    """Raise InvalidConfig that names what has changed in a run's data since it began."""
    theirs = read_identity(run)
    differences = [] if theirs is None else _differences(ours, theirs)
    if differences:
        raise InvalidConfig(
            f"the data have changed since the run in {run} began: {_listed(differences)}. Its scores are of "
            "the old "
            "data. Choose another --out, or delete the run"
        )


def _differences(ours: Identity, theirs: Identity) -> list[str]:
    found = []
    if ours["classes"] != theirs["classes"]:
        found.append(f"classes were {theirs['classes']} and are {ours['classes']}")
    for part in PARTS:
        before, now = set(theirs["splits"][part]), set(ours["splits"][part])
        changes = [
            f"{sign}{g}"
            for sign, groups in (("+", now - before), ("-", before - now))
            for g in sorted(groups)
        ]
        if changes:
            found.append(f"{part} patients {_listed(changes)}")
    for key, what in (("image_digest", "images"), ("mask_digest", "masks"), ("spacing", "spacings")):
        changed = _changed(key, ours["patients"], theirs["patients"])
        if changed:
            found.append(f"{what} of {len(changed)} patients ({_listed(changed)})")
    return found


def _changed(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    both = sorted(ours.keys() & theirs.keys())
    return [g for g in both if key in ours[g] and key in theirs[g] and ours[g][key] != theirs[g][key]]


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_MOST]) + (f" and {len(items) - _MOST} more" if len(items) > _MOST else "")
