"""The MONAI Label protocol, as 3D Slicer's extension "MONAILabel" speaks it.

The address of the server in the viewer is `/monailabel/BANK`. The bank is three models: automatic, by points
in one slice, and by points or a box through the volume. Saved labels become templates of the bank.
"""

import json
from functools import partial
from typing import Annotated, Any
from urllib.parse import parse_qs

import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool

from vessa.codec import image_digest
from vessa.errors import (
    DeadlineExceeded,
    InvalidRequest,
    UnknownImage,
    UnknownSession,
    VessaError,
)
from vessa.file_kinds import HEAD, kind_of
from vessa.volumes import Bounds, isolated, write_labels
from vessa_server.active_learning import suggest
from vessa_server.api.authentication import CallerDep, caller_of_key, require_curator, require_key
from vessa_server.api.dependencies import (
    READ,
    BankPath,
    BanksDep,
    ChangeDep,
    callers_banks,
    limits_of,
    read_body,
    service_of,
    unless_gone,
)
from vessa_server.api.viewers.access import WorkDep, painter_of, read_upload, sessions_of
from vessa_server.auth.api_key import Access
from vessa_server.auth.keys import Caller
from vessa_server.serialization.fields import read_name
from vessa_server.serialization.multipart import Form
from vessa_server.serialization.request_parser import TemplateRequest
from vessa_server.serving.engine import Engine
from vessa_server.types import DescribeItem, scoped_id
from vessa_server.viewers import monailabel, saved_labels
from vessa_server.viewers.monailabel import Image
from vessa_server.viewers.sessions import ViewerSession
from vessa_server.viewers.stack import Stack, without_voxels

PROTOCOL = "monailabel"
_FORM_BYTES = 4096
_FORMATS = {".nrrd": ("nrrd", ".nrrd"), ".seg.nrrd": ("nrrd", ".seg.nrrd"), ".nii.gz": ("nifti", ".nii.gz")}
_LOOKS = (0.3, 0.5, 0.7)  # places of the slices by which volumes are ranked

monailabel_api = APIRouter(prefix="/monailabel/{bank}", dependencies=[Depends(require_key)])
monailabel_sign_in = APIRouter(prefix="/monailabel/{bank}")
ImageQuery = Annotated[str, Query(description="id of the volume", max_length=128)]


@monailabel_sign_in.get("/auth/")
async def auth(request: Request) -> dict[str, bool]:
    """Say whether the viewer must send a key."""
    access: Access = request.app.state.access
    return {"enabled": access.key is not None}


@monailabel_sign_in.post("/auth/token")
async def sign_in(request: Request, response: Response) -> dict[str, str]:
    """Check the password, which is a key; the viewer sends it with each request then."""
    body = await read_body(request, limit=_FORM_BYTES, seconds=sessions_of(request).bounds.viewer_body_s)
    password = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0].strip()
    access: Access = request.app.state.access
    if access.key is not None:
        await caller_of_key(request, password)
    response.headers["Cache-Control"] = "no-store"
    return {"access_token": password, "token_type": "Bearer"}


@monailabel_api.get("/auth/token/valid")
async def token_is_valid() -> dict[str, bool]:
    """Say that the key is valid."""
    return {"valid": True}


@monailabel_api.get("/info/", dependencies=READ)
def info(request: Request, bank: BankPath, banks: BanksDep, caller: CallerDep) -> dict[str, Any]:
    """Describe the bank as models."""
    return monailabel.info(banks.get(bank), [s.work for s in _images(request, caller, bank)])


@monailabel_api.put("/session/")
async def create_session(request: Request, bank: BankPath, caller: CallerDep, engine: WorkDep) -> Any:
    """Take a volume for a session; a viewer sends it again when the session has ended."""
    form = Form(_type(request), await read_upload(request), {"files", "client_id"})
    session = await run_in_threadpool(_open, request, caller, bank, "", form.file("files"))
    return {"session_id": session.token, "expiry": int(sessions_of(request).bounds.viewer_idle_s)}


@monailabel_api.get("/session/{token}")
async def session_info(request: Request, token: str, caller: CallerDep) -> dict[str, Any]:
    """Return a session; an empty object when it has ended, so that the viewer uploads again."""
    try:
        session = sessions_of(request).get(PROTOCOL, token, caller)
    except UnknownSession:
        return {}
    return {"session_id": session.token, "expiry": int(sessions_of(request).remaining(session))}


@monailabel_api.delete("/session/{token}")
async def delete_session(request: Request, token: str, caller: CallerDep) -> dict[str, Any]:
    """End a session."""
    sessions = sessions_of(request)
    sessions.close(sessions.get(PROTOCOL, token, caller))
    return {}


@monailabel_api.put("/datastore/")
async def add_image(
    request: Request, bank: BankPath, caller: CallerDep, engine: WorkDep, image: ImageQuery
) -> dict[str, str]:
    """Take a volume under the viewer's name for it."""
    name = read_name(image, "the image id")
    form = Form(_type(request), await read_upload(request), {"file", "params"})
    await run_in_threadpool(_open, request, caller, bank, name, form.file("file"))
    return {"image": name}


