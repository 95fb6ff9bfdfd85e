"""Route that ranks unlabeled images by how much annotating each would improve a bank."""

import threading
import time
from functools import partial

import numpy as np
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool

from vessa.errors import NoTemplate, UnknownBank, VessaError
from vessa.schemas import Suggestion, Suggestions
from vessa_server.active_learning import CandidateCache, suggest
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.dependencies import (
    BankPath,
    callers_banks,
    limits_of,
    read_body,
    service_of,
    unless_gone,
)
from vessa_server.api.openapi import SUGGEST_BODY
from vessa_server.serialization.fields import check_size
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.serialization.suggest_request import Candidates, read_candidates
from vessa_server.serving.engine import Engine
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.retrieval import Bank, check_name
from vessa_server.types import DescribeItem, SegmentItem, SegmentResult, scoped_id

suggestions = APIRouter(dependencies=[Depends(require_key)])
_RANKING = CapacityLimiter(1)  # it computes without a pause: one thread leaves the others to requests


@suggestions.post("/banks/{bank}/suggest", openapi_extra=SUGGEST_BODY)
async def suggest_images(request: Request, caller: CallerDep, bank: BankPath) -> Suggestions:
    """Rank unlabeled images by how much annotating each would improve what the bank covers.

    The body holds images uint8 (B, H, W) or (B, H, W, 3), or metadata image_ids of images sent here before;
    metadata groups (JSON list, then patients are ranked) and count. Features are computed when images come:
    send many images in several requests, then rank them by one request with all their ids. A bank that does
    not exist yet counts as empty.
    """
    limits = limits_of(request)
    cache: CandidateCache = request.app.state.candidates
    with limits.work(caller), service_of(request).permit() as engine:
        body = await read_body(
            request,
            limit=engine.settings.limits.max_body_bytes,
            seconds=engine.settings.limits.body_timeout_s,
        )
        wanted = await run_in_threadpool(read_candidates, body, engine.settings)
        state = await run_in_threadpool(bank_or_empty, callers_banks(engine, caller), check_name(bank))
        if wanted.images is not None:
            limits.take(caller, len(wanted.ids))
            await unless_gone(request, describe_candidates(engine, cache, state, wanted, caller.name))
        return await unless_gone(request, rank_candidates(engine, cache, state, wanted, caller.name))


def bank_or_empty(banks: CallersBanks, name: str) -> Bank:
    """Return a bank as the caller sees it; one that does not exist yet counts as empty."""
    try:
        return banks.get(name)
    except UnknownBank:
        return Bank(name, 0, ())


async def describe_candidates(
    engine: Engine, cache: CandidateCache, bank: Bank, wanted: Candidates, client: str
) -> None:
    """Cache the features of images and, where the bank has templates, the annotator's confidence."""
    assert wanted.images is not None
    check_size(wanted.images.shape[1:3], max(len(bank.classes), 1), engine.settings.limits.max_pixels)
    ids = [scoped_id(client, identity) for identity in wanted.ids]
    pairs = list(zip(ids, wanted.images, wanted.groups, strict=True))
    features = await engine.describe([DescribeItem(i, image) for i, image, _ in pairs], client)
    sure: list[float | None] = [None] * len(pairs)
    if bank.classes:
        items: list[SegmentItem | VessaError] = [SegmentItem(i, m, bank.name, group=g) for i, m, g in pairs]
        size = (int(wanted.images.shape[1]), int(wanted.images.shape[2]))
        asked = SegmentRequest(bank, wanted.ids, items, bank.classes, size, False)
        sure = [_confidence(i, answer) for i, answer in enumerate(await engine.annotate(asked, client))]
    for i, (identity, feature, confidence) in enumerate(zip(ids, features, sure, strict=True)):
        if isinstance(feature, VessaError):
            feature.item = i
            raise feature
        cache.put(identity, feature, bank.name, bank.digest, confidence)


def _confidence(place: int, answer: object) -> float:
    """Return the mean confidence of an answer in [0, 1], 0 without a template of another patient."""
    if isinstance(answer, NoTemplate):
        return 0.0
    if isinstance(answer, VessaError):
        answer.item = place
        raise answer
    assert isinstance(answer, SegmentResult)
    return float(answer.confidence.mean()) / 255


async def rank_candidates(
    engine: Engine, cache: CandidateCache, bank: Bank, wanted: Candidates, client: str
) -> Suggestions:
    """Rank in one thread at a time for all callers; stop the computation when the caller leaves."""
    left = threading.Event()
    rank = partial(_rank, engine, cache, bank, wanted, client, left)
    try:
        return await run_sync(rank, limiter=_RANKING, abandon_on_cancel=True)
    finally:
        left.set()


def _rank(
    engine: Engine,
    cache: CandidateCache,
    bank: Bank,
    wanted: Candidates,
    client: str,
    left: threading.Event,
) -> Suggestions:
    ids = [scoped_id(client, identity) for identity in wanted.ids]
    features = [cache.feature(identity) for identity in ids]
    sure = [cache.confidence(identity, bank.name, bank.digest) for identity in ids]
    known = [f for f in features if f is not None]
    unknown = [
        identity
        for identity, feature, confidence in zip(wanted.ids, features, sure, strict=True)
        if feature is None or (bank.classes and confidence is None)
    ]
    answer = Suggestions(
        bank=bank.name,
        bank_version=bank.version,
        bank_digest=bank.digest,
        image_ids=list(wanted.ids),
        unknown=unknown,
    )
    if unknown:
        return answer
    # Equal pixels of one patient count once: they would only multiply the work.
    pairs = enumerate(zip(ids, wanted.units, strict=True))
    rows = list({pair: row for row, pair in pairs}.values())
    units = [wanted.units[row] for row in rows]
    usable = [t.whole.feature for t in bank.templates if t.model == engine.info.model]
    picks = suggest(
        np.stack([known[row] for row in rows]),
        wanted.count,
        covered=np.stack(usable) if usable else None,
        groups=units,
        confidence=np.array([sure[row] for row in rows], np.float32) if bank.classes else None,
        until=time.monotonic() + engine.settings.limits.suggest_timeout_s,
        stopped=left.is_set,
    )
    found = [
        Suggestion(group=p.group, image_ids=[wanted.ids[rows[i]] for i in p.images], gain=round(p.gain, 6))
        for p in picks
    ]
    return answer.model_copy(update={"suggestions": found})
