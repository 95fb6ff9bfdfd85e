"""Train methods side by side, by the names of their configs, for comparisons and tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vessa.client import AnnotatorClient
from vessa.datasets import Case, Dataset
from vessa.errors import InvalidConfig
from vessa.report.tables import Row, scores_from
from vessa_trainer.config import Config, overlaid, read_tree, shipped
from vessa_trainer.experiments.annotator_labels import read_labels
from vessa_trainer.experiments.run import finished, fit
from vessa_trainer.experiments.run_data import RunData, open_run_data
from vessa_trainer.experiments.timing import announce_time
from vessa_trainer.pseudo_labels.annotator_check import choose
from vessa_trainer.pseudo_labels.template_bank import seed_labeled
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_labels
from vessa_trainer.students.networks import build_student


@dataclass(frozen=True)
class Method:
    """One method of a comparison. name: of its config; tree: its settings, which replace all others."""

    name: str
    tree: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Its name in tables."""
        return str(self.tree.get("title") or self.name)

    def config(self, base: Config, seed: int, cell: Mapping[str, Any] | None = None) -> Config:
        """Return the config of one run. cell: settings that replace the method's own, such as a split."""
        out = str(Path(base.out) / f"{self.name}-{seed}")
        return replace(overlaid(base, self.tree, cell or {}), seed=seed, out=out)

    def seeds(self, base: Config, count: int) -> range:
        """Return its seeds: one for a method that trains nothing."""
        alone = self.config(base, 0).semi.method == "vessa_alone"
        return range(1 if alone else count)


def find_methods(names: Sequence[str]) -> list[Method]:
    """Read methods by the names of shipped configs, or by paths. Raises InvalidConfig."""
    paths = [Path(n) if Path(n).suffix in (".yaml", ".yml") else shipped(n) for n in names]
    twice = {p.stem for p in paths if [q.stem for q in paths].count(p.stem) > 1}
    if twice or not paths:
        raise InvalidConfig(f"expected methods of different names, got {', '.join(names) or 'none'}")
    return [Method(path.stem, read_tree(path)) for path in paths]


@dataclass
class Runs:
    """Finished runs of methods on one split.

    summaries, configs: one entry per seed, by the method's name
    """

    methods: list[Method]
    configs: dict[str, list[Config]] = field(default_factory=dict)
    summaries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def trained(self) -> list[Method]:
        """Methods that train a student."""
        return [m for m in self.methods if self.configs[m.name][0].semi.method != "vessa_alone"]

    def rows(self) -> list[Row]:
        """Return test scores as rows of a table."""
        return [Row(m.title, [scores_from(s["test"]) for s in self.summaries[m.name]]) for m in self.methods]

    def delivered_rows(self) -> dict[str, Row]:
        """Return test scores of what `predict` delivers, by the method's name and a suffix.

        `_delivered` is with the flips and post-processing that validation chose, where it chose any;
        `_fused` with the annotator's labels besides (`predict --with-vessa`).
        """
        rows = {}
        for method in self.methods:
            found = self.summaries[method.name]
            if any("test_delivered" in s for s in found):
                scores = [scores_from(s.get("test_delivered", s["test"])) for s in found]
                rows[f"{method.name}_delivered"] = Row(f"{method.title}, as predict delivers", scores)
            if all("test_fused" in s for s in found):
                scores = [scores_from(s["test_fused"]) for s in found]
                rows[f"{method.name}_fused"] = Row(f"{method.title}, fused with VESSA", scores)
        return rows

    def sources(self) -> dict[str, dict[str, Any]]:
        """Return the annotator of each method, by the method's title."""
        return {
            m.title: s["annotator"] for m in self.methods if (s := self.summaries[m.name][0])["annotator"]
        }

    def predicted(self, dataset: Dataset, cases: Sequence[Case]) -> dict[str, dict[str, list[np.ndarray]]]:
        """Return labels of test cases by each method's run of seed 0, by the method's title."""
        labels = {}
        for method in self.methods:
            run = self.configs[method.name][0]
            if method not in self.trained:
                labels[method.title] = read_labels(Path(run.out), cases)
                continue
            model, channels, _ = load_best(Path(run.out), run)
            labels[method.title] = predict_labels(model, dataset, cases, run, channels)
        return labels


