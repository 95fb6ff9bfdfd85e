"""Results to bodies: safetensors for many images, JSON and PNG for one."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pycocotools import mask as coco

from vessa.codec import encode
from vessa.errors import InvalidRequest, UnsupportedMedia, VessaError
from vessa.schemas import ClassMask, ErrorBody, ItemInfo, Rle, SegmentAnswer
from vessa_server.wire.images import label_png, overlay_png
from vessa_server.wire.reading import SegmentRequest

if TYPE_CHECKING:
    from vessa_server.items import SegmentResult

JSON, PNG, SAFETENSORS = "application/json", "image/png", "application/vnd.safetensors"


def choose_type(accept: str | None, offered: Sequence[str]) -> str:
    """Return the offered media type that the Accept header likes best, the first of them for `*/*`.

    UnsupportedMedia when it wants something else.
    """
    wanted = []
    for part in (accept or "*/*").split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        try:
            wanted.append((float(quality), kind))
        except ValueError:
            continue
    for weight, kind in sorted(wanted, key=lambda pair: -pair[0]):
        for media in offered:
            if weight > 0 and kind in {media, f"{media.split('/')[0]}/*", "*/*"}:
                return media
    raise UnsupportedMedia(f"Accept must allow one of {', '.join(offered)}, got {(accept or '')[:80]!r}")


def tensor_answer(
    request: SegmentRequest, results: "Sequence[SegmentResult | VessaError]", model: str, labels_version: str
) -> bytes:
    """Return the safetensors answer; a failed item has zero labels and its error in the metadata.

    With no usable image at all the arrays have the size 1 x 1.
    """
    shape = (len(results), *(request.size or (1, 1)))
    tensors = {"labels": np.zeros(shape, np.uint8), "confidence": np.zeros(shape, np.uint8)}
    if request.probabilities:
        channels = (len(results), len(request.classes) + 1, *shape[1:])
        tensors["probabilities"] = np.zeros(channels, np.float16)
    infos, version = [], request.bank.version
    for i, (identity, result) in enumerate(zip(request.ids, results, strict=True)):
        if isinstance(result, VessaError):
            body = ErrorBody(code=result.code, message=str(result), item=i)
            infos.append(ItemInfo(status="error", error=body, image_id=identity))
            continue
        tensors["labels"][i], tensors["confidence"][i] = result.labels, result.confidence
        if request.probabilities and result.probabilities is not None:
            tensors["probabilities"][i] = result.probabilities
        version = result.bank_version
        infos.append(
            ItemInfo(status="ok", image_id=identity, templates=result.templates, scores=result.scores)
        )
    metadata = {
        "items": json.dumps([info.model_dump() for info in infos]),
        "classes": json.dumps(request.classes),
        "model": model,
        "bank_version": str(version),
        "labels_version": labels_version,
    }
    return encode(tensors, metadata)


def json_answer(request: SegmentRequest, result: "SegmentResult", model: str) -> bytes:
    """Return the JSON answer for one image: COCO compressed RLE (column-major) and score of each class."""
    height, width = result.labels.shape
    masks = []
    for class_id, name in request.classes.items():
        mask = result.labels == class_id
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        masks.append(
            ClassMask(
                class_id=class_id,
                class_name=name,
                score=result.scores.get(name),
                area=int(mask.sum()),
                rle=Rle(size=(height, width), counts=rle["counts"].decode("ascii")),
            )
        )
    answer = SegmentAnswer(
        image_id=result.image_id,
        height=height,
        width=width,
        bank=request.bank.name,
        bank_version=result.bank_version,
        model=model,
        masks=masks,
        templates=result.templates,
    )
    return answer.model_dump_json().encode()


def png_answer(request: SegmentRequest, result: "SegmentResult", *, overlay: bool) -> bytes:
    """Return the label map as 8-bit gray PNG of class ids, or the overlay for the eye."""
    if not overlay:
        return label_png(result.labels)
    item = request.items[0]
    if isinstance(item, VessaError) or item.image is None:
        raise InvalidRequest("an overlay needs the image's pixels")
    return overlay_png(item.image, result.labels, request.classes)
