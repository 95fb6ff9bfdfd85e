"""Routes of template banks: banks, their templates and their own weights."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool

from vessa.errors import InvalidRequest, UnsupportedMedia
from vessa.schemas import AdaptationInfo, BankInfo, TemplateInfo, TemplateInfos
from vessa_server.api.authentication import CallerDep, require_curator, require_key
from vessa_server.api.dependencies import (
    FORM,
    READ,
    BankPath,
    BankQuery,
    BanksDep,
    ChangeDep,
    EngineDep,
    callers_banks,
    limits_of,
    media_type,
    read_body,
    service_of,
    unless_gone,
)
from vessa_server.api.openapi import ADAPTATION_BODY, TEMPLATE_BODY, answering
from vessa_server.serialization.adaptation_request import read_squares
from vessa_server.serialization.overlays import overlay_png
from vessa_server.serialization.request_parser import DEFAULT_BANK
from vessa_server.serialization.responses import PNG, SAFETENSORS, notes_header

banks_api = APIRouter(dependencies=[Depends(require_key)])
CURATE = [Depends(require_curator)]


@banks_api.get("/banks", dependencies=READ)
def list_banks(banks: BanksDep) -> list[BankInfo]:
    """List the template banks of this key, and the shared ones."""
    return banks.list()


@banks_api.get("/banks/{bank}", dependencies=READ)
def bank_info(bank: BankPath, banks: BanksDep) -> BankInfo:
    """Describe one template bank."""
    return banks.get(bank).info()


@banks_api.delete("/banks/{bank}", status_code=204, dependencies=CURATE)
def delete_bank(bank: BankPath, banks: BanksDep, change: ChangeDep) -> None:
    """Delete a bank with all its templates."""
    with change("bank.delete", bank=bank):
        banks.delete(bank)


@banks_api.put("/banks/{bank}/share", dependencies=CURATE)
def share_bank(bank: BankPath, banks: BanksDep, change: ChangeDep) -> BankInfo:
    """Let all keys segment by the bank, and curators change its templates."""
    with change("bank.share", bank=bank):
        return banks.share(bank, True)


@banks_api.delete("/banks/{bank}/share", dependencies=CURATE)
def unshare_bank(bank: BankPath, banks: BanksDep, change: ChangeDep) -> BankInfo:
    """Let only the owner use the bank again."""
    with change("bank.unshare", bank=bank):
        return banks.share(bank, False)


@banks_api.post("/banks/{bank}/adapt", status_code=202, openapi_extra=ADAPTATION_BODY, dependencies=CURATE)
async def adapt_bank(
    request: Request,
    bank: BankPath,
    caller: CallerDep,
    change: ChangeDep,
    seconds: Annotated[float, Query(gt=0, description="longest time to learn, s")] = 1200.0,
) -> AdaptationInfo:
    """Adapt the segmenter to the bank's templates and to unlabeled images, in the background.

    A safetensors body holds at most 400 gray squares of 240 px (images uint8 (M, 240, 240)); without a body
    the bank learns from its templates alone. They stay in memory until the end and are never stored. GET
    returns the state. The adaptation is kept only if it improves Dice on held-out templates. While it runs it
    shares the device with requests. A bank has one adaptation; a new one that helps replaces it.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as engine:
        bounds = engine.settings.limits
        if seconds > bounds.adapt_s:
            raise InvalidRequest(f"seconds is at most {bounds.adapt_s:g} (VESSA_ADAPT_S), got {seconds:g}.")
        body = await read_body(request, limit=bounds.max_body_bytes, seconds=bounds.body_timeout_s)
        if body and media_type(request) != SAFETENSORS:
            raise UnsupportedMedia(f"The body of an adaptation must be {SAFETENSORS}, or empty.")
        images = await run_in_threadpool(read_squares, body, bounds.max_body_bytes)
        limits.take(caller, len(images))
        banks = callers_banks(engine, caller)
        writing = change("bank.adapt", bank=bank, seconds=seconds, images=len(images))
        async with contextmanager_in_threadpool(writing):
            await run_in_threadpool(banks.get, bank)
            return await run_in_threadpool(engine.worker.adapt, bank, seconds, images)


