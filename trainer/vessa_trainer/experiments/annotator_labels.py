"""Score the annotator's own labels, without any student."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa.datasets import Case, Dataset
from vessa.images import read_image
from vessa.report.cases import annotated, best_median_worst, score_labels
from vessa_trainer.config import Config, save_config, shareable
from vessa_trainer.data.splits import Splits, cases_of
from vessa_trainer.outages import interruptions
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.reporting.run_report import write_run_report


def labels_of(feed: AnnotationFeed, cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
    """Return VESSA's labels of every slice of some cases, uint8 (H, W) each, by the case's name."""
    feed.prefetch([s.name for case in cases for s in case.slices])
    return {case.name: [p.labels for p in feed.get([s.name for s in case.slices])] for case in cases}


def score_alone(
    config: Config, dataset: Dataset, splits: Splits, feed: AnnotationFeed, source: dict[str, Any]
) -> dict[str, Any]:
    """Score the annotator's labels of validation and test cases; write the latter to `labels`."""
    out, started = Path(config.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    cases = {k: annotated(dataset, cases_of(dataset, getattr(splits, k))) for k in ("val", "test")}
    labels = {key: labels_of(feed, some) for key, some in cases.items()}
    write_labels(out, cases["test"], labels["test"])
    summary = {
        "method": config.semi.method,
        "seed": config.seed,
        "steps": 0,
        "best_step": 0,
        "selected_by": "none: nothing is trained",
        "seconds": round(time.monotonic() - started, 1),
        "wait_share": 0.0,
        "groups": {k: len(v) for k, v in vars(splits).items()},
        "annotator": source,
        "feed": feed.stats(),
        "interruptions": interruptions(out),
        "advice": [],
        **{key: score_labels(dataset, cases[key], labels[key]).to_dict() for key in cases},
        "config": shareable(config),
    }
    rows = best_median_worst(dataset, cases["test"], {"VESSA": labels["test"]}, "VESSA")
    write_run_report(out, summary, rows, dataset)
    return summary


def write_labels(run: Path, cases: Sequence[Case], labels: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write the labels of some cases into a run's folder, an 8-bit PNG of class ids for each slice."""
    folder = run / "labels"
    folder.mkdir(exist_ok=True)
    for case in cases:
        for item, one in zip(case.slices, labels[case.name], strict=True):
            Image.fromarray(one).save(folder / f"{item.name}.png")


def read_labels(run: Path, cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
    """Read what `write_labels` wrote."""
    return {c.name: [read_image(run / "labels" / f"{s.name}.png") for s in c.slices] for c in cases}
