"""The nnInteractive protocol, version 2: 3D Slicer, MITK and napari connect without a plug-in of ours.

The address of the server in the viewer is `/nninteractive/BANK`, or `/nninteractive/BANK/CLASS` to draw one
class. Without a class the first interaction decides what is drawn.
"""

import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from vessa.errors import InvalidPrompt, InvalidRequest, Retryable, ShapeMismatch, UnknownClass, VessaError
from vessa.volumes import isolated, packed_array
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.dependencies import BanksDep, read_body, service_of, unless_gone
from vessa_server.api.error_handlers import error_response
from vessa_server.api.viewers.access import WorkDep, painter_of, read_upload, sessions_of
from vessa_server.auth.keys import Caller
from vessa_server.serialization.multipart import read_json
from vessa_server.serving.engine import Engine
from vessa_server.viewers import interactions
from vessa_server.viewers.interactions import Bool, Drawing
from vessa_server.viewers.sessions import LIVENESS_S, ViewerSession
from vessa_server.viewers.stack import Stack
from vessa_server.viewers.target import Step, Target, changed_box

PROTOCOL = "nninteractive"
_META, _LEASE = "X-Meta", "X-Lease-Token"
_OCTETS = "application/octet-stream"
_JSON_BYTES = 64 * 1024
_VERSION = "2.6.0"  # of nnInteractive whose protocol this is
_CAPABILITIES = {
    "supported_interactions": {
        "points": True,
        "bbox2d": True,
        "bbox3d": True,
        "scribble": True,
        "lasso": True,
    },
    "channel_mapping": {},
    "num_interaction_channels": 0,
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": False,
    "preferred_scribble_thickness": [1, 1, 1],
    "interaction_decay": None,
    "inference_session_version": _VERSION,
    "license": "Apache-2.0 (VESSA); the weights have their own",
    "supports_undo": True,
    "do_autozoom": True,
}


