"""The template bank of a run: filled with its labeled slices, and with nothing else."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vessa.client import AnnotatorClient
from vessa.codec import image_digest
from vessa.datasets import Dataset, Slice
from vessa.errors import InvalidDataset
from vessa.schemas import BankInfo

_log = logging.getLogger(__name__)
_BATCH = 16
_LONGEST = 55  # characters before the digest: the annotator takes names of 64


def bank_name(dataset: Dataset, split: str, groups: Sequence[str]) -> str:
    """Name the bank of some labeled groups: data set, split and a digest of all that goes into it.

    Two splits of one name, two drawn splits or two data sets of one name never share a bank:
    templates of one would leak into the other. A corrected mask is another bank too.
    """
    parts = [sorted(groups), sorted(dataset.classes.items())]
    parts += [[s.name, image_digest(dataset.image(s)), image_digest(m)] for s, m in _shown(dataset, groups)]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    plain = f"{dataset.name}-{Path(split).stem}"
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in plain)
    return f"{plain.lstrip('-_')[:_LONGEST]}-{digest}"


def seed_bank(client: AnnotatorClient, dataset: Dataset, groups: Sequence[str], bank: str) -> BankInfo:
    """Put every labeled slice that shows a class into a template bank; what is there already stays.

    Raises InvalidDataset when the groups show no class, and VessaError when the annotator refuses a
    template or does not answer.
    """
    shown = _shown(dataset, groups)
    if not shown:
        raise InvalidDataset(
            f"the labeled groups of '{dataset.name}' hold no mask with a class: {sorted(groups)[:5]}"
        )
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"seeding bank {bank}", total=len(shown))
        for start in range(0, len(shown), _BATCH):
            part = shown[start : start + _BATCH]
            client.add_templates(
                bank,
                [dataset.image(item) for item, _ in part],
                [mask for _, mask in part],
                dataset.classes,
                [item.group for item, _ in part],
            )
            bar.advance(task, len(part))
    info = client.bank(bank)
    others = sorted(set(info.groups) - set(groups))
    if others:
        _log.warning("bank %s also holds templates of groups that are not labeled here: %s", bank, others[:5])
    return info


def _shown(dataset: Dataset, groups: Sequence[str]) -> list[tuple[Slice, np.ndarray]]:
    """Slices of some groups whose mask shows a class, and the masks."""
    wanted = set(groups)
    return [
        (item, mask)
        for item in dataset.slices()
        if item.group in wanted and (mask := dataset.mask(item)) is not None and mask.any()
    ]
