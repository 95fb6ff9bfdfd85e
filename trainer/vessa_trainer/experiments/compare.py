"""Compare methods with the same steps and seeds, on one or several label budgets, one report each."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Shown
from rich.text import Text

from vessa.errors import InvalidConfig, InvalidDataset
from vessa.report.cases import annotated, best_median_worst
from vessa.report.page import Page
from vessa.report.tables import Row, Table, cards, missed, table
from vessa_trainer.config import DEFAULT_METHODS, Config, shareable
from vessa_trainer.data.splits import cases_of, read_splits
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.experiments.methods import Runs, find_methods, run_methods
from vessa_trainer.reporting.plots import bars_figure, comparison_figure

METRICS = ("dice", "iou", "iou_fgbg", "hd95")
_KEYS = {"vessa": "vessa_assisted"}  # names of methods in the JSON line, where they differ


def compare(
    config: Config,
    *,
    seeds: int,
    resume_line: str,
    console: Console,
    methods: Sequence[str] = DEFAULT_METHODS,
    labeled: Sequence[str] = (),
    urls: Sequence[str | None] = (),
) -> dict[str, Any]:
    """Train methods for each label budget and seed, score them on the test patients, and write reports.

    methods: names of configs, see `find_methods`
    labeled: split files of several budgets, each with a folder of its own in `config.out`; none for the
        config's own split
    urls: of the services, see `run_methods`
    Returns the figures of the JSON line; those of several budgets under "budgets", by their names. Raises
    what `run_methods` raises.
    """
    chosen = find_methods(methods)
    budgets = _budgets(config, labeled)
    results: dict[str, dict[str, Any]] = {}
    for name, budget in budgets.items():
        dataset = open_training_data(budget.data)
        cases = annotated(dataset, cases_of(dataset, read_splits(dataset, budget.data).test))
        if not cases:
            raise InvalidDataset(
                "no test patient has a mask: methods cannot be compared. Annotate test patients"
            )
        runs = run_methods(
            budget,
            chosen,
            seeds=seeds,
            urls=urls or [budget.annotator.url],
            resume_line=resume_line,
            console=console,
        )
        scores = table([*runs.rows(), *runs.delivered_rows().values()], METRICS)
        _print(console, scores, f"Test patients, {name}" if len(budgets) > 1 else "Test patients")
        (Path(budget.out) / "results.md").write_text(scores.markdown())
        _write_page(budget, runs, seeds)
        results[name] = figures(runs) | {
            "seeds": seeds,
            "steps": config.steps,
            "report": str(Path(budget.out) / "report.html"),
        }
    return next(iter(results.values())) if len(results) == 1 else {"budgets": results}


def _budgets(config: Config, labeled: Sequence[str]) -> dict[str, Config]:
    """Return the config of each budget by the name of its split file."""
    if len(labeled) < 2:
        split = labeled[0] if labeled else config.data.labeled
        return {Path(split).stem: replace(config, data=replace(config.data, labeled=split))}
    budgets = {
        Path(split).stem: replace(
            config, out=str(Path(config.out) / Path(split).stem), data=replace(config.data, labeled=split)
        )
        for split in labeled
    }
    if len(budgets) < len(labeled):
        raise InvalidConfig(f"expected label splits of different names, got {', '.join(labeled)}")
    return budgets


def _write_page(config: Config, runs: Runs, seeds: int) -> None:
    dataset = open_training_data(config.data)
    rows = [*runs.rows(), *runs.delivered_rows().values()]
    splits = read_splits(dataset, config.data)
    out, classes = Path(config.out), list(rows[0].seeds[0].by_class)
    page = Page(f"{dataset.name}: {', '.join(m.title for m in runs.methods)}")
    page.lead(
        f"{len(splits.labeled)} labeled and {len(splits.unlabeled)} unlabeled patients. Scores are those of "
        f"{len(splits.test)} test patients; {len(splits.val)} other patients choose the checkpoint. "
        f"{config.steps} steps, {seeds} seed{'s' if seeds > 1 else ''}"
        f"{': mean ± standard deviation' if seeds > 1 else ''}."
    )
    page.cards(cards(runs.rows()))
    charts = [
        bars_figure({r.name: [r.values("dice", c) for c in classes] for r in rows}, classes, "Test Dice")
    ]
    curves = {m.title: [Path(c.out) for c in runs.configs[m.name]] for m in runs.trained}
    page.figures([*charts, *([comparison_figure(curves)] if curves else [])])
    page.heading("Test patients")
    scores = table(rows, METRICS)
    page.table(scores.header, scores.lines, scores.best)
    page.note(missed(rows))
    cases = annotated(dataset, cases_of(dataset, splits.test))
    assisted = [m.title for m in runs.methods if m.name == "vessa"] or [runs.methods[-1].title]
    page.overlays(
        best_median_worst(dataset, cases, runs.predicted(dataset, cases), assisted[0]), dataset.classes
    )
    page.heading("Runs")
    page.links(
        {
            f"{m.title}, seed {c.seed}": f"{Path(c.out).name}/report.html"
            for m in runs.methods
            for c in runs.configs[m.name]
        }
    )
    page.details(
        "Configuration, annotators and counts",
        {"config": shareable(config), "annotators": runs.sources(), "runs": runs.summaries},
    )
    page.write(out / "report.html")


def _print(console: Console, scores: Table, title: str) -> None:
    shown = Shown(title=Text(title))
    for index, heading in enumerate(scores.header):
        shown.add_column(Text(heading), justify="left" if index < 2 else "right")
    for i, line in enumerate(scores.lines):
        last = i + 1 == len(scores.lines) or scores.lines[i + 1][0] != line[0]
        cells = [Text(c, "bold" if (i, j) in scores.best else "") for j, c in enumerate(line)]
        shown.add_row(*cells, end_section=last)
    console.print(shown)


def figures(runs: Runs) -> dict[str, Any]:
    """Return figures as plain data: mean Dice of each method as `<key>_dice`, the rest under `<key>`.

    `<method>_delivered_dice` and `<method>_fused_dice` stand beside them; see `Runs.delivered_rows`.
    """
    rows: dict[str, Row] = {
        _KEYS.get(m.name, m.name): row for m, row in zip(runs.methods, runs.rows(), strict=True)
    }
    further = runs.delivered_rows()
    found: dict[str, Any] = {
        f"{key}_dice": _rounded(row.mean("dice")) for key, row in (rows | further).items()
    }
    for key, row in rows.items():
        found[key] = {
            "dice_by_seed": [round(v, 4) for v in row.values("dice")],
            "hd95": _rounded(row.mean("hd95")),
            "by_class": {
                name: {m: _rounded(row.mean(m, name)) for m in METRICS} for name in row.seeds[0].by_class
            },
        }
    found["hd95_unit"] = next(iter(rows.values())).seeds[0].unit
    sources = list(runs.sources().values())
    if sources:
        found["annotator_model"] = sources[0]["model"]
        found["wait_share"] = max(s["wait_share"] for some in runs.summaries.values() for s in some)
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
