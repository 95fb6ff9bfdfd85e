"""UniMatch V2 alone against VESSA-assisted, same steps and seeds, with VESSA alone beside them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as Shown

from vessa.client import AnnotatorClient
from vessa.datasets import Case, Dataset, open_dataset
from vessa.errors import InvalidConfig, InvalidDataset
from vessa.report.cases import Overlay, annotated, best_median_worst, score_labels
from vessa.report.page import Page
from vessa.report.tables import Row, Table, cards, missed, scores_from, table
from vessa_trainer.annotations import AnnotationFeed
from vessa_trainer.config import Config
from vessa_trainer.curves import bars_figure, comparison_figure
from vessa_trainer.data import cases_of, read_splits
from vessa_trainer.fit import fit, labels_of, seed_labeled, without_key
from vessa_trainer.label_cache import open_cache
from vessa_trainer.loop import load_best, predict_labels

_METHODS: dict[Literal["unimatch_v2", "vessa"], str] = {
    "unimatch_v2": "UniMatch V2",
    "vessa": "VESSA-assisted",
}
_ALONE = "VESSA alone"
_METRICS = ("dice", "iou", "iou_fgbg", "hd95")


def compare(config: Config, *, seeds: int, resume_line: str, console: Console) -> dict[str, Any]:
    """Train both methods for each seed, score them on the test patients, write the report.

    Returns the figures of the JSON line. Finished runs in `config.out` are taken as they are, an
    unfinished one is taken up. Raises InvalidConfig when a run there has another config or was
    trained with other weights of the annotator; InvalidDataset; Interrupted, after saving.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    dataset = open_dataset(config.data.root)
    cases = annotated(dataset, cases_of(dataset, read_splits(dataset, config.data).test))
    if not cases:
        raise InvalidDataset("no test patient has a mask: there is nothing to compare by")
    alone, source = _annotate(config, dataset, cases, console)
    summaries: dict[str, list[dict[str, Any]]] = {m: [] for m in _METHODS}
    for seed in range(seeds):
        for method in _METHODS:
            run = _run_config(config, method, seed)
            console.print(f"{_METHODS[method]}, seed {seed}: {run.out}", highlight=False)
            summaries[method].append(fit(run, resume_line=resume_line))
    for summary in summaries["vessa"]:
        if summary["annotator"]["model"] != source["model"]:
            raise InvalidConfig(
                f"seed {summary['seed']} in {out} was trained with other weights of the annotator than "
                "those that answer now: choose another --out, or delete it"
            )
    rows = [Row(name, [scores_from(s["test"]) for s in summaries[m]]) for m, name in _METHODS.items()]
    rows.append(Row(_ALONE, [score_labels(dataset, cases, alone)]))
    scores = table(rows, _METRICS)
    _print(console, scores)
    (out / "results.md").write_text(scores.markdown())
    pictures = _pictures(config, dataset, cases, alone)
    _write_page(config, dataset, rows, summaries, pictures, source)
    return _figures(rows, summaries, source) | {
        "seeds": seeds,
        "steps": config.steps,
        "report": str(out / "report.html"),
    }


def _run_config(config: Config, method: Literal["unimatch_v2", "vessa"], seed: int) -> Config:
    out = str(Path(config.out) / f"{method}-{seed}")
    return replace(config, seed=seed, out=out, semi=replace(config.semi, method=method))