class _Route(APIRoute):
    """Answer failures with the field `detail` too, which the protocol's clients show."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except VessaError as error:
                service_of(request).metrics.errors.labels(error.code).inc()
                return _failure(error, claim=request.url.path.endswith("/claim"))

        return answer


nninteractive_api = APIRouter(
    prefix="/nninteractive/{bank}", route_class=_Route, dependencies=[Depends(require_key)]
)


@dataclass(eq=False)
class _Work:
    """Hold what a lease works on. class_id: that of the address, None where it names none."""

    class_id: int | None
    through: bool = True
    target: Target | None = None


async def lease_of(
    request: Request, caller: CallerDep, x_lease_token: Annotated[str, Header(max_length=128)] = ""
) -> ViewerSession:
    """Return the session of the lease that a request names. Raises UnknownSession."""
    use = request.method == "POST" and not request.url.path.endswith("/heartbeat")
    return sessions_of(request).get(PROTOCOL, x_lease_token, caller, use=use)


LeaseDep = Annotated[ViewerSession, Depends(lease_of)]


async def meta_of(x_meta: Annotated[str, Header(max_length=_JSON_BYTES)] = "{}") -> dict[str, Any]:
    """Return the JSON of the header X-Meta. Raises InvalidRequest."""
    return _object(x_meta)


MetaDep = Annotated[dict[str, Any], Depends(meta_of)]


@nninteractive_api.get("/healthz")
@nninteractive_api.get("/{name}/healthz")
async def healthz() -> dict[str, str]:
    """Say that the service answers."""
    return {"status": "ok"}


@nninteractive_api.post("/claim")
@nninteractive_api.post("/{name}/claim")
async def claim(request: Request, bank: str, caller: CallerDep, banks: BanksDep, name: str = "") -> Any:
    """Open a session for one viewer. Raises UnknownBank, UnknownClass."""
    classes = (await run_in_threadpool(banks.get, bank)).classes
    ids = {known: key for key, known in classes.items()}
    if name and name not in ids:
        raise UnknownClass(f"bank {bank!r} has no class {name[:80]!r}; it has {sorted(ids)}")
    sessions = sessions_of(request)
    session = sessions.open(PROTOCOL, caller, bank, beats=True)
    session.work = _Work(ids.get(name))
    return {
        "lease_token": session.token,
        "idle_timeout_seconds": sessions.bounds.viewer_idle_s,
        "liveness_timeout_seconds": LIVENESS_S,
        "max_sessions": sessions.bounds.viewer_sessions,
    }


@nninteractive_api.get("/capabilities")
@nninteractive_api.get("/{name}/capabilities")
async def capabilities() -> dict[str, Any]:
    """Say which tools work."""
    return _CAPABILITIES


@nninteractive_api.post("/release")
@nninteractive_api.post("/{name}/release")
async def release(request: Request, lease: LeaseDep) -> dict[str, bool]:
    """End the session."""
    sessions_of(request).close(lease)
    return {"released": True}


@nninteractive_api.post("/heartbeat")
@nninteractive_api.post("/{name}/heartbeat")
async def heartbeat(request: Request, lease: LeaseDep) -> dict[str, float]:
    """Say that the viewer still runs."""
    return {"remaining_seconds": sessions_of(request).remaining(lease)}


@nninteractive_api.get("/lease_status")
@nninteractive_api.get("/{name}/lease_status")
async def lease_status(request: Request, lease: LeaseDep) -> dict[str, float]:
    """Say how long an unused session lasts."""
    sessions = sessions_of(request)
    return {
        "remaining_seconds": sessions.remaining(lease),
        "idle_timeout_seconds": sessions.bounds.viewer_idle_s,
    }


@nninteractive_api.post("/set_image")
@nninteractive_api.post("/{name}/set_image")
async def set_image(request: Request, engine: WorkDep, lease: LeaseDep, meta: MetaDep) -> dict[str, Any]:
    """Take a volume (C, X, Y, Z); what was drawn before is dropped."""
    array = await _unpack(request, await read_upload(request))
    if array.ndim != 4:
        raise ShapeMismatch(f"The image needs four axes (C, X, Y, Z), got the shape {array.shape}.")
    properties = meta.get("image_properties")
    spacing = properties.get("spacing") if isinstance(properties, dict) else None
    stack = Stack.of_channels(array, spacing if isinstance(spacing, list) else [])
    async with lease.lock:
        work: _Work = lease.work
        target = Target(stack, work.class_id, work.through)
        sessions_of(request).hold(lease, target.nbytes)
        work.target = target
    return {"original_image_shape": list(array.shape)}


@nninteractive_api.post("/set_target_buffer")
@nninteractive_api.post("/{name}/set_target_buffer")
async def set_target_buffer(request: Request, lease: LeaseDep) -> dict[str, Any]:
    """Begin with an empty mask of the image's shape."""
    given = await _body(request)
    async with lease.lock:
        target = _target(lease)
        if given.get("shape") != list(target.stack.shape):
            raise ShapeMismatch(f"The target buffer must have the image's shape {target.stack.shape}.")
        target.mask = np.zeros(target.stack.shape, bool)
    return {}


@nninteractive_api.post("/set_do_autozoom")
@nninteractive_api.post("/{name}/set_do_autozoom")
async def set_do_autozoom(request: Request, lease: LeaseDep) -> dict[str, Any]:
    """Say whether masks continue through the volume (auto-zoom) or stay in the slices that are drawn on."""
    through = bool((await _body(request)).get("do_autozoom", True))
    async with lease.lock:
        lease.work.through = through
        if lease.work.target is not None:
            lease.work.target.through = through
    return {}


@nninteractive_api.post("/reset_interactions")
@nninteractive_api.post("/{name}/reset_interactions")
async def reset_interactions(lease: LeaseDep) -> dict[str, Any]:
    """Begin another structure in the same volume."""
    async with lease.lock:
        if lease.work.target is not None:
            lease.work.target.reset(lease.work.class_id)
    return {}