@monailabel_api.get("/datastore/", dependencies=READ)
async def datastore(request: Request, bank: BankPath, caller: CallerDep) -> dict[str, Any]:
    """List the volumes of this key in memory."""
    images: list[Image] = [s.work for s in _images(request, caller, bank)]
    objects: dict[str, Any] = {
        image.name: {"image": {}, "labels": {"final": {}} if image.saved else {}} for image in images
    }
    return {"objects": objects, "total": len(images), "completed": sum(i.saved for i in images)}


@monailabel_api.get("/datastore/image", dependencies=READ)
async def download_image(request: Request, bank: BankPath, caller: CallerDep, image: ImageQuery) -> Response:
    """Return a volume as it was sent."""
    found: Image = _image(request, caller, bank, image).work
    return Response(found.sent, media_type="application/octet-stream")


@monailabel_api.put("/datastore/label", dependencies=[Depends(require_curator)])
async def save_label(
    request: Request,
    bank: BankPath,
    caller: CallerDep,
    engine: WorkDep,
    change: ChangeDep,
    image: ImageQuery,
    tag: Annotated[str, Query(max_length=64)] = "",
) -> dict[str, Any]:
    """Store slices of a label volume as templates of the bank; the image's id is their patient."""
    form = Form(_type(request), await read_upload(request), {"label", "params"})
    session = _image(request, caller, bank, image)
    banks = callers_banks(engine, caller)

    def read() -> TemplateRequest:
        found: Image = session.work
        classes = banks.get(bank).classes
        names = saved_labels.label_values(_params(form).get("label_info"), classes)
        ids = saved_labels.class_ids(names, classes)
        label = isolated.read_volume([form.file("label")], _bounds(request))
        labels = saved_labels.labels_on_grid(label, found.grid)
        return TemplateRequest(bank, saved_labels.template_items(found.stack, labels, names, ids, found.name))

    wanted = await run_in_threadpool(read)
    limits_of(request).take(caller, len(wanted.items))
    writing = change("template.add", bank=bank, images=len(wanted.items))
    async with contextmanager_in_threadpool(writing) as more:
        templates = await unless_gone(request, engine.encode(wanted, banks))
        infos = await run_in_threadpool(banks.add, bank, templates)  # once begun, it is done
        more["templates"] = [one.id for one in infos if one.created]
    session.work.saved = True
    return {"image": image, "label": image, "templates": [one.id for one in infos]}


@monailabel_api.post("/infer/{model}")
async def infer(
    request: Request,
    bank: BankPath,
    model: Annotated[str, Path(max_length=80)],
    caller: CallerDep,
    engine: WorkDep,
    image: ImageQuery = "",
    session_id: Annotated[str, Query(max_length=128)] = "",
    output: Annotated[str, Query(max_length=16)] = "all",
) -> Response:
    """Segment a volume, or a slice of it, and answer a label volume on its grid."""
    suffix = monailabel.suffix_of(model, bank)
    form = Form(_type(request), await read_upload(request), {"params", "file", "label"})
    params = _params(form)
    if "label" in form.fields:
        raise InvalidRequest("Scribbles by a label volume are not read. Place points, or a box.")
    extension = params.get("result_extension", ".nrrd")
    if extension not in _FORMATS:
        raise InvalidRequest(f"result_extension must be one of {', '.join(_FORMATS)}.")
    session = await _session(request, caller, bank, image, session_id, form)
    found: Image = session.work
    async with session.lock:
        work = _segment(request, engine, caller, bank, suffix, found, params)
        labels, classes = await unless_gone(request, work)
        sessions_of(request).hold(session, found.nbytes)
    kind, ending = _FORMATS[extension]
    grid = labels.swapaxes(0, 2)
    data = await run_in_threadpool(write_labels, found.grid, grid, classes, engine.info.model[:16], kind)
    if output == "image":
        return Response(data, media_type="application/octet-stream")
    names = monailabel.present(labels, classes)
    about = json.dumps({"label_names": names, "model": model})
    body, media = monailabel.multipart(about, f"labels{ending}", data)
    return Response(body, media_type=media)


@monailabel_api.post("/activelearning/{strategy}")
async def next_sample(
    request: Request, bank: BankPath, strategy: str, caller: CallerDep, engine: WorkDep
) -> dict[str, Any]:
    """Return the uploaded volume without saved labels that would add most to the bank."""
    if strategy != monailabel.STRATEGY:
        raise InvalidRequest(f"There is no strategy {strategy[:40]!r}; there is {monailabel.STRATEGY!r}.")
    candidates = [s.work for s in _images(request, caller, bank) if not s.work.saved]
    if not candidates:
        return {}
    best = await unless_gone(request, _rank(request, engine, caller, bank, candidates))
    return {"id": best.name, "name": f"{best.name}.nii.gz"}


