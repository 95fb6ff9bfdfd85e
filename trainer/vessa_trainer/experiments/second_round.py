"""Train a second student on labels of a bank that holds volumes segmented by the first student.

The first round's bank holds the annotated volumes alone. Its student segments unlabeled training patients.
The volumes from which the annotated ones can be segmented back best join a second bank, whose labels teach a
new student. Validation patients decide twice: whether the labels are better, and then whether the student is.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vessa import atomic_write
from vessa.bulk.seed_bank import add_slices
from vessa.client import AnnotatorClient
from vessa.codec import image_digest
from vessa.datasets import Case, Slice
from vessa.errors import InvalidConfig, UnknownBank
from vessa.report.cases import annotated, score_labels
from vessa_trainer.config import Config, load_config
from vessa_trainer.data.splits import cases_of
from vessa_trainer.experiments.annotator_labels import labels_of
from vessa_trainer.experiments.run import finished, fit
from vessa_trainer.experiments.run_data import RunData, open_run_data
from vessa_trainer.prediction.delivery import DeliveredRun, open_run
from vessa_trainer.pseudo_labels.cache import open_cache
from vessa_trainer.pseudo_labels.cleaning import VolumeCleaner
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.template_bank import adapt_to_unlabeled, seed_groups, seed_labeled

FILE = "second_round.json"  # in the folder of the second run
_NAME = 45  # characters of the first bank's name in those made from it
Masks = list[tuple[Slice, np.ndarray]]


@dataclass(frozen=True)
class Candidate:
    """An unlabeled patient.

    dice: of the annotated slices, segmented from this patient's predicted volumes; None where these are empty
    """

    group: str
    dice: float | None


def second_round(
    run: Path,
    out: Path,
    *,
    url: str | None,
    candidates: int,
    templates: int,
    resume_line: str,
    console: Console,
) -> dict[str, Any]:
    """Train a second round after a finished run of method vessa; returns what was chosen, with its figures.

    candidates: unlabeled patients that are tried as templates, drawn by the run's seed
    templates: of them, how many join the bank: those with the highest Dice backwards
    Raises InvalidConfig for a run that is unfinished, used no annotator or selected nothing on validation
    patients, and what `fit` raises.
    """
    config = load_config(run / "config.yaml")
    annotator = replace(config.annotator, url=url or config.annotator.url)
    config = replace(config, out=str(run), annotator=annotator)  # the folder may have been moved
    if config.semi.method != "vessa" or config.annotator.labels is not None:
        raise InvalidConfig(f"{run} was not trained with a service: train it with --method vessa and --url")
    found = open_run_data(config)
    first = finished(config, found)
    if first is None:
        raise InvalidConfig(f"{run} is not finished: resume it first")
    if first["val"]["mean"]["dice"] is None:
        raise InvalidConfig(f"{run} has no validation patient with a mask, which a second round needs")
    with AnnotatorClient(config.annotator.url, config.annotator.api_key) as client:
        record = _choose_bank(client, config, found, run, candidates, templates, console)
    record |= {"first": str(run), "first_val_dice": first["val"]["mean"]["dice"], "second": None}
    record |= {"second_val_dice": None, "selected": str(run)}
    out.mkdir(parents=True, exist_ok=True)
    if (record["label_dice_after"] or 0.0) > (record["label_dice_before"] or 0.0):
        again = replace(config, out=str(out), annotator=replace(annotator, bank=record["bank"]))
        second = fit(again, resume_line=resume_line, announce=False)
        record |= {"second": str(out), "second_val_dice": second["val"]["mean"]["dice"]}
        if (record["second_val_dice"] or 0.0) > record["first_val_dice"]:
            record["selected"] = str(out)
    atomic_write.write_text(out / FILE, json.dumps(record, indent=1) + "\n")
    return record


def _choose_bank(
    client: AnnotatorClient,
    config: Config,
    found: RunData,
    run: Path,
    candidates: int,
    templates: int,
    console: Console,
) -> dict[str, Any]:
    """Fill the second bank, and score the labels of both banks on the validation patients."""
    data, splits = found.data, found.plan.splits
    bank = seed_labeled(client, data, config)  # a new service may not hold it yet
    predicted = _predict(open_run(run), found, config.seed, candidates, console)
    tried = _verify_backwards(client, config, found, bank.name, predicted, console)
    ranked = sorted((c for c in tried if c.dice is not None), key=lambda c: -(c.dice or 0.0))
    chosen = [c.group for c in ranked[:templates]]
    if not chosen:
        raise InvalidConfig(
            f"the run finds no class in {len(tried)} unlabeled patients: nothing can be added"
        )
    items = [item for group in chosen for item in predicted[group]]
    second = f"{bank.name[:_NAME]}-r2-{_digest(items)}"
    seed_groups(client, data, splits.labeled, second)
    add_slices(client, data, items, second)
    if config.annotator.adapt:
        adapt_to_unlabeled(client, data, config, second)
    cases = annotated(data, cases_of(data, splits.val))
    return {
        "tried": [asdict(c) for c in tried],
        "templates": chosen,
        "bank": second,
        "label_dice_before": _dice(client, config, found, bank.name, cases),
        "label_dice_after": _dice(client, config, found, second, cases),
    }


def _predict(run: DeliveredRun, found: RunData, seed: int, count: int, console: Console) -> dict[str, Masks]:
    """Segment some unlabeled training patients as `predict` does.

    Returns the slices that show a class, with their class ids, by patient.
    """
    groups = sorted(set(found.plan.splits.unlabeled) - set(found.plan.splits.labeled))
    drawn = np.random.default_rng(seed).permutation(len(groups))[:count]
    predicted: dict[str, Masks] = {}
    with Progress(console=console, transient=True) as bar:
        for place in bar.track(drawn, description="predicting unlabeled patients"):
            masks = predicted[groups[place]] = []
            for case in cases_of(found.data, [groups[place]]):
                labels = run.labels([found.data.image(s) for s in case.slices], flips=run.flips.used)
                shown = zip(case.slices, run.postprocessing.apply(labels), strict=True)
                masks += [(item, mask) for item, mask in shown if mask.any()]
    return predicted


def _verify_backwards(
    client: AnnotatorClient,
    config: Config,
    found: RunData,
    bank: str,
    predicted: Mapping[str, Masks],
    console: Console,
) -> list[Candidate]:
    """Segment the annotated slices with the masks of each candidate as the only templates."""
    tried = []
    cases = annotated(found.data, cases_of(found.data, found.plan.splits.labeled))
    with Progress(console=console, transient=True) as bar:
        for group, masks in bar.track(predicted.items(), description="verifying backwards"):
            dice = None
            if masks:
                with _temporary_bank(client, f"{bank[:_NAME]}-back-{_digest(masks)}") as name:
                    add_slices(client, found.data, masks, name)
                    dice = _dice(client, config, found, name, cases)
            tried.append(Candidate(group, dice))
    return tried


@contextmanager
def _temporary_bank(client: AnnotatorClient, name: str) -> Iterator[str]:
    """Give the name of a bank that is empty at first, and delete it at the end."""
    with suppress(UnknownBank):
        client.delete_bank(name)  # a killed process may have left it
    try:
        yield name
    finally:
        with suppress(UnknownBank):
            client.delete_bank(name)


def _dice(
    client: AnnotatorClient, config: Config, found: RunData, bank: str, cases: Sequence[Case]
) -> float | None:
    """Return the mean Dice of the labels that a bank gives some cases, cleaned as in training."""
    cleaner = VolumeCleaner(found.data, found.plan.splits.labeled) if config.annotator.clean else None
    feed = AnnotationFeed(
        client,
        found.data,
        client.bank(bank),
        open_cache(config.cache),
        config.annotator,
        seed=config.seed,
        learned=(),
        cleaner=cleaner,
    )
    with closing(feed):
        labels = labels_of(feed, cases)
    return score_labels(found.data, cases, labels).mean["dice"]


def _digest(masks: Masks) -> str:
    """Return eight digits that name predicted masks by slices and contents."""
    parts = [[item.name, image_digest(mask)] for item, mask in masks]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
