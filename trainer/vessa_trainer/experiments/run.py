"""One run from its config to its report: train, score, write, and never train twice or over another."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vessa.client import AnnotatorClient
from vessa.datasets import Case, Dataset, open_dataset
from vessa.errors import InvalidConfig, VessaError
from vessa.images import read_image
from vessa.report.cases import Overlay, annotated, best_median_worst, score_labels
from vessa.schemas import BankInfo
from vessa_trainer.config import Config, load_config, save_config, to_dict
from vessa_trainer.data.splits import cases_of, read_splits
from vessa_trainer.outages import Incidents, interruptions
from vessa_trainer.pseudo_labels.annotator_check import check_served
from vessa_trainer.pseudo_labels.cache import open_cache
from vessa_trainer.pseudo_labels.prefetcher import COUNTS, AnnotationFeed
from vessa_trainer.pseudo_labels.template_bank import bank_name, seed_bank
from vessa_trainer.reporting.diagnostics import Advice, never_labeled, over_run
from vessa_trainer.reporting.plots import read_metrics, write_progress
from vessa_trainer.reporting.run_report import SUMMARY, write_run_report
from vessa_trainer.semi_supervised.distributed import Processes, join
from vessa_trainer.semi_supervised.trainer import Run
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_labels

_log = logging.getLogger(__name__)
_WHO = ("model", "labels_version", "preset", "parts", "trained_on")
# What may differ between the starts of one run: where things are, and how fast.
_PLACE = ("title", "out", "device", "threads", "batch_eval", "checkpoint_every", "cache", "trackers")
_ANNOTATOR_PLACE = ("url", "api_key", "serves", "batch", "lookahead_batches", "patience_s")


def finished(config: Config) -> dict[str, Any] | None:
    """Return the summary of a run that has ended, None where there is no run or an unfinished one.

    Raises InvalidConfig when the folder holds a run of another config.
    """
    out = Path(config.out)
    if not ((out / checkpoint.LAST).is_file() or (out / SUMMARY).is_file()):
        return None
    _check_same(config, load_config(out / "config.yaml"), out)
    if not (out / SUMMARY).is_file():
        return None
    summary: dict[str, Any] = json.loads((out / SUMMARY).read_text())
    return summary


def fit(config: Config, *, resume_line: str, resume: bool = True) -> dict[str, Any]:
    """Train one run, write its report files, and return its summary.

    With `resume` a finished run is not trained again and an unfinished one is taken up. Raises
    InvalidConfig when the folder holds a run of another config, or any run without `resume`, or when the
    annotator is not the one that the config names; InvalidDataset; Interrupted, after saving.
    """
    out = Path(config.out)
    if not resume and ((out / checkpoint.LAST).is_file() or (out / SUMMARY).is_file()):
        raise InvalidConfig(f"{out} holds a run: --resume goes on with it, another --out starts a new one")
    if (summary := finished(config)) is not None:
        return summary
    dataset, processes = open_dataset(config.data.root), join(config.device)
    if not config.annotated:
        return _train(config, dataset, None, {}, resume_line, processes)
    with AnnotatorClient(config.annotator.url, config.annotator.api_key) as client:
        info = check_served(client, config.annotator)
        if processes.first:
            seed_labeled(client, dataset, config)
        processes.wait()
        bank = client.bank(bank_of(dataset, config))
        source = {"bank": bank.model_dump()} | {k: getattr(info, k) for k in _WHO}
        incidents = Incidents(out) if processes.first else None  # the others see the same
        feed = AnnotationFeed(
            client,
            dataset,
            bank,
            open_cache(config.cache, incidents),
            config.annotator,
            seed=config.seed,
            exact=config.deterministic,
            learned=read_splits(dataset, config.data).unlabeled,
            incidents=incidents,
        )
        try:
            if config.semi.method == "vessa_alone":
                return _score_alone(config, dataset, feed, source)
            return _train(config, dataset, feed, source, resume_line, processes)
        finally:
            feed.close()


def seed_labeled(client: AnnotatorClient, dataset: Dataset, config: Config) -> BankInfo:
    """Fill the bank of a config with its labeled groups."""
    labeled = read_splits(dataset, config.data).labeled
    return seed_bank(client, dataset, labeled, bank_of(dataset, config))


def bank_of(dataset: Dataset, config: Config) -> str:
    """Return the name of the bank that a config's labels come from."""
    labeled = read_splits(dataset, config.data).labeled
    return config.annotator.bank or bank_name(dataset, config.data.labeled, labeled)


def without_key(config: Config) -> dict[str, Any]:
    """Return the config as plain data, without the API key: for files that people share."""
    return to_dict(replace(config, annotator=replace(config.annotator, api_key=None)))


