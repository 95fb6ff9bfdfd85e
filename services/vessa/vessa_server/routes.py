"""The paper's path: templates into banks, images into masks.

Each route reads a body within its bounds, hands it on, and answers in the form that was asked for.
"""

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool

from vessa.errors import InvalidRequest, VessaError
from vessa.schemas import AdaptationInfo, BankInfo, SegmentAnswer, TemplateInfo, TemplateInfos
from vessa.tracing import span
from vessa_server.api.authentication import CallerDep, require_curator, require_key
from vessa_server.receiving import (
    FORM,
    BankPath,
    BankQuery,
    BanksDep,
    ChangeDep,
    LoadedDep,
    limits_of,
    media_type,
    read_body,
    service_of,
    unless_gone,
)
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.wire.answers import (
    DICOM,
    JSON,
    PNG,
    SAFETENSORS,
    choose_type,
    dicom_answer,
    json_answer,
    kept_tensor_answer,
    overlay_answer,
    tensor_answer,
)
from vessa_server.wire.docs import SEGMENT_BODY, TEMPLATE_BODY, answering
from vessa_server.wire.images import label_png, overlay_png
from vessa_server.wire.reading import DEFAULT_BANK

api = APIRouter(dependencies=[Depends(require_key)])
ANNOTATION_ID = "X-Annotation-Id"
CURATE = [Depends(require_curator)]


@api.get("/banks")
def list_banks(banks: BanksDep) -> list[BankInfo]:
    """The template banks of this key, and the shared ones."""
    return banks.list()


@api.get("/banks/{bank}")
def bank_info(bank: BankPath, banks: BanksDep) -> BankInfo:
    """One template bank."""
    return banks.get(bank).info()


@api.delete("/banks/{bank}", status_code=204, dependencies=CURATE)
def delete_bank(bank: BankPath, banks: BanksDep, change: ChangeDep) -> None:
    """Delete a bank with all its templates."""
    with change("bank.delete", bank=bank):
        banks.delete(bank)


@api.put("/banks/{bank}/share", dependencies=CURATE)
def share_bank(bank: BankPath, banks: BanksDep, change: ChangeDep) -> BankInfo:
    """Let all keys segment by the bank, and curators change its templates."""
    with change("bank.share", bank=bank):
        return banks.share(bank, True)


@api.delete("/banks/{bank}/share", dependencies=CURATE)
def unshare_bank(bank: BankPath, banks: BanksDep, change: ChangeDep) -> BankInfo:
    """Keep the bank to its owner again."""
    with change("bank.unshare", bank=bank):
        return banks.share(bank, False)


@api.post("/banks/{bank}/adapt", status_code=202, dependencies=CURATE)
def adapt_bank(
    bank: BankPath,
    loaded: LoadedDep,
    banks: BanksDep,
    change: ChangeDep,
    seconds: Annotated[float, Query(gt=0, description="longest time to learn, s")] = 120.0,
) -> AdaptationInfo:
    """Let the mask decoder learn from the bank's templates, in the background; GET tells how it goes.

    Each template is predicted from others. What does not help with held-out templates is dropped. While it
    runs it shares the device with requests. A bank has one adaptation; a new one that helps replaces it.
    """
    longest = loaded.settings.adapt_s
    if seconds > longest:
        raise InvalidRequest(f"seconds is at most {longest:g} here, got {seconds:g}")
    with change("bank.adapt", bank=bank, seconds=seconds):
        banks.get(bank)
        return loaded.device.adapt(bank, seconds)


@api.get("/banks/{bank}/adapt")
def adaptation_info(bank: BankPath, loaded: LoadedDep, banks: BanksDep) -> AdaptationInfo:
    """How the bank's adaptation goes, or went."""
    banks.get(bank)
    return loaded.device.adaptation(bank)


@api.delete("/banks/{bank}/adapt", status_code=204, dependencies=CURATE)
def forget_adaptation(bank: BankPath, loaded: LoadedDep, banks: BanksDep, change: ChangeDep) -> None:
    """Serve the bank by the common weights again."""
    with change("bank.adapt.forget", bank=bank):
        banks.get(bank)
        loaded.device.forget_adaptation(bank)


@api.get("/templates")
def list_templates(banks: BanksDep, bank: BankQuery = DEFAULT_BANK) -> list[TemplateInfo]:
    """The templates of a bank."""
    return [template.info(bank) for template in banks.get(bank).templates]


@api.get("/templates/{identity}")
def template_info(identity: str, banks: BanksDep, bank: BankQuery = DEFAULT_BANK) -> TemplateInfo:
    """One template."""
    return banks.get(bank).template(identity).info(bank)


@api.get("/templates/{identity}/overlay.png", response_class=Response, responses=answering(PNG))
def template_overlay(identity: str, banks: BanksDep, bank: BankQuery = DEFAULT_BANK) -> Response:
    """A template for the eye: its image with tinted classes, contours and a legend."""
    template = banks.get(bank).template(identity)
    return Response(overlay_png(template.image, template.mask, template.classes), media_type=PNG)


@api.delete("/templates/{identity}", status_code=204, dependencies=CURATE)
def delete_template(
    identity: str, banks: BanksDep, change: ChangeDep, bank: BankQuery = DEFAULT_BANK
) -> None:
    """Remove one template from a bank."""
    with change("template.remove", bank=bank, template=identity):
        banks.remove(bank, identity)


