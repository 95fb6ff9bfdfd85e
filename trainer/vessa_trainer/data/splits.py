"""Read the patients of each split from files, or draw them among the annotated patients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vessa.datasets import Case, Dataset, Slice
from vessa.errors import InvalidDataset
from vessa_trainer.config import DataConfig
from vessa_trainer.data.examination import examine

PARTS = ("labeled", "unlabeled", "val", "test")


@dataclass(frozen=True)
class Splits:
    """Groups of each part; no group is in two of them."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class SplitPlan:
    """Splits, and where the patients of each part come from, by part."""

    splits: Splits
    sources: Mapping[str, str]
    drawn: bool = False


def read_splits(dataset: Dataset, config: DataConfig) -> Splits:
    """Return the groups of the four parts; see `plan_splits`."""
    return plan_splits(dataset, config).splits


def plan_splits(dataset: Dataset, config: DataConfig) -> SplitPlan:
    """Read the four split files of a config, else the data set's own lists, else draw the patients.

    The unlabeled groups are those of their file that are not labeled. The data set's own lists are those that
    it calls train, val and test, such as SSL4MIS's; what they leave open is drawn. Raises InvalidDataset when
    some of the four files exist and others do not, or when a group is in two parts.
    """
    names = {part: getattr(config, part) for part in PARTS}
    missing = [part for part, name in names.items() if not dataset.has_split(name)]
    if not missing:
        parts = {part: dataset.split(name) for part, name in names.items()}
        sources = dict(names)
        drawn = False
    elif len(missing) < len(names):
        listed = ", ".join(f"{part} ({names[part]})" for part in missing)
        raise InvalidDataset(
            f"no split file for {listed}. Write the missing files, or none to have them drawn"
        )
    elif any(_has_own(dataset, part) for part in ("train", "val", "test")):
        parts, sources = _own_lists(dataset, config)
        drawn = True
    else:
        parts, sources = _draw(dataset, config)
        drawn = True
    if config.folds:
        _take_fold(dataset, config, parts, sources, drawn=drawn)
        drawn = True
    parts["unlabeled"] = tuple(g for g in parts["unlabeled"] if g not in parts["labeled"])
    splits = Splits(**parts)
    _check_apart(splits)
    return SplitPlan(splits, sources, drawn)


def _take_fold(
    dataset: Dataset,
    config: DataConfig,
    parts: dict[str, tuple[str, ...]],
    sources: dict[str, str],
    *,
    drawn: bool,
) -> None:
    """Replace the labeled, unlabeled and validation patients by those of one fold; see `DataConfig.folds`.

    Labeled patients come from the parts behind the validation part, so that folds draw different ones.
    drawn: no split file keeps the masks of unlabeled patients out, so these are divided, too
    Raises InvalidDataset for fewer annotated patients than folds.
    """
    known, annotated = {*parts["labeled"], *parts["val"]}, set(examine(dataset).annotated())
    known |= set(parts["unlabeled"]) & annotated if drawn else set()
    pool = sorted(known & annotated)
    if len(pool) < config.folds:
        raise InvalidDataset(
            f"{config.folds} folds need as many annotated patients besides those of the test; there are "
            f"{len(pool)}. Lower --folds, or annotate more"
        )
    order = np.random.default_rng(config.split_seed).permutation(pool).tolist()
    cut = [order[number :: config.folds] for number in range(config.folds)]
    behind = [g for part in (*cut[config.fold + 1 :], *cut[: config.fold]) for g in part]
    labeled = behind[: config.labeled_groups or len(parts["labeled"])]
    others = {*parts["unlabeled"], *known} - {*labeled, *cut[config.fold]}
    parts |= {"labeled": tuple(labeled), "val": tuple(cut[config.fold]), "unlabeled": tuple(sorted(others))}
    text = (
        f"fold {config.fold + 1} of {config.folds} among the {len(pool)} annotated patients that are not of "
        "the test"
    )
    sources |= {"labeled": text, "val": text, "unlabeled": f"the other training patients; {text}"}


def _check_apart(splits: Splits) -> None:
    pairs = [
        ("val", "test"),
        *((one, other) for one in ("labeled", "unlabeled") for other in ("val", "test")),
    ]
    for one, other in pairs:
        both = set(getattr(splits, one)) & set(getattr(splits, other))
        if both:
            raise InvalidDataset(f"groups in both {one} and {other}: {sorted(both)[:5]}")


def _has_own(dataset: Dataset, part: str) -> bool:
    """Tell whether the data set has a list of its own; a file `test` in the working directory is none."""
    return dataset.has_split(part) and not Path(part).is_file()