def _annotate(
    config: Config, dataset: Dataset, cases: Sequence[Case], console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """VESSA alone: its labels of the test cases without any student, and who it is."""
    with AnnotatorClient(config.annotator.url, config.annotator.api_key) as client:
        bank = seed_labeled(client, dataset, config)
        info = client.info()
        feed = AnnotationFeed(client, dataset, bank, open_cache(config.cache), config.annotator)
        try:
            with console.status(f"{_ALONE}: {sum(len(c.slices) for c in cases)} test images"):
                labels = labels_of(feed, cases)
        finally:
            feed.close()
        source: dict[str, Any] = {"model": info.model, "preset": info.preset, "bank": bank.model_dump()}
        source |= {"labels_version": info.labels_version, "failed_items": int(feed.stats()["failed_items"])}
    return labels, source


def _pictures(
    config: Config, dataset: Dataset, cases: Sequence[Case], alone: dict[str, Any]
) -> list[Overlay]:
    """Test cases by VESSA alone and by the best teachers of seed 0."""
    predicted = {_ALONE: alone}
    for method, name in _METHODS.items():
        run = _run_config(config, method, 0)
        model, channels, _ = load_best(Path(run.out), run)
        predicted[name] = predict_labels(model, dataset, cases, run, channels)
    return best_median_worst(dataset, cases, predicted, _METHODS["vessa"])


def _write_page(
    config: Config,
    dataset: Dataset,
    rows: Sequence[Row],
    summaries: dict[str, list[dict[str, Any]]],
    pictures: Sequence[Overlay],
    source: dict[str, Any],
) -> None:
    out, seeds = Path(config.out), len(summaries["vessa"])
    groups = summaries["vessa"][0]["groups"]
    page = Page(f"{dataset.name}: UniMatch V2 and VESSA")
    page.lead(
        f"{groups['labeled']} labeled and {groups['unlabeled']} unlabeled patients. Scores are those of "
        f"{groups['test']} test patients, the checkpoint is chosen on {groups['val']} validation patients. "
        f"{config.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"
        f"{': mean ± standard deviation' if seeds > 1 else ''}."
    )
    page.cards(cards(rows))
    classes = list(rows[0].seeds[0].by_class)
    page.figures(
        [
            bars_figure({r.name: [r.values("dice", c) for c in classes] for r in rows}, classes, "Test Dice"),
            comparison_figure(
                {
                    name: [Path(_run_config(config, m, seed).out) for seed in range(seeds)]
                    for m, name in _METHODS.items()
                }
            ),
        ]
    )
    page.heading("Test patients")
    scores = table(rows, _METRICS)
    page.table(scores.header, scores.lines, scores.best)
    page.note(missed(rows))
    page.overlays(pictures, dataset.classes)
    page.heading("Runs")
    page.links(
        {
            f"{name}, seed {seed}": f"{m}-{seed}/report.html"
            for m, name in _METHODS.items()
            for seed in range(seeds)
        }
    )
    page.details(
        "Configuration, annotator and counts",
        {"config": without_key(config), "annotator": source, "runs": summaries},
    )
    page.write(out / "report.html")


def _print(console: Console, scores: Table) -> None:
    shown = Shown(title="Test patients")
    for index, heading in enumerate(scores.header):
        shown.add_column(heading, justify="left" if index < 2 else "right")
    for i, line in enumerate(scores.lines):
        last = i + 1 == len(scores.lines) or scores.lines[i + 1][0] != line[0]
        cells = [f"[bold]{c}[/bold]" if (i, j) in scores.best else c for j, c in enumerate(line)]
        shown.add_row(*cells, end_section=last)
    console.print(shown)


def _figures(
    rows: Sequence[Row], summaries: dict[str, list[dict[str, Any]]], source: dict[str, Any]
) -> dict[str, Any]:
    keys = ("unimatch_v2", "vessa_assisted", "vessa_alone")
    figures: dict[str, Any] = {
        f"{key}_dice": _rounded(row.mean("dice")) for key, row in zip(keys, rows, strict=True)
    }
    for key, row in zip(keys, rows, strict=True):
        figures[key] = {
            "dice_by_seed": [round(v, 4) for v in row.values("dice")],
            "hd95": _rounded(row.mean("hd95")),
            "by_class": {
                name: {m: _rounded(row.mean(m, name)) for m in _METRICS} for name in row.seeds[0].by_class
            },
        }
    figures["hd95_unit"] = rows[0].seeds[0].unit
    figures["annotator_model"] = source["model"]
    figures["wait_share"] = max(s["wait_share"] for s in summaries["vessa"])
    return figures


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
