"""Provide what the protocols of viewers share: sessions, bodies, work on the queue."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Request

from vessa_server.api.authentication import require_key
from vessa_server.api.dependencies import body_chunks, callers_banks, limits_of, service_of
from vessa_server.auth.keys import Caller
from vessa_server.serialization.request_parser import SegmentRequest
from vessa_server.serving.engine import Engine
from vessa_server.types import SegmentResult
from vessa_server.viewers.drawing import Painter, raise_errors
from vessa_server.viewers.sessions import ViewerSessions


def sessions_of(request: Request) -> ViewerSessions:
    """Return the sessions of viewers of this app."""
    sessions: ViewerSessions = request.app.state.viewer_sessions
    return sessions


def admitting(identify: Callable[..., Any]) -> Callable[..., AsyncIterator[Engine]]:
    """Return the dependency that takes a place for a request that computes, and gives the engine.

    identify: the dependency that returns the caller. Raises LimitReached, QueueFull.
    """

    async def admit(request: Request, caller: Annotated[Caller, Depends(identify)]) -> AsyncIterator[Engine]:
        with (
            limits_of(request).work(caller),
            service_of(request).permit() as engine,
            sessions_of(request).upload(caller) as request.state.upload,
        ):
            yield engine

    return admit


WorkDep = Annotated[Engine, Depends(admitting(require_key), scope="function")]


async def read_upload(request: Request) -> bytes:
    """Return the body of an admitted request, with the bounds of viewers.

    Its bytes count until the request ends. Raises TooLarge, MalformedBody, LimitReached.
    """
    bounds, body = sessions_of(request).bounds, bytearray()
    chunks = body_chunks(request, limit=bounds.viewer_body_bytes, seconds=bounds.viewer_body_s)
    async for chunk in chunks:
        request.state.upload(len(chunk))
        body += chunk
    return bytes(body)


def painter_of(
    request: Request, engine: Engine, caller: Caller, bank: str, group: str | None = None
) -> Painter:
    """Return what computes masks for a caller, on the common queue and counted against the key's limits."""
    reader = engine.reader.for_caller(callers_banks(engine, caller))
    annotate: Callable[[SegmentRequest], Awaitable[list[SegmentResult]]]
    annotate = partial(_annotate, request, engine, caller)
    return Painter(reader, bank, annotate, group)


async def _annotate(
    request: Request, engine: Engine, caller: Caller, wanted: SegmentRequest
) -> list[SegmentResult]:
    limits_of(request).take(caller, len(wanted.items))
    answers: list[Any] = await engine.annotate(wanted, caller.name)
    return raise_errors(answers)
