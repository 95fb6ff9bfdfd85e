"""Worklists: images to review, their labels, decisions and export; the console draws on these routes."""

from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from fastapi.responses import StreamingResponse
from numpy.typing import NDArray

from vessa.errors import InvalidRequest, NoTemplate, ShapeMismatch, UnknownClass, VessaError
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.dependencies import (
    READ,
    BanksDep,
    BoundedJsonRoute,
    ChangeDep,
    callers_banks,
    limits_of,
    read_body,
    service_of,
    unless_gone,
)
from vessa_server.api.jobs import jobs_of
from vessa_server.api.openapi import WORKLIST_ITEM_BODY, answering
from vessa_server.auth.keys import Caller, Role
from vessa_server.serialization.fields import read_group
from vessa_server.serialization.image_files import decode_image, label_png
from vessa_server.serialization.multipart import Form
from vessa_server.serialization.request_parser import TemplateRequest
from vessa_server.serialization.responses import PNG
from vessa_server.serving.engine import Engine
from vessa_server.template_bank.bank import check_name
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.types import SegmentResult, TemplateItem
from vessa_server.worklists.export import ExportFormat, export_worklist
from vessa_server.worklists.records import Item, Worklist
from vessa_server.worklists.schemas import (
    DecisionBody,
    ItemInfo,
    NewWorklist,
    SegmentBody,
    WorklistContent,
    WorklistInfo,
    item_info,
    volume_info,
    worklist_info,
)
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.volumes import volumes_of

worklists_api = APIRouter(dependencies=[Depends(require_key)], route_class=BoundedJsonRoute)

ListName = Annotated[str, Path(description="worklist", max_length=64)]
ItemId = Annotated[str, Path(description="item of the worklist", max_length=32)]
_ITEM_FIELDS = {"image", "name", "group"}
_ZIP = "application/zip"


def store_of(request: Request) -> WorklistStore:
    """Return the worklists of this app."""
    store: WorklistStore = request.app.state.worklists
    return store


StoreDep = Annotated[WorklistStore, Depends(store_of)]


@worklists_api.get("/worklists", dependencies=READ)
def list_worklists(store: StoreDep, caller: CallerDep) -> list[WorklistInfo]:
    """The worklists of this key."""
    return [worklist_info(worklist, store.items(worklist)) for worklist in store.worklists(caller)]


@worklists_api.post("/worklists", status_code=201)
def create_worklist(body: NewWorklist, store: StoreDep, caller: CallerDep, change: ChangeDep) -> WorklistInfo:
    """Make a worklist, or return the one of this name."""
    with change("worklist.create", worklist=body.name):
        worklist = store.create(body.name, check_name(body.bank), caller)
    return worklist_info(worklist, store.items(worklist))


@worklists_api.get("/worklists/{name}", dependencies=READ)
def worklist_content(name: ListName, store: StoreDep, caller: CallerDep, banks: BanksDep) -> WorklistContent:
    """A worklist with all its items."""
    worklist = store.get(name, caller)
    items = store.items(worklist)
    return WorklistContent(
        **worklist_info(worklist, items).model_dump(),
        classes=_classes(banks, worklist),
        items=[item_info(item) for item in items],
        volumes=[volume_info(volume) for volume in volumes_of(store, worklist)],
    )


@worklists_api.delete("/worklists/{name}", status_code=204)
def delete_worklist(name: ListName, store: StoreDep, caller: CallerDep, change: ChangeDep) -> None:
    """Delete a worklist with its images, labels and decisions."""
    with change("worklist.delete", worklist=name):
        store.delete(name, caller)