def _score_alone(
    config: Config, dataset: Dataset, feed: AnnotationFeed, source: dict[str, Any]
) -> dict[str, Any]:
    """Score the annotator's own labels; those of the test cases are kept as PNG files in `labels`."""
    out, splits, started = Path(config.out), read_splits(dataset, config.data), time.monotonic()
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
        "seconds": round(time.monotonic() - started, 1),
        "wait_share": 0.0,
        "groups": {k: len(v) for k, v in vars(splits).items()},
        "annotator": source,
        "feed": feed.stats(),
        "interruptions": interruptions(out),
        "advice": [],
        **{key: score_labels(dataset, cases[key], labels[key]).to_dict() for key in cases},
        "config": without_key(config),
    }
    rows = best_median_worst(dataset, cases["test"], {"VESSA": labels["test"]}, "VESSA")
    write_run_report(out, summary, rows, dataset)
    return summary


def write_labels(run: Path, cases: Sequence[Case], labels: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Keep the labels of some cases in a run directory, an 8-bit PNG with class ids for each slice."""
    folder = run / "labels"
    folder.mkdir(exist_ok=True)
    for case in cases:
        for item, one in zip(case.slices, labels[case.name], strict=True):
            Image.fromarray(one).save(folder / f"{item.name}.png")


def read_labels(run: Path, cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
    """Read what `write_labels` kept."""
    return {c.name: [read_image(run / "labels" / f"{s.name}.png") for s in c.slices] for c in cases}


def _train(
    config: Config,
    dataset: Dataset,
    feed: AnnotationFeed | None,
    source: dict[str, Any],
    resume_line: str,
    processes: Processes,
) -> dict[str, Any]:
    run = Run(config, dataset, feed, resume_line, processes)
    run.resume()

    def draw(step: int) -> None:
        if processes.first and step % config.eval_every == 0:
            write_progress(run.out, f"{config.semi.method}, seed {config.seed}")

    result = run.train(on_step=draw)
    if feed is not None:
        stats = feed.stats()
        stats |= processes.total({k: stats[k] for k in COUNTS})
    if result is None:
        processes.wait()  # for what the first one writes
        summary: dict[str, Any] = json.loads((run.out / SUMMARY).read_text())
        return summary
    summary = {
        "method": config.semi.method,
        "seed": config.seed,
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "wait_share": round(run.waited / max(result.seconds, 1e-9), 4),
        "groups": {k: len(v) for k, v in vars(run.splits).items()},
        "annotator": source,
        "processes": processes.count,
        "feed": stats if feed is not None else None,
        "interruptions": interruptions(run.out),
        "advice": [vars(one) for one in _advice(run)],
        "val": result.val.to_dict(),
        "test": result.test.to_dict(),
        "config": without_key(config),
    }
    rows = _pictures(run, dataset, feed)
    write_run_report(run.out, summary, rows, dataset)
    shutil.rmtree(run.out / "feedback", ignore_errors=True)  # prompts are of use to an unfinished run alone
    processes.wait()
    return summary


def _advice(run: Run) -> list[Advice]:
    missing = never_labeled(run.labeled.masks.unique().tolist(), run.dataset.classes)
    return [*missing, *over_run(read_metrics(run.out), run.dataset.classes)]


def _pictures(run: Run, dataset: Dataset, feed: AnnotationFeed | None) -> list[Overlay]:
    """Test cases seen by VESSA, by the best teacher and by the student as it ended."""
    cases = annotated(dataset, cases_of(dataset, run.splits.test))
    predicted: dict[str, dict[str, list[np.ndarray]]] = {}
    if feed is not None:
        try:
            predicted["VESSA"] = labels_of(feed, cases)
        except VessaError as error:  # the run is done: its report can do without this column
            _log.warning("the report has no pictures of VESSA's labels: %s", error.message)
    teacher, channels, _ = load_best(run.out, run.config)
    for name, model in (("teacher", teacher), ("student", run.student)):
        predicted[name] = predict_labels(model, dataset, cases, run.config, channels)
    return best_median_worst(dataset, cases, predicted, "teacher")


def labels_of(feed: AnnotationFeed, cases: Sequence[Case]) -> dict[str, list[np.ndarray]]:
    """VESSA's labels of every slice of some cases, without any student."""
    feed.prefetch([s.name for case in cases for s in case.slices])
    return {case.name: [p.labels for p in feed.get([s.name for s in case.slices])] for case in cases}


def _check_same(config: Config, there: Config, out: Path) -> None:
    ours, theirs = _identity(config), _identity(there)
    other = [
        f"{key} {theirs[key]!r} there, {ours[key]!r} here"
        for key in sorted(ours.keys() & theirs.keys())  # other keys tell only that the method differs
        if ours[key] != theirs[key]
    ]
    if other:
        raise InvalidConfig(
            f"{out} holds a run of another config ({'; '.join(other[:4])}): "
            "choose another --out, or delete it"
        )


def _identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same experiment, as flat keys."""
    tree = to_dict(config)
    tree["data"]["root"] = str(Path(config.data.root).resolve())
    for key in _PLACE:
        del tree[key]
    del tree["data"]["prepared"], tree["data"]["prepared_gb"]
    for key in _ANNOTATOR_PLACE:
        del tree["annotator"][key]
    if not config.annotated:  # what VESSA would do changes nothing here
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
