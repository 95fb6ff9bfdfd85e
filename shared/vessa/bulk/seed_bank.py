"""Fill a template bank with the annotated slices of a data set."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vessa.client import AnnotatorClient
from vessa.datasets import Dataset, Slice
from vessa.datasets.base import IGNORE
from vessa.errors import InvalidDataset
from vessa.schemas import BankInfo

_BATCH = 16  # templates per request

Mask = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class SeedResult:
    """The result of `seed_bank`. created: templates that were not in the bank before; bank: its new state."""

    created: int
    bank: BankInfo


def annotated_slices(dataset: Dataset, groups: Collection[str]) -> list[tuple[Slice, Mask]]:
    """Return the slices of some groups whose mask shows a class, with the masks: uint8 (H, W) class ids.

    Pixels marked IGNORE are background in a template: the annotator knows no third kind.
    """
    chosen = set(groups)
    found = []
    for item in dataset.slices():
        mask = dataset.mask(item) if item.group in chosen else None
        if mask is not None and (shown := np.where(mask == IGNORE, 0, mask).astype(np.uint8)).any():
            found.append((item, shown))
    return found


def seed_bank(
    client: AnnotatorClient,
    dataset: Dataset,
    groups: Collection[str],
    bank: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SeedResult:
    """Add every annotated slice of some groups to a bank; templates that it already has stay.

    progress: called as progress(done, total) with the number of slices
    Raises InvalidDataset when no mask of the groups shows a class, and errors of the service.
    """
    items = annotated_slices(dataset, groups)
    if not items:
        raise InvalidDataset(
            f"no mask of the {len(groups)} groups of '{dataset.name}' shows a class: {sorted(groups)[:5]}; "
            "choose groups with masks"
        )
    created = add_slices(client, dataset, items, bank, progress)
    return SeedResult(created, client.bank(bank))


def add_slices(
    client: AnnotatorClient,
    dataset: Dataset,
    items: Sequence[tuple[Slice, Mask]],
    bank: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Add slices with their masks to a bank in batches; returns how many it did not have before."""
    created = 0
    progress(0, len(items))
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        added = client.add_templates(
            bank,
            [dataset.image(item) for item, _ in batch],
            [mask for _, mask in batch],
            dataset.classes,
            [item.group for item, _ in batch],
        )
        created += sum(template.created for template in added)
        progress(start + len(batch), len(items))
    return created
