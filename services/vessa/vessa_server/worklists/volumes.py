"""Volumes of a worklist: the files as they came, and one item per slice.

`volumes/<id>/` in the worklist's folder holds `volume.json` and the files, `00000.input` and so on. The
slices are ordinary items that name their volume, so that they are reviewed like pictures, and labels return
to the grid of the files when they are exported.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from vessa.errors import TooLarge, UnknownWorklist
from vessa.schemas import Provenance
from vessa.volumes import Bounds, Volume, isolated
from vessa.volumes.grid import slice_of
from vessa_server.storage.files import disk, make_private
from vessa_server.worklists.folders import ITEM_ID, VOLUME_HEAD, VOLUMES, remove_item
from vessa_server.worklists.records import Item, StoredVolume, Worklist, encode
from vessa_server.worklists.store import MOST_ITEMS, WorklistStore

Labels = NDArray[np.uint8]


def add_volume(
    store: WorklistStore, worklist: Worklist, files: Sequence[Path], name: str, group: str, bounds: Bounds
) -> StoredVolume:
    """Move the files of one volume into a worklist and add its slices; the same files are added once.

    The files are stored last: after a kill in between, sending them again adds what is missing. Raises
    InvalidImage, TooLarge.
    """
    volume = isolated.read_volume(files, bounds)
    axis, color = volume.axis(), volume.color
    count = len(store.items(worklist))
    if count + volume.shape[axis] > MOST_ITEMS:
        raise TooLarge(
            f"the volume has {volume.shape[axis]} slices, and worklist {worklist.name!r} holds {count} of "
            f"{MOST_ITEMS} images; make another worklist"
        )
    digest = sha256(f"{group}\n{name}\n".encode())
    for path in files:
        digest.update(sha256(path.read_bytes()).digest())
    identity = digest.hexdigest()[:32]
    added = StoredVolume(
        identity,
        name,
        group,
        axis,
        volume.shape,
        tuple(tuple(float(v) for v in row) for row in volume.affine),
        bool(volume.headers) and not color,
        notes=volume.notes,
    )
    place = _place(store, worklist, identity)
    if (known := store.volume(place / VOLUME_HEAD)) is not None:
        return known
    store.check_share(worklist.owner, sum(path.stat().st_size for path in files))
    stem = name.removesuffix(".gz").rsplit(".", 1)[0] or "volume"
    for index in range(added.slices):
        shown = f"{stem} slice {index + 1:03d}"
        store.add(worklist, volume.image(axis, index), shown, group, volume=identity, slice=index)
    fresh = place.with_name(f".{identity}")
    with disk("written"), store.changing(store.place(worklist)):
        shutil.rmtree(fresh, ignore_errors=True)
        make_private(fresh)
        for number, path in enumerate(files):
            shutil.move(path, fresh / f"{number:05d}.input")
            (fresh / f"{number:05d}.input").chmod(0o600)
        store.write(fresh / VOLUME_HEAD, encode(added))
        shutil.rmtree(place, ignore_errors=True)  # its record is damaged, or a file of it is missing
        fresh.rename(place)
    return added


def volumes_of(store: WorklistStore, worklist: Worklist) -> list[StoredVolume]:
    """Return the volumes of a worklist by name."""
    heads = (store.place(worklist) / VOLUMES).glob(f"[!.]*/{VOLUME_HEAD}")
    found = [store.volume(path) for path in heads]
    return sorted((volume for volume in found if volume is not None), key=lambda v: (v.name, v.id))


def get_volume(store: WorklistStore, worklist: Worklist, identity: str) -> StoredVolume:
    """Return one volume. Raises UnknownWorklist when the worklist has none of this id."""
    path = _place(store, worklist, identity) / VOLUME_HEAD
    found = store.volume(path) if ITEM_ID.fullmatch(identity) else None
    if found is None:
        raise UnknownWorklist(f"worklist {worklist.name!r} has no volume {identity[:40]!r}")
    return found


def set_job(store: WorklistStore, worklist: Worklist, volume: StoredVolume, job: str) -> StoredVolume:
    """Store which job segments a volume."""
    changed = replace(volume, job=job)
    with store.changing(store.place(worklist)):
        path = _place(store, worklist, volume.id) / VOLUME_HEAD
        store.write(path, encode(changed))
    return changed


def files_of(store: WorklistStore, worklist: Worklist, volume: StoredVolume) -> list[Path]:
    """Return the stored files of a volume, in the order in which they came."""
    return sorted(_place(store, worklist, volume.id).glob("*.input"))


def slices_of(store: WorklistStore, worklist: Worklist, volume: StoredVolume) -> list[Item]:
    """Return the items of a volume by their place; removed ones are missing."""
    return sorted((i for i in store.items(worklist) if i.volume == volume.id), key=lambda item: item.slice)


def remove_volume(store: WorklistStore, worklist: Worklist, identity: str) -> str:
    """Remove a volume with its slices and files, also a damaged one; returns its job, empty without one.

    Raises UnknownWorklist.
    """
    path, place = store.place(worklist), _place(store, worklist, identity)
    if not ITEM_ID.fullmatch(identity) or not place.is_dir():
        raise UnknownWorklist(f"worklist {worklist.name!r} has no volume {identity[:40]!r}")
    with disk("deleted"), store.changing(path):
        known = store.volume(place / VOLUME_HEAD)
        for item in store.items(worklist):
            if item.volume == identity:
                remove_item(path, item.id)
        shutil.rmtree(place)
    return "" if known is None else known.job


def take_labels(
    store: WorklistStore,
    worklist: Worklist,
    volume: StoredVolume,
    labels: Labels,
    made: Sequence[Provenance],
    doubts: Sequence[float],
) -> int:
    """Give the slices the labels of a finished job and return how many took them.

    labels: uint8 (I, J, K); made, doubts: of each slice. Slices that were decided or edited keep their own.
    """
    taken = 0
    for item in slices_of(store, worklist, volume):
        if item.decision != "open" or item.edited:
            continue
        one = made[item.slice]
        store.set_labels(
            worklist,
            item,
            np.ascontiguousarray(slice_of(labels, volume.axis, item.slice)),
            doubt=doubts[item.slice],
            scores=one.scores,
            templates={name: [use.model_dump() for use in uses] for name, uses in one.templates.items()},
        )
        taken += 1
    return taken


def shown_nifti(store: WorklistStore, worklist: Worklist, volume: StoredVolume, labels: bool) -> bytes:
    """Return the slices as they are shown, or their newest labels whatever their decision, as a .nii file."""
    stack = np.zeros(volume.shape, np.uint8)
    for item in slices_of(store, worklist, volume):
        pixels = store.labels(worklist, item) if labels else _gray(store.image(worklist, item))
        if pixels is not None:
            slice_of(stack, volume.axis, item.slice)[...] = pixels
    image: Any = nib.Nifti1Image(stack, np.array(volume.affine))
    image.header.set_xyzt_units("mm")
    data: bytes = image.to_bytes()
    return data


def accepted_labels(store: WorklistStore, worklist: Worklist, volume: StoredVolume) -> tuple[Labels, int]:
    """Return uint8 (I, J, K) with the labels of accepted slices, 0 in all others, and their number."""
    stack, accepted = np.zeros(volume.shape, np.uint8), 0
    for item in slices_of(store, worklist, volume):
        labels = store.labels(worklist, item) if item.decision == "accepted" else None
        if labels is not None:
            slice_of(stack, volume.axis, item.slice)[...] = labels
            accepted += 1
    return stack, accepted


def read_source(store: WorklistStore, worklist: Worklist, volume: StoredVolume, bounds: Bounds) -> Volume:
    """Read the files of a volume again."""
    return isolated.read_volume(files_of(store, worklist, volume), bounds)


def _gray(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return image if image.ndim == 2 else image.mean(axis=-1).astype(np.uint8)


def _place(store: WorklistStore, worklist: Worklist, identity: str) -> Path:
    return store.place(worklist) / VOLUMES / identity
