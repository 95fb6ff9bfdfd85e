"""Export a worklist as a data folder, nnU-Net data set or COCO file, as one ZIP archive.

The data folder is what `vessa-trainer` reads: accepted images have a mask, all others have none and are
unlabeled. It has no split files: the trainer draws validation and test patients among the annotated ones and
says which. Masks that nobody accepted are left out, and `export.json` counts them.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from vessa.errors import InvalidRequest
from vessa_server.serialization.image_files import label_png
from vessa_server.worklists.store import Item, Worklist, WorklistStore

ExportFormat = Literal["folder", "nnunet", "coco"]
_UNSAFE = str.maketrans({c: "-" for c in '/\\:*?"<>|_ \t\n\r'})


def export_worklist(
    store: WorklistStore, worklist: Worklist, classes: Mapping[int, str], kind: ExportFormat
) -> bytes:
    """Return the archive. classes: {id: name} of the bank. Raises InvalidRequest for an empty worklist."""
    items = store.items(worklist)
    if not items:
        raise InvalidRequest(f"worklist {worklist.name!r} holds no image; add images first")
    writers = {"folder": _folder_files, "nnunet": _nnunet_files, "coco": _coco_files}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in writers[kind](store, worklist, classes, items):
            archive.writestr(name, data)
        archive.writestr("export.json", json.dumps(_counts(items), indent=1))
    return buffer.getvalue()


def _counts(items: list[Item]) -> dict[str, int]:
    counts = {
        decision: sum(i.decision == decision for i in items) for decision in ("accepted", "rejected", "open")
    }
    return {"images": len(items), **counts, "masks_left_out": len(items) - counts["accepted"]}


def _accepted(store: WorklistStore, worklist: Worklist, item: Item) -> NDArray[np.uint8] | None:
    return store.labels(worklist, item) if item.decision == "accepted" else None


def _stems(items: list[Item]) -> dict[str, tuple[str, str]]:
    """Return (group, unique stem `<group>_<number>`) by item id, the form that data folders ask for."""
    stems: dict[str, tuple[str, str]] = {}
    used: dict[str, int] = {}
    for item in items:
        group = (item.group or item.name.rsplit(".", 1)[0]).translate(_UNSAFE)[:80] or "image"
        used[group] = used.get(group, 0) + 1
        stems[item.id] = (group, f"{group}_{used[group]:03d}")
    return stems


def _folder_files(
    store: WorklistStore, worklist: Worklist, classes: Mapping[int, str], items: list[Item]
) -> Iterator[tuple[str, bytes | str]]:
    stems = _stems(items)
    for item in items:
        _, stem = stems[item.id]
        yield f"images/{stem}.png", store.image_file(worklist, item)
        mask = _accepted(store, worklist, item)
        if mask is not None:
            yield f"masks/{stem}.png", label_png(mask)
    meta = {"classes": {"0": "background", **{str(k): v for k, v in classes.items()}}}
    yield "meta.json", json.dumps(meta, indent=1)
    yield "names.json", json.dumps({stems[item.id][1]: item.name for item in items}, indent=1)


def _nnunet_files(
    store: WorklistStore, worklist: Worklist, classes: Mapping[int, str], items: list[Item]
) -> Iterator[tuple[str, bytes | str]]:
    """nnU-Net v2 with 2D PNG files: accepted images are the training cases, the others imagesTs."""
    stems, cases = _stems(items), 0
    order = {old: new for new, old in enumerate(sorted(classes), 1)}  # nnU-Net wants ids without gaps
    for item in items:
        stem = stems[item.id][1]
        mask = _accepted(store, worklist, item)
        folder = "imagesTs" if mask is None else "imagesTr"
        for channel, data in enumerate(_channels(store.image(worklist, item))):
            yield f"{folder}/{stem}_{channel:04d}.png", data
        if mask is not None:
            cases += 1
            table = np.zeros(256, np.uint8)
            for old, new in order.items():
                table[old] = new
            yield f"labelsTr/{stem}.png", label_png(table[mask])
    colors = {store.image(worklist, item).ndim for item in items}
    names = {"0": "intensity"} if colors == {2} else {"0": "R", "1": "G", "2": "B"}
    description: dict[str, Any] = {
        "channel_names": names,
        "labels": {"background": 0, **{classes[old]: new for old, new in order.items()}},
        "numTraining": cases,
        "file_ending": ".png",
    }
    if len(colors) > 1:
        raise InvalidRequest(
            "the worklist mixes gray and color images, which one nnU-Net data set cannot hold"
        )
    yield "dataset.json", json.dumps(description, indent=1)


def _channels(image: NDArray[np.uint8]) -> list[bytes]:
    if image.ndim == 2:
        return [label_png(image)]
    return [label_png(np.ascontiguousarray(image[..., c])) for c in range(3)]


def _coco_files(
    store: WorklistStore, worklist: Worklist, classes: Mapping[int, str], items: list[Item]
) -> Iterator[tuple[str, bytes | str]]:
    stems = _stems(items)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(items, 1):
        name = f"{stems[item.id][1]}.png"
        yield f"images/{name}", store.image_file(worklist, item)
        images.append({"id": number, "file_name": name, "height": item.height, "width": item.width})
        mask = _accepted(store, worklist, item)
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