def _own_lists(dataset: Dataset, config: DataConfig) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Take the data set's own train, val and test lists; draw what they leave open.

    Without a train list all patients of no other list are trained on. Validation and test patients without a
    list are drawn among the annotated patients that are trained on, and labeled patients among the rest.
    """
    own = {part: dataset.split(part) for part in ("train", "val", "test") if _has_own(dataset, part)}
    listed = {group for part in ("val", "test") for group in own.get(part, ())}
    train = own.get("train", tuple(g for g in dataset.groups() if g not in listed))
    sources = {part: f"the data set's own {part} list" for part in own}
    sources["unlabeled"] = sources.pop("train", "all patients of no other list")
    annotated = set(examine(dataset).annotated())
    rng = np.random.default_rng(config.split_seed)
    candidates = [g for g in rng.permutation(sorted(train)).tolist() if g in annotated]
    count = len(candidates)
    for part, share in (("val", config.val_share), ("test", config.test_share)):
        if part not in own:
            taken = candidates[: max(1, round(share * count))]
            candidates = candidates[len(taken) :]
            own[part] = tuple(taken)
            train = tuple(g for g in train if g not in taken)
            sources[part] = f"drawn from the training patients by data.split_seed {config.split_seed}"
    labeled = _labeled(candidates, len(train) > len(candidates), config)
    if not labeled:
        raise InvalidDataset(
            f"no training patient of '{dataset.name}' is left that has a mask that shows a class: {count} of "
            f"{len(train)} have one. Annotate more, or write all of train, val and test lists"
        )
    sources["labeled"] = f"drawn from the annotated training patients ({_how_many(config)})"
    return {"labeled": labeled, "unlabeled": train, "val": own["val"], "test": own["test"]}, sources


def _draw(dataset: Dataset, config: DataConfig) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Draw validation, test and labeled patients among the annotated ones; the others are unlabeled."""
    every, annotated = dataset.groups(), examine(dataset).annotated()
    rng = np.random.default_rng(config.split_seed)
    groups = rng.permutation(annotated).tolist() if annotated else []
    val, test = (max(1, round(share * len(groups))) for share in (config.val_share, config.test_share))
    train = groups[val + test :]
    if len(train) < (config.labeled_groups or 1):
        raise InvalidDataset(
            f"{len(groups)} of the {len(every)} groups of '{dataset.name}' have a mask that shows a class: "
            "too few "
            f"for {config.labeled_groups or 1} labeled, {val} validation and {test} test groups. Annotate "
            "more, or "
            f"write split files ({', '.join(getattr(config, part) for part in PARTS)})"
        )
    labeled = _labeled(train, len(every) > len(groups), config)
    apart = {*labeled, *groups[: val + test]}
    drawn = f"drawn among {len(groups)} annotated groups by data.split_seed {config.split_seed}"
    sources = dict.fromkeys(PARTS, drawn) | {
        "labeled": f"{drawn} ({_how_many(config)})",
        "unlabeled": "all groups that are in no other part",
    }
    return {
        "labeled": labeled,
        "unlabeled": tuple(g for g in rng.permutation(sorted(every)).tolist() if g not in apart),
        "val": tuple(groups[:val]),
        "test": tuple(groups[val : val + test]),
    }, sources


def _labeled(annotated: Sequence[str], others: bool, config: DataConfig) -> tuple[str, ...]:
    """Take the labeled patients; others: whether patients without annotation can be the unlabeled ones."""
    everyone = len(annotated) if others else 1
    return tuple(annotated[: config.labeled_groups or everyone])


def _how_many(config: DataConfig) -> str:
    if config.labeled_groups is not None:
        return f"data.labeled_groups {config.labeled_groups}"
    return "all of them where other patients are unlabeled, else one; data.labeled_groups sets the number"


def write_splits(folder: Path, splits: Splits) -> None:
    """Write split files that `--set data.labeled=...` and others read again, one group a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        text = "".join(f"{group}\n" for group in getattr(splits, part))
        (folder / f"{part}.txt").write_text(text, encoding="utf-8")


def slices_of(dataset: Dataset, groups: Sequence[str]) -> list[Slice]:
    """Return all slices of some groups, in order."""
    wanted = set(groups)
    return [s for s in dataset.slices() if s.group in wanted]


def cases_of(dataset: Dataset, groups: Sequence[str]) -> list[Case]:
    """Return all cases of some groups, in order."""
    wanted = set(groups)
    return [c for c in dataset.cases() if c.group in wanted]
