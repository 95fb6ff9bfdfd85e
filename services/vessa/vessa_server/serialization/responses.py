"""Encode results as response bodies: safetensors for many images, JSON and PNG for one."""

import json
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco

from vessa.codec import encode
from vessa.errors import InvalidRequest, UnsupportedMedia, VessaError
from vessa.schemas import ClassMask, ErrorBody, ItemInfo, Rle, SegmentAnswer
from vessa.volumes import write_labels
from vessa_server.serialization.overlays import overlay_png
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.types import Answer

JSON, PNG, SAFETENSORS = "application/json", "image/png", "application/vnd.safetensors"
DICOM = "application/dicom"


def choose_type(accept: str | None, offered: Sequence[str]) -> str:
    """Return the offered media type that the Accept header prefers; the first one for `*/*`.

    Raises UnsupportedMedia when the header allows none of them.
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
    raise UnsupportedMedia(f"Accept must allow one of {', '.join(offered)}, got {(accept or '')[:80]!r}.")


def tensor_answer(
    request: SegmentRequest, answers: Sequence[Answer | VessaError], model: str, labels_version: str
) -> bytes:
    """Return the safetensors answer. A failed item has zero labels and its error in the metadata.

    Without any usable image the arrays have the size 1 x 1.
    """
    shape = (len(answers), *(request.size or (1, 1)))
    tensors = {"labels": np.zeros(shape, np.uint8), "confidence": np.zeros(shape, np.uint8)}
    if request.probabilities:
        channels = (len(answers), len(request.classes) + 1, *shape[1:])
        tensors["probabilities"] = np.zeros(channels, np.float16)
    infos, bank = [], (request.bank.version, request.bank.digest)
    for i, (identity, answer) in enumerate(zip(request.ids, answers, strict=True)):
        if isinstance(answer, VessaError):
            body = ErrorBody(code=answer.code, message=str(answer), item=i)
            infos.append(ItemInfo(status="error", error=body, image_id=identity))
            continue
        for name in tensors:
            tensors[name][i] = getattr(answer, name)
        bank = (answer.provenance.bank_version, answer.provenance.bank_digest)
        infos.append(_item(answer))
    return encode(tensors, _metadata(infos, request.classes, model, bank, labels_version))


def kept_tensor_answer(answer: Answer) -> bytes:
    """Return a cached annotation as safetensors: labels (1, H, W), metadata of a batch, and provenance."""
    made = answer.provenance
    bank = (made.bank_version, made.bank_digest)
    metadata = _metadata([_item(answer)], made.classes, made.model, bank, made.labels_version)
    return encode({"labels": answer.labels[None]}, {**metadata, "provenance": made.model_dump_json()})


def _item(answer: Answer) -> ItemInfo:
    made = answer.provenance
    return ItemInfo(
        status="ok",
        image_id=made.image_id,
        annotation_id=answer.id,
        bank_version=made.bank_version,
        bank_digest=made.bank_digest,
        adaptation=made.adaptation,
        templates=made.templates,
        scores=made.scores,
        cleaning=made.cleaning,
        absent=made.absent,
    )


def _metadata(
    items: list[ItemInfo], classes: dict[int, str], model: str, bank: tuple[int, str], labels_version: str
) -> dict[str, str]:
    return {
        "items": json.dumps([item.model_dump() for item in items]),
        "classes": json.dumps(classes),
        "model": model,
        "bank_version": str(bank[0]),
        "bank_digest": bank[1],
        "labels_version": labels_version,
    }


def json_answer(answer: Answer) -> bytes:
    """Return the JSON answer for one image: COCO compressed RLE (column-major) and score of each class."""
    made, masks = answer.provenance, []
    for class_id, name in made.classes.items():
        mask = answer.labels == class_id
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        masks.append(
            ClassMask(
                class_id=class_id,
                class_name=name,
                score=made.scores.get(name),
                area=int(mask.sum()),
                rle=Rle(size=(made.height, made.width), counts=rle["counts"].decode("ascii")),
            )
        )
    body = SegmentAnswer(**dict(made), annotation_id=answer.id, masks=masks)
    return body.model_dump_json().encode()


def overlay_answer(request: SegmentRequest, answer: Answer) -> bytes:
    """Return an overlay of the answer as PNG."""
    item = request.items[0]
    if isinstance(item, VessaError) or item.image is None:
        raise InvalidRequest("An overlay needs the pixels of the image. Send the image instead of its id.")
    return overlay_png(item.image, answer.labels, request.classes)


def dicom_answer(request: SegmentRequest, answer: Answer) -> bytes:
    """Return a DICOM SEG that refers to the DICOM image of a form."""
    assert request.volume is not None
    made, labels = answer.provenance, answer.labels.T[..., None]
    return write_labels(request.volume, labels, made.classes, made.model[:16], "dicom-seg")


def notes_header(notes: Sequence[str]) -> dict[str, str]:
    """Return the response header of what was repaired in a file: a JSON list; no header without notes."""
    return {"X-Notes": json.dumps(list(notes))} if notes else {}
