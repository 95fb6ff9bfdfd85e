"""Score models, describe progress, and carry what a run ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vessa.datasets import Case, Dataset
from vessa.errors import VessaError
from vessa.metrics import Scores
from vessa.report.cases import Labels, annotated, score_labels
from vessa_trainer.config import Config
from vessa_trainer.data.examination import examine
from vessa_trainer.data.overview import shows_class
from vessa_trainer.data.splits import Splits, cases_of
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.students.inference import predict_labels


class Interrupted(VessaError):
    """The run was stopped and saved; its message ends with the line that resumes it."""

    code = "interrupted"


@dataclass(frozen=True)
class RunResult:
    """Hold the outcome of a finished run.

    teacher: the delivered one; best_step: its step, the best by validation Dice, else the last
    selected: whether validation chose it
    cases, labels, scores: of "val" and "test": the judged cases, the teacher's labels and scores of them
    """

    out: Path
    steps: int
    best_step: int
    selected: bool
    teacher: nn.Module
    cases: Mapping[str, Sequence[Case]]
    labels: Mapping[str, Labels]
    scores: Mapping[str, Scores]
    seconds: float


def evaluate(
    model: nn.Module, dataset: Dataset, cases: Sequence[Case], config: Config, channels: int
) -> Scores:
    """Score a model on volumes; slices without a mask are left out."""
    cases = annotated(dataset, cases)
    return score_labels(dataset, cases, predict_labels(model, dataset, cases, config, channels))


def score_annotator(dataset: Dataset, cases: Sequence[Case], feed: AnnotationFeed) -> Scores:
    """Score the annotator's newest labels of some annotated cases."""
    labels = {
        case.name: [p.labels for p in feed.get([s.name for s in case.slices], newest=True)] for case in cases
    }
    return score_labels(dataset, cases, labels)


def judged_cases(dataset: Dataset, splits: Splits, *, selects: bool) -> dict[str, list[Case]]:
    """Return the annotated cases of "val" and "test" that a run is scored on.

    selects: whether a validation patient can be scored. Test patients whose masks show no class have no score
    either: any prediction there would count as 0.
    """
    scored = {"val": selects, "test": shows_class(splits.test, examine(dataset))}
    return {
        part: annotated(dataset, cases_of(dataset, getattr(splits, part))) if judged else []
        for part, judged in scored.items()
    }


def describe(
    config: Config, step: int, best: float | None, waited: float, figures: Mapping[str, float]
) -> str:
    """Return the line beside the progress bar. best: validation Dice, None while not scored."""
    parts = [f"{config.semi.method} {step}/{config.steps}", f"loss {figures['loss']:.3f}"]
    for key, text in (("eta", "eta"), ("confident", "confident"), ("agreement", "agree")):
        if key in figures:
            parts.append(f"{text} {figures[key]:.2f}")
    val = "val not scored" if best is None else f"val {best:.3f}"
    return " ".join([*parts, val, f"waited {waited:.0f}s"])
