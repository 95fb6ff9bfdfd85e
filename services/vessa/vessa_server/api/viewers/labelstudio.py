"""Label Studio's ML backend protocol: pre-annotation, smart tools, and saved annotations as templates.

The address of the backend in Label Studio is `/labelstudio/BANK`, with basic authentication: any user name,
and a key as the password. Images are fetched from the one Label Studio that the settings name.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from numpy.typing import NDArray

from vessa.errors import Forbidden, InvalidRequest
from vessa_server.api.authentication import require_password
from vessa_server.api.dependencies import (
    BankPath,
    callers_banks,
    change_of,
    limits_of,
    read_body,
    unless_gone,
)
from vessa_server.api.viewers.access import admitting
from vessa_server.auth.keys import Caller, Role
from vessa_server.serialization.image_files import decode_image
from vessa_server.serialization.multipart import read_json
from vessa_server.serialization.request_parser import TemplateRequest
from vessa_server.serving.engine import Engine
from vessa_server.types import SegmentResult, TemplateItem
from vessa_server.viewers import labelstudio
from vessa_server.viewers.drawing import raise_errors
from vessa_server.viewers.labelstudio import LabelConfig
from vessa_server.viewers.remote_images import fetch

labelstudio_api = APIRouter(prefix="/labelstudio/{bank}", dependencies=[Depends(require_password)])
PasswordDep = Annotated[Caller, Depends(require_password)]


WorkDep = Annotated[Engine, Depends(admitting(require_password), scope="function")]


@labelstudio_api.get("/")
@labelstudio_api.get("/health")
async def health() -> dict[str, str]:
    """Say that the backend answers."""
    return {"status": "UP", "model_class": "VESSA"}


@labelstudio_api.post("/setup")
async def setup(request: Request, bank: BankPath, caller: PasswordDep, engine: WorkDep) -> dict[str, str]:
    """Check that the project's labels fit the bank; return the model's version."""
    given = await _body(request, engine)
    state = await run_in_threadpool(callers_banks(engine, caller).get, bank)
    labelstudio.common_classes(labelstudio.read_config(given.get("schema")), state.classes)
    return {"model_version": _version(engine, state.version)}


@labelstudio_api.post("/predict")
async def predict(request: Request, bank: BankPath, caller: PasswordDep, engine: WorkDep) -> dict[str, Any]:
    """Return brush masks of tasks: of all classes, or of the one that the smart tools of a task prompt."""
    given = await _body(request, engine)
    config = labelstudio.read_config(given.get("label_config"))
    tasks = _tasks(given, engine)
    params = given.get("params")
    context = params.get("context") if isinstance(params, dict) else None
    limits_of(request).take(caller, len(tasks))
    results = []
    for task in tasks:  # one after another: decoded images of many tasks would fill the memory
        work = _predict(engine, caller, bank, config, task, context)
        results.append(await unless_gone(request, work))
    return {"results": results, "model_version": results[0]["model_version"]}


@labelstudio_api.post("/webhook", status_code=201)
async def webhook(
    request: Request, response: Response, bank: BankPath, caller: PasswordDep, engine: WorkDep
) -> dict[str, Any]:
    """Store a saved annotation as a template of the bank; other events are acknowledged."""
    event = await _body(request, engine)
    if not labelstudio.is_saved(event):
        return {"templates": []}
    if caller.role < Role.curate:
        raise Forbidden(f"Key {caller.name!r} may not change banks. Give the backend a key of role curate.")
    task, project, annotation = (_object_of(event, name) for name in ("task", "project", "annotation"))
    config = labelstudio.read_config(project.get("label_config"))
    image = await _image(engine, config, task)
    banks = callers_banks(engine, caller)

    def read() -> tuple[TemplateRequest, int]:
        classes = banks.get(bank).classes
        most = engine.settings.limits.max_pixels
        size = image.shape[0], image.shape[1]
        mask, named, others = labelstudio.drawn_mask(annotation.get("result"), size, classes, most)
        if not named:
            raise InvalidRequest("The annotation has no brush region, so that it gives no template.")
        return TemplateRequest(bank, [TemplateItem(image, mask, named, _group(task))]), others

    wanted, others = await run_in_threadpool(read)
    limits_of(request).take(caller, 1)
    change = await change_of(request, caller)
    async with contextmanager_in_threadpool(change("template.add", bank=bank, images=1)) as more:
        templates = await unless_gone(request, engine.encode(wanted, banks))
        infos = await run_in_threadpool(banks.add, bank, templates)  # once begun, it is done
        more["templates"] = [info.id for info in infos if info.created]
    return {"templates": [info.id for info in infos], "regions_left_out": others}


async def _predict(
    engine: Engine, caller: Caller, bank: str, config: LabelConfig, task: Mapping[str, Any], context: Any
) -> dict[str, Any]:
    image = await _image(engine, config, task)
    reader = engine.reader.for_caller(callers_banks(engine, caller))

    def read() -> Any:
        names = labelstudio.common_classes(config, reader.banks.get(bank).classes)
        drawn: Mapping[str, Any] = {}
        if context:
            names, drawn = labelstudio.smart_prompts(context, (image.shape[0], image.shape[1]), names)
        return reader.segment_image(image, bank, names, _group(task), drawn, {})

    wanted = await run_in_threadpool(read)
    (answer,) = raise_errors(await engine.annotate(wanted, caller.name))
    return await run_in_threadpool(_result, engine, config, wanted.classes, answer)


def _result(
    engine: Engine, config: LabelConfig, classes: Mapping[int, str], answer: SegmentResult
) -> dict[str, Any]:
    scores = [answer.scores[name] for name in classes.values() if name in answer.scores]
    return {
        "result": labelstudio.regions(config, answer.labels, classes, answer.scores),
        "score": round(float(np.mean(scores)), 4) if scores else 0.0,
        "model_version": _version(engine, answer.bank_version),
    }


async def _image(engine: Engine, config: LabelConfig, task: Mapping[str, Any]) -> NDArray[np.uint8]:
    data = task.get("data")
    address = data.get(config.key) if isinstance(data, dict) else None
    if not isinstance(address, str):
        raise InvalidRequest(f"The task's data has no image {config.key[:80]!r}.")
    limits = engine.settings.limits
    content = await fetch(address, engine.settings.viewers, limits.max_body_bytes)
    return await run_in_threadpool(decode_image, content, limits.max_pixels)


def _object_of(event: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = event.get(name)
    if not isinstance(part, dict):
        raise InvalidRequest(f"The event needs the object {name}.")
    return part


async def _body(request: Request, engine: Engine) -> dict[str, Any]:
    limits = engine.settings.limits
    body = await read_body(request, limit=limits.max_body_bytes, seconds=limits.body_timeout_s)
    value = await run_in_threadpool(read_json, body.decode("utf-8", "replace"), "the request")
    if not isinstance(value, dict):
        raise InvalidRequest("The request must be a JSON object.")
    return value


def _tasks(given: Mapping[str, Any], engine: Engine) -> list[dict[str, Any]]:
    tasks, most = given.get("tasks"), engine.settings.limits.max_items
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise InvalidRequest("The request needs a list of tasks.")
    if len(tasks) > most:
        raise InvalidRequest(f"A request holds at most {most} tasks, got {len(tasks)}. Lower the batch size.")
    return tasks


def _group(task: Mapping[str, Any]) -> str:
    """Return the patient of a task: a task's own template is never used for it."""
    return f"labelstudio-task-{str(task.get('id', ''))[:40]}"


def _version(engine: Engine, bank_version: int) -> str:
    return f"vessa-{engine.info.model[:12]}-{bank_version}"