@banks_api.get("/banks/{bank}/adapt", dependencies=READ)
def adaptation_info(bank: BankPath, engine: EngineDep, banks: BanksDep) -> AdaptationInfo:
    """Return the state of the bank's adaptation."""
    banks.get(bank)
    return engine.worker.adaptation(bank)


@banks_api.delete("/banks/{bank}/adapt", status_code=204, dependencies=CURATE)
def forget_adaptation(bank: BankPath, engine: EngineDep, banks: BanksDep, change: ChangeDep) -> None:
    """Serve the bank by the common weights again, and cancel a running adaptation."""
    with change("bank.adapt.forget", bank=bank):
        banks.get(bank)
        engine.worker.forget_adaptation(bank)


@banks_api.get("/templates", dependencies=READ)
def list_templates(banks: BanksDep, bank: BankQuery = DEFAULT_BANK) -> list[TemplateInfo]:
    """List the templates of a bank."""
    return [template.info(bank) for template in banks.get(bank).templates]


@banks_api.get("/templates/{identity}", dependencies=READ)
def template_info(identity: str, banks: BanksDep, bank: BankQuery = DEFAULT_BANK) -> TemplateInfo:
    """Describe one template."""
    return banks.get(bank).template(identity).info(bank)


@banks_api.get(
    "/templates/{identity}/overlay.png",
    response_class=Response,
    responses=answering(PNG),
    dependencies=READ,
)
def template_overlay(identity: str, banks: BanksDep, bank: BankQuery = DEFAULT_BANK) -> Response:
    """Draw a template as PNG: its image with tinted classes, contours and a legend."""
    template = banks.get(bank).template(identity)
    return Response(overlay_png(template.image, template.mask, template.classes), media_type=PNG)


@banks_api.delete("/templates/{identity}", status_code=204, dependencies=CURATE)
def delete_template(
    identity: str, banks: BanksDep, change: ChangeDep, bank: BankQuery = DEFAULT_BANK
) -> None:
    """Remove one template from a bank."""
    with change("template.remove", bank=bank, template=identity):
        banks.remove(bank, identity)


@banks_api.post("/templates", status_code=201, openapi_extra=TEMPLATE_BODY, dependencies=CURATE)
async def add_templates(
    request: Request, response: Response, caller: CallerDep, change: ChangeDep
) -> TemplateInfo | TemplateInfos:
    """Add annotated images to a template bank.

    A form adds one and answers its description. A safetensors body adds many, all or none (images uint8 (B,
    H, W) or (B, H, W, 3), masks uint8 (B, H, W); metadata bank, classes, groups) and answers {"templates":
    [...]}. What is there already is left as it is, so sending something twice does no harm. The header
    X-Notes lists as JSON what was repaired in the file of a form.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as engine:
        kind = media_type(request)
        body = await read_body(
            request,
            limit=engine.settings.limits.max_body_bytes,
            seconds=engine.settings.limits.body_timeout_s,
        )
        if kind == FORM:
            header = request.headers["content-type"]
            wanted = await run_in_threadpool(engine.reader.template_form, header, body)
        else:
            wanted = await run_in_threadpool(engine.reader.template_tensors, body)
        limits.take(caller, len(wanted.items))
        banks = callers_banks(engine, caller)
        writing = change("template.add", bank=wanted.bank, images=len(wanted.items))
        async with contextmanager_in_threadpool(writing) as more:
            templates = await unless_gone(request, engine.encode(wanted, banks))
            infos = await run_in_threadpool(banks.add, wanted.bank, templates)  # once begun, it is done
            more["templates"] = [info.id for info in infos if info.created]
        response.headers.update(notes_header(wanted.notes))
        return infos[0] if kind == FORM else TemplateInfos(templates=infos)
