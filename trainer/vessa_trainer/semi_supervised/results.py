"""Score models, describe progress, and carry what a run ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vessa.datasets import Case, Dataset
from vessa.errors import VessaError
from vessa.metrics import Scores
from vessa.report.cases import annotated, score_labels
from vessa_trainer.config import Config
from vessa_trainer.data.examination import examine
from vessa_trainer.data.overview import shows_class
from vessa_trainer.data.splits import cases_of
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.students.inference import predict_labels


class Interrupted(VessaError):
    """The run was stopped and saved; its message ends with the line that resumes it."""

    code = "interrupted"


@dataclass(frozen=True)
class RunResult:
    """Scores of a finished run.

    best_step: the step of the delivered teacher: the best by validation Dice, else the last; val, test: its
    scores;
    selected: whether validation chose it
    """

    out: Path
    steps: int
    best_step: int
    selected: bool
    val: Scores
    test: Scores
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


def final_scores(
    model: nn.Module,
    dataset: Dataset,
    val_cases: Sequence[Case],
    test_groups: Sequence[str],
    config: Config,
    channels: int,
) -> tuple[Scores, Scores]:
    """Score the delivered model on validation cases and on the test patients.

    Patients whose masks show no class have no score: any prediction there would count as 0.
    """
    val = evaluate(model, dataset, val_cases, config, channels)
    scored = shows_class(test_groups, examine(dataset))
    test_cases = cases_of(dataset, test_groups) if scored else []
    return val, evaluate(model, dataset, test_cases, config, channels)


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
