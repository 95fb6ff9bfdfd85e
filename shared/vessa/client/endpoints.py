"""The annotator's HTTP protocol as plain functions that build requests and read responses."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from pydantic import TypeAdapter, ValidationError

from vessa.client.prompt_tensors import check_prompts, prompt_bytes, prompt_shape, prompt_tensors
from vessa.client.responses import read_annotation, read_annotations
from vessa.client.types import Annotation, Floats, Image, Prompts, TemplateChoice
from vessa.codec import MEDIA_TYPE, encode
from vessa.errors import (
    BadResponse,
    InvalidImage,
    InvalidRequest,
    ShapeMismatch,
    VessaError,
    error_from,
)
from vessa.schemas import (
    AdaptationInfo,
    BankInfo,
    ErrorResponse,
    ServiceInfo,
    TemplateInfo,
    TemplateInfos,
)

Repeat = Literal["always", "unsent", "never"]

_T = TypeVar("_T")
_R = TypeVar("_R")
_MAX_ITEMS = 32  # images per request; larger batches become several requests
_MAX_BYTES = 16 << 20  # bytes of tensors per request, unless one item has more; the service accepts 64 MiB


@dataclass(frozen=True)
class Call(Generic[_T]):
    """One HTTP request and the function that reads its response.

    repeat: "always": sending it twice does no harm; "unsent": repeat it only if the first one had no effect;
        "never": for probes
    rows: indices, in the caller's list, of the items that it carries
    """

    method: str
    path: str
    read: Callable[[httpx.Response], _T]
    options: dict[str, Any] = field(default_factory=dict)
    repeat: Repeat = "always"
    rows: tuple[int, ...] = ()


def reads(adapter: TypeAdapter[_T]) -> Callable[[httpx.Response], _T]:
    """Return a function that reads a JSON response; it raises BadResponse."""

    def read(response: httpx.Response) -> _T:
        try:
            return adapter.validate_json(response.content)
        except ValidationError as error:
            raise BadResponse(
                f"the response to {response.url.path} does not follow the annotator's protocol: check "
                "that client and annotator have the same version"
            ) from error

    return read


def read_error(response: httpx.Response) -> VessaError:
    """Return the error that a failed response describes."""
    retry_after = _retry_after(response.headers.get("retry-after", ""))
    position = response.headers.get("x-queue-position", "")
    try:
        body = ErrorResponse.model_validate_json(response.content).error
        failure = error_from(body.code, body.message, body.item, retry_after)
    except ValidationError:
        text = f"{response.url} returned status {response.status_code} without an annotator's error message"
        failure = BadResponse(f"{text}: check the address", retry_after=retry_after)
    failure.queue_position = int(position) if re.fullmatch(r"[0-9]{1,9}", position) else None
    return failure


def _retry_after(value: str) -> float | None:
    """Read a Retry-After header, seconds or a date, as seconds; None when it is neither."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def info() -> Call[ServiceInfo]:
    """Build GET /info."""
    return Call("GET", "/info", reads(TypeAdapter(ServiceInfo)))


def ready() -> Call[bool]:
    """Build GET /readyz; it is not repeated, since "not ready" is a valid result."""
    return Call("GET", "/readyz", lambda response: response.status_code == 200, repeat="never")


def banks() -> Call[list[BankInfo]]:
    """Build GET /banks."""
    return Call("GET", "/banks", reads(TypeAdapter(list[BankInfo])))


def bank(name: str) -> Call[BankInfo]:
    """Build GET /banks/{bank}."""
    return Call("GET", f"/banks/{quoted(name)}", reads(TypeAdapter(BankInfo)))


def adapt(bank: str, seconds: float, images: Image | None) -> Call[AdaptationInfo]:
    """Build POST /banks/{bank}/adapt."""
    options: dict[str, Any] = {"params": {"seconds": seconds}}
    if images is not None and len(images):
        options |= {"content": encode({"images": images}, {}), "headers": {"content-type": MEDIA_TYPE}}
    path, read = f"/banks/{quoted(bank)}/adapt", reads(TypeAdapter(AdaptationInfo))
    return Call("POST", path, read, options, "unsent")


