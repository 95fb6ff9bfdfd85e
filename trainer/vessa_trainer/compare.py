"""UniMatch V2 alone against VESSA-assisted, same steps and seeds, with VESSA alone beside them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vessa.client import AnnotatorClient
from vessa.datasets import Case, Dataset, open_dataset
from vessa.metrics import Scores, score_volumes
from vessa.schemas import BankInfo
from vessa_trainer.annotations import AnnotationFeed, seed_bank
from vessa_trainer.config import Config, to_dict
from vessa_trainer.data import cases_of, read_splits
from vessa_trainer.label_cache import open_cache
from vessa_trainer.loop import Run, load_best, predict_volumes
from vessa_trainer.report import (
    Overlay,
    Row,
    markdown_table,
    progress_figure,
    read_metrics,
    table,
    write_html,
    write_run_report,
)

_METHODS: dict[Literal["unimatch_v2", "vessa"], str] = {
    "unimatch_v2": "UniMatch V2",
    "vessa": "VESSA-assisted",
}


def bank_name(config: Config, dataset: Dataset) -> str:
    """Name of the bank of a run's labeled images: the data set's and the split's."""
    stem = Path(config.data.labeled).stem
    return config.annotator.bank or "".join(
        c if c.isalnum() or c in "-_" else "-" for c in f"{dataset.name}-{stem}"
    )


def scores_from(data: dict[str, Any]) -> Scores:
    """Read scores back from a summary."""
    return Scores(data["by_class"], data["mean"], data["unit"], data["counts"])


def fit(config: Config, *, resume_line: str, resume: bool = True) -> dict[str, Any]:
    """Train one run, write its report files, and return its summary.

    A finished run of the same config is not trained again. Raises InvalidConfig, InvalidDataset,
    Interrupted.
    """
    out = Path(config.out)
    plain = json.loads(json.dumps(to_dict(config)))
    finished = out / "summary.json"
    if resume and finished.is_file():
        summary: dict[str, Any] = json.loads(finished.read_text())
        if summary["config"] == plain:
            return summary
    dataset = open_dataset(config.data.root)
    feed = client = None
    if config.semi.method == "vessa":
        client = AnnotatorClient(config.annotator.url, config.annotator.api_key)
        bank = seed_bank(
            client, dataset, read_splits(dataset, config.data).labeled, bank_name(config, dataset)
        )
        feed = AnnotationFeed(
            client, dataset, bank, open_cache(config.cache), config.annotator, seed=config.seed
        )
    try:
        run = Run(config, dataset, feed, resume_line)
        if resume:
            run.resume()
        result = run.train()
    finally:
        if feed is not None and client is not None:
            feed.close()
            client.close()
    summary = {
        "method": config.semi.method,
        "seed": config.seed,
        "steps": result.steps,
        "best_step": result.best_step,
        "seconds": round(result.seconds, 1),
        "wait_share": round(run.waited / max(result.seconds, 1e-9), 4),
        "feed": feed.stats() if feed is not None else None,
        "val": result.val.to_dict(),
        "test": result.test.to_dict(),
        "config": plain,
    }
    write_run_report(out, summary)
    return summary


def annotate_cases(
    client: AnnotatorClient, dataset: Dataset, bank: BankInfo, cases: Sequence[Case], config: Config
) -> dict[str, list[np.ndarray]]:
    """VESSA alone: labels of every slice of some cases, without any student."""
    labels: dict[str, list[np.ndarray]] = {}
    for case in track(cases, "VESSA alone", transient=True):
        answers = []
        for start in range(0, len(case.slices), config.annotator.batch):
            part = case.slices[start : start + config.annotator.batch]
            answers += client.segment(
                [dataset.image(s) for s in part],
                bank=bank.name,
                groups=[s.group for s in part],
                template_choice=config.annotator.template_choice,
            )
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        labels[case.name] = [a.labels for a in answers if a.labels is not None]
    return labels


