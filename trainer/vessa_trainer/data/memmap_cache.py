"""Store prepared squares in memory-mapped files, decoded once for all runs."""

import fcntl
import hashlib
import json
import math
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap

from vessa.datasets import Dataset, Slice
from vessa.errors import InvalidConfig

_ABANDONED_S = 86400.0  # nobody writes to a folder of this age any more
VERSION = 3  # of how images are prepared and laid out
Square = tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]  # image, mask, valid; height and width


def key_of(
    dataset: Dataset,
    slices: Sequence[Slice],
    size: int,
    need_masks: bool,
    apart: Sequence[Path] = (),
    neighbors: int = 0,
) -> str:
    """Hash what the squares depend on: files by name, size and time, so that nothing has to be decoded.

    apart: folders that may lie in the data set's and are none of it, such as that of the squares
    neighbors: slices on each side in further channels
    """
    root, outside = dataset.root.resolve(), {path.resolve() for path in apart}
    files = sorted(p for p in root.rglob("*") if p.is_file() and not outside.intersection(p.parents))
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    parts = [VERSION, str(root), [s.name for s in slices], size, need_masks, stats, neighbors]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class MappedSquares:
    """Arrays of N squares on disk. images: (N, C, S, S) uint8; masks: (N, S, S) uint8; valid: (N, S, S) bool.

    sizes: (N, 2) height and width of the images, px. A row that was damaged is prepared again when it is
    checked; a folder that cannot be read is built anew.
    """

    def __init__(
        self, folder: Path, key: str, count: int, prepare: Callable[[int], Square], limit_bytes: float
    ) -> None:
        """Open the squares of a key, or prepare them. prepare: of a row, (C, S, S), (S, S), (S, S) and size.

        limit_bytes: of the whole folder; the squares that were used longest ago make room. Raises
        InvalidConfig when the folder cannot be written.
        """
        self.path, self._prepare = folder / key, prepare
        if self._open(count):
            return
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # the squares show patients
            with (folder / ".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one prepares, the others find it
                if self._open(count):
                    return
                shutil.rmtree(self.path, ignore_errors=True)
                self._build(count)
                _make_room(folder, self.path, limit_bytes)
        except OSError as error:
            raise InvalidConfig(f"data.prepared {folder} cannot hold the images: {error}") from error
        if not self._open(count):
            raise InvalidConfig(f"{self.path} cannot be read right after it was written")

    def _open(self, count: int) -> bool:
        try:
            # copy-on-write: nothing changes the file but `check`
            images, masks, valid = (
                np.load(self.path / f"{name}.npy", mmap_mode="c", allow_pickle=False)
                for name in ("images", "masks", "valid")
            )
            self.sizes = np.load(self.path / "sizes.npy", allow_pickle=False)
            self._sums = np.load(self.path / "sums.npy", allow_pickle=False)
            (self.path / "sums.npy").touch()
        except (OSError, ValueError):
            return False
        self.images, self.masks, self.valid = images, masks, valid
        return all(len(a) == count for a in (images, masks, valid, self.sizes, self._sums))

    def _build(self, count: int) -> None:
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        fresh.mkdir(parents=True, mode=0o700)
        try:
            first = self._prepare(0)
            arrays = _allocate(fresh, count, first)
            sizes, sums = np.zeros((count, 2), np.int32), np.zeros(count, np.uint32)
            for row in range(count):
                image, mask, valid, sizes[row] = first if row == 0 else self._prepare(row)
                if image.shape[0] > arrays[0].shape[1]:  # the first color image among gray ones
                    arrays[0] = _widen(fresh, arrays[0], row, sums)
                _store(arrays, row, image, mask, valid)
                sums[row] = _sum(arrays[0][row])
            for array in arrays:
                array.flush()
            np.save(fresh / "sizes.npy", sizes)
            np.save(fresh / "sums.npy", sums)
            fresh.rename(self.path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def check(self, rows: Sequence[int]) -> None:
        """Prepare rows again whose pixels are not those that were written."""
        for row in rows:
            if _sum(self.images[row]) != self._sums[row]:
                image, mask, valid, _ = self._prepare(row)
                on_disk = [
                    np.load(self.path / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
                    for name in ("images", "masks", "valid")
                ]
                for arrays in (on_disk, [self.images, self.masks, self.valid]):
                    _store(arrays, row, image, mask, valid)


def _allocate(folder: Path, count: int, first: Square) -> list[np.memmap]:
    size = first[1].shape
    return [
        open_memmap(folder / "images.npy", "w+", np.uint8, (count, *first[0].shape)),
        open_memmap(folder / "masks.npy", "w+", np.uint8, (count, *size)),
        open_memmap(folder / "valid.npy", "w+", np.bool_, (count, *size)),
    ]


def _widen(folder: Path, gray: np.memmap, done: int, sums: np.ndarray) -> np.memmap:
    """Return an array of three channels with the gray rows that are done."""
    wide = open_memmap(folder / "wide.npy", "w+", np.uint8, (len(gray), 3, *gray.shape[2:]))
    for row in range(done):
        wide[row] = gray[row]
        sums[row] = _sum(wide[row])
    (folder / "wide.npy").replace(folder / "images.npy")
    return wide


def _sum(pixels: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(pixels).data)


def _store(
    arrays: Sequence[np.ndarray], row: int, image: np.ndarray, mask: np.ndarray, valid: np.ndarray
) -> None:
    arrays[0][row] = image
    if mask.any() or arrays[1][row].any():  # what stays zero takes no place on disk
        arrays[1][row] = mask
    arrays[2][row] = valid


def _make_room(folder: Path, keep: Path, limit_bytes: float) -> None:
    """Delete what a kill left half built, then the squares used longest ago until the others fit."""
    for path in folder.glob(".*"):
        newest = max((f.stat().st_mtime for f in path.iterdir()), default=0.0) if path.is_dir() else math.inf
        if time.time() - newest > _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)
    found = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    found.sort(key=lambda p: (p / "sums.npy").stat().st_mtime if (p / "sums.npy").is_file() else 0.0)
    held = {p: sum(f.stat().st_blocks * 512 for f in p.iterdir()) for p in found}
    for path in found:
        if sum(held.values()) <= limit_bytes:
            return
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
            del held[path]