@api.post("/templates", status_code=201, openapi_extra=TEMPLATE_BODY, dependencies=CURATE)
async def add_templates(
    request: Request, caller: CallerDep, change: ChangeDep
) -> TemplateInfo | TemplateInfos:
    """Add annotated images to a template bank.

    A form adds one and answers its description. A safetensors body adds many, all or none (images uint8 (B,
    H, W) or (B, H, W, 3), masks uint8 (B, H, W); metadata bank, classes, groups) and answers {"templates":
    [...]}. What is there already is left as it is, so sending something twice does no harm.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as loaded:
        kind = media_type(request)
        body = await read_body(request, loaded.settings)
        if kind == FORM:
            header = request.headers["content-type"]
            wanted = await run_in_threadpool(loaded.reader.template_form, header, body)
        else:
            wanted = await run_in_threadpool(loaded.reader.template_tensors, body)
        limits.take(caller, len(wanted.items))
        banks = CallersBanks(loaded.banks, caller)
        writing = change("template.add", bank=wanted.bank, images=len(wanted.items))
        async with contextmanager_in_threadpool(writing) as more:
            templates = await unless_gone(request, loaded.encode(wanted, banks))
            infos = await run_in_threadpool(banks.add, wanted.bank, templates)  # once begun, it is done
            more["templates"] = [info.id for info in infos if info.created]
        return infos[0] if kind == FORM else TemplateInfos(templates=infos)


@api.post(
    "/segment",
    openapi_extra=SEGMENT_BODY,
    response_class=Response,
    responses=answering(JSON, PNG, SAFETENSORS, DICOM, model=SegmentAnswer),
)
async def segment(
    request: Request,
    caller: CallerDep,
    overlay: Annotated[bool, Query(description="with Accept: image/png, an RGB overlay for the eye")] = False,
) -> Response:
    """Segment images with the templates of a bank.

    A form segments one image and answers by Accept: application/json (default; COCO compressed RLE and
    scores), image/png (8-bit gray label map of class ids, or an overlay), application/vnd.safetensors or, for
    a DICOM image, application/dicom (DICOM SEG). Volumes are jobs: POST /jobs.
    A safetensors body segments many: images uint8 (B, H, W) or (B, H, W, 3), or metadata image_ids for
    images the service still holds; prompts boxes (B, K, 4), points (B, K, P, 2) with point_labels (B, K, P),
    mask_logits (B, K, h, w) with mask_present (B, K); metadata bank, classes, groups, probabilities,
    template_choice, seed. Its answer holds labels and confidence uint8 (B, H, W), on request probabilities
    float16 (B, K + 1, H, W), and in its metadata the status of each item: one that failed does not harm the
    others. GET /annotations/{id} tells what made an answer, by its annotation_id (header X-Annotation-Id).
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as loaded:
        reader = replace(loaded.reader, banks=CallersBanks(loaded.banks, caller))
        kind = media_type(request)
        offered = [JSON, PNG, SAFETENSORS, DICOM] if kind == FORM else [SAFETENSORS]
        answer_type = choose_type(request.headers.get("accept"), offered)
        body = await read_body(request, loaded.settings)
        if kind == FORM:
            header = request.headers["content-type"]
            wanted = await run_in_threadpool(reader.segment_form, header, body)
        else:
            wanted = await run_in_threadpool(reader.segment_tensors, body)
        limits.take(caller, len(wanted.items))
        with span("device", images=len(wanted.items)):
            results = await unless_gone(request, loaded.segment(wanted, caller.name))
        for failed in (r for r in results if isinstance(r, VessaError)):
            loaded.metrics.errors.labels(failed.code).inc()

        def answer() -> Response:
            answers = loaded.annotations.answer(wanted, results, caller)
            if answer_type == SAFETENSORS:
                model, version = loaded.about.model, loaded.labels_version
                return Response(tensor_answer(wanted, answers, model, version), media_type=SAFETENSORS)
            if isinstance(one := answers[0], VessaError):
                raise one
            if answer_type == DICOM:
                content = dicom_answer(one, request.headers["content-type"], body, loaded.settings.max_pixels)
            elif answer_type == JSON:
                content = json_answer(one)
            else:
                content = overlay_answer(wanted, one) if overlay else label_png(one.labels)
            return Response(content, media_type=answer_type, headers={ANNOTATION_ID: one.id})

        return await run_in_threadpool(answer)


@api.get(
    "/annotations/{identity}",
    response_class=Response,
    responses=answering(JSON, PNG, SAFETENSORS, model=SegmentAnswer),
)
def annotation(identity: str, request: Request, loaded: LoadedDep, caller: CallerDep) -> Response:
    """What POST /segment answered under this annotation_id, with what made it, while it is kept.

    By Accept: application/json (default; COCO compressed RLE), image/png (8-bit gray label map) or
    application/vnd.safetensors (labels uint8 (1, H, W), metadata provenance). Only the keys that were
    answered see it, and admins; 404 unknown_annotation once it is gone.
    """
    answer_type = choose_type(request.headers.get("accept"), [JSON, PNG, SAFETENSORS])
    found = loaded.annotations.get(identity, caller)
    if answer_type == SAFETENSORS:
        body = kept_tensor_answer(found)
    else:
        body = json_answer(found) if answer_type == JSON else label_png(found.labels)
    return Response(body, media_type=answer_type, headers={ANNOTATION_ID: found.id})