def compare(config: Config, *, seeds: int, resume_line: str, console: Console) -> dict[str, Any]:
    """Train both methods for each seed, score them on the test patients, write the report.

    Returns the figures of the JSON line. Finished runs in `config.out` are taken as they are.
    """
    out = Path(config.out)
    dataset = open_dataset(config.data.root)
    splits = read_splits(dataset, config.data)
    cases = [c for c in cases_of(dataset, splits.test) if dataset.mask(c.slices[0]) is not None]
    client = AnnotatorClient(config.annotator.url, config.annotator.api_key)
    bank = seed_bank(client, dataset, splits.labeled, bank_name(config, dataset))
    alone_labels = annotate_cases(client, dataset, bank, cases, config)
    alone = _score(dataset, cases, alone_labels)
    summaries: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        for method in _METHODS:
            run = replace(
                config, seed=seed, out=str(out / f"{method}-{seed}"), semi=replace(config.semi, method=method)
            )
            summaries.setdefault(method, []).append(fit(run, resume_line=resume_line))
    rows = [Row(name, [scores_from(s["test"]) for s in summaries[m]]) for m, name in _METHODS.items()]
    rows.append(Row("VESSA alone", [alone]))
    header, lines = table(rows)
    _print(console, header, lines)
    (out / "results.md").write_text(markdown_table(header, lines))
    overlays = _overlays(config, dataset, cases, alone_labels, out)
    write_html(
        out / "report.html",
        title=f"{dataset.name}: UniMatch V2 and VESSA",
        lead=(
            f"{len(splits.labeled)} labeled and {len(splits.unlabeled)} unlabeled patients, "
            f"{len(splits.test)} test patients; {config.steps} steps, seeds: {seeds}; "
            f"the checkpoint was chosen on {len(splits.val)} validation patients."
        ),
        header=header,
        lines=lines,
        figures=[
            (f"Training, {name}, seed 0", progress_figure(read_metrics(out / f"{m}-0"), name))
            for m, name in _METHODS.items()
        ],
        overlays=overlays,
        classes=dataset.classes,
        details={
            "config": to_dict(replace(config, annotator=replace(config.annotator, api_key=None))),
            "bank": bank.model_dump(),
            "runs": summaries,
        },
    )
    client.close()
    return _figures(rows, summaries, out, config.steps, seeds)


def _score(dataset: Dataset, cases: Sequence[Case], labels: dict[str, list[np.ndarray]]) -> Scores:
    volumes = []
    for case in cases:
        pairs = [
            (p, m)
            for s, p in zip(case.slices, labels[case.name], strict=True)
            if (m := dataset.mask(s)) is not None
        ]
        volumes.append((np.stack([p for p, _ in pairs]), np.stack([m for _, m in pairs]), case.spacing))
    return score_volumes(volumes, dataset.classes)


def _overlays(
    config: Config, dataset: Dataset, cases: Sequence[Case], alone: dict[str, list[np.ndarray]], out: Path
) -> list[Overlay]:
    """Middle slices of the best, median and worst case of the VESSA-assisted teacher of seed 0."""
    models = {name: load_best(out / f"{m}-0", replace(config, seed=0)) for m, name in _METHODS.items()}
    predicted: dict[str, dict[str, list[np.ndarray]]] = {"VESSA alone": alone}
    for name, (model, channels, _) in models.items():
        volumes = predict_volumes(model, dataset, cases, config, channels)
        predicted[name] = {c.name: [p.argmax(0).byte().numpy() for p in slices] for c, slices in volumes}
    quality = {
        name: {c.name: _score(dataset, [c], labels).mean["dice"] or 0.0 for c in cases}
        for name, labels in predicted.items()
    }
    ranked = sorted(cases, key=lambda c: -quality["VESSA-assisted"][c.name])
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    overlays = []
    for title, case in chosen.items():
        middle = len(case.slices) // 2
        item = case.slices[middle]
        truth = dataset.mask(item)
        assert truth is not None
        masks = {"truth": truth} | {name: labels[case.name][middle] for name, labels in predicted.items()}
        captions = {name: f"case Dice {quality[name][case.name]:.3f}" for name in predicted}
        overlays.append(Overlay(f"{title}: {item.name}", dataset.image(item), masks, captions))
    return overlays


def _print(console: Console, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    shown = Table(*header, title="Test patients")
    for index, line in enumerate(lines):
        last = index + 1 == len(lines) or lines[index + 1][0] != line[0]
        shown.add_row(*line, end_section=last)
    console.print(shown)


def _figures(
    rows: Sequence[Row], summaries: dict[str, list[dict[str, Any]]], out: Path, steps: int, seeds: int
) -> dict[str, Any]:
    keys = ("unimatch_v2", "vessa_assisted", "vessa_alone")
    figures: dict[str, Any] = {}
    for key, row in zip(keys, rows, strict=True):
        figures[f"{key}_dice"] = round(float(np.mean(row.values("dice", None))), 4)
    for key, row in zip(keys, rows, strict=True):
        figures[key] = {
            "dice_by_seed": [round(v, 4) for v in row.values("dice", None)],
            "by_class": {
                n: {
                    m: round(float(np.mean(v)), 4) for m in ("dice", "iou", "hd95") if (v := row.values(m, n))
                }
                for n in row.seeds[0].by_class
            },
            "hd95": round(float(np.mean(row.values("hd95", None))), 2),
        }
    figures |= {"hd95_unit": rows[0].seeds[0].unit, "seeds": seeds, "steps": steps}
    figures["wait_share"] = max(s["wait_share"] for s in summaries["vessa"])
    figures["report"] = str(out / "report.html")
    return figures
