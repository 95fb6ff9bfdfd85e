"""Provide what routes share: the service, a bounded body, work that ends when the caller has left.

Dependencies that never block are `async`, or each would cost a request a hop through the thread pool.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter
from fastapi import Depends, Path, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message

from vessa.errors import MalformedBody, TooLarge, UnsupportedMedia
from vessa_server.api.authentication import CallerDep, actor_of
from vessa_server.auth.audit_log import AuditLog
from vessa_server.auth.keys import Caller
from vessa_server.auth.rate_limits import KeyLimits
from vessa_server.serialization.responses import SAFETENSORS
from vessa_server.serving.engine import Engine
from vessa_server.serving.lifecycle import Service
from vessa_server.template_bank.bank import Quota
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.retrieval import BANK_NAME

FORM = "multipart/form-data"
JSON_BYTES = 256 * 1024  # of a body that FastAPI reads

# The pattern is for those who read the description: `check_name` refuses other names, and says it better.
_NAME = {"pattern": f"^{BANK_NAME.pattern}$"}
BankPath = Annotated[str, Path(description="template bank", json_schema_extra=_NAME)]
BankQuery = Annotated[str, Query(description="template bank", max_length=64, json_schema_extra=_NAME)]

Change = Callable[..., AbstractContextManager[dict[str, Any]]]

_T = TypeVar("_T")


def service_of(request: Request) -> Service:
    """Return the service of this app."""
    service: Service = request.app.state.service
    return service


async def engine_of(request: Request) -> Engine:
    """Return the engine. Raises NotReady until it is loaded."""
    return service_of(request).engine()


EngineDep = Annotated[Engine, Depends(engine_of)]


def callers_banks(engine: Engine, caller: Caller) -> CallersBanks:
    """Return the template banks as a caller sees them, with the quota of a key."""
    own = engine.settings.storage
    return CallersBanks(engine.banks, caller, Quota(own.key_banks, own.key_templates, own.key_bank_bytes))


async def banks_of(engine: EngineDep, caller: CallerDep) -> CallersBanks:
    """Return the template banks as the caller sees them."""
    return callers_banks(engine, caller)


BanksDep = Annotated[CallersBanks, Depends(banks_of)]


async def change_of(request: Request, caller: CallerDep) -> Change:
    """Return how to record a change by this caller: `with change("bank.delete", bank=name): ...`.

    Raises LimitReached for a key that makes too many changes.
    """
    audit: AuditLog = request.app.state.audit
    limits_of(request).change(caller)
    return partial(audit.change, actor_of(caller))


ChangeDep = Annotated[Change, Depends(change_of)]


def limits_of(request: Request) -> KeyLimits:
    """Return the limits of one key."""
    limits: KeyLimits = request.app.state.limits
    return limits


async def read_place(request: Request, caller: CallerDep) -> AsyncIterator[None]:
    """Wait for a place among the GET requests that draw, read or list. Raises LimitReached.

    A key holds 3/4 of the places at most; its further requests wait for its own, not before those of others.
    The place is given back before the answer is sent, so that a slow reader does not hold it.
    """
    places: CapacityLimiter = request.app.state.reading
    with limits_of(request).read(caller):
        share = CapacityLimiter(max(1, int(places.total_tokens * 3 // 4)))
        own = request.app.state.key_reading.setdefault(caller.name, share)
        async with own, places:
            yield


READ = [Depends(read_place, scope="function")]


def media_type(request: Request) -> str:
    """Return the body's type: a form or safetensors. Raises UnsupportedMedia for another."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in {FORM, SAFETENSORS}:
        raise UnsupportedMedia(
            f"The body must be {FORM} or {SAFETENSORS}, got {kind[:80] or 'no Content-Type'}."
        )
    return kind


async def read_body(request: Request, *, limit: int, seconds: float) -> bytes:
    """Return the body. Raises TooLarge for more than `limit` bytes, MalformedBody after `seconds`.

    The announced length is checked first. The bytes that arrive are counted too, because a chunked body
    announces no length.
    """
    body = bytearray()
    async for chunk in body_chunks(request, limit=limit, seconds=seconds):
        body += chunk
    return bytes(body)


async def body_chunks(request: Request, *, limit: int, seconds: float) -> AsyncIterator[bytes]:
    """Yield the body in chunks, with the bounds of `read_body`."""
    too_large = TooLarge(
        f"The body has more than {limit} bytes, the limit. Send fewer or smaller images in one request."
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    received = 0
    deadline = asyncio.get_running_loop().time() + seconds
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise MalformedBody(
                f"The body did not arrive within {seconds:g} s: {received} bytes came. Send it faster, or "
                "less."
            ) from None
        if chunk is None:
            return
        received += len(chunk)
        if received > limit:
            raise too_large
        yield chunk


class BoundedJsonRoute(APIRoute):
    """Read a JSON body within JSON_BYTES and `body_timeout_s`, then handle the request.

    Every router with a pydantic body uses it: FastAPI alone would read any length at any pace, and before it
    checks the key.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def answer(request: Request) -> Response:
            seconds = service_of(request).settings.limits.body_timeout_s
            body = await read_body(request, limit=JSON_BYTES, seconds=seconds)
            unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> Message:
                # After the body, the connection goes on to say whether the client has left.
                return unread.pop() if unread else await request.receive()

            return await handle(Request(request.scope, receive))

        return answer


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
