"""Read what the requests of the nnInteractive protocol carry."""

from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool

from vessa.errors import InvalidPrompt, InvalidRequest, ShapeMismatch
from vessa.volumes import isolated
from vessa_server.api.dependencies import read_body
from vessa_server.api.viewers.access import sessions_of
from vessa_server.serialization.multipart import read_json
from vessa_server.viewers.interactions import Bool
from vessa_server.viewers.stack import Stack

_JSON_BYTES = 64 * 1024


async def meta_of(x_meta: Annotated[str, Header(max_length=_JSON_BYTES)] = "{}") -> dict[str, Any]:
    """Return the JSON of the header X-Meta. Raises InvalidRequest."""
    return _object(x_meta)


MetaDep = Annotated[dict[str, Any], Depends(meta_of)]


async def unpack(request: Request, body: bytes) -> Any:
    """Return the array (X, Y, Z or with channels first) of a body. Raises MalformedBody, TooLarge."""
    return await run_in_threadpool(isolated.unpack_bytes, body, sessions_of(request).bounds.viewer_voxels)


async def json_body(request: Request) -> dict[str, Any]:
    """Return the JSON object of the body. Raises InvalidRequest, TooLarge."""
    seconds = sessions_of(request).bounds.viewer_body_s
    return _object((await read_body(request, limit=_JSON_BYTES, seconds=seconds)).decode("utf-8", "replace"))


def _object(text: str) -> dict[str, Any]:
    value = read_json(text, "the request")
    if not isinstance(value, dict):
        raise InvalidRequest("The request must be a JSON object.")
    return value


def include_of(given: dict[str, Any]) -> bool:
    """Return True for an interaction inside the structure. Raises InvalidPrompt."""
    include = given.get("include_interaction")
    if not isinstance(include, bool):
        raise InvalidPrompt("include_interaction must be true (inside) or false (outside).")
    return include


def drawing_of(mask: Any, meta: dict[str, Any], stack: Stack) -> tuple[Bool, list[int]]:
    """Return a drawn mask with the place of its first voxel; a crop names it by interaction_bbox."""
    bounds = meta.get("interaction_bbox")
    corner = [0, 0, 0]
    if bounds is not None:
        try:
            corner = [int(low) for low, _ in bounds]
        except (TypeError, ValueError):
            raise InvalidPrompt("interaction_bbox needs two whole numbers for each axis.") from None
    ends = [start + size for start, size in zip(corner, mask.shape, strict=False)]
    fits = mask.ndim == 3 and len(corner) == 3 and min(corner) >= 0
    if not fits or any(end > n for end, n in zip(ends, stack.shape, strict=True)):
        raise ShapeMismatch(f"The drawing {mask.shape} at {corner} does not fit the image {stack.shape}.")
    return mask.astype(bool), corner
