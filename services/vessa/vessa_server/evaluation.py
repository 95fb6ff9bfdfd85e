"""Score the annotator alone from the templates of a few patients (the paper's Tables 4 and 5).

Each draw of bank patients makes a new bank. Every test patient outside of it is annotated slice by slice
and scored as a volume. Each variant differs from the default in one setting.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from vessa.bulk.adapt_bank import gray_squares
from vessa.codec import image_digest
from vessa.datasets import Case, Dataset, Slice
from vessa.datasets.base import IGNORE
from vessa.errors import InvalidDataset, VessaError
from vessa.masks.geometry import box_and_point
from vessa.report.cases import annotated, best_median_worst, score_labels
from vessa.report.page import Page
from vessa.report.tables import Row, cards, missed, table
from vessa.schemas import ADAPTATION_IMAGES
from vessa_server.inference.annotator import Annotator, load_annotator
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.template import Template
from vessa_server.types import SegmentItem, SegmentResult, TemplateItem

_Answer = TypeVar("_Answer", SegmentResult, Template)

_BATCH = 8
_SURE = 6.0  # mask logit of a known pixel
_FEATURES = 2 << 30  # bytes; every variant reuses the features of the first one
_PICTURED = 4  # variants in the pictures beside the truth
_TRUTH = "from the truth: a ceiling"


@dataclass(frozen=True)
class Variant:
    """One configuration of the requests.

    without: see Annotator; prompts: kind of prompts made from the truth, or None; adapted: whether the bank
    has weights of its own
    """

    name: str
    template_choice: str = "top1"
    without: frozenset[str] = frozenset()
    prompts: str | None = None
    adapted: bool = False

    @property
    def drawn(self) -> bool:
        """Whether the result depends on a seed."""
        return self.template_choice in ("sample", "random")


VARIANTS = {
    "top1": Variant("VESSA, most similar template"),
    "top3": Variant("three templates in memory", "top3"),
    "sample": Variant("template sampled (Eq. 1)", "sample"),
    "random": Variant("random template", "random"),
    "no-language": Variant("without language", without=frozenset({"language"})),
    "no-memory": Variant("without memory", without=frozenset({"memory"})),
    "box": Variant(f"box {_TRUTH}", prompts="box"),
    "point": Variant(f"point {_TRUTH}", prompts="point"),
    "mask": Variant(f"mask logits {_TRUTH}", prompts="mask"),
    "adapted": Variant("adapted to the bank", adapted=True),
}


def evaluate(
    dataset: Dataset,
    banks: Sequence[Sequence[str]],
    test: Sequence[str] | None,
    *,
    weights: str,
    device: str,
    variants: Sequence[str],
    seeds: int,
    out: Path,
    console: Console,
    adapt_seconds: float = 1200.0,
    unlabeled: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Score variants on the test groups, once for each bank and, where it matters, for each seed.

    banks: groups of each draw; test: None for all groups outside the bank; unlabeled: groups whose images,
    without masks, the variant 'adapted' learns from; None for all that are neither in the bank nor under
    test, and where there are none, for those under test. Writes out/report.html and returns the figures of
    the JSON line, those of the first variant at the top. Raises InvalidDataset when a bank or the test groups
    hold no annotation, or share a group.
    """
    rows = {name: Row(VARIANTS[name].name, []) for name in variants}
    stages: dict[str, float] = {}
    labels: dict[str, dict[str, list[np.ndarray]]] = {}
    adapted: list[dict[str, Any]] = []
    for draw, groups in enumerate(banks):
        cases = _cases(dataset, groups, test)
        with tempfile.TemporaryDirectory() as folder:
            store = TemplateBanks(FolderStore(folder))
            annotator = load_annotator(weights, device, store, _FEATURES)
            seed_bank(annotator, dataset, groups)
            for name in variants:
                variant = VARIANTS[name]
                if variant.adapted:
                    own = _unlabeled(dataset, groups, cases, unlabeled)
                    adapted.append(_adapt(annotator, own, adapt_seconds))
                else:
                    annotator.banks.adapt("evaluation", None)
                for seed in range(seeds if variant.drawn else 1):
                    title = f"bank {draw + 1} of {len(banks)}: {variant.name}"
                    found = dict(_annotate(annotator, dataset, cases, variant, seed, title, console))
                    rows[name].seeds.append(score_labels(dataset, cases, found))
                    labels.setdefault(variant.name, found)
                if draw == 0 and name == variants[0]:
                    stages = dict(annotator.stage_seconds())
    cases = _cases(dataset, banks[0], test)
    images = sum(len(c.slices) for c in cases)
    figures = _figures(list(rows.items())) | {
        "banks": [list(b) for b in banks],
        "test_patients": len({c.group for c in cases}),
        "model": annotator.model_digest,
        "ms_per_image": {k: round(1000 * v / images, 2) for k, v in stages.items()},
        "report": str(out / "report.html"),
    }
    if adapted:
        figures["adaptations"] = adapted
    _write(out, dataset, list(rows.values()), labels, cases, figures)
    return figures


def _cases(dataset: Dataset, bank: Sequence[str], test: Sequence[str] | None) -> list[Case]:
    wanted = set(dataset.groups()) - set(bank) if test is None else set(test)
    if both := wanted & set(bank):
        raise InvalidDataset(f"groups both in the bank and under test: {sorted(both)[:5]}")
    cases = annotated(dataset, [c for c in dataset.cases() if c.group in wanted])
    if not cases:
        raise InvalidDataset(f"no test group of '{dataset.name}' has a mask: there is nothing to score")
    return cases