@worklists_api.post("/worklists/{name}/items", status_code=201, openapi_extra=WORKLIST_ITEM_BODY)
async def add_item(
    name: ListName, request: Request, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> ItemInfo:
    """Add one image: PNG, JPEG, TIFF or a DICOM image. The same image of the same name is added once."""
    with limits_of(request).work(caller), service_of(request).permit() as engine:
        body = await read_body(
            request,
            limit=engine.settings.limits.max_body_bytes,
            seconds=engine.settings.limits.body_timeout_s,
        )
        form = Form(request.headers.get("content-type", ""), body, _ITEM_FIELDS)

        def add() -> Item:
            image = decode_image(form.file("image"), engine.settings.limits.max_pixels)
            group = form.text("group", "")
            return store.add(
                store.get(name, caller),
                image,
                form.text("name", "image")[:200],
                read_group(group, "group") if group else "",
            )

        async with contextmanager_in_threadpool(change("worklist.add", worklist=name)) as more:
            item = await run_in_threadpool(add)
            more["item"] = item.id
        return item_info(item)


@worklists_api.get("/worklists/{name}/items/{identity}", dependencies=READ)
def item_state(name: ListName, identity: ItemId, store: StoreDep, caller: CallerDep) -> ItemInfo:
    """One item of a worklist."""
    return item_info(store.item(store.get(name, caller), identity))


@worklists_api.delete("/worklists/{name}/items/{identity}", status_code=204)
def remove_item(
    name: ListName, identity: ItemId, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> None:
    """Remove an image with its labels from a worklist."""
    worklist = store.get(name, caller)
    with change("worklist.remove", worklist=name, item=identity):
        store.remove(worklist, identity)


@worklists_api.get(
    "/worklists/{name}/items/{identity}/image.png",
    response_class=Response,
    responses=answering(PNG),
    dependencies=READ,
)
def item_image(name: ListName, identity: ItemId, store: StoreDep, caller: CallerDep) -> Response:
    """The pixels of an item as PNG."""
    worklist = store.get(name, caller)
    data = store.image_file(worklist, store.item(worklist, identity))
    return Response(data, media_type=PNG, headers={"Cache-Control": "private, max-age=3600"})


@worklists_api.get(
    "/worklists/{name}/items/{identity}/labels.png",
    response_class=Response,
    responses=answering(PNG),
    dependencies=READ,
)
def item_labels(name: ListName, identity: ItemId, store: StoreDep, caller: CallerDep) -> Response:
    """The newest label map of an item, 8-bit gray class ids; all background before there is one."""
    worklist = store.get(name, caller)
    item = store.item(worklist, identity)
    labels = store.labels(worklist, item)
    if labels is None:
        labels = np.zeros((item.height, item.width), np.uint8)
    return Response(label_png(labels), media_type=PNG, headers={"Cache-Control": "no-store"})


@worklists_api.post(
    "/worklists/{name}/items/{identity}/segment", response_class=Response, responses=answering(PNG)
)
async def segment_item(
    name: ListName,
    identity: ItemId,
    body: SegmentBody,
    request: Request,
    store: StoreDep,
    caller: CallerDep,
    keep: Annotated[bool, Query(description="keep the labels as the item's newest version")] = True,
    layer: Annotated[Literal["labels", "confidence"], Query(description="what the PNG holds")] = "labels",
) -> Response:
    """Segment an item by its worklist's bank and answer its labels as an 8-bit gray PNG.

    With keep the labels become the item's newest version, and its doubt and templates are stored. To correct
    one class, ask with keep=false, classes=[that class] and prompts, and store the merged map by PUT labels.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as engine:
        worklist = await run_in_threadpool(store.get, name, caller)
        item = await run_in_threadpool(store.item, worklist, identity)
        limits.take(caller, 1)
        result = await unless_gone(request, _segment(engine, store, worklist, item, body, caller))

        def answer() -> bytes:
            if keep:
                _keep(store, worklist, item, result)
            return label_png(result.labels if layer == "labels" else result.confidence)

        return Response(
            await run_in_threadpool(answer), media_type=PNG, headers={"Cache-Control": "no-store"}
        )


@worklists_api.put("/worklists/{name}/items/{identity}/labels")
async def put_labels(
    name: ListName,
    identity: ItemId,
    request: Request,
    store: StoreDep,
    caller: CallerDep,
    change: ChangeDep,
) -> ItemInfo:
    """Store labels that a person drew: the body holds uint8 (H, W) class ids, row by row."""
    with limits_of(request).work(caller), service_of(request).permit() as engine:
        limits = engine.settings.limits
        body = await read_body(request, limit=limits.max_body_bytes, seconds=limits.body_timeout_s)
        async with contextmanager_in_threadpool(change("worklist.label", worklist=name, item=identity)):
            put = partial(_put_labels, engine, store, name, identity, body, caller)
            return item_info(await run_in_threadpool(put))


@worklists_api.post("/worklists/{name}/items/{identity}/undo")
def undo_labels(
    name: ListName, identity: ItemId, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> ItemInfo:
    """Return to the labels before the newest ones."""
    worklist = store.get(name, caller)
    with change("worklist.undo_label", worklist=name, item=identity):
        return item_info(store.undo(worklist, store.item(worklist, identity)))


@worklists_api.post("/worklists/{name}/items/{identity}/decision")
async def decide(
    name: ListName,
    identity: ItemId,
    body: DecisionBody,
    request: Request,
    store: StoreDep,
    caller: CallerDep,
    change: ChangeDep,
) -> ItemInfo:
    """Accept, reject or reopen an item; the audit log has each decision, and its history can be undone."""
    worklist = await run_in_threadpool(store.get, name, caller)
    item = await run_in_threadpool(store.item, worklist, identity)
    if body.decision == "accepted" and not item.versions:
        raise InvalidRequest("this image has no labels to accept; segment or draw them first")
    if body.add_to_bank and (body.decision != "accepted" or caller.role < Role.curate):
        raise InvalidRequest(
            "only an accepted image becomes a template, by a key of the role curate or admin"
        )
    about = {"worklist": name, "item": identity, "decision": body.decision, "bank": worklist.bank}
    async with contextmanager_in_threadpool(change("worklist.decide", **about)) as more:
        if body.add_to_bank:
            more["templates"] = await _add_template(request, store, worklist, item, caller)
        history = (*item.history, item.decision)[-32:]
        changed = await run_in_threadpool(
            store.change, worklist, item,
            decision=body.decision, history=history, in_bank=item.in_bank or body.add_to_bank,
        )  # fmt: skip
    return item_info(changed)


@worklists_api.delete("/worklists/{name}/items/{identity}/decision")
def undo_decision(
    name: ListName, identity: ItemId, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> ItemInfo:
    """Return to the decision before the last one. A template that was made of the image stays in its bank."""
    worklist = store.get(name, caller)
    item = store.item(worklist, identity)
    if not item.history:
        raise InvalidRequest("nothing to undo: this image has no earlier decision")
    with change("worklist.undo", worklist=name, item=identity, decision=item.history[-1]):
        return item_info(store.change(worklist, item, decision=item.history[-1], history=item.history[:-1]))


@worklists_api.get(
    "/worklists/{name}/export", response_class=Response, responses=answering(_ZIP), dependencies=READ
)
def export(
    name: ListName,
    request: Request,
    store: StoreDep,
    caller: CallerDep,
    banks: BanksDep,
    format: Annotated[
        ExportFormat, Query(description="folder for vessa-trainer, nnunet, coco, nifti or dicom-seg")
    ] = "folder",
) -> Response:
    """The worklist as a ZIP archive: accepted images with masks, all others without.

    nifti and dicom-seg hold one file for each volume, on the grid of its files.
    """
    worklist, bounds = store.get(name, caller), jobs_of(request).bounds
    parts = export_worklist(store, worklist, _classes(banks, worklist), format, bounds)
    disposition = f'attachment; filename="{name}-{format}.zip"'
    return StreamingResponse(parts, media_type=_ZIP, headers={"Content-Disposition": disposition})


def _put_labels(
    engine: Engine, store: WorklistStore, name: str, identity: str, body: bytes, caller: Caller
) -> Item:
    worklist = store.get(name, caller)
    item = store.item(worklist, identity)
    if len(body) != item.height * item.width:
        raise ShapeMismatch(
            f"labels of this image are {item.height} x {item.width} bytes, got {len(body)} bytes"
        )
    labels = np.frombuffer(body, np.uint8).reshape(item.height, item.width)
    known = _classes(callers_banks(engine, caller), worklist)
    unknown = sorted({int(v) for v in np.unique(labels) if v} - set(known))
    if known and unknown:
        raise UnknownClass(
            f"the labels hold the class ids {unknown}; bank {worklist.bank!r} has {sorted(known)}"
        )
    return store.set_labels(worklist, item, labels, edited=True)


async def _segment(
    engine: Engine, store: WorklistStore, worklist: Worklist, item: Item, body: SegmentBody, caller: Caller
) -> SegmentResult:
    reader = replace(engine.reader, banks=callers_banks(engine, caller))

    def read() -> Any:
        image: NDArray[np.uint8] = store.image(worklist, item)
        drawn = {"boxes": body.boxes or None, "points": body.points or None}
        drawn["point_labels"] = body.point_labels or None  # type: ignore[assignment]
        options = {"template_choice": body.template_choice}
        return reader.segment_image(image, worklist.bank, body.classes, item.group or None, drawn, options)

    (result,) = await engine.annotate(await run_in_threadpool(read), caller.name)
    if isinstance(result, VessaError):
        raise result
    assert isinstance(result, SegmentResult)
    return result


def _keep(store: WorklistStore, worklist: Worklist, item: Item, result: SegmentResult) -> None:
    store.set_labels(
        worklist,
        item,
        result.labels,
        doubt=result.doubt,
        edited=False,
        scores=result.scores,
        templates={name: [use.model_dump() for use in uses] for name, uses in result.templates.items()},
    )


async def _add_template(
    request: Request, store: WorklistStore, worklist: Worklist, item: Item, caller: Caller
) -> list[str]:
    with limits_of(request).work(caller), service_of(request).permit() as engine:
        banks = callers_banks(engine, caller)

        def read() -> TemplateRequest:
            labels, classes = store.labels(worklist, item), _classes(banks, worklist)
            assert labels is not None  # checked by the caller
            ids = [int(v) for v in np.unique(labels) if v]
            if not ids:
                raise InvalidRequest("the labels are empty: a template needs at least one pixel of a class")
            image = store.image(worklist, item)
            named = {value: classes[value] for value in ids}
            return TemplateRequest(worklist.bank, [TemplateItem(image, labels, named, item.patient)])

        wanted = await run_in_threadpool(read)
        limits_of(request).take(caller, 1)
        templates = await unless_gone(request, engine.encode(wanted, banks))
        infos = await run_in_threadpool(banks.add, worklist.bank, templates)
    return [info.id for info in infos if info.created]


def _classes(banks: CallersBanks, worklist: Worklist) -> dict[int, str]:
    try:
        return banks.get(worklist.bank).classes
    except VessaError as error:
        if error.code in {"unknown_bank", NoTemplate.code}:
            return {}
        raise