def run_methods(
    base: Config,
    methods: Sequence[Method],
    *,
    seeds: int,
    urls: Sequence[str | None],
    cell: Mapping[str, Any] | None = None,
    resume_line: str,
    console: Console,
) -> Runs:
    """Train what is not trained yet below `base.out`, a folder for each method and seed.

    urls: services of which each annotated method takes the first that is what its config names. Data,
    students, annotators, keys and banks are checked before anything is trained. Finished runs are taken as
    they are, an unfinished one is continued. Raises InvalidConfig when a run there has another config or
    other data, or when runs of one kind of annotator would be labeled by different weights; InvalidDataset;
    InvalidWeights; Interrupted, after saving.
    """
    runs = Runs(list(methods))
    for method in methods:
        runs.configs[method.name] = [method.config(base, s, cell) for s in method.seeds(base, seeds)]
    every = [config for method in methods for config in runs.configs[method.name]]
    opened = {config.out: open_run_data(config) for config in every}
    opened[every[0].out].announce(console)
    done = [finished(config, opened[config.out]) for config in every]
    waiting = [config for config, summary in zip(every, done, strict=True) if summary is None]
    _require_students(waiting)
    announce_time(waiting, [opened[config.out] for config in waiting], console)
    address = _annotators(every, done, urls, opened)
    for method in methods:
        runs.summaries[method.name] = []
        for config in runs.configs[method.name]:
            console.print(
                f"{method.title}, seed {config.seed}: {config.out}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
            url = address.get(config.annotator.serves, config.annotator.url)
            run = replace(config, annotator=replace(config.annotator, url=url))
            runs.summaries[method.name].append(fit(run, resume_line=resume_line, announce=False))
    return runs


def _require_students(configs: Sequence[Config]) -> None:
    """Build each kind of student once, so that missing weights are found before hours of another method.

    Raises InvalidWeights, InvalidConfig.
    """
    for student in {config.student for config in configs if config.semi.method != "vessa_alone"}:
        build_student(student, channels=1, classes=2)
        if student.init is not None:
            checkpoint.read(Path(student.init) / checkpoint.BEST)


def _annotators(
    every: Sequence[Config],
    done: Sequence[Mapping[str, Any] | None],
    urls: Sequence[str | None],
    opened: Mapping[str, RunData],
) -> dict[str | None, str | None]:
    """Return the address of each kind of annotator that unfinished runs need; fill their banks.

    A key that may not fill a bank is so refused before anything is trained.
    """
    labelers: dict[str | None, dict[str, str]] = {}
    for config, summary in zip(every, done, strict=True):
        if config.annotated and summary is not None:
            _same_labeler(labelers, config, summary["annotator"])
    address: dict[str | None, str | None] = {}
    for config, summary in zip(every, done, strict=True):
        serves = config.annotator.serves
        if config.annotator.labels is not None:  # a folder in place of the service
            continue
        if config.annotated and summary is None and serves not in address:
            address[serves], info = choose(urls, config.annotator)
            _same_labeler(labelers, config, info.model_dump())
            with AnnotatorClient(address[serves], config.annotator.api_key) as client:
                seed_labeled(client, opened[config.out].data, config)
    return address


def _same_labeler(
    labelers: dict[str | None, dict[str, str]], config: Config, source: Mapping[str, Any]
) -> None:
    """Raise InvalidConfig when runs of one kind of annotator have different weights."""
    who = {k: str(source[k]) for k in ("model", "labels_version")}
    first = labelers.setdefault(config.annotator.serves, who)
    if who != first:
        these, others = (f"{w['model']} with labels {w['labels_version']}" for w in (first, who))
        raise InvalidConfig(
            f"runs in {Path(config.out).parent} have labels of different weights of the annotator ({these}, "
            f"{others}). Choose another --out, or delete the older runs"
        )
