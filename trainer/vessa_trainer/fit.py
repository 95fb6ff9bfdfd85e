"""One run from its config to its report: train, score, write, and never train twice or over another."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vessa.client import AnnotatorClient
from vessa.datasets import Case, Dataset, open_dataset
from vessa.errors import InvalidConfig, VessaError
from vessa.report.cases import Overlay, annotated, best_median_worst
from vessa.schemas import BankInfo
from vessa_trainer import checkpoint
from vessa_trainer.annotations import AnnotationFeed
from vessa_trainer.config import Config, load_config, to_dict
from vessa_trainer.curves import write_progress
from vessa_trainer.data import cases_of, read_splits
from vessa_trainer.label_cache import open_cache
from vessa_trainer.loop import Run, load_best, predict_labels
from vessa_trainer.report import write_run_report
from vessa_trainer.seeding import bank_name, seed_bank

_log = logging.getLogger(__name__)
# What may differ between the starts of one run: where things are, and how fast.
_PLACE = ("out", "device", "threads", "batch_eval", "checkpoint_every", "cache")
_ANNOTATOR_PLACE = ("url", "api_key", "batch", "lookahead_batches", "patience_s")


def fit(config: Config, *, resume_line: str, resume: bool = True) -> dict[str, Any]:
    """Train one run, write its report files, and return its summary.

    With `resume` a finished run is not trained again and an unfinished one is taken up. Raises
    InvalidConfig when the folder holds a run of another config, or any run without `resume`;
    InvalidDataset; Interrupted, after saving.
    """
    out = Path(config.out)
    if (out / checkpoint.LAST).is_file() or (out / "summary.json").is_file():
        if not resume:
            raise InvalidConfig(
                f"{out} holds a run: --resume goes on with it, another --out starts a new one"
            )
        _check_same(config, load_config(out / "config.yaml"), out)
        if (out / "summary.json").is_file():
            summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
            return summary
    dataset = open_dataset(config.data.root)
    if config.semi.method != "vessa":
        return _train(config, dataset, None, {}, resume_line)
    with AnnotatorClient(config.annotator.url, config.annotator.api_key) as client:
        bank = seed_labeled(client, dataset, config)
        info = client.info()
        source = {"model": info.model, "labels_version": info.labels_version, "bank": bank.model_dump()}
        feed = AnnotationFeed(
            client, dataset, bank, open_cache(config.cache), config.annotator, seed=config.seed
        )
        try:
            return _train(config, dataset, feed, source, resume_line)
        finally:
            feed.close()


def seed_labeled(client: AnnotatorClient, dataset: Dataset, config: Config) -> BankInfo:
    """Fill the bank of a config with its labeled groups."""
    labeled = read_splits(dataset, config.data).labeled
    name = config.annotator.bank or bank_name(dataset, config.data.labeled, labeled)
    return seed_bank(client, dataset, labeled, name)


def without_key(config: Config) -> dict[str, Any]:
    """Return the config as plain data, without the API key: for files that people share."""
    return to_dict(replace(config, annotator=replace(config.annotator, api_key=None)))


def _train(
    config: Config, dataset: Dataset, feed: AnnotationFeed | None, source: dict[str, Any], resume_line: str
) -> dict[str, Any]:
    run = Run(config, dataset, feed, resume_line)
    run.resume()

    def draw(step: int) -> None:
        if step % config.eval_every == 0:
            write_progress(run.out, f"{config.semi.method}, seed {config.seed}")

    result = run.train(on_step=draw)
    summary = {
        "method": config.semi.method,
        "seed": config.seed,
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "wait_share": round(run.waited / max(result.seconds, 1e-9), 4),
        "groups": {k: len(v) for k, v in vars(run.splits).items()},
        "annotator": source,
        "feed": feed.stats() if feed is not None else None,
        "val": result.val.to_dict(),
        "test": result.test.to_dict(),
        "config": without_key(config),
    }
    rows = _pictures(run, dataset, feed)
    write_run_report(run.out, summary, rows, dataset)
    return summary


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
    for key in _ANNOTATOR_PLACE:
        del tree["annotator"][key]
    if config.semi.method != "vessa":  # what VESSA would do changes nothing here
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
