"""Take volumes, clicks, boxes, scribbles and lassos of viewers, and answer the mask that they ask for."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from vessa.errors import InvalidRequest, ShapeMismatch
from vessa.volumes import packed_array
from vessa_server.api.authentication import CallerDep
from vessa_server.api.dependencies import service_of, unless_gone
from vessa_server.api.viewers.access import WorkDep, painter_of, read_upload, sessions_of
from vessa_server.api.viewers.nninteractive.failures import DetailedRoute
from vessa_server.api.viewers.nninteractive.fields import MetaDep, drawing_of, include_of, json_body, unpack
from vessa_server.api.viewers.nninteractive.leases import LeaseDep, LeaseWork
from vessa_server.auth.keys import Caller
from vessa_server.serving.engine import Engine
from vessa_server.viewers import interactions
from vessa_server.viewers.interactions import Bool, Drawing
from vessa_server.viewers.sessions import ViewerSession
from vessa_server.viewers.stack import Stack
from vessa_server.viewers.target import Step, Target, changed_box

_META = "X-Meta"
_OCTETS = "application/octet-stream"

interactions_api = APIRouter(route_class=DetailedRoute)


@interactions_api.post("/set_image")
@interactions_api.post("/{name}/set_image")
async def set_image(request: Request, engine: WorkDep, lease: LeaseDep, meta: MetaDep) -> dict[str, Any]:
    """Take a volume (C, X, Y, Z); what was drawn before is dropped."""
    array = await unpack(request, await read_upload(request))
    if array.ndim != 4:
        raise ShapeMismatch(f"The image needs four axes (C, X, Y, Z), got the shape {array.shape}.")
    properties = meta.get("image_properties")
    spacing = properties.get("spacing") if isinstance(properties, dict) else None
    stack = Stack.of_channels(array, spacing if isinstance(spacing, list) else [])
    async with lease.lock:
        work: LeaseWork = lease.work
        target = Target(stack, work.class_id, work.through)
        sessions_of(request).hold(lease, target.nbytes)
        work.target = target
    return {"original_image_shape": list(array.shape)}


@interactions_api.post("/set_target_buffer")
@interactions_api.post("/{name}/set_target_buffer")
async def set_target_buffer(request: Request, lease: LeaseDep) -> dict[str, Any]:
    """Begin with an empty mask of the image's shape."""
    given = await json_body(request)
    async with lease.lock:
        target = _target(lease)
        if given.get("shape") != list(target.stack.shape):
            raise ShapeMismatch(f"The target buffer must have the image's shape {target.stack.shape}.")
        target.mask = np.zeros(target.stack.shape, bool)
    return {}


@interactions_api.post("/set_do_autozoom")
@interactions_api.post("/{name}/set_do_autozoom")
async def set_do_autozoom(request: Request, lease: LeaseDep) -> dict[str, Any]:
    """Say whether masks continue through the volume (auto-zoom) or stay in the slices that are drawn on."""
    through = bool((await json_body(request)).get("do_autozoom", True))
    async with lease.lock:
        lease.work.through = through
        if lease.work.target is not None:
            lease.work.target.through = through
    return {}


@interactions_api.post("/reset_interactions")
@interactions_api.post("/{name}/reset_interactions")
async def reset_interactions(lease: LeaseDep) -> dict[str, Any]:
    """Begin another structure in the same volume."""
    async with lease.lock:
        if lease.work.target is not None:
            lease.work.target.reset(lease.work.class_id)
    return {}


@interactions_api.post("/undo")
@interactions_api.post("/{name}/undo")
async def undo(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Drop the newest interaction and answer what changed."""
    async with lease.lock:
        undone = _target(lease).undo()
        return await _answer(request, caller, engine, lease, run=undone)


@interactions_api.post("/predict")
@interactions_api.post("/{name}/predict")
async def predict(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Compute the mask of the interactions that came with run_prediction false."""
    async with lease.lock:
        return await _answer(request, caller, engine, lease, run=True)


@interactions_api.post("/add_point_interaction")
@interactions_api.post("/{name}/add_point_interaction")
async def add_point(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Add a click inside or outside of the structure."""

    def draw(place: Any, include: bool, stack: Stack) -> list[Drawing]:
        return [interactions.point(place, include, stack.axis, stack.shape)]

    return await _add_placed(request, caller, engine, lease, "coordinates", draw)


@interactions_api.post("/add_bbox_interaction")
@interactions_api.post("/{name}/add_bbox_interaction")
async def add_bbox(request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep) -> Response:
    """Add a box that the structure lies in, or must not enter."""

    def draw(bounds: Any, include: bool, stack: Stack) -> list[Drawing]:
        return interactions.box(bounds, include, stack.axis, stack.shape)

    return await _add_placed(request, caller, engine, lease, "bbox_coords", draw)


@interactions_api.post("/add_scribble_interaction")
@interactions_api.post("/{name}/add_scribble_interaction")
async def add_scribble(
    request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep, meta: MetaDep
) -> Response:
    """Add a scribble inside or outside of the structure."""
    most = service_of(request).settings.limits.max_points // 2

    def draw(drawn: Bool, corner: list[int], include: bool, stack: Stack) -> list[Drawing]:
        return interactions.scribble(drawn, corner, include, stack.axis, most)

    return await _add_drawn(request, caller, engine, lease, meta, draw)


@interactions_api.post("/add_lasso_interaction")
@interactions_api.post("/{name}/add_lasso_interaction")
async def add_lasso(
    request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep, meta: MetaDep
) -> Response:
    """Add a closed region that the structure lies in, or must not enter."""

    def draw(drawn: Bool, corner: list[int], include: bool, stack: Stack) -> list[Drawing]:
        return interactions.lasso(drawn, corner, include, stack.axis, stack.shape)

    return await _add_drawn(request, caller, engine, lease, meta, draw)


@interactions_api.post("/add_initial_seg_interaction")
@interactions_api.post("/{name}/add_initial_seg_interaction")
async def add_initial_label(
    request: Request, caller: CallerDep, engine: WorkDep, lease: LeaseDep, meta: MetaDep
) -> Response:
    """Begin with a mask of the whole volume; slices that are drawn on later are corrected from it."""
    mask = await unpack(request, await read_upload(request))
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
    given = await json_body(request)
    async with lease.lock:
        drawings = draw(given.get(field, []), include_of(given), _target(lease).stack)
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
    mask = await unpack(request, await read_upload(request))
    async with lease.lock:
        stack = _target(lease).stack
        drawn, corner = drawing_of(mask, meta, stack)
        drawings = draw(drawn, corner, include_of(meta), stack)
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


def _target(lease: ViewerSession) -> Target:
    target: Target | None = lease.work.target
    if target is None:
        raise InvalidRequest("The session has no image yet. Send it by set_image first.")
    return target
