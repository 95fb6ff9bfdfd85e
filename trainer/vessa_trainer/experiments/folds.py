"""Train a student for each fold of a cross-validation, and deliver their average."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vessa import atomic_write
from vessa.datasets import Case
from vessa.errors import InvalidConfig
from vessa.report.cases import annotated, score_labels
from vessa.report.page import Page
from vessa.report.tables import Row, scores_from, table
from vessa_trainer.config import Config
from vessa_trainer.data.splits import cases_of
from vessa_trainer.data.training_data import TrainingData
from vessa_trainer.experiments.run import fit
from vessa_trainer.experiments.run_data import RunData, open_run_data
from vessa_trainer.experiments.run_lock import locked
from vessa_trainer.prediction.choices import choose_delivery
from vessa_trainer.prediction.delivery import FOLDS, DeliveredRun, open_run
from vessa_trainer.pseudo_labels.cleaning import single_classes
from vessa_trainer.reporting.run_report import SUMMARY
from vessa_trainer.semi_supervised.distributed import join

Labels = dict[str, list[np.ndarray]]


def fit_folds(
    config: Config, *, resume_line: str, resume: bool, console: Console | None = None
) -> dict[str, Any]:
    """Train `config.data.folds` runs in `fold-0`, `fold-1`, ... of the run's folder; returns the summary.

    Each fold validates on other patients and learns from other labeled ones; see `DataConfig.folds`. Flips
    and post-processing are chosen on all validation patients, each predicted by the student that has not
    seen it. The test patients are predicted by the average. Raises what `fit` raises.
    """
    if config.semi.method == "vessa_alone":
        raise InvalidConfig("method vessa_alone trains no student: a cross-validation has nothing to average")
    if join(config.device).count > 1:
        raise InvalidConfig("folds are trained one after the other, by one process: start without torchrun")
    out = Path(config.out)
    names = [f"fold-{number}" for number in range(config.data.folds)]
    runs = [
        replace(config, out=str(out / name), data=replace(config.data, fold=number))
        for number, name in enumerate(names)
    ]
    with locked(out):
        found = [open_run_data(run) for run in runs]  # nothing is trained where a later fold cannot be
        summaries = [
            fit(run, resume_line=resume_line, resume=resume, console=console, announce=number == 0)
            for number, run in enumerate(runs)
        ]
        atomic_write.write_text(out / FOLDS, json.dumps({"folds": names}) + "\n")
        summary = _deliver(out, found, summaries)
        _write_page(out, names, summaries, summary)
        atomic_write.write_text(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def _deliver(out: Path, found: Sequence[RunData], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose how the average is used, and score it."""
    data, run = found[0].data, open_run(out)
    by_fold = [annotated(data, cases_of(data, one.plan.splits.val)) for one in found]
    cases = {
        "val": [case for fold in by_fold for case in fold],
        "test": annotated(data, cases_of(data, found[0].plan.splits.test)),
    }

    def labels(part: str, flips: bool) -> Labels:
        if part == "test":
            return _labels(run, data, cases["test"], flips=flips)
        each = [replace(run, members=(member,)) for member in run.members]
        pairs = zip(each, by_fold, strict=True)
        return {k: v for one, fold in pairs for k, v in _labels(one, data, fold, flips=flips).items()}

    geometry = run.geometry
    chosen = choose_delivery(
        out,
        data,
        cases,
        labels,
        by_volume=geometry is not None and geometry.volumes,
        single=single_classes(data, {group for one in found for group in one.plan.splits.labeled}),
    )
    test = score_labels(data, cases["test"], labels("test", False))
    values = [value for one in summaries if (value := one["val"]["mean"]["dice"]) is not None]
    several = len(values) > 1
    mean = float(np.mean(values)) if several else None
    spread = float(np.std(values, ddof=1)) if several else None
    shown = "not scored" if test.mean["dice"] is None else f"{test.mean['dice']:.3f}"
    text = f"test Dice of the average of {len(summaries)} students {shown}"
    if mean is not None:
        text += f"; validation Dice of the folds {mean:.3f} ± {spread:.3f}"
    return {
        "method": summaries[0]["method"],
        "folds": [str(out / f"fold-{number}") for number in range(len(summaries))],
        "val_dice": [one["val"]["mean"]["dice"] for one in summaries],
        "val_dice_mean": mean,
        "val_dice_std": spread,
        "test_dice": [one["test"]["mean"]["dice"] for one in summaries],
        "dice": test.mean["dice"],
        "test": test.to_dict(),
        **chosen,
        "report": str(out / "report.html"),
        "text": text,
    }


def _labels(run: DeliveredRun, data: TrainingData, cases: Sequence[Case], *, flips: bool) -> Labels:
    return {c.name: run.labels([data.image(s) for s in c.slices], flips=flips) for c in cases}


def _write_page(
    out: Path, names: Sequence[str], summaries: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> None:
    page = Page(f"{summary['method']}: {len(names)} folds")
    page.lead(f"{summary['text']}. Each fold validates on other patients; the test patients are the same.")
    rows = [Row("average of the folds, test", [scores_from(summary["test"])])]
    if "test_delivered" in summary:
        rows.append(Row("average, test, as predict delivers", [scores_from(summary["test_delivered"])]))
    for name, one in zip(names, summaries, strict=True):
        rows += [
            Row(f"{name}, {part}", [scores_from(one[key])])
            for key, part in (("val", "validation"), ("test", "test"))
        ]
    scores = table(rows)
    page.table(scores.header, scores.lines, set())
    page.heading("Folds")
    page.links({name: f"{name}/report.html" for name in names})
    page.details("Counts", summary)
    page.write(out / "report.html")