async def _segment(
    request: Request,
    engine: Engine,
    caller: Caller,
    bank_name: str,
    suffix: str,
    image: Image,
    params: dict[str, Any],
) -> tuple[Any, dict[int, str]]:
    """Return labels uint8 (K, J, I) and the names of their values."""
    bank = await run_in_threadpool(callers_banks(engine, caller).get, bank_name)
    painter = painter_of(request, engine, caller, bank_name, image.name or None)
    if not suffix:
        target = image.target(bank, None, through=True)
        axis = image.stack.axis
        places = [(axis, i) for i in range(image.stack.shape[axis])]
        await painter.label(target, [place for place in places if place not in target.labels])
        return np.stack([target.labels[place] for place in places], axis), bank.classes
    class_id = monailabel.class_of(params, bank)
    target = image.target(bank, class_id, through=suffix == "-volume")
    for step in monailabel.drawings(params, image.stack):
        target.add(step)
    seconds = engine.settings.limits.request_timeout_s
    mask, complete = await painter.paint(target, seconds)
    if not complete:
        raise DeadlineExceeded(
            f"The volume took longer than {seconds:g} s. Draw a smaller box, or ask for fewer slices.",
            retry_after=5.0,
        )
    # Drawn on one class, a viewer expects one label: 1.
    return mask.astype(np.uint8), {1: bank.classes[class_id]}


async def _rank(request: Request, engine: Engine, caller: Caller, bank: str, images: list[Image]) -> Image:
    items, groups = [], []
    for image in images:
        axis = image.stack.axis
        for place in sorted({int(look * image.stack.shape[axis]) for look in _LOOKS}):
            pixels = image.stack.image(axis, place)
            items.append(DescribeItem(scoped_id(caller.name, image_digest(pixels)), pixels))
            groups.append(image.name)
    limits_of(request).take(caller, len(items))
    features = await engine.describe(items, caller.name)
    for feature in features:
        if isinstance(feature, VessaError):
            raise feature
    state = await run_in_threadpool(callers_banks(engine, caller).get, bank)
    usable = [t.whole.feature for t in state.templates if t.model == engine.info.model]
    covered = np.stack(usable) if usable else None
    rank = partial(suggest, np.stack(features), 1, covered=covered, groups=groups)
    (best,) = await run_in_threadpool(rank)
    return next(image for image in images if image.name == best.group)


def _open(request: Request, caller: Caller, bank: str, name: str, data: bytes) -> ViewerSession:
    """Read a volume into a session; it replaces the one of the same name, or the key's longest unused."""
    kind = kind_of(data[:HEAD])
    if kind == "NRRD":
        raise InvalidRequest("NRRD is not read. Set the extension's file type to .nii.gz.")
    volume = isolated.read_volume([data], _bounds(request))
    stack = Stack.of_volume(volume)
    image = Image(name, data if name else b"", without_voxels(volume, stack.pixels), stack)
    sessions = sessions_of(request)
    mine = sorted(sessions.of(PROTOCOL, caller, bank), key=lambda s: s.used)
    for session in mine:
        if name and session.work is not None and session.work.name == name:
            sessions.close(session)
            mine.remove(session)
            break
    if len(mine) >= sessions.bounds.viewer_key_sessions:
        sessions.close(mine[0])
    session = sessions.open(PROTOCOL, caller, bank)
    try:
        sessions.hold(session, image.nbytes)
    except VessaError:
        sessions.close(session)
        raise
    session.work, session.group = image, name
    return session


async def _session(
    request: Request, caller: Caller, bank: str, image: str, token: str, form: Form
) -> ViewerSession:
    """Return the session of a request: by its token, the image's id, or of the file that came with it."""
    if token:
        return sessions_of(request).get(PROTOCOL, token, caller)
    if "file" in form.fields:
        return await run_in_threadpool(_open, request, caller, bank, "", form.file("file"))
    return _image(request, caller, bank, image)


def _images(request: Request, caller: Caller, bank: str) -> list[ViewerSession]:
    """Return the sessions of named volumes."""
    sessions = sessions_of(request).of(PROTOCOL, caller, bank)
    return [session for session in sessions if session.work is not None and session.work.name]


def _image(request: Request, caller: Caller, bank: str, name: str) -> ViewerSession:
    for session in _images(request, caller, bank):
        if session.work.name == name.strip():
            return sessions_of(request).get(PROTOCOL, session.token, caller)
    raise UnknownImage(f"There is no volume {name[:80]!r} in memory. Upload it again.")


def _bounds(request: Request) -> Bounds:
    settings = service_of(request).settings
    limits, jobs = settings.limits, settings.jobs
    return Bounds(sessions_of(request).bounds.viewer_voxels, limits.max_pixels, jobs.max_job_slices)


def _type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _params(form: Form) -> dict[str, Any]:
    params = form.json("params")
    if params is not None and not isinstance(params, dict):
        raise InvalidRequest("params must be a JSON object.")
    return params or {}
