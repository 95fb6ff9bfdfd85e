"""Read or draw the patients of each split."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vessa.datasets import Case, Dataset, Slice
from vessa.errors import InvalidDataset
from vessa_trainer.config import DataConfig


@dataclass(frozen=True)
class Splits:
    """Groups of each part; no group is in two of them."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def read_splits(dataset: Dataset, config: DataConfig) -> Splits:
    """Read the four split files, or draw the splits by patient when none of them exists.

    The unlabeled groups are those of their file that are not labeled. Raises InvalidDataset when
    some files exist and others do not, or when a group is in two parts.
    """
    names = {"labeled": config.labeled, "unlabeled": config.unlabeled, "val": config.val, "test": config.test}
    missing = {k: v for k, v in names.items() if not ((dataset.root / v).is_file() or Path(v).is_file())}
    if len(missing) == len(names):
        return _draw(dataset, config)
    if missing:
        raise InvalidDataset(f"no split file for {', '.join(f'{k} ({v})' for k, v in missing.items())}")
    parts = {k: dataset.split(v) for k, v in names.items()}
    parts["unlabeled"] = tuple(g for g in parts["unlabeled"] if g not in parts["labeled"])
    splits = Splits(**parts)
    for one, other in (
        ("val", "test"),
        ("labeled", "val"),
        ("labeled", "test"),
        ("unlabeled", "val"),
        ("unlabeled", "test"),
    ):
        both = set(getattr(splits, one)) & set(getattr(splits, other))
        if both:
            raise InvalidDataset(f"groups in both {one} and {other}: {sorted(both)[:5]}")
    return splits


def _draw(dataset: Dataset, config: DataConfig) -> Splits:
    groups = np.random.default_rng(config.split_seed).permutation(sorted(dataset.groups())).tolist()
    val, test = (max(1, round(share * len(groups))) for share in (config.val_share, config.test_share))
    train = groups[val + test :]
    if len(train) <= config.labeled_groups:
        raise InvalidDataset(
            f"'{dataset.name}' has {len(groups)} groups: too few for {config.labeled_groups} labeled ones "
            "besides unlabeled, validation and test groups"
        )
    return Splits(
        tuple(train[: config.labeled_groups]),
        tuple(train[config.labeled_groups :]),
        tuple(groups[:val]),
        tuple(groups[val : val + test]),
    )


def slices_of(dataset: Dataset, groups: Sequence[str]) -> list[Slice]:
    """All slices of some groups, in order."""
    wanted = set(groups)
    return [s for s in dataset.slices() if s.group in wanted]


def cases_of(dataset: Dataset, groups: Sequence[str]) -> list[Case]:
    """All cases of some groups, in order."""
    wanted = set(groups)
    return [c for c in dataset.cases() if c.group in wanted]
