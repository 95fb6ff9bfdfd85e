"""Fill the template bank of a run with its labeled slices, and with nothing else."""

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vessa.bulk.adapt_bank import gray_squares, wait_for_adaptation
from vessa.bulk.seed_bank import annotated_slices, seed_bank
from vessa.bulk.unlabeled_pool import Candidate, Pixels
from vessa.client import AnnotatorClient
from vessa.client.transport import find_key
from vessa.codec import image_digest
from vessa.datasets import Dataset
from vessa.errors import InvalidConfig, UnknownBank
from vessa.schemas import BankInfo
from vessa_trainer.config import Config
from vessa_trainer.data.splits import read_splits

_log = logging.getLogger(__name__)
_LONGEST = 55  # characters before the digest: the annotator takes names of 64


def bank_name(
    dataset: Dataset, split: str, groups: Sequence[str], owner: str = "", adapted: float = 0.0
) -> str:
    """Name the bank of some labeled groups: data set, split and a digest of all that goes into it.

    Two splits of one name, two drawn splits or two data sets of one name never share a bank:
    templates of one would leak into the other. A corrected mask is another bank too.
    owner: sets the banks of several keys apart, where the common name is taken; adapted: minutes of its
    adaptation, 0 for the common weights: runs with and without one must not share a bank either
    """
    parts: list[Any] = [sorted(groups), sorted(dataset.classes.items()), *([owner] if owner else [])]
    parts += [adapted] if adapted else []
    parts += [
        [item.name, image_digest(dataset.image(item)), image_digest(mask)]
        for item, mask in annotated_slices(dataset, groups)
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    plain = f"{dataset.name}-{Path(split).stem}"
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in plain)
    return f"{plain.lstrip('-_')[:_LONGEST]}-{digest}"


def seed_labeled(client: AnnotatorClient, dataset: Dataset, config: Config) -> BankInfo:
    """Fill the bank of a config with its labeled groups.

    Where another key owns the bank of this name, this key gets a bank of its own. Raises InvalidConfig when
    the config names a bank of another key, and what `seed_groups` raises.
    """
    labeled = read_splits(dataset, config.data).labeled
    name, own = _names(dataset, labeled, config)
    try:
        return seed_groups(client, dataset, labeled, name)
    except UnknownBank as error:  # to others a key's bank does not exist
        if own is None:
            raise InvalidConfig(
                f"the bank '{name}' belongs to another key. Choose another annotator.bank, or ask its owner "
                "to share it"
            ) from error
    _log.warning("bank %s belongs to another key: this run fills %s, a bank of its own", name, own)
    return seed_groups(client, dataset, labeled, own)


def adapt_to_unlabeled(client: AnnotatorClient, dataset: Dataset, config: Config, bank: str) -> None:
    """Adapt the bank to the unlabeled training images, unless that was done before; wait for the end.

    Raises ServiceError when the adaptation fails.
    """
    info = client.adaptation(bank)
    if info.state in ("none", "failed"):
        groups = set(read_splits(dataset, config.data).unlabeled)
        slices = [item for item in dataset.slices() if item.group in groups]
        images = gray_squares(Pixels([Candidate(s.name, s.group, partial(dataset.image, s)) for s in slices]))
        info = client.adapt(bank, 60 * config.annotator.adapt, images)
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"adapting bank {bank}", total=1.0)
        info = wait_for_adaptation(client, info, lambda share: bar.update(task, completed=share))
    figures = info.figures
    assert figures is not None  # of a finished adaptation
    _log.info(
        "bank %s: adapted to %d unlabeled images, Dice of held-out templates %.3f -> %.3f; %s",
        bank,
        figures.images,
        figures.before,
        figures.after,
        "in use" if figures.kept else "no gain, the common weights stay",
    )


def find_bank(client: AnnotatorClient, dataset: Dataset, config: Config) -> BankInfo:
    """Return the bank that `seed_labeled` filled. Raises UnknownBank where there is none."""
    name, own = _names(dataset, read_splits(dataset, config.data).labeled, config)
    try:
        return client.bank(name)
    except UnknownBank:
        if own is None:
            raise
    return client.bank(own)


def _names(dataset: Dataset, labeled: Sequence[str], config: Config) -> tuple[str, str | None]:
    """Return the name of a config's bank, and that of the key's own where the first may be taken."""
    if config.annotator.bank is not None:
        return config.annotator.bank, None
    key = config.annotator.api_key or find_key() or ""
    owner = hashlib.sha256(key.encode()).hexdigest() if key else "no key"
    split, adapted = config.data.labeled, config.annotator.adapt
    names = [bank_name(dataset, split, labeled, who, adapted) for who in ("", owner)]
    return names[0], names[1]


def seed_groups(client: AnnotatorClient, dataset: Dataset, groups: Sequence[str], bank: str) -> BankInfo:
    """Add the labeled slices of some groups to a template bank, with a progress bar.

    Logs a warning when the bank has templates of other groups. Raises InvalidDataset when no mask shows a
    class, and errors of the service.
    """
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"seeding bank {bank}")
        info = seed_bank(
            client,
            dataset,
            groups,
            bank,
            lambda done, total: bar.update(task, completed=done, total=total),
        ).bank
    others = sorted(set(info.groups) - set(groups))
    if others:
        _log.warning("bank %s also has templates of groups that are not labeled here: %s", bank, others[:5])
    return info
