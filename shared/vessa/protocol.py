"""The annotator's HTTP protocol as plain functions: what to send, how to read what comes back."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import httpx
import numpy as np
from pydantic import TypeAdapter, ValidationError

from vessa.codec import MEDIA_TYPE, TensorSpec, decode, encode
from vessa.errors import BadResponse, InvalidRequest, ShapeMismatch, VessaError, error_from
from vessa.schemas import BankInfo, ErrorResponse, ItemInfo, ServiceInfo, TemplateInfo, TemplateUse

Image = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, Any]
TemplateChoice = Literal["top1", "top3", "sample"]

_T = TypeVar("_T")
_R = TypeVar("_R")
_MAX_ITEMS = 32  # images a request carries; larger batches become several requests
_MAX_ANSWER = 1 << 31
_ANSWER = {
    "labels": TensorSpec(("U8",), ((None, None, None),)),
    "confidence": TensorSpec(("U8",), ((None, None, None),)),
    "probabilities": TensorSpec(("F16",), ((None, None, None, None),)),
}


@dataclass(frozen=True)
class Prompts:
    """Prompts of one image for K classes, in px of the image as it is sent.

    boxes: (K, 4) XYXY, a row of -1 means none; points: (K, P, 2) (x, y) with point_labels (K, P)
    1 inside, 0 outside, -1 padding; mask_logits: (K, h, w) over the whole image, any h and w, with
    mask_present (K,) bool, absent = all present
    """

    boxes: Floats | None = None
    points: Floats | None = None
    point_labels: Floats | None = None
    mask_logits: Floats | None = None
    mask_present: Floats | None = None


@dataclass(frozen=True)
class Annotation:
    """The annotator's answer for one image.

    labels: uint8 (H, W) with the bank's class ids; confidence: uint8 (H, W), 255 is certain;
    probabilities: float16 (K + 1, H, W), background first, when asked for; classes: id to name in
    the order of the request; scores: predicted IoU of each class; error: set when this item failed,
    its arrays are None then
    """

    image_id: str
    labels: Image | None = None
    confidence: Image | None = None
    probabilities: Floats | None = None
    classes: dict[int, str] = field(default_factory=dict)
    templates: dict[str, list[TemplateUse]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    model: str = ""
    bank_version: int = 0
    labels_version: str = ""
    error: VessaError | None = None


@dataclass(frozen=True)
class Call(Generic[_T]):
    """One HTTP request and how to read its answer. repeatable: sending it twice does no harm."""

    method: str
    path: str
    read: Callable[[httpx.Response], _T]
    options: dict[str, Any] = field(default_factory=dict)
    repeatable: bool = True


def _json(adapter: TypeAdapter[_T]) -> Callable[[httpx.Response], _T]:
    def read(response: httpx.Response) -> _T:
        try:
            return adapter.validate_json(response.content)
        except ValidationError as error:
            raise BadResponse(
                f"{response.url.path} answered something that is not the annotator's protocol"
            ) from error

    return read


def read_error(response: httpx.Response) -> VessaError:
    """Make the error that a failed response describes."""
    after = response.headers.get("retry-after", "")
    retry_after = float(after) if after.replace(".", "", 1).isdigit() else None
    try:
        body = ErrorResponse.model_validate_json(response.content).error
    except ValidationError:
        failure: VessaError = BadResponse(
            f"status {response.status_code} from {response.url.path}, not from an annotator"
        )
        failure.retry_after = retry_after
        return failure
    return error_from(body.code, body.message, body.item, retry_after)


def info() -> Call[ServiceInfo]:
    """GET /info."""
    return Call("GET", "/info", _json(TypeAdapter(ServiceInfo)))


def ready() -> Call[bool]:
    """GET /readyz."""
    return Call("GET", "/readyz", lambda response: response.status_code == 200)


def banks() -> Call[list[BankInfo]]:
    """GET /banks."""
    return Call("GET", "/banks", _json(TypeAdapter(list[BankInfo])))


def bank(name: str) -> Call[BankInfo]:
    """GET /banks/{bank}."""
    return Call("GET", f"/banks/{name}", _json(TypeAdapter(BankInfo)))


def templates(bank: str) -> Call[list[TemplateInfo]]:
    """GET /templates."""
    return Call("GET", "/templates", _json(TypeAdapter(list[TemplateInfo])), {"params": {"bank": bank}})


def delete_template(bank: str, template: str) -> Call[None]:
    """DELETE /templates/{id}; a second one would answer 404, so it is not repeated."""
    return Call(
        "DELETE", f"/templates/{template}", lambda _: None, {"params": {"bank": bank}}, repeatable=False
    )


def delete_bank(name: str) -> Call[None]:
    """DELETE /banks/{bank}; a second one would answer 404, so it is not repeated."""
    return Call("DELETE", f"/banks/{name}", lambda _: None, repeatable=False)


def _binary(
    path: str,
    tensors: Mapping[str, Floats],
    metadata: Mapping[str, str],
    read: Callable[[httpx.Response], _T],
) -> Call[_T]:
    headers = {"Content-Type": MEDIA_TYPE, "Accept": f"{MEDIA_TYPE}, application/json"}
    return Call("POST", path, read, {"content": encode(tensors, metadata), "headers": headers})


def _batches(shapes: Iterable[tuple[int, ...]]) -> list[list[int]]:
    """Group rows of equal shape into batches of at most _MAX_ITEMS."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for row, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(row)
    return [rows[i : i + _MAX_ITEMS] for rows in by_shape.values() for i in range(0, len(rows), _MAX_ITEMS)]


