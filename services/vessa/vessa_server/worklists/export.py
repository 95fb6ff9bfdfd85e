"""Export a worklist as one ZIP archive: data folder, nnU-Net data set, COCO file, or label volumes.

The data folder is what `vessa-trainer` reads: accepted images have a mask, all others have none and are
unlabeled. It has no split files: the trainer draws validation and test patients among the annotated ones and
says which. Masks that nobody accepted are left out, and `export.json` counts them.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from vessa.errors import InternalError, InvalidRequest
from vessa.volumes import Bounds
from vessa_server.serialization.image_files import label_png
from vessa_server.worklists.records import Item, Worklist
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.volume_export import VolumeExport

ExportFormat = Literal["folder", "nnunet", "coco", "nifti", "dicom-seg"]
Files = Iterator[tuple[str, bytes | str]]
_UNSAFE = str.maketrans({c: "-" for c in '/\\:*?"<>|_ \t\n\r'})


def export_worklist(
    store: WorklistStore, worklist: Worklist, classes: Mapping[int, str], kind: ExportFormat, bounds: Bounds
) -> Iterator[bytes]:
    """Return the archive in parts, each with the files of about one image.

    classes: {id: name} of the bank; bounds: of the volumes that are read again. Raises InvalidRequest, before
    the first part, for a worklist that is empty or cannot be written in this format.
    """
    items = store.items(worklist)
    if not items:
        raise InvalidRequest(f"worklist {worklist.name!r} holds no image; add images first")
    if kind in ("nifti", "dicom-seg"):
        volumes = VolumeExport(store, worklist, classes, kind, bounds)
        pictures = sum(not item.volume for item in items)
        return _zipped(
            volumes.files(),
            lambda: {**_counts(items, 0), "pictures_left_out": pictures, "volumes": volumes.counts},
        )
    source = _Source(store, worklist)
    if kind == "nnunet" and len(source.colors(items)) > 1:
        raise InvalidRequest(
            "the worklist mixes gray and color images, which one nnU-Net data set cannot hold"
        )
    writers = {"folder": _folder_files, "nnunet": _nnunet_files, "coco": _coco_files}
    return _zipped(writers[kind](source, classes, items), lambda: _counts(items, source.damaged))


class _Source:
    """Read the items of a worklist, and count those whose files are damaged."""

    def __init__(self, store: WorklistStore, worklist: Worklist) -> None:
        self._store, self._worklist = store, worklist
        self.damaged = 0

    def read(
        self, items: list[Item]
    ) -> Iterator[tuple[Item, NDArray[np.uint8], bytes, NDArray[np.uint8] | None]]:
        """Yield each item with its pixels, its PNG file and, when it is accepted, its mask."""
        for item in items:
            try:
                image = self._store.image(self._worklist, item)
                accepted = item.decision == "accepted"
                mask = self._store.labels(self._worklist, item) if accepted else None
                yield item, image, self._store.image_file(self._worklist, item), mask
            except InternalError:
                self.damaged += 1

    def colors(self, items: list[Item]) -> set[bool]:
        """Return which of gray (False) and color (True) the readable images have, by their headers."""
        found = {self._store.is_color(self._worklist, item) for item in items}
        return {color for color in found if color is not None}


class _Parts(io.RawIOBase):
    """Collect what is written until it is taken, so that an archive is never whole in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


def _zipped(files: Files, counts: Callable[[], dict[str, Any]]) -> Iterator[bytes]:
    parts = _Parts()
    with zipfile.ZipFile(parts, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            # PNG files are compressed already.
            archive.writestr(name, data, zipfile.ZIP_STORED if name.endswith(".png") else None)
            yield parts.take()
        archive.writestr("export.json", json.dumps(counts(), indent=1))
    yield parts.take()


def _counts(items: list[Item], damaged: int) -> dict[str, int]:
    counts = {
        decision: sum(i.decision == decision for i in items) for decision in ("accepted", "rejected", "open")
    }
    left_out = len(items) - counts["accepted"]
    return {"images": len(items), **counts, "masks_left_out": left_out, "damaged_left_out": damaged}


def _stems(items: list[Item]) -> dict[str, tuple[str, str]]:
    """Return (group, unique stem `<group>_<number>`) by item id, the form that data folders ask for."""
    stems: dict[str, tuple[str, str]] = {}
    used: dict[str, int] = {}
    for item in items:
        group = (item.group or item.name.rsplit(".", 1)[0]).translate(_UNSAFE)[:80] or "image"
        used[group] = used.get(group, 0) + 1
        stems[item.id] = (group, f"{group}_{used[group]:03d}")
    return stems


def _folder_files(source: _Source, classes: Mapping[int, str], items: list[Item]) -> Files:
    stems = _stems(items)
    for item, _, png, mask in source.read(items):
        _, stem = stems[item.id]
        yield f"images/{stem}.png", png
        if mask is not None:
            yield f"masks/{stem}.png", label_png(mask)
    meta = {"classes": {"0": "background", **{str(k): v for k, v in classes.items()}}}
    yield "meta.json", json.dumps(meta, indent=1)
    yield "names.json", json.dumps({stems[item.id][1]: item.name for item in items}, indent=1)


def _nnunet_files(source: _Source, classes: Mapping[int, str], items: list[Item]) -> Files:
    """nnU-Net v2 with 2D PNG files: accepted images are the training cases, the others imagesTs."""
    stems, cases, color = _stems(items), 0, source.colors(items) == {True}
    order = {old: new for new, old in enumerate(sorted(classes), 1)}  # nnU-Net wants ids without gaps
    for item, image, _, mask in source.read(items):
        stem = stems[item.id][1]
        folder = "imagesTs" if mask is None else "imagesTr"
        for channel, data in enumerate(_channels(image)):
            yield f"{folder}/{stem}_{channel:04d}.png", data
        if mask is not None:
            cases += 1
            table = np.zeros(256, np.uint8)
            for old, new in order.items():
                table[old] = new
            yield f"labelsTr/{stem}.png", label_png(table[mask])
    description: dict[str, Any] = {
        "channel_names": {"0": "R", "1": "G", "2": "B"} if color else {"0": "intensity"},
        "labels": {"background": 0, **{classes[old]: new for old, new in order.items()}},
        "numTraining": cases,
        "file_ending": ".png",
    }
    yield "dataset.json", json.dumps(description, indent=1)


def _channels(image: NDArray[np.uint8]) -> list[bytes]:
    if image.ndim == 2:
        return [label_png(image)]
    return [label_png(np.ascontiguousarray(image[..., c])) for c in range(3)]


def _coco_files(source: _Source, classes: Mapping[int, str], items: list[Item]) -> Files:
    stems = _stems(items)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (item, _, png, mask) in enumerate(source.read(items), 1):
        name = f"{stems[item.id][1]}.png"
        yield f"images/{name}", png
        images.append({"id": number, "file_name": name, "height": item.height, "width": item.width})
        if mask is None:
            continue
        for class_id in classes:
            binary = np.asfortranarray((mask == class_id).astype(np.uint8))
            if not binary.any():
                continue
            rle = coco.encode(binary)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": class_id,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "area": int(coco.area(rle)),
                    "bbox": [float(v) for v in coco.toBbox(rle)],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": class_id, "name": name} for class_id, name in classes.items()]
    body = {"images": images, "annotations": annotations, "categories": categories}
    yield "annotations.json", json.dumps(body)