def seed_bank(annotator: Annotator, dataset: Dataset, groups: Sequence[str]) -> None:
    """Fill the bank "evaluation" with all annotated slices of some groups."""
    if unknown := set(groups) - set(dataset.groups()):
        raise InvalidDataset(f"'{dataset.name}' has no groups {sorted(unknown)[:5]}")
    items = []
    for item in dataset.slices():
        mask = dataset.mask(item) if item.group in groups else None
        mask = None if mask is None else np.where(mask == IGNORE, 0, mask).astype(np.uint8)
        if mask is not None and mask.any():
            items.append(TemplateItem(dataset.image(item), mask, dict(dataset.classes), item.group))
    if not items:
        raise InvalidDataset(f"the bank's groups hold no mask with a class: {sorted(groups)[:5]}")
    annotator.banks.add("evaluation", [_result(t) for t in annotator.encode_templates(items)])


def _unlabeled(
    dataset: Dataset, bank: Sequence[str], cases: Sequence[Case], groups: Sequence[str] | None
) -> list[np.ndarray]:
    """Return the images that the variant 'adapted' learns from, see `evaluate`."""
    test = {c.group for c in cases}
    chosen = set(dataset.groups()) - set(bank) - test if groups is None else set(groups) - set(bank)
    slices = [s for s in dataset.slices() if s.group in (chosen or test)]
    rows = np.linspace(0, len(slices) - 1, min(len(slices), ADAPTATION_IMAGES)).round().astype(int)
    return [dataset.image(slices[row]) for row in rows]


def _adapt(annotator: Annotator, images: Sequence[np.ndarray], seconds: float) -> dict[str, Any]:
    """Adapt to the bank "evaluation" for `seconds`; return what it was worth on held-out templates."""
    bank = annotator.banks.get("evaluation")
    found, figures = annotator.adaptations.fit(bank, seconds, gray_squares(images))
    annotator.banks.adapt("evaluation", found)
    return figures.model_dump()


def _annotate(
    annotator: Annotator,
    dataset: Dataset,
    cases: Sequence[Case],
    variant: Variant,
    seed: int,
    title: str,
    console: Console,
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Annotate cases; yield each name and the label maps uint8 (H, W) of its slices."""
    annotator.leave_out(variant.without)
    for case in track(cases, title, console=console, transient=True):
        labels: list[np.ndarray] = []
        for start in range(0, len(case.slices), _BATCH):
            slices = case.slices[start : start + _BATCH]
            items = [_item(dataset, s, variant, seed) for s in slices]
            answers = iter(annotator.segment([i for i in items if i is not None]))
            for one, item in zip(slices, items, strict=True):
                empty = np.zeros(dataset.image(one).shape[:2], np.uint8)
                labels.append(empty if item is None else _result(next(answers)).labels)
        yield case.name, labels


def _result(answer: _Answer | VessaError) -> _Answer:
    if isinstance(answer, VessaError):
        raise answer
    return answer


def _item(dataset: Dataset, item: Slice, variant: Variant, seed: int) -> SegmentItem | None:
    """Return the request for a slice; None when the variant has prompts and no class is present."""
    image = dataset.image(item)
    names = tuple(dataset.classes[c] for c in sorted(dataset.classes))
    asked = SegmentItem(
        image_digest(image),
        image,
        "evaluation",
        classes=names,
        group=item.group,
        template_choice=variant.template_choice,
        # each slice has a seed of its own, the same in every run
        seed=int(np.random.default_rng([seed, item.index]).integers(1 << 31)),
    )
    mask = dataset.mask(item)
    if variant.prompts is None or mask is None:
        return asked
    truth = np.stack([mask == c for c in sorted(dataset.classes)])
    if variant.prompts == "mask":
        return replace(asked, mask_logits=np.where(truth, _SURE, -_SURE).astype(np.float32))
    # An annotator who marks structures marks, and requests, the present ones only.
    present = np.flatnonzero(truth.any((1, 2)))
    if not len(present):
        return None
    marks = [box_and_point(truth[row]) for row in present]
    asked = replace(asked, classes=tuple(names[row] for row in present))
    if variant.prompts == "box":
        return replace(asked, boxes=np.array([box for box, _ in marks], np.float32))
    points = np.array([[point] for _, point in marks], np.float32)
    return replace(asked, points=points, point_labels=np.ones((len(present), 1), np.int8))


def _figures(rows: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    def of(row: Row) -> dict[str, Any]:
        dice = row.values("dice")
        return {
            "dice_mean": _rounded(row.mean("dice")),
            "dice_std": round(float(np.std(dice, ddof=1)), 4) if len(dice) > 1 else 0.0,
            "dice_by_class": {c: _rounded(row.mean("dice", c)) for c in row.seeds[0].by_class},
            "iou_mean": _rounded(row.mean("iou")),
            "hd95_mean": _rounded(row.mean("hd95")),
            "hd95_unit": row.seeds[0].unit,
        }

    return of(rows[0][1]) | {"variants": {name: of(row) for name, row in rows}}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _write(
    out: Path,
    dataset: Dataset,
    rows: Sequence[Row],
    labels: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    cases: Sequence[Case],
    figures: Mapping[str, Any],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    page = Page(f"{dataset.name}: the annotator alone")
    size = len(figures["banks"][0])
    page.lead(
        f"{len(figures['banks'])} bank(s) of {size} patient{'s' if size > 1 else ''}, "
        f"{figures['test_patients']} test patients, weights {figures['model']}."
    )
    page.cards(cards(rows[:1]))
    page.heading("Test patients")
    scores = table(rows)
    page.table(scores.header, scores.lines, scores.best)
    page.note(missed(rows))
    shown = dict(list(labels.items())[:_PICTURED])
    page.overlays(best_median_worst(dataset, cases, shown, rows[0].name), dataset.classes)
    page.details("Figures", figures)
    page.write(out / "report.html")