def adaptation(bank: str) -> Call[AdaptationInfo]:
    """Build GET /banks/{bank}/adapt."""
    return Call("GET", f"/banks/{quoted(bank)}/adapt", reads(TypeAdapter(AdaptationInfo)))


def forget_adaptation(bank: str) -> Call[None]:
    """Build DELETE /banks/{bank}/adapt."""
    return Call("DELETE", f"/banks/{quoted(bank)}/adapt", lambda _: None)


def templates(bank: str) -> Call[list[TemplateInfo]]:
    """Build GET /templates."""
    return Call("GET", "/templates", reads(TypeAdapter(list[TemplateInfo])), {"params": {"bank": bank}})


def delete_template(bank: str, template: str) -> Call[None]:
    """Build DELETE /templates/{id}; it is not repeated, since a second one would return 404."""
    path = f"/templates/{quoted(template)}"
    return Call("DELETE", path, lambda _: None, {"params": {"bank": bank}}, "unsent")


def delete_bank(name: str) -> Call[None]:
    """Build DELETE /banks/{bank}; it is not repeated, since a second one would return 404."""
    return Call("DELETE", f"/banks/{quoted(name)}", lambda _: None, repeat="unsent")


def annotation(identity: str) -> Call[Annotation]:
    """Build GET /annotations/{id}."""
    headers = {"Accept": MEDIA_TYPE}
    return Call("GET", f"/annotations/{quoted(identity)}", read_annotation, {"headers": headers})


def quoted(name: str) -> str:
    """Quote a name as one segment of a path, so that it cannot lead to another route."""
    if name in ("", ".", ".."):
        raise InvalidRequest(f"'{name}' is not a valid name: expected 1 to 128 printable characters")
    return quote(name, safe=":")


def binary(
    path: str,
    tensors: Mapping[str, Floats],
    metadata: Mapping[str, str],
    read: Callable[[httpx.Response], _T],
    rows: Sequence[int],
) -> Call[_T]:
    """Build a POST with a safetensors body. rows: indices of its items in the caller's list."""
    headers = {"Content-Type": MEDIA_TYPE, "Accept": f"{MEDIA_TYPE}, application/json"}
    options = {"content": encode(tensors, metadata), "headers": headers}
    return Call("POST", path, read, options, rows=tuple(rows))


