"""Open a data set as the trainer sees it: class ids 1..K without gaps, whatever ids its masks store."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vessa.datasets import Case, Dataset, NnUnet, Slice, open_dataset
from vessa.datasets.base import IGNORE
from vessa.errors import InvalidDataset
from vessa_trainer.config import DataConfig

_UNNAMED = -1


class TrainingData(Dataset):
    """View a data set through class ids 1..K, so that a network has no outputs for ids that no class has.

    source: the data set on disk; stored_ids: the id in its masks of each class id here, background first.
    Pixels marked IGNORE stay marked.
    """

    def __init__(self, source: Dataset) -> None:
        """Wrap a data set. Raises InvalidDataset when it names no class, or two classes alike."""
        super().__init__(source.root)
        self.source = source
        self.modality, self.licence = source.modality, source.licence
        if not source.classes:
            raise InvalidDataset(
                f"'{self.name}' names no class besides the background: there is nothing to learn"
            )
        twice = [name for name, count in Counter(source.classes.values()).items() if count > 1]
        if twice:
            raise InvalidDataset(
                f"'{self.name}' gives several class ids the name '{twice[0]}'. Each class needs its own name"
            )
        self.stored_ids = (0, *sorted(source.classes))
        self.classes = {i: source.classes[stored] for i, stored in enumerate(self.stored_ids) if stored}
        self._ids = np.full(256, _UNNAMED, np.int16)
        self._ids[list(self.stored_ids)] = range(len(self.stored_ids))
        self._ids[IGNORE] = self._ids[IGNORE] if IGNORE in source.classes else IGNORE

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self.source.cases()

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W) or (H, W, 3)."""
        return self.source.image(item)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return class ids 1..K, 0 for background and IGNORE, uint8 (H, W); None without annotation.

        Raises InvalidDataset when the mask holds an id that no class has.
        """
        stored = self.source.mask(item)
        if stored is None:
            return None
        ids = self._ids[stored]
        if (ids == _UNNAMED).any():
            unnamed = np.unique(stored[ids == _UNNAMED]).tolist()
            raise InvalidDataset(
                f"the mask of {item.name} holds class ids {unnamed[:5]}; '{self.name}' names "
                f"{list(self.stored_ids[1:])}. Name the class, or set its pixels to 0"
            )
        return ids.astype(np.uint8)

    def split(self, name_or_path: str | Path) -> tuple[str, ...]:
        """Read a split file; see `Dataset.split`."""
        return self.source.split(name_or_path)

    def has_split(self, name_or_path: str | Path) -> bool:
        """Tell whether `split` would find a file."""
        return self.source.has_split(name_or_path)


def open_training_data(config: DataConfig) -> TrainingData:
    """Open the data set of a config for training.

    Raises InvalidDataset, also for several channels of which the config chooses none.
    """
    source = open_dataset(config.root)
    channels = source.channels if isinstance(source, NnUnet) else ()
    if config.channel is not None and isinstance(source, NnUnet):
        source.select_channel(config.channel)
    elif config.channel is not None:
        raise InvalidDataset(f"data.channel is '{config.channel}', but '{source.name}' has no named channels")
    elif len(channels) > 1:
        raise InvalidDataset(
            f"'{source.name}' has {len(channels)} channels ({', '.join(channels)}); a student learns from "
            "one. "
            f"Choose it: --set data.channel={channels[-1]}"
        )
    return TrainingData(source)


def to_stored(labels: np.ndarray, stored_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return class ids 1..K, uint8, as the ids that the data set's masks store."""
    table = np.asarray(stored_ids, np.uint8)
    found: np.ndarray[Any, np.dtype[np.uint8]] = table[labels]
    return found
