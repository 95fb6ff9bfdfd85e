"""The routes: read a body within its bounds, hand it on, answer in the form that was asked for."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from vessa.errors import InvalidRequest, MalformedBody, TooLarge, UnsupportedMedia, VessaError
from vessa.schemas import AdaptationInfo, BankInfo, ServiceInfo, TemplateInfo
from vessa_server import __version__
from vessa_server.security import require_key
from vessa_server.service import Loaded, Service
from vessa_server.settings import Settings
from vessa_server.telemetry import METRICS_TYPE
from vessa_server.wire.answers import (
    JSON,
    PNG,
    SAFETENSORS,
    choose_type,
    json_answer,
    png_answer,
    tensor_answer,
)
from vessa_server.wire.docs import SEGMENT_BODY, TEMPLATE_BODY, docs_page
from vessa_server.wire.images import overlay_png
from vessa_server.wire.reading import DEFAULT_BANK

FORM = "multipart/form-data"

probes = APIRouter()  # the only routes without a key
api = APIRouter(dependencies=[Depends(require_key)])

_T = TypeVar("_T")


def service_of(request: Request) -> Service:
    """Return the service of this app."""
    service: Service = request.app.state.service
    return service


def loaded_of(request: Request) -> Loaded:
    """Return the loaded parts; NotReady until there are."""
    return service_of(request).loaded()


LoadedDep = Annotated[Loaded, Depends(loaded_of)]
BankQuery = Annotated[str, Query(description="template bank", max_length=64)]


@probes.get("/livez")
async def livez() -> dict[str, str]:
    """Answer as long as the process runs; it needs no key."""
    return {"status": "ok"}


@probes.get("/readyz")
async def readyz(request: Request) -> dict[str, str]:
    """Answer 200 when weights are loaded and the device thread lives, else 503; it needs no key."""
    service_of(request).check_ready()
    return {"status": "ready"}


@api.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(service_of(request).metrics.expose(), headers={"content-type": METRICS_TYPE})


@api.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Return this list of routes as a page."""
    return Response(docs_page(request.app.openapi()), media_type="text/html")


@api.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> dict[str, Any]:
    """Return the OpenAPI description."""
    description: dict[str, Any] = request.app.openapi()
    return description


@api.get("/info")
def info(loaded: LoadedDep) -> ServiceInfo:
    """What runs here: version, weights, device, limits, banks, and the annotator's parts in use."""
    annotator = loaded.annotator
    stage1 = annotator.model.provenance.get("data")
    return ServiceInfo(
        version=__version__,
        preset=annotator.preset,
        model=annotator.model_digest,
        device=annotator.device,
        limits=loaded.settings.limits(),
        banks=loaded.banks.list(),
        labels_version=loaded.labels_version,
        parts=loaded.parts,
        trained_on=None if stage1 is None else [entry["name"] for entry in stage1],
    )


@api.get("/banks")
def banks(loaded: LoadedDep) -> list[BankInfo]:
    """All template banks."""
    return loaded.banks.list()


@api.get("/banks/{bank}")
def bank_info(bank: str, loaded: LoadedDep) -> BankInfo:
    """One template bank."""
    return loaded.banks.get(bank).info()


@api.delete("/banks/{bank}", status_code=204)
def delete_bank(bank: str, loaded: LoadedDep) -> None:
    """Delete a bank with all its templates."""
    loaded.banks.delete(bank)


@api.post("/banks/{bank}/adapt", status_code=202)
def adapt_bank(
    bank: str,
    loaded: LoadedDep,
    seconds: Annotated[float, Query(gt=0, description="longest time to learn, s")] = 120.0,
) -> AdaptationInfo:
    """Let the mask decoder learn from the bank's templates, in the background; GET tells how it goes.

    Each template is predicted from others. What does not help with held-out templates is dropped. While it
    runs it shares the device with requests. A bank has one adaptation; a new one that helps replaces it.
    """
    longest = loaded.settings.adapt_s
    if seconds > longest:
        raise InvalidRequest(f"seconds is at most {longest:g} here, got {seconds:g}")
    return loaded.adapting.start(bank, seconds)


@api.get("/banks/{bank}/adapt")
def adaptation_info(bank: str, loaded: LoadedDep) -> AdaptationInfo:
    """How the bank's adaptation goes, or went."""
    return loaded.adapting.info(bank)


@api.delete("/banks/{bank}/adapt", status_code=204)
def forget_adaptation(bank: str, loaded: LoadedDep) -> None:
    """Serve the bank by the common weights again."""
    loaded.adapting.forget(bank)


@api.get("/templates")
def templates(loaded: LoadedDep, bank: BankQuery = DEFAULT_BANK) -> list[TemplateInfo]:
    """The templates of a bank."""
    return [template.info(bank) for template in loaded.banks.get(bank).templates]


