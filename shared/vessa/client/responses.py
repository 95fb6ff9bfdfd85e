"""Read the annotator's safetensors responses and refuse what contradicts itself or the request."""

from collections.abc import Sequence
from typing import Any

import httpx
from pydantic import TypeAdapter

from vessa.client.types import Annotation, Floats, Image
from vessa.codec import TensorSpec, decode
from vessa.errors import BadResponse, VessaError, error_from
from vessa.schemas import ItemInfo, Provenance

_MAX_ANSWER = 1 << 31
_ITEMS, _CLASSES = TypeAdapter(list[ItemInfo]), TypeAdapter(dict[int, str])  # slow to build
_ANSWER = {
    "labels": TensorSpec(("U8",), ((None, None, None),)),
    "confidence": TensorSpec(("U8",), ((None, None, None),)),
    "probabilities": TensorSpec(("F16",), ((None, None, None, None),)),
}


def read_annotations(
    response: httpx.Response, rows: Sequence[int], size: tuple[int, ...] | None
) -> list[Annotation]:
    """Read the response to POST /segment.

    rows: indices of the items in the caller's list; size: (H, W) of the images that were sent, None if ids
    were. Raises BadResponse.
    """
    try:
        tensors, metadata = decode(response.content, _ANSWER, max_bytes=_MAX_ANSWER)
        items = _ITEMS.validate_json(metadata["items"])
        classes = _CLASSES.validate_json(metadata["classes"])
        labels, confidence = tensors["labels"], tensors["confidence"]
        common: dict[str, Any] = {
            "classes": classes,
            "model": metadata["model"],
            "labels_version": metadata["labels_version"],
        }
        version, digest = int(metadata["bank_version"]), metadata["bank_digest"]
        probabilities = tensors.get("probabilities")
        _check_sizes(labels, confidence, probabilities, len(items), len(classes))
        answered = [item for item in items if item.error is None]
        if len(items) != len(rows) or any(item.status == "error" for item in answered):
            raise ValueError("the items do not fit the request")
        if size is not None and answered and labels.shape[1:] != size:
            raise ValueError("the labels have another size than the images")
    except (VessaError, KeyError, ValueError) as error:
        raise BadResponse("the response to POST /segment does not follow the annotator's protocol") from error
    annotations = []
    for place, (row, item) in enumerate(zip(rows, items, strict=True)):
        if item.error is not None:
            failure = error_from(item.error.code, item.error.message, row)
            annotations.append(
                Annotation(item.image_id, error=failure, bank_version=version, bank_digest=digest, **common)
            )
            continue
        annotations.append(
            Annotation(
                item.image_id,
                # Copies are writable, and one kept item does not hold its whole batch in memory.
                labels[place].copy(),
                confidence[place].copy(),
                None if probabilities is None else probabilities[place].copy(),
                templates=item.templates,
                scores=item.scores,
                absent=item.absent,
                bank_version=version if item.bank_version is None else item.bank_version,
                bank_digest=item.bank_digest or digest,
                annotation_id=item.annotation_id,
                adaptation=item.adaptation,
                cleaning=item.cleaning,
                **common,
            )
        )
    return annotations


def read_annotation(response: httpx.Response) -> Annotation:
    """Read the response to GET /annotations/{id}. Raises BadResponse."""
    try:
        tensors, metadata = decode(response.content, {"labels": _ANSWER["labels"]}, max_bytes=_MAX_ANSWER)
        made = Provenance.model_validate_json(metadata["provenance"])
        (item,) = _ITEMS.validate_json(metadata["items"])
        labels = tensors["labels"]
        if labels.shape != (1, made.height, made.width):
            raise ValueError("the labels do not fit the provenance")
    except (VessaError, KeyError, ValueError) as error:
        raise BadResponse(
            "the response to GET /annotations does not follow the annotator's protocol"
        ) from error
    return Annotation(
        made.image_id,
        labels[0].copy(),
        classes=made.classes,
        templates=made.templates,
        scores=made.scores,
        absent=made.absent,
        model=made.model,
        bank_version=made.bank_version,
        bank_digest=made.bank_digest,
        labels_version=made.labels_version,
        annotation_id=item.annotation_id,
        adaptation=made.adaptation,
        cleaning=made.cleaning,
        provenance=made,
    )


def _check_sizes(
    labels: Image, confidence: Image, probabilities: Floats | None, items: int, classes: int
) -> None:
    """Raise ValueError unless the arrays of a response fit each other."""
    if labels.shape != confidence.shape or labels.shape[0] != items:
        raise ValueError("labels, confidence and items differ in number or size")
    if probabilities is not None and probabilities.shape != (items, classes + 1, *labels.shape[1:]):
        raise ValueError("probabilities do not fit the labels")