def in_order(count: int, parts: Iterable[tuple[list[int], list[_R]]]) -> list[_R]:
    """Put the answers of several requests back in the order of the call."""
    placed: dict[int, _R] = {}
    for rows, answers in parts:
        if len(rows) != len(answers):
            raise BadResponse(f"the annotator answered {len(answers)} items to {len(rows)}")
        placed.update(zip(rows, answers, strict=True))
    return [placed[i] for i in range(count)]


def add_templates(
    bank: str,
    images: Sequence[Image],
    masks: Sequence[Image],
    classes: Mapping[int, str],
    groups: Sequence[str],
) -> list[tuple[list[int], Call[list[TemplateInfo]]]]:
    """POST /templates, one request for each size of image. Raises ShapeMismatch."""
    if not len(images) == len(masks) == len(groups):
        raise InvalidRequest(
            f"{len(images)} images, {len(masks)} masks and {len(groups)} groups: expected one of each"
        )
    for row, (image, mask) in enumerate(zip(images, masks, strict=True)):
        if image.shape[:2] != mask.shape:
            raise ShapeMismatch(f"image {row} has size {image.shape[:2]}, its mask {mask.shape}", item=row)
    reader = _json(TypeAdapter(dict[str, list[TemplateInfo]]))
    calls = []
    for rows in _batches(i.shape for i in images):
        tensors = {"images": np.stack([images[r] for r in rows]), "masks": np.stack([masks[r] for r in rows])}
        metadata = {
            "bank": bank,
            "classes": json.dumps({str(c): n for c, n in classes.items()}),
            "groups": json.dumps([groups[r] for r in rows]),
        }
        calls.append((rows, _binary("/templates", tensors, metadata, lambda r: reader(r)["templates"])))
    return calls


def segment(
    images: Sequence[Image] | None,
    *,
    bank: str,
    image_ids: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    groups: Sequence[str | None] | None = None,
    prompts: Sequence[Prompts | None] | None = None,
    template_choice: TemplateChoice = "top1",
    seed: int = 0,
    probabilities: bool = False,
) -> tuple[int, list[tuple[list[int], Call[list[Annotation]]]]]:
    """POST /segment, one request for each size of image and kind of prompts.

    Returns how many items there are and the requests with their rows. Raises InvalidRequest.
    """
    if (images is None) == (image_ids is None):
        raise InvalidRequest("give either images or image_ids")
    count = len(images if images is not None else image_ids or [])
    given = list(prompts) if prompts is not None else [None] * count
    owners = list(groups) if groups is not None else [None] * count
    if len(given) != count or len(owners) != count:
        raise InvalidRequest(
            f"{count} items with {len(given)} prompts and {len(owners)} groups: expected one each"
        )
    shapes = [(() if images is None else images[i].shape) + _prompt_shape(given[i]) for i in range(count)]
    calls = []
    for rows in _batches(shapes):
        tensors = _prompt_tensors([given[r] for r in rows])
        metadata = {"bank": bank, "template_choice": template_choice, "seed": str(seed)}
        if images is not None:
            tensors["images"] = np.stack([images[r] for r in rows])
        else:
            metadata["image_ids"] = json.dumps([(image_ids or [])[r] for r in rows])
        if classes is not None:
            metadata["classes"] = json.dumps(list(classes))
        metadata["groups"] = json.dumps([owners[r] for r in rows])
        if probabilities:
            metadata["probabilities"] = "1"
        calls.append((rows, _binary("/segment", tensors, metadata, _read_annotations)))
    return count, calls


_PROMPT_TYPES = {
    "boxes": np.float32,
    "points": np.float32,
    "point_labels": np.int8,
    "mask_logits": np.float16,
    "mask_present": np.uint8,
}


def _prompt_shape(prompts: Prompts | None) -> tuple[Any, ...]:
    """What must be equal for two items' prompts to share a tensor."""
    if prompts is None:
        return ()
    return tuple((n, np.shape(v)) for n in _PROMPT_TYPES if (v := getattr(prompts, n)) is not None)


def _prompt_tensors(prompts: Sequence[Prompts | None]) -> dict[str, Floats]:
    first = prompts[0]
    if first is None:
        return {}
    return {
        name: np.stack([np.asarray(getattr(p, name), dtype) for p in prompts])
        for name, dtype in _PROMPT_TYPES.items()
        if getattr(first, name) is not None
    }


def _read_annotations(response: httpx.Response) -> list[Annotation]:
    """Read a safetensors answer to POST /segment."""
    try:
        tensors, metadata = decode(response.content, _ANSWER, max_bytes=_MAX_ANSWER)
        items = TypeAdapter(list[ItemInfo]).validate_json(metadata["items"])
        classes = TypeAdapter(dict[int, str]).validate_json(metadata["classes"])
        labels, confidence = tensors["labels"], tensors["confidence"]
        common: dict[str, Any] = {
            "classes": classes,
            "model": metadata["model"],
            "bank_version": int(metadata["bank_version"]),
            "labels_version": metadata["labels_version"],
        }
    except (VessaError, KeyError, ValueError) as error:
        raise BadResponse("the answer to POST /segment is not the annotator's protocol") from error
    probabilities = tensors.get("probabilities")
    annotations = []
    for row, item in enumerate(items):
        if item.error is not None:
            failure = error_from(item.error.code, item.error.message, item.error.item)
            annotations.append(Annotation(item.image_id, error=failure, **common))
            continue
        annotations.append(
            Annotation(
                item.image_id,
                labels[row],
                confidence[row],
                None if probabilities is None else probabilities[row],
                templates=item.templates,
                scores=item.scores,
                **common,
            )
        )
    return annotations
