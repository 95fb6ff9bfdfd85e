"""Routes that segment images and return stored annotations."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from vessa.errors import UnknownBank, VessaError
from vessa.schemas import SegmentAnswer
from vessa.tracing import span
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.dependencies import (
    FORM,
    READ,
    BanksDep,
    EngineDep,
    callers_banks,
    limits_of,
    media_type,
    read_body,
    service_of,
    unless_gone,
)
from vessa_server.api.openapi import SEGMENT_BODY, answering
from vessa_server.serialization.image_files import label_png
from vessa_server.serialization.responses import (
    DICOM,
    JSON,
    PNG,
    SAFETENSORS,
    choose_type,
    dicom_answer,
    json_answer,
    kept_tensor_answer,
    notes_header,
    overlay_answer,
    tensor_answer,
)
from vessa_server.serving.annotation_cache import unknown_annotation

segmentation = APIRouter(dependencies=[Depends(require_key)])
ANNOTATION_ID = "X-Annotation-Id"


@segmentation.post(
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
    template_choice, seed, clean. Its answer holds labels and confidence uint8 (B, H, W), on request
    probabilities float16 (B, K + 1, H, W), and in its metadata the status of each item: one that failed does
    not harm the others. GET /annotations/{id} tells what made an answer, by its annotation_id (header
    X-Annotation-Id). The header X-Notes lists as JSON what was repaired in the file of a form.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as engine:
        reader = engine.reader.for_caller(callers_banks(engine, caller))
        kind = media_type(request)
        offered = [JSON, PNG, SAFETENSORS, DICOM] if kind == FORM else [SAFETENSORS]
        answer_type = choose_type(request.headers.get("accept"), offered)
        body = await read_body(
            request,
            limit=engine.settings.limits.max_body_bytes,
            seconds=engine.settings.limits.body_timeout_s,
        )
        if kind == FORM:
            header = request.headers["content-type"]
            as_seg = answer_type == DICOM
            wanted = await run_in_threadpool(reader.segment_form, header, body, dicom_seg=as_seg)
        else:
            wanted = await run_in_threadpool(reader.segment_tensors, body)
        limits.take(caller, len(wanted.items))
        with span("device", images=len(wanted.items)):
            results = await unless_gone(request, engine.annotate(wanted, caller.name))
        for failed in (r for r in results if isinstance(r, VessaError)):
            engine.metrics.errors.labels(failed.code).inc()

        def answer() -> Response:
            answers = engine.annotations.store(wanted, results, caller)
            headers = notes_header(wanted.notes)
            if answer_type == SAFETENSORS:
                model, version = engine.info.model, engine.labels_version
                content = tensor_answer(wanted, answers, model, version)
                return Response(content, media_type=SAFETENSORS, headers=headers)
            if isinstance(one := answers[0], VessaError):
                raise one
            if answer_type == DICOM:
                content = dicom_answer(wanted, one)
            elif answer_type == JSON:
                content = json_answer(one)
            else:
                content = overlay_answer(wanted, one) if overlay else label_png(one.labels)
            return Response(content, media_type=answer_type, headers={ANNOTATION_ID: one.id, **headers})

        return await run_in_threadpool(answer)


@segmentation.get(
    "/annotations/{identity}",
    response_class=Response,
    responses=answering(JSON, PNG, SAFETENSORS, model=SegmentAnswer),
    dependencies=READ,
)
def annotation(
    identity: str, request: Request, engine: EngineDep, caller: CallerDep, banks: BanksDep
) -> Response:
    """Return an answer of POST /segment by its annotation_id, with its provenance, while it is cached.

    By Accept: application/json (default; COCO compressed RLE), image/png (8-bit gray label map) or
    application/vnd.safetensors (labels uint8 (1, H, W), metadata provenance). Visible to admins and to the
    keys that were answered, while they may use its bank; else 404 unknown_annotation.
    """
    answer_type = choose_type(request.headers.get("accept"), [JSON, PNG, SAFETENSORS])
    found = engine.annotations.get(identity, caller)
    try:
        banks.get(found.provenance.bank)  # it was deleted, or is no longer shared
    except UnknownBank:
        raise unknown_annotation(identity) from None
    if answer_type == SAFETENSORS:
        body = kept_tensor_answer(found)
    else:
        body = json_answer(found) if answer_type == JSON else label_png(found.labels)
    return Response(body, media_type=answer_type, headers={ANNOTATION_ID: found.id})