def batches(
    shapes: Iterable[tuple[Any, ...]], sizes: Iterable[int], budget: int = _MAX_BYTES
) -> Iterator[list[int]]:
    """Group rows of equal shape into batches of at most _MAX_ITEMS items and `budget` bytes.

    A single item may exceed the budget.
    """
    by_shape: dict[tuple[Any, ...], list[int]] = {}
    size_of = {}
    for row, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        by_shape.setdefault(shape, []).append(row)
        size_of[shape] = max(size, 1)
    for shape, rows in by_shape.items():
        step = max(1, min(_MAX_ITEMS, budget // size_of[shape]))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def in_order(count: int, parts: Iterable[tuple[Call[list[_R]], list[_R]]]) -> list[_R]:
    """Put the results of several requests into the order of the caller's list."""
    placed: dict[int, _R] = {}
    for call, answers in parts:
        if len(call.rows) != len(answers):
            raise BadResponse(f"the annotator returned {len(answers)} items for {len(call.rows)}")
        placed.update(zip(call.rows, answers, strict=True))
    return [placed[i] for i in range(count)]


def check_list(names: Sequence[str | None] | None, what: str) -> None:
    """Raise InvalidRequest for a bare string: its letters would pass for names."""
    if isinstance(names, str):
        raise InvalidRequest(f"{what} must be a list of names, got the string '{names[:60]}'")


def check_images(images: Iterable[Image], first: int = 0) -> None:
    """Raise InvalidImage unless every image is uint8 (H, W[, 3]). first: index of the first image."""
    for row, image in enumerate(images, first):
        if not isinstance(image, np.ndarray):
            raise InvalidImage(f"image {row} is a {type(image).__name__}; expected a numpy array", item=row)
        gray_or_rgb = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not gray_or_rgb or image.size == 0:
            raise InvalidImage(
                f"image {row} is {image.dtype} {image.shape}; expected uint8 (H, W) or (H, W, 3)", item=row
            )


def add_templates(
    bank: str,
    images: Sequence[Image],
    masks: Sequence[Image],
    classes: Mapping[int, str],
    groups: Sequence[str],
) -> Iterator[Call[list[TemplateInfo]]]:
    """Build POST /templates, at least one request per image size.

    All arguments are checked before the first request is built; each body is encoded when it is its turn.
    Raises InvalidImage, ShapeMismatch, InvalidRequest.
    """
    if not len(images) == len(masks) == len(groups):
        raise InvalidRequest(
            f"{len(images)} images, {len(masks)} masks and {len(groups)} groups: expected as many of each"
        )
    check_list(groups, "groups")
    check_images(images)
    for row, (image, mask) in enumerate(zip(images, masks, strict=True)):
        if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8:
            kind = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
            raise InvalidImage(f"mask {row} is {kind}; expected a numpy array of uint8 class ids", item=row)
        if image.shape[:2] != mask.shape:
            raise ShapeMismatch(
                f"image {row} has size {image.shape[:2]}, its mask {mask.shape}: expected the same", item=row
            )
    read = reads(TypeAdapter(TemplateInfos))

    def call(rows: list[int]) -> Call[list[TemplateInfo]]:
        tensors = {"images": np.stack([images[r] for r in rows]), "masks": np.stack([masks[r] for r in rows])}
        metadata = {
            "bank": bank,
            "classes": json.dumps({str(c): n for c, n in classes.items()}),
            "groups": json.dumps([groups[r] for r in rows]),
        }
        return binary("/templates", tensors, metadata, lambda r: read(r).templates, rows)

    sizes = (i.nbytes + m.nbytes for i, m in zip(images, masks, strict=True))
    return map(call, batches((i.shape for i in images), sizes))


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
    clean: bool = False,
) -> tuple[int, Iterator[Call[list[Annotation]]]]:
    """Build POST /segment, at least one request per image size and prompt shape.

    Returns the number of items and the requests. All arguments are checked before the first request is built;
    each body is encoded when it is its turn. Raises InvalidRequest, InvalidImage, InvalidPrompt.
    """
    if (images is None) == (image_ids is None):
        raise InvalidRequest("expected either images or image_ids")
    for names, what in ((image_ids, "image_ids"), (classes, "classes"), (groups, "groups")):
        check_list(names, what)
    ids = list(image_ids or [])
    count = len(ids) if images is None else len(images)
    given = list(prompts) if prompts is not None else [None] * count
    owners = list(groups) if groups is not None else [None] * count
    if len(given) != count or len(owners) != count:
        raise InvalidRequest(
            f"{count} items with {len(given)} prompts and {len(owners)} groups: expected one of each per item"
        )
    check_images([] if images is None else images)
    check_prompts(given)

    def call(rows: list[int]) -> Call[list[Annotation]]:
        tensors = prompt_tensors([given[r] for r in rows])
        metadata = {"bank": bank, "template_choice": template_choice, "seed": str(seed)}
        if images is not None:
            tensors["images"] = np.stack([images[r] for r in rows])
        else:
            metadata["image_ids"] = json.dumps([ids[r] for r in rows])
        if classes is not None:
            metadata["classes"] = json.dumps(list(classes))
        metadata["groups"] = json.dumps([owners[r] for r in rows])
        if probabilities:
            metadata["probabilities"] = "1"
        if clean:
            metadata["clean"] = "1"
        size = None if images is None else images[rows[0]].shape[:2]
        return binary("/segment", tensors, metadata, lambda r: read_annotations(r, rows, size), rows)

    shapes = [(() if images is None else images[i].shape, prompt_shape(given[i])) for i in range(count)]
    sizes = [(0 if images is None else images[i].nbytes) + prompt_bytes(given[i]) for i in range(count)]
    # A response with probabilities has 2 (K + 1) bytes per pixel.
    return count, map(call, batches(shapes, sizes, _MAX_BYTES // (4 if probabilities else 1)))
