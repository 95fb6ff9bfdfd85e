"""Run one experiment from its config to its report."""

import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig, VessaError
from vessa.report.cases import Labels, Overlay, best_median_worst
from vessa_trainer.config import Config, load_config, shareable
from vessa_trainer.data.splits import write_splits
from vessa_trainer.experiments.annotator_labels import labels_of, score_alone
from vessa_trainer.experiments.identity import require_same_config, require_same_data, write_identity
from vessa_trainer.experiments.run_data import RunData, open_run_data
from vessa_trainer.experiments.run_lock import locked
from vessa_trainer.experiments.timing import announce_time
from vessa_trainer.outages import Incidents, interruptions
from vessa_trainer.prediction.choices import deliver, deliver_fused
from vessa_trainer.pseudo_labels.annotator_check import check_served, hold_to_annotator, record_changes
from vessa_trainer.pseudo_labels.cache import FolderCache, LabelCache, open_cache
from vessa_trainer.pseudo_labels.cleaning import VolumeCleaner
from vessa_trainer.pseudo_labels.offline import OfflineAnnotator, write_labels
from vessa_trainer.pseudo_labels.prefetcher import COUNTS, AnnotationFeed
from vessa_trainer.pseudo_labels.template_bank import adapt_to_unlabeled, find_bank, seed_labeled
from vessa_trainer.reporting.diagnostics import Advice, never_labeled, over_run
from vessa_trainer.reporting.plots import read_metrics, write_progress
from vessa_trainer.reporting.run_report import SUMMARY, write_run_report
from vessa_trainer.semi_supervised.distributed import Processes, join
from vessa_trainer.semi_supervised.results import Interrupted, RunResult
from vessa_trainer.semi_supervised.trainer import Run
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import predict_labels

_log = logging.getLogger(__name__)

_DRAW_EVERY_S = 30.0  # a drawing takes a second: short runs would spend most of their time on it


def finished(config: Config, known: RunData | None = None) -> dict[str, Any] | None:
    """Return the summary of a finished run, None where there is no run or an unfinished one.

    known: its data, opened where None. Raises InvalidConfig when the folder holds a run of another config or
    of other data.
    """
    out = Path(config.out)
    if not _holds_run(out):
        return None
    require_same_config(config, load_config(out / "config.yaml"), out)
    require_same_data((known or open_run_data(config)).identity, out)
    if not (out / SUMMARY).is_file():
        return None
    summary: dict[str, Any] = json.loads((out / SUMMARY).read_text())
    return summary


def _holds_run(out: Path) -> bool:
    return (out / checkpoint.LAST).is_file() or (out / SUMMARY).is_file()


def fit(
    config: Config,
    *,
    resume_line: str,
    resume: bool = True,
    console: Console | None = None,
    announce: bool = True,
) -> dict[str, Any]:
    """Train one run, write its report files, and return its summary.

    resume: return a finished run's summary, continue an unfinished run; console: where to describe the data;
    announce: False where the caller has described them.
    Raises InvalidConfig when the folder holds a run of another config or of other data, any run without
    `resume`, a run under way, or when the annotator is not the one that the config names; InvalidDataset;
    Interrupted, after saving; Diverged.
    """
    out = Path(config.out)
    processes = join(config.device)
    with locked(out) if processes.first else nullcontext():
        if not resume and _holds_run(out):
            raise InvalidConfig(f"{out} holds a run. Use --resume to continue it, or choose another --out")
        found = open_run_data(config)
        if (summary := finished(config, found)) is not None:
            return summary
        if processes.first and announce:
            found.announce(console)
            announce_time([config], [found], console)
        if not config.annotated:
            _record(out, found, processes)
            return _train(config, found, None, {}, resume_line, processes)
        return _fit_annotated(config, found, resume_line, processes)


def _fit_annotated(config: Config, found: RunData, resume_line: str, processes: Processes) -> dict[str, Any]:
    out, data, splits = Path(config.out), found.data, found.plan.splits
    with _annotator(config) as client:
        info = check_served(client, config.annotator)
        if isinstance(client, OfflineAnnotator):
            bank = client.bank()
        else:
            if processes.first:
                seeded = seed_labeled(client, data, config)
                if config.annotator.adapt:
                    adapt_to_unlabeled(client, data, config, seeded.name)
            processes.wait()
            bank = find_bank(client, data, config)
        source = hold_to_annotator(out, info, bank, config.annotator, write=processes.first)
        _record(out, found, processes)
        incidents = Incidents(out) if processes.first else None  # the others see the same
        cleaner = VolumeCleaner(data, splits.labeled) if config.annotator.clean else None
        cache = _labels_cache(config, incidents)
        feed = AnnotationFeed(
            client,
            data,
            bank,
            cache,
            config.annotator,
            seed=config.seed,
            exact=config.deterministic,
            learned=splits.unlabeled,
            incidents=incidents,
            cleaner=cleaner,
        )

        def unprompted() -> AnnotationFeed:
            """Open a feed of labels as a new image gets them: the run's feed has labels after feedback."""
            return AnnotationFeed(
                client, data, bank, cache, config.annotator, seed=config.seed, learned=(), cleaner=cleaner
            )

        try:
            if config.semi.method == "vessa_alone":
                return score_alone(config, data, splits, feed, source)
            return _train(config, found, feed, source, resume_line, processes, unprompted)
        finally:
            feed.close()


