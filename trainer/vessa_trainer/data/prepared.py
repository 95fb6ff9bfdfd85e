"""Decode images once and put them on squares of one size, in memory or in files."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from vessa.datasets import Dataset, Slice
from vessa.datasets.base import IGNORE
from vessa.errors import InvalidDataset
from vessa_trainer.config import Config
from vessa_trainer.data.memmap_cache import MappedSquares, Square, key_of
from vessa_trainer.data.neighbors import SliceStacks
from vessa_trainer.data.splits import Splits, slices_of
from vessa_trainer.data.windows import Window, union_box, window_around


@dataclass(frozen=True)
class Frame:
    """The place of an image of `height` x `width` px on its square of `size` px: resized and centered."""

    height: int
    width: int
    size: int

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the resized image, px."""
        scale = self.size / max(self.height, self.width)
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def enter(self, array: Tensor) -> Tensor:
        """Resize (C, height, width) float to (C, size, size); shrinking is antialiased, the border is 0."""
        inner = self.inner
        small = F.interpolate(
            array[None], inner, mode="bilinear", align_corners=False, antialias=inner[0] < self.height
        )[0]
        top, left = (self.size - inner[0]) // 2, (self.size - inner[1]) // 2
        return F.pad(small, (left, self.size - inner[1] - left, top, self.size - inner[0] - top))

    def enter_labels(self, labels: Tensor) -> Tensor:
        """Resize (height, width) class ids to (size, size) int64; the border is 0.

        Each class is resized as an image is, and the largest share wins. Nearest neighbors would shift the
        labels by half a native pixel against the image at every even factor.
        """
        ids = labels.unique()
        shares = self.enter((labels[None] == ids[:, None, None]).float())
        found = ids.long()[shares.argmax(0)]
        return torch.where(shares.sum(0) > 0.5, found, 0)

    def valid(self) -> Tensor:
        """Return where the square shows the image and no border: (size, size) bool."""
        return self.enter(torch.ones(1, self.height, self.width))[0] > 0.5

    def box_on_square(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """Move a box XYXY px of the image to px of the square."""
        inner = self.inner
        top, left = (self.size - inner[0]) // 2, (self.size - inner[1]) // 2
        x, y = inner[1] / self.width, inner[0] / self.height
        return left + x * box[0], top + y * box[1], left + x * box[2], top + y * box[3]

    def leave(self, array: Tensor) -> Tensor:
        """Move (C, size, size) float back to (C, height, width)."""
        inner = self.inner
        top, left = (self.size - inner[0]) // 2, (self.size - inner[1]) // 2
        cut = array[:, top : top + inner[0], left : left + inner[1]]
        return F.interpolate(cut[None], (self.height, self.width), mode="bilinear", align_corners=False)[0]


def _covered(frame: Frame, pixels: np.ndarray) -> Tensor:
    """Return where a square shows any of some pixels: (S, S) bool. pixels: bool (height, width)."""
    if not pixels.any():
        return torch.zeros(frame.size, frame.size, dtype=torch.bool)
    return frame.enter(torch.from_numpy(pixels)[None].float())[0] > 0


class PreparedSlices:
    """Slices on squares.

    images: (N, C, S, S) uint8, C is 1, 3, or 2n + 1 with n neighbors
    masks: (N, S, S) uint8; valid: (N, S, S) bool
    """

    def __init__(
        self,
        dataset: Dataset,
        slices: Sequence[Slice],
        size: int,
        *,
        need_masks: bool,
        neighbors: int = 0,
        folder: Path | None = None,
        limit_bytes: float = math.inf,
        out: Path | None = None,
    ) -> None:
        """Decode and resize; `need_masks` raises InvalidDataset for a slice without annotation.

        neighbors: slices on each side that become further channels
        folder: where squares are kept in files, for this run and others, instead of in memory; limit_bytes:
        of that folder; out: of the run, which may lie among the images like that folder.
        """
        self.slices = list(slices)
        self._windows: dict[float, Tensor] = {}
        self.rows = {s.name: i for i, s in enumerate(self.slices)}
        self.size, self._dataset, self._need_masks = size, dataset, need_masks
        self._read = SliceStacks(dataset, neighbors).image if neighbors else dataset.image
        if not self.slices:
            raise InvalidDataset("a split holds no images")
        bar = track(range(len(self.slices)), "preparing images", transient=True)
        self._mapped: MappedSquares | None = None
        if folder is None:
            images, masks, valid, sizes = zip(*(self._square(row) for row in bar), strict=True)
            if len({i.shape[0] for i in images}) > 1:
                images = tuple(np.broadcast_to(i, (3, *i.shape[1:])) for i in images)
            self.images, self.masks, self.valid = (
                torch.from_numpy(np.stack(a)) for a in (images, masks, valid)
            )
        else:
            apart = [folder, *([out] if out else [])]
            key = key_of(dataset, self.slices, size, need_masks, apart, neighbors)
            self._mapped = MappedSquares(folder, key, len(self.slices), self._square, limit_bytes)
            arrays = (self._mapped.images, self._mapped.masks, self._mapped.valid)
            self.images, self.masks, self.valid = (torch.from_numpy(a) for a in arrays)
            sizes = tuple((int(h), int(w)) for h, w in self._mapped.sizes)
        self.frames = [Frame(height, width, size) for height, width in sizes]

    def _square(self, row: int) -> Square:
        item, dataset = self.slices[row], self._dataset
        image = self._read(item)
        mask = dataset.mask(item) if self._need_masks else np.zeros(image.shape[:2], np.uint8)
        if mask is None:
            raise InvalidDataset(f"{item.name} is in a labeled split but has no mask")
        ignored = mask == IGNORE
        mask = np.where(ignored, 0, mask).astype(np.uint8)
        if mask.max(initial=0) > max(dataset.classes):
            raise InvalidDataset(
                f"the mask of {item.name} holds class id {mask.max()}, '{dataset.name}' names ids up to "
                f"{max(dataset.classes)}"
            )
        frame = Frame(image.shape[0], image.shape[1], self.size)
        pixels = torch.from_numpy(image).float()
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return (
            frame.enter(pixels).round().byte().numpy(),
            frame.enter_labels(torch.from_numpy(mask)).byte().numpy(),
            (frame.valid() & ~_covered(frame, ignored)).numpy(),
            (image.shape[0], image.shape[1]),
        )

    def __len__(self) -> int:
        return len(self.slices)

    def windows(self, factor: float) -> Tensor:
        """Return each row's window around the masks of its volume, (N, 3) float; see `data.windows`."""
        if factor not in self._windows:
            rows_of: dict[str, list[int]] = {}
            for row, item in enumerate(self.slices):
                rows_of.setdefault(item.case, []).append(row)
            found = torch.empty(len(self.slices), 3)
            for rows in rows_of.values():
                box = union_box(self.masks[rows])
                found[rows] = torch.tensor(window_around(box, self.size, factor))
            self._windows[factor] = found
        return self._windows[factor]

    def usual_window(self, factor: float) -> Window:
        """Return the window around all masks of all volumes, for images whose structures are not known."""
        return window_around(union_box(self.masks), self.size, factor)

    @property
    def channels(self) -> int:
        """Channels of the images: 1, 3, or slices with neighbors."""
        return self.images.shape[1]

    def show_as(self, channels: int) -> None:
        """Give gray images the channels of others that they are learned with."""
        self.images = self.images.expand(-1, channels, -1, -1)

    def floats(self, rows: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
        """Images of some rows on a device, (B, C, S, S) float in [0, 1]; they travel as bytes."""
        if self._mapped is not None:
            self._mapped.check(rows)
        return self.images[list(rows)].to(device).float() / 255


class Order:
    """Endless shuffled rows, epoch after epoch; a position alone says what comes next."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self._epochs: dict[int, np.ndarray] = {}

    def _row(self, position: int) -> int:
        epoch = position // self.count
        if epoch not in self._epochs:
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1}
            self._epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self._epochs[epoch][position % self.count])

    def rows(self, step: int) -> list[int]:
        """Rows of the batch of one step."""
        return [self._row(step * self.batch + i) for i in range(self.batch)]

    def ahead(self, step: int, batches: int) -> Iterator[list[int]]:
        """Rows of the batches from `step` on."""
        return (self.rows(s) for s in range(step, step + batches))


def prepare_splits(
    dataset: Dataset, splits: Splits, config: Config, out: Path
) -> tuple[PreparedSlices, PreparedSlices | None]:
    """Prepare the labeled and, unless the method is supervised, the unlabeled images of a run.

    Both have the same number of channels. out: folder of the run, which may lie among the images.
    """
    options: dict[str, Any] = {
        "folder": None if config.data.prepared is None else Path(config.data.prepared),
        "limit_bytes": config.data.prepared_gb * 1e9,
        "out": out,
        "neighbors": config.student.neighbors,
    }
    size = config.student.size
    labeled = PreparedSlices(dataset, slices_of(dataset, splits.labeled), size, need_masks=True, **options)
    if config.semi.method == "supervised":
        return labeled, None
    unlabeled = PreparedSlices(
        dataset, slices_of(dataset, splits.unlabeled), size, need_masks=False, **options
    )
    channels = max(labeled.channels, unlabeled.channels)
    for part in (labeled, unlabeled):
        part.show_as(channels)
    return labeled, unlabeled