@api.get("/templates/{identity}")
def template_info(identity: str, loaded: LoadedDep, bank: BankQuery = DEFAULT_BANK) -> TemplateInfo:
    """One template."""
    return loaded.banks.get(bank).template(identity).info(bank)


@api.get("/templates/{identity}/overlay.png")
def template_overlay(identity: str, loaded: LoadedDep, bank: BankQuery = DEFAULT_BANK) -> Response:
    """A template for the eye: its image with tinted classes, contours and a legend."""
    template = loaded.banks.get(bank).template(identity)
    return Response(overlay_png(template.image, template.mask, template.classes), media_type=PNG)


@api.delete("/templates/{identity}", status_code=204)
def delete_template(identity: str, loaded: LoadedDep, bank: BankQuery = DEFAULT_BANK) -> None:
    """Remove one template from a bank."""
    loaded.banks.remove(bank, identity)


@api.post("/templates", status_code=201, openapi_extra=TEMPLATE_BODY)
async def add_templates(request: Request) -> Any:
    """Add annotated images to a template bank.

    A form adds one and answers its description. A safetensors body adds many, all or none (images uint8 (B,
    H, W) or (B, H, W, 3), masks uint8 (B, H, W); metadata bank, classes, groups) and answers {"templates":
    [...]}. What is there already is left as it is, so sending something twice does no harm.
    """
    with service_of(request).permit() as loaded:
        kind = media_type(request)
        body = await read_body(request, loaded.settings)
        if kind == FORM:
            header = request.headers["content-type"]
            wanted = await run_in_threadpool(loaded.reader.template_form, header, body)
        else:
            wanted = await run_in_threadpool(loaded.reader.template_tensors, body)
        infos = await unless_gone(request, loaded.seed(wanted))
        return infos[0] if kind == FORM else {"templates": infos}


@api.post("/segment", openapi_extra=SEGMENT_BODY)
async def segment(
    request: Request,
    overlay: Annotated[bool, Query(description="with Accept: image/png, an RGB overlay for the eye")] = False,
) -> Response:
    """Segment images with the templates of a bank.

    A form segments one image and answers by Accept: application/json (default; COCO compressed RLE and
    scores), image/png (8-bit gray label map of class ids, or an overlay) or application/vnd.safetensors.
    A safetensors body segments many: images uint8 (B, H, W) or (B, H, W, 3), or metadata image_ids for
    images the service still holds; prompts boxes (B, K, 4), points (B, K, P, 2) with point_labels (B, K, P),
    mask_logits (B, K, h, w) with mask_present (B, K); metadata bank, classes, groups, probabilities,
    template_choice, seed. Its answer holds labels and confidence uint8 (B, H, W), on request probabilities
    float16 (B, K + 1, H, W), and in its metadata the status of each item: one that failed does not harm the
    others.
    """
    with service_of(request).permit() as loaded:
        kind = media_type(request)
        offered = [JSON, PNG, SAFETENSORS] if kind == FORM else [SAFETENSORS]
        answer_type = choose_type(request.headers.get("accept"), offered)
        body = await read_body(request, loaded.settings)
        if kind == FORM:
            header = request.headers["content-type"]
            wanted = await run_in_threadpool(loaded.reader.segment_form, header, body)
        else:
            wanted = await run_in_threadpool(loaded.reader.segment_tensors, body)
        results = await unless_gone(request, loaded.segment(wanted))
        model = loaded.annotator.model_digest
        if answer_type == SAFETENSORS:
            version = loaded.labels_version
            answer = await run_in_threadpool(tensor_answer, wanted, results, model, version)
        elif isinstance(results[0], VessaError):
            raise results[0]
        elif answer_type == PNG:
            answer = await run_in_threadpool(png_answer, wanted, results[0], overlay=overlay)
        else:
            answer = await run_in_threadpool(json_answer, wanted, results[0], model)
        return Response(answer, media_type=answer_type)


def media_type(request: Request) -> str:
    """Return the body's type: a form or safetensors; UnsupportedMedia for another."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in {FORM, SAFETENSORS}:
        raise UnsupportedMedia(
            f"the body must be {FORM} or {SAFETENSORS}, got {kind[:80] or 'no Content-Type'}"
        )
    return kind


async def read_body(request: Request, settings: Settings) -> bytes:
    """Return the body; TooLarge once it is over the limit, MalformedBody when it is too slow.

    The announced length is checked first, and what really arrives is counted, for a chunked body announces
    nothing.
    """
    limit = settings.max_body_bytes
    too_large = TooLarge(
        f"the body has more than {limit} bytes, the limit; send fewer or smaller images at once"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_large
                body += chunk
    except TimeoutError:
        raise MalformedBody(
            f"the body did not arrive within {settings.body_timeout_s:g} s; {len(body)} bytes came"
        ) from None
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the work's result; drop the work and raise ClientDisconnect as soon as the caller has left."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
