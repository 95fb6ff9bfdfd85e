"""Choose on the validation patients how `predict` uses a run's students, and score the choice."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vessa.datasets import Case, Dataset
from vessa.errors import VessaError
from vessa.report.cases import Labels, score_labels
from vessa_trainer.prediction.flips import FlipChoice, choose_flips
from vessa_trainer.prediction.fusion import WEIGHTS, Fusion, fuse
from vessa_trainer.prediction.postprocessing import Postprocessing, choose
from vessa_trainer.pseudo_labels.cleaning import VolumeCleaner, single_classes
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.types import PseudoLabel
from vessa_trainer.semi_supervised.results import RunResult
from vessa_trainer.semi_supervised.trainer import Run
from vessa_trainer.students.inference import predict_labels, predict_volume

_log = logging.getLogger(__name__)

Predict = Callable[[str, bool], Labels]  # (part, flips) to the labels of its cases


def deliver(run: Run, result: RunResult) -> dict[str, Any]:
    """Choose on the validation cases how `predict` uses the delivered teacher."""
    if not run.selects:
        return {"flips": vars(FlipChoice()), "postprocessing": {}}
    dataset, cases = run.dataset, result.cases

    def labels(part: str, flips: bool) -> Labels:
        if not flips:
            return result.labels[part]
        return predict_labels(result.teacher, dataset, cases[part], run.config, run.channels, flips=True)

    single = single_classes(dataset, run.splits.labeled)
    return choose_delivery(run.out, dataset, cases, labels, by_volume=run.geometry.volumes, single=single)


def deliver_fused(
    run: Run,
    result: RunResult,
    source: Mapping[str, Any],
    unprompted: Callable[[], AnnotationFeed],
) -> dict[str, Any]:
    """Choose how `predict --with-vessa` fuses the teacher and the annotator; nothing where it is away.

    source: the record of the run's annotator; unprompted: opens a feed of labels without prompts
    """
    config, dataset, cases = run.config, run.dataset, result.cases
    flips = FlipChoice.read(run.out).used
    cleaner = VolumeCleaner(dataset, run.splits.labeled) if config.annotator.clean else None
    fields = {
        "bank": source["bank"]["name"],
        "bank_digest": source["bank"]["digest"],
        **{key: source[key] for key in ("model", "labels_version")},
        "template_choice": config.annotator.template_choice,
        "seed": config.seed,
        "views": config.annotator.views,
        "single": None if cleaner is None else list(cleaner.single),
    }

    def probabilities(case: Case) -> list[Tensor]:
        images = [dataset.image(s) for s in case.slices]
        return predict_volume(result.teacher, images, config, run.channels, flips=flips)

    feed = unprompted()
    try:
        names = [s.name for part in cases.values() for case in part for s in case.slices]
        feed.prefetch(names)
        return choose_fusion(
            run.out,
            dataset,
            cases,
            probabilities,
            lambda case: feed.get([s.name for s in case.slices]),
            fields,
        )
    except VessaError as error:
        _log.warning("predict --with-vessa is not possible with this run: %s", error.message)
        return {}
    finally:
        feed.close()


def choose_delivery(
    run: Path,
    dataset: Dataset,
    cases: Mapping[str, Sequence[Case]],
    predict: Predict,
    *,
    by_volume: bool,
    single: Collection[int],
) -> dict[str, Any]:
    """Choose flips and post-processing, write them to the run's folder, and return them with their scores.

    cases: annotated ones of "val" and "test"; by_volume: whether a case is a volume when it is predicted;
    single: classes that form one component in every labeled volume.
    Scores of both parts come back as `val_delivered` and `test_delivered` where anything is chosen.
    """

    def dice(labels: Labels) -> float | None:
        return score_labels(dataset, cases["val"], labels).mean["dice"]

    plain, mirrored = predict("val", False), predict("val", True)
    flips = choose_flips(dice(plain), dice(mirrored))
    chosen = mirrored if flips.used else plain
    rules = choose(
        [[dataset.mask(item) for item in case.slices] for case in cases["val"]],
        [chosen[case.name] for case in cases["val"]],
        sorted(dataset.classes),
        by_volume=by_volume,
        single=single,
    )
    flips.write(run)
    rules.write(run)
    found: dict[str, Any] = {
        "flips": vars(flips),
        "postprocessing": {dataset.classes[i]: vars(rule) for i, rule in rules.rules.items()},
    }
    if not flips.used and not rules.rules:
        return found
    for part, labels in (("val", chosen), ("test", predict("test", flips.used))):
        found[f"{part}_delivered"] = _scores(dataset, cases[part], labels, rules)
    return found


def _scores(dataset: Dataset, cases: Sequence[Case], labels: Labels, rules: Postprocessing) -> dict[str, Any]:
    cleaned = {case.name: rules.apply(labels[case.name]) for case in cases}
    return score_labels(dataset, cases, cleaned).to_dict()


def choose_fusion(
    run: Path,
    dataset: Dataset,
    cases: Mapping[str, Sequence[Case]],
    probabilities: Callable[[Case], list[Tensor]],
    vessa: Callable[[Case], list[PseudoLabel]],
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Choose the weight by which `predict --with-vessa` fuses student and annotator, and score both parts.

    cases: annotated ones of "val" and "test"; probabilities, vessa: the student's (C, H, W) and the
    annotator's labels of the slices of a case; source: the fields of `Fusion` that name the annotator.
    The run's post-processing is applied. Nothing comes back where no validation patient has a score.
    """
    rules = Postprocessing.read(run)

    def fused(part: str, weights: Sequence[float]) -> dict[float, dict[str, list[np.ndarray]]]:
        found: dict[float, dict[str, list[np.ndarray]]] = {weight: {} for weight in weights}
        for case in cases[part]:
            pairs = list(zip(probabilities(case), vessa(case), strict=True))
            for weight in weights:
                labels = [fuse(*pair, weight).argmax(0).byte().numpy() for pair in pairs]
                found[weight][case.name] = rules.apply(labels)
        return found

    tried = {
        weight: score_labels(dataset, cases["val"], labels)
        for weight, labels in fused("val", (0.0, *WEIGHTS)).items()
    }
    dice = {weight: value for weight, scores in tried.items() if (value := scores.mean["dice"]) is not None}
    if not dice:
        return {}
    weight = max(WEIGHTS, key=lambda one: dice[one])
    fusion = Fusion(weight=weight, before=dice[0.0], after=dice[weight], **source)
    fusion.write(run)
    test = score_labels(dataset, cases["test"], fused("test", [weight])[weight])
    return {
        "fusion": asdict(fusion),
        "val_fused": tried[weight].to_dict(),
        "test_fused": test.to_dict(),
    }
