"""Reproduce the tables of the VESSA paper: its methods at its label budgets, on public splits."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vessa import atomic_write
from vessa.datasets import Dataset
from vessa.errors import InvalidConfig, InvalidDataset
from vessa.report.cases import annotated
from vessa.report.tables import Row, missed
from vessa_trainer.config import Config, overlaid
from vessa_trainer.data.splits import cases_of
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.experiments.compare import METRICS, figures
from vessa_trainer.experiments.methods import Runs, find_methods, run_methods
from vessa_trainer.reporting.plots import bars_figure, budgets_figure

_SHOWN = ("dice", "iou", "hd95")  # of each cell, as in the paper; the CSV file has all of METRICS


@dataclass(frozen=True)
class PublishedTable:
    """One table of the VESSA paper.

    percents: labeled percentages of the training patients; bound: whether a run with all labels is added
    """

    title: str
    methods: tuple[str, ...]
    percents: tuple[float, ...]
    bound: bool = False


_SEMI = ("semisam", "unimatch_v2", "vessa")
TABLES = {
    "table1": PublishedTable("Table 1: VESSA's share", ("vessa_alone", "sam2", "vessa"), (1,)),
    "table2": PublishedTable("Table 2: methods on ACDC", _SEMI, (1, 5, 10), bound=True),
    "table3": PublishedTable("Table 3: methods on AbdomenCT-1K", _SEMI, (1, 5, 10), bound=True),
    "table4": PublishedTable(
        "Table 4: the annotator's parts",
        ("vessa_no_language", "vessa_no_memory", "vessa_no_feedback", "vessa"),
        (1,),
    ),
}


@dataclass(frozen=True)
class Split:
    """Patients of each part, and the source of the split. train: in the order of labeling."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    source: str


def split_patients(dataset: Dataset, seed: int) -> Split:
    """Read the data's own split files, such as SSL4MIS's 70/10/20, or draw the VESSA paper's 80/20.

    The paper does not state validation patients. They are a tenth of all patients and are taken from the
    80 %, also where the files name none. Raises InvalidDataset when only train or only test has a file.
    """
    there = {part: dataset.has_split(part) for part in ("train", "val", "test")}
    if there["train"] != there["test"]:
        raise InvalidDataset(f"'{dataset.name}' has a split file of train or of test alone. Add the other")
    rng = np.random.default_rng(seed)
    if there["train"]:
        train, test = list(dataset.split("train")), dataset.split("test")
        source = "the data's own split files"
    else:
        drawn = rng.permutation(sorted(dataset.groups())).tolist()
        count = max(1, round(0.2 * len(drawn)))
        train, test = drawn[count:], tuple(drawn[:count])
        source = f"80 % and 20 % of the patients, drawn by seed {seed}"
    if there["val"]:
        val = dataset.split("val")
    else:
        val = tuple(rng.permutation(train)[: max(1, round(0.1 * (len(train) + len(test))))].tolist())
        train = [g for g in train if g not in val]
        source += "; validation patients drawn out of the training patients"
    if len(train) < 2:
        raise InvalidDataset(f"'{dataset.name}' has {len(train)} training patients; expected 2 or more")
    return Split(tuple(train), val, test, source)


def labeled_patients(dataset: Dataset, split: Split, percent: float) -> tuple[str, ...]:
    """Return the labeled patients of a budget: `labeled_<n>` of the data's own files, else the first n.

    n is `percent` of the training patients rounded down, at least 1: 1, 3 and 7 of SSL4MIS's 70.
    """
    count = max(1, int(percent / 100 * len(split.train)))
    own = f"labeled_{count}"
    return dataset.split(own) if dataset.has_split(own) else split.train[:count]


@dataclass(frozen=True)
class Column:
    """One label budget of a table, with its runs."""

    percent: float
    labeled: int
    runs: Runs

    @property
    def heading(self) -> str:
        """Its heading."""
        return f"{self.percent:g} % ({self.labeled} patient{'s' if self.labeled > 1 else ''})"


def run_table(
    name: str,
    config: Config,
    *,
    seeds: int,
    urls: Sequence[str | None],
    resume_line: str,
    console: Console,
    methods: Sequence[str] = (),
    percents: Sequence[float] = (),
) -> dict[str, Any]:
    """Run one of TABLES and write `<name>.md`, `.csv` and `.png` into `config.out`, budget by budget.

    methods, percents: replace those of the table. Methods that name no annotator need the complete one.
    Returns figures by percent. Raises what `run_methods` raises.
    """
    published, out = TABLES[name], Path(config.out)
    dataset = open_training_data(config.data)
    split = split_patients(dataset, config.data.split_seed)
    if not annotated(dataset, cases_of(dataset, split.test)):
        raise InvalidDataset("no test patient has a mask: nothing can be scored. Annotate test patients")
    base = overlaid(config, {"annotator": {"serves": "vessa"}})
    chosen = find_methods(methods or published.methods)
    plan = [(p, chosen, labeled_patients(dataset, split, p)) for p in percents or published.percents]
    if published.bound:
        plan.append((100, find_methods(["supervised_bound"]), split.train))
    columns: list[Column] = []
    for percent, some, labeled in plan:
        runs = run_methods(
            replace(base, out=str(out / f"labeled_{len(labeled)}")),
            some,
            seeds=seeds,
            urls=urls,
            cell=_write_splits(out / "splits", split, labeled),
            resume_line=resume_line,
            console=console,
        )
        columns.append(Column(percent, len(labeled), runs))
        _write(name, published, config, split, columns, seeds)
    console.print((out / f"{name}.md").read_text(), highlight=False, markup=False)
    return {
        "table": str(out / f"{name}.md"),
        "seeds": seeds,
        "steps": config.steps,
        "percents": {f"{c.percent:g}": figures(c.runs) | {"labeled": c.labeled} for c in columns},
    }