def _annotator(config: Config) -> AnnotatorClient | OfflineAnnotator:
    """Open the service, or the folder of labels in its place."""
    if config.annotator.labels is not None:
        return OfflineAnnotator(Path(config.annotator.labels))
    return AnnotatorClient(config.annotator.url, config.annotator.api_key)


def _labels_cache(config: Config, incidents: Incidents | None) -> LabelCache:
    """Open the cache of a config, or the folder of labels in its place."""
    if config.annotator.labels is not None:
        return FolderCache(Path(config.annotator.labels))
    return open_cache(config.cache, incidents)


def make_labels(config: Config, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Fill the bank of a config and write the annotator's labels of its data to a folder; returns counts."""
    found = open_run_data(config)
    found.announce(console)
    with AnnotatorClient(config.annotator.url, config.annotator.api_key) as client:
        check_served(client, config.annotator)
        bank = seed_labeled(client, found.data, config)
        splits = found.plan.splits
        return write_labels(client, found.data, splits, bank, config.annotator, folder, seed=config.seed)


def _record(out: Path, found: RunData, processes: Processes) -> None:
    """Write what the run's data are, and drawn splits as files that can be used again."""
    if not processes.first:
        return
    out.mkdir(parents=True, exist_ok=True)
    write_identity(out, found.identity)
    if found.plan.drawn:
        write_splits(out / "splits", found.plan.splits)


def _train(
    config: Config,
    found: RunData,
    feed: AnnotationFeed | None,
    source: dict[str, Any],
    resume_line: str,
    processes: Processes,
    unprompted: Callable[[], AnnotationFeed] | None = None,
) -> dict[str, Any]:
    dataset = found.data
    run = Run(config, dataset, feed, resume_line, processes)
    run.resume()

    drawn = time.monotonic()

    def draw(step: int) -> None:
        nonlocal drawn
        due = step % config.eval_every == 0 and time.monotonic() - drawn >= _DRAW_EVERY_S
        if processes.first and due:
            write_progress(run.out, f"{config.semi.method}, seed {config.seed}")
            drawn = time.monotonic()

    result = run.train(on_step=draw)
    stats: dict[str, Any] | None = None
    if feed is not None:
        stats = feed.stats()
        stats |= processes.total({k: stats[k] for k in COUNTS})
        if processes.first:
            record_changes(run.out, source, feed.annotator_changes)
    if result is None:
        processes.wait()  # for what the first process writes
        summary: dict[str, Any] = json.loads((run.out / SUMMARY).read_text())
        return summary
    summary = {
        "method": config.semi.method,
        "seed": config.seed,
        "steps": result.steps,
        "best_step": result.best_step,
        "selected_by": "validation Dice" if result.selected else "none: no validation patient can be scored",
        "seconds": round(result.seconds, 1),
        "wait_share": round(run.waited / max(result.seconds, 1e-9), 4),
        "groups": {k: len(v) for k, v in vars(run.splits).items()},
        "split_sources": dict(found.plan.sources),
        "annotator": source,
        "processes": processes.count,
        "feed": None if feed is None else {**(stats or {}), "reliability": feed.reliability()},
        "interruptions": interruptions(run.out),
        "advice": [vars(one) for one in _advice(run)],
        **{part: scores.to_dict() for part, scores in result.scores.items()},
        "config": shareable(config),
    }
    try:
        _conclude(run, result, feed, source, unprompted, summary)
    except OSError as error:  # the run is saved, and `--resume` writes what is missing
        raise Interrupted(
            f"cannot write to {run.out}: {error.strerror or error}. The training is done and saved. Mend "
            f"that, then resume with: {resume_line}"
        ) from error
    processes.wait()
    return summary


def _conclude(
    run: Run,
    result: RunResult,
    feed: AnnotationFeed | None,
    source: dict[str, Any],
    unprompted: Callable[[], AnnotationFeed] | None,
    summary: dict[str, Any],
) -> None:
    """Choose what `predict` does with the teacher, and write the report and, last of all, the summary."""
    summary |= deliver(run, result)
    if run.selects and unprompted is not None and source["parts"]:
        summary |= deliver_fused(run, result, source, unprompted)
    rows = _pictures(run, result, feed)
    write_run_report(run.out, summary, rows, run.dataset)
    shutil.rmtree(run.out / "feedback", ignore_errors=True)  # only an unfinished run needs its prompts


def _advice(run: Run) -> list[Advice]:
    missing = never_labeled(run.labeled.masks.unique().tolist(), run.dataset.classes)
    return [*missing, *over_run(read_metrics(run.out), run.dataset.classes)]


def _pictures(run: Run, result: RunResult, feed: AnnotationFeed | None) -> list[Overlay]:
    """Show test cases with the masks of VESSA, of the delivered teacher and of the last student."""
    cases, predicted = result.cases["test"], dict[str, Labels]()
    if feed is not None:
        try:
            predicted["VESSA"] = labels_of(feed, cases)
        except VessaError as error:  # the run is done: its report can do without this column
            _log.warning("the report has no pictures of VESSA's labels: %s", error.message)
    predicted["teacher"] = result.labels["test"]
    predicted["student"] = predict_labels(run.student, run.dataset, cases, run.config, run.channels)
    return best_median_worst(run.dataset, cases, predicted, "teacher")