@nninteractive_api.post("/undo")
@nninteractive_api.post("/{name}/undo")
async def undo(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Drop the newest interaction and answer what changed."""
    async with lease.lock:
        undone = _target(lease).undo()
        return await _answer(request, caller, engine, lease, run=undone)


@nninteractive_api.post("/predict")
@nninteractive_api.post("/{name}/predict")
async def predict(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Compute the mask of the interactions that came with run_prediction false."""
    async with lease.lock:
        return await _answer(request, caller, engine, lease, run=True)


@nninteractive_api.post("/add_point_interaction")
@nninteractive_api.post("/{name}/add_point_interaction")
async def add_point(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Add a click inside or outside of the structure."""

    def draw(place: Any, include: bool, stack: Stack) -> list[Drawing]:
        return [interactions.point(place, include, stack.axis, stack.shape)]

    return await _add_placed(request, caller, engine, lease, "coordinates", draw)


@nninteractive_api.post("/add_bbox_interaction")
@nninteractive_api.post("/{name}/add_bbox_interaction")
async def add_bbox(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Add a box that the structure lies in, or must not enter."""

    def draw(bounds: Any, include: bool, stack: Stack) -> list[Drawing]:
        return interactions.box(bounds, include, stack.axis, stack.shape)

    return await _add_placed(request, caller, engine, lease, "bbox_coords", draw)


@nninteractive_api.post("/add_scribble_interaction")
@nninteractive_api.post("/{name}/add_scribble_interaction")
async def add_scribble(
    request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep, meta: MetaDep
) -> Response:
    """Add a scribble inside or outside of the structure."""
    most = service_of(request).settings.limits.max_points // 2

    def draw(drawn: Bool, corner: list[int], include: bool, stack: Stack) -> list[Drawing]:
        return interactions.scribble(drawn, corner, include, stack.axis, most)

    return await _add_drawn(request, caller, engine, lease, meta, draw)


@nninteractive_api.post("/add_lasso_interaction")
@nninteractive_api.post("/{name}/add_lasso_interaction")
async def add_lasso(
    request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep, meta: MetaDep
) -> Response:
    """Add a closed region that the structure lies in, or must not enter."""

    def draw(drawn: Bool, corner: list[int], include: bool, stack: Stack) -> list[Drawing]:
        return interactions.lasso(drawn, corner, include, stack.axis, stack.shape)

    return await _add_drawn(request, caller, engine, lease, meta, draw)


@nninteractive_api.post("/add_initial_seg_interaction")
@nninteractive_api.post("/{name}/add_initial_seg_interaction")
async def add_initial_label(
    request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep, meta: MetaDep
) -> Response:
    """Begin with a mask of the whole volume; slices that are drawn on later are corrected from it."""
    mask = await _unpack(request, await read_upload(request))
    async with lease.lock:
        given = {"run_prediction": meta.get("run_prediction", False)}
        return await _add(request, caller, engine, lease, Step(label=mask.astype(bool)), given)


async def _add_placed(
    request: Request,
    caller: Caller,
    engine: Engine,
    lease: ViewerSession,
    field: str,
    draw: Callable[[Any, bool, Stack], list[Drawing]],
) -> Response:
    """Add the interaction that a JSON body places. field: that holds the place; draw: makes its drawings."""
    given = await _body(request)
    async with lease.lock:
        drawings = draw(given.get(field, []), _include(given), _target(lease).stack)
        return await _add(request, caller, engine, lease, Step(drawings), given)


async def _add_drawn(
    request: Request,
    caller: Caller,
    engine: Engine,
    lease: ViewerSession,
    meta: dict[str, Any],
    draw: Callable[[Bool, list[int], bool, Stack], list[Drawing]],
) -> Response:
    """Add the interaction that a mask in the body shows. draw: makes its drawings."""
    mask = await _unpack(request, await read_upload(request))
    async with lease.lock:
        stack = _target(lease).stack
        drawn, corner = _drawn(mask, meta, stack)
        drawings = draw(drawn, corner, _include(meta), stack)
        return await _add(request, caller, engine, lease, Step(drawings), meta)


async def _add(
    request: Request,
    caller: Caller,
    engine: Engine,
    lease: ViewerSession,
    step: Step,
    given: dict[str, Any],
) -> Response:
    """Add a step and answer the mask; a step whose mask fails is dropped, so that it does not fail again."""
    target = _target(lease)
    class_id, mask = target.class_id, target.mask
    target.add(step)
    if step.label is not None:
        target.mask = step.label.copy()  # the viewer writes it into its buffer before the answer comes
    try:
        return await _answer(request, caller, engine, lease, run=bool(given.get("run_prediction", True)))
    except BaseException:
        target.undo()
        target.class_id, target.mask = class_id, mask
        raise


async def _answer(
    request: Request, caller: Caller, engine: Engine, lease: ViewerSession, *, run: bool
) -> Response:
    """Compute the mask and answer the part of it that changed, with the bounds of that part."""
    target, sessions = _target(lease), sessions_of(request)
    sessions.hold(lease, target.nbytes)
    if not run:
        return Response(b"", media_type=_OCTETS, headers={_META: '{"ran_prediction":false,"bbox":null}'})
    painter = painter_of(request, engine, caller, lease.bank)
    mask, complete = await unless_gone(request, painter.paint(target, sessions.bounds.viewer_timeout_s))
    sessions.hold(lease, target.nbytes)
    bounds = await run_in_threadpool(changed_box, target.mask, mask)
    content = b""
    if bounds is not None:
        part = mask[tuple(slice(low, high) for low, high in bounds)].astype(np.uint8)
        content = await run_in_threadpool(packed_array.pack, part)
    target.mask = mask
    meta = {"ran_prediction": True, "bbox": bounds, "complete": complete, "class_id": target.class_id}
    return Response(content, media_type=_OCTETS, headers={_META: json.dumps(meta)})


def _failure(error: VessaError, *, claim: bool) -> Response:
    """Return the answer to a failure; a claim that must wait gets 503, as the protocol's clients expect."""
    response = error_response(error)
    content = json.loads(bytes(response.body)) | {"detail": str(error)}
    status = 503 if claim and isinstance(error, Retryable) else response.status_code
    kept = {"retry-after", "www-authenticate", "x-queue-position"}
    headers = {name: value for name, value in response.headers.items() if name in kept}
    return Response(json.dumps(content), status, headers, "application/json")


def _target(lease: ViewerSession) -> Target:
    target: Target | None = lease.work.target
    if target is None:
        raise InvalidRequest("The session has no image yet. Send it by set_image first.")
    return target


async def _unpack(request: Request, body: bytes) -> Any:
    return await run_in_threadpool(isolated.unpack_bytes, body, sessions_of(request).bounds.viewer_voxels)


async def _body(request: Request) -> dict[str, Any]:
    seconds = sessions_of(request).bounds.viewer_body_s
    return _object((await read_body(request, limit=_JSON_BYTES, seconds=seconds)).decode("utf-8", "replace"))


def _object(text: str) -> dict[str, Any]:
    value = read_json(text, "the request")
    if not isinstance(value, dict):
        raise InvalidRequest("The request must be a JSON object.")
    return value


def _include(given: dict[str, Any]) -> bool:
    include = given.get("include_interaction")
    if not isinstance(include, bool):
        raise InvalidPrompt("include_interaction must be true (inside) or false (outside).")
    return include


def _drawn(mask: Any, meta: dict[str, Any], stack: Stack) -> tuple[Bool, list[int]]:
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
