"""Describe what a run will learn from, and refuse what would spoil it before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass

from vessa.datasets import Dataset, PngFolder
from vessa.errors import InvalidDataset
from vessa_trainer.config import Config
from vessa_trainer.data.examination import Examination, Problem
from vessa_trainer.data.splits import PARTS, SplitPlan

_MOST = 5  # names in one message
_FEW = 3  # images from which on the grouping of images into patients is judged


@dataclass(frozen=True)
class Overview:
    """The printed description of a data set.

    lines: facts; warnings: what may be meant, with the way to change it
    """

    lines: list[str]
    warnings: list[str]


def overview(dataset: Dataset, plan: SplitPlan | None, examination: Examination) -> Overview:
    """Describe images, patients, classes and splits. plan: None where the splits cannot be read."""
    lines, warnings = _about_patients(dataset, examination)
    if plan is not None:
        lines += [_about_part(part, plan, examination) for part in PARTS]
        warnings += _about_scores(plan, examination)
    return Overview(lines, warnings)


def _about_patients(dataset: Dataset, examination: Examination) -> tuple[list[str], list[str]]:
    items, patients = dataset.slices(), examination.patients
    annotated = sum(patient.annotated for patient in patients.values())
    layout = type(getattr(dataset, "source", dataset)).__name__
    example = items[0]
    lines = [
        f"{dataset.name}: {layout}, {len(items)} images of {len(patients)} patients, {annotated} of them "
        "annotated; "
        f"for example image {example.name} is of patient {example.group}",
        *_about_names(dataset),
        "classes: " + ", ".join(f"{i} {name}" for i, name in _stored_classes(dataset).items()),
    ]
    warnings = []
    change = (
        "state the patients: in files.csv or by patterns in meta.json for pictures, in `groups` of "
        "dataset.json for "
        "nnU-Net"
    )
    if len(items) >= _FEW and len(patients) == len(items):
        warnings.append(
            f"every image is a patient of its own ({example.name}, {items[1].name}, ...): where several "
            "images show "
            f"one patient, that patient can be in training and in test. If so, {change}"
        )
    elif len(items) >= _FEW and len(patients) == 1:
        warnings.append(
            f"all {len(items)} images are of one patient, '{example.group}'. If they are not, {change}"
        )
    channels: tuple[str, ...] = getattr(getattr(dataset, "source", dataset), "channels", ())
    if len(channels) > 1:
        warnings.append(
            f"{len(channels)} channels ({', '.join(channels)}): a run learns from one. Choose it with "
            f"--set data.channel={channels[-1]}"
        )
    ignored = sum(patient.ignored for patient in patients.values())
    if ignored:
        warnings.append(f"{ignored} masks mark pixels to ignore: they are neither learned from nor scored")
    return lines, warnings


def _about_names(dataset: Dataset) -> list[str]:
    """Say by which names pictures, masks and patients were told apart, where the layout has a choice."""
    source = getattr(dataset, "source", dataset)
    return [f"file names: {source.listing.pattern}"] if isinstance(source, PngFolder) else []


def _stored_classes(dataset: Dataset) -> dict[int, str]:
    source: Dataset = getattr(dataset, "source", dataset)
    return source.classes


def _about_part(part: str, plan: SplitPlan, examination: Examination) -> str:
    groups = getattr(plan.splits, part)
    patients = [examination.patients[g] for g in groups]
    images, masks = sum(p.images for p in patients), sum(p.masks for p in patients)
    named = ", ".join(groups[:_MOST]) + (", ..." if len(groups) > _MOST else "")
    return (
        f"{part}: {len(groups)} patients, {images} images, {masks} masks"
        f"{f' ({named})' if groups else ''}; {plan.sources[part]}"
    )


def shows_class(groups: Sequence[str], examination: Examination) -> bool:
    """Tell whether some patient has a mask that shows a class, so that scores mean something."""
    return any(examination.patients[g].annotated for g in groups)


def _about_scores(plan: SplitPlan, examination: Examination) -> list[str]:
    warnings = []
    if not shows_class(plan.splits.val, examination):
        warnings.append(
            f"no validation patient can be scored: {_why_unscored(plan.splits.val, examination)}. No teacher "
            "can be "
            "chosen, so the last one is kept. Annotate validation patients to choose the best"
        )
    if not shows_class(plan.splits.test, examination):
        warnings.append(
            f"no test patient can be scored: {_why_unscored(plan.splits.test, examination)}. The run has no "
            "test score"
        )
    return warnings


def _why_unscored(groups: Sequence[str], examination: Examination) -> str:
    if not groups:
        return "the split is empty"
    if not any(examination.patients[g].masks for g in groups):
        return f"none of the {len(groups)} patients has a mask"
    return "their masks show no class"


def require_trainable(config: Config, plan: SplitPlan, examination: Examination) -> None:
    """Check all that a run needs. Raises InvalidDataset that names what is wrong, with counts."""
    splits = plan.splits
    if not splits.labeled:
        raise InvalidDataset(
            f"the labeled split is empty ({plan.sources['labeled']}): name at least one patient"
        )
    semi = config.semi.method not in ("supervised", "vessa_alone")
    if semi and not splits.unlabeled:
        raise InvalidDataset(
            f"the unlabeled split is empty ({plan.sources['unlabeled']}, without the labeled patients): "
            "method "
            f"{config.semi.method} learns from unlabeled images. Add patients to it, or use --method "
            "supervised"
        )
    with_masks = {*splits.labeled, *splits.val, *splits.test}
    needed = with_masks | (set(splits.unlabeled) if semi else set())
    problems = [
        p for p in examination.problems if p.group in with_masks or (p.group in needed and not p.in_mask)
    ]
    if problems:
        raise InvalidDataset(_problem_text(problems))
    missing = [name for g in splits.labeled for name in examination.patients[g].unannotated]
    if missing:
        raise InvalidDataset(
            f"{len(missing)} images of labeled patients have no mask: {', '.join(missing[:_MOST])}. Annotate "
            "them, "
            "or take these patients out of the labeled split"
        )
    if not shows_class(splits.labeled, examination):
        raise InvalidDataset(
            f"no mask of the {len(splits.labeled)} labeled patients shows a class: there is nothing to learn"
        )


def _problem_text(problems: Sequence[Problem]) -> str:
    shown = "; ".join(p.message for p in problems[:_MOST])
    more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
    return f"{len(problems)} images or masks cannot be used: {shown}{more}. `vessa-trainer verify` lists all"