def _write_splits(folder: Path, split: Split, labeled: Sequence[str]) -> dict[str, Any]:
    """Write the split files of one budget; return the settings that name them.

    Raises InvalidConfig when the folder holds another split, whose runs have other patients.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {f"labeled_{len(labeled)}": labeled, "train": split.train, "val": split.val, "test": split.test}
    paths = {part: folder.resolve() / f"{part}.txt" for part in parts}
    for part, groups in parts.items():
        text = "".join(f"{g}\n" for g in groups)
        if paths[part].is_file() and paths[part].read_text(encoding="utf-8") != text:
            raise InvalidConfig(f"{paths[part]} names other patients. Choose another --out, or delete it")
        atomic_write.write_text(paths[part], text)
    first, train, val, test = map(str, paths.values())
    return {"data": {"labeled": first, "unlabeled": train, "val": val, "test": test}}


def _write(
    name: str, published: PublishedTable, config: Config, split: Split, columns: Sequence[Column], seeds: int
) -> None:
    out, rows = Path(config.out), [_rows(c) for c in columns]
    titles = list(dict.fromkeys(title for some in rows for title in some))
    first = next(iter(rows[0].values())).seeds[0]
    classes = [*first.by_class, None]
    atomic_write.write_text(
        out / f"{name}.md",
        f"# {published.title}\n\n"
        + _about(config, split, columns, seeds, first.unit)
        + _markdown(rows, titles, classes, columns),
    )
    with (
        atomic_write.replacing(out / f"{name}.csv") as fresh,
        fresh.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["method", "class", "percent", "labeled", "metric", "mean", "std", "by_seed"])
        for column, some in zip(columns, rows, strict=True):
            for title, row in some.items():
                writer.writerows(_records(row, title, column, classes))
    if len(columns) > 1:
        curves = {
            t: [
                (c.percent, some[t].values("dice"))
                for c, some in zip(columns, rows, strict=True)
                if t in some
            ]
            for t in titles
        }
        figure = budgets_figure(curves, "Test Dice")
    else:
        shown = [c for c in classes if c is not None]
        figure = bars_figure(
            {t: [r.values("dice", c) for c in shown] for t, r in rows[0].items()}, shown, "Test Dice"
        )
    with atomic_write.replacing(out / f"{name}.png") as fresh:
        figure.savefig(fresh, format="png", dpi=140)


def _rows(column: Column) -> dict[str, Row]:
    return {row.name: row for row in column.runs.rows()}


def _markdown(
    rows: Sequence[Mapping[str, Row]],
    titles: Sequence[str],
    classes: Sequence[str | None],
    columns: Sequence[Column],
) -> str:
    lines = [["method", "class", *(c.heading for c in columns)]]
    lines.append(["---"] * len(lines[0]))
    for title in titles:
        for class_name in classes:
            cells = [
                " / ".join(some[title].cell(m, class_name) for m in _SHOWN) if title in some else "–"
                for some in rows
            ]
            lines.append([title, class_name or "mean", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _records(row: Row, title: str, column: Column, classes: Sequence[str | None]) -> list[list[str]]:
    records = []
    for class_name in classes:
        for metric in METRICS:
            values = row.values(metric, class_name)
            mean = f"{np.mean(values):.5f}" if values else ""
            spread = f"{np.std(values, ddof=1):.5f}" if len(values) > 1 else ""
            place = [title, class_name or "mean", f"{column.percent:g}", str(column.labeled)]
            records.append([*place, metric, mean, spread, " ".join(f"{v:.5f}" for v in values)])
    return records


def _about(config: Config, split: Split, columns: Sequence[Column], seeds: int, unit: str) -> str:
    """Describe data, budget, annotators and their Stage 1 data, for the head of a table."""
    student = f"{config.student.name} at {config.student.size} px"
    several = seeds > 1
    parts = [
        f"{Path(config.data.root).name}: {len(split.train)} training, {len(split.val)} validation and "
        f"{len(split.test)} test patients ({split.source}). {config.steps} steps of "
        f"{config.batch_labeled} labeled and {config.batch_unlabeled} unlabeled images, {student}, "
        f"{seeds} seed{'s' if several else ''}. The teacher that is best on the validation patients is "
        "tested. "
        f"Cells: Dice / IoU of the foreground / HD95 ({unit})"
        f"{', mean ± standard deviation' if several else ''}.",
        missed([row for column in columns for row in column.runs.rows()]),
    ]
    sources = {t: s for column in columns for t, s in column.runs.sources().items()}
    for title, source in sources.items():
        who = " and ".join(source["parts"]) or "prompts alone"
        saw = ", ".join(source["trained_on"] or []) or "nothing (official weights)"
        parts.append(
            f"{title}: preset {source['preset']}, weights {source['model']}, by {who}; Stage 1 saw {saw}."
        )
    return "\n\n".join(p for p in parts if p) + "\n\n"
