"""Authenticate requests by bearer key and role, as dependencies of the routes."""

import base64
import binascii
import logging
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from vessa.errors import Forbidden, Unauthorized
from vessa_server.auth.api_key import Access
from vessa_server.auth.audit_log import Actor
from vessa_server.auth.client_address import is_served_host
from vessa_server.auth.keys import Caller, Role
from vessa_server.auth.rate_limits import KeyLimits
from vessa_server.auth.sessions import COOKIE, CSRF_HEADER, Sessions, check_csrf
from vessa_server.observability.request_context import current_request

log = logging.getLogger(__name__)

_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_bearer = HTTPBearer(auto_error=False, description="The key of the key file, or VESSA_API_KEY")


async def identify(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """Return whose key the request presents, of any role.

    Raises Unauthorized without a valid key, LimitReached after too many wrong ones of one address. A service
    without keys (--insecure) refuses (Forbidden) requests under another host name and requests that a browser
    sends for another site's page, so that visiting a page cannot change the banks of a service on the
    visitor's machine.

    A browser that signed in at the console presents its session's cookie instead of the header. A request
    that may change something must repeat the session's CSRF token.
    """
    access: Access = request.app.state.access
    if access.key is None:
        _check_host(request)
        return Caller("anyone", Role.admin)
    if credentials is None:
        return await _signed_in(request)
    return await caller_of_key(request, credentials.credentials)


async def caller_of_key(request: Request, presented: str) -> Caller:
    """Return whose key this is. Raises Unauthorized, LimitReached after too many wrong ones."""
    access: Access = request.app.state.access
    # Keys other than the local one may have to be read from a file or from Redis.
    caller = access.local(presented)
    if caller is None:
        try:
            caller = await run_in_threadpool(access.identify, presented)
        except Unauthorized:
            limits: KeyLimits = request.app.state.limits
            limits.failed(current_request().source)
            raise
    current_request().key = caller.name
    return caller


async def require_password(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """Let keys of the role annotate and above through, also as the password of basic authentication.

    For programs that know no other way. The user name is ignored.
    """
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    access: Access = request.app.state.access
    if access.key is None or scheme.lower() != "basic":
        return _require(await identify(request, credentials), Role.annotate)
    try:
        password = base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        raise Unauthorized("The header of basic authentication is damaged.") from None
    return _require(await caller_of_key(request, password.strip()), Role.annotate)


async def require_key(caller: Annotated[Caller, Depends(identify)]) -> Caller:
    """Let keys of the role annotate and above through. Raises Forbidden for others."""
    return _require(caller, Role.annotate)


async def _signed_in(request: Request) -> Caller:
    """Return whose session the request's cookie names; Unauthorized without one."""
    cookie = request.cookies.get(COOKIE)
    if not cookie:
        raise Unauthorized("The request has no key. Send the header 'Authorization: Bearer <key>'.")
    sessions: Sessions = request.app.state.sessions
    session = await run_in_threadpool(sessions.find, cookie)
    if request.method not in _SAFE_METHODS:
        check_csrf(session, request.headers.get(CSRF_HEADER))
    current_request().key = session.caller.name
    return session.caller


CallerDep = Annotated[Caller, Depends(require_key)]


async def require_monitor(caller: Annotated[Caller, Depends(identify)]) -> Caller:
    """Let keys of the roles monitor and admin through. Raises Forbidden for others."""
    if caller.role not in (Role.monitor, Role.admin):
        raise _wrong_role(caller, Role.monitor)
    return caller


async def require_curator(caller: CallerDep) -> Caller:
    """Let curators and admins through. Raises Forbidden for others."""
    return _require(caller, Role.curate)


async def require_admin(caller: CallerDep) -> Caller:
    """Let admins through. Raises Forbidden for others."""
    return _require(caller, Role.admin)


def actor_of(caller: Caller) -> Actor:
    """Return who makes the current request, for the audit log."""
    context = current_request()
    return Actor(caller.name, context.source, context.id)


def _require(caller: Caller, role: Role) -> Caller:
    if caller.role < role:
        raise _wrong_role(caller, role)
    return caller


def _wrong_role(caller: Caller, role: Role) -> Forbidden:
    return Forbidden(
        f"This needs the role {role.name}; key {caller.name!r} has {caller.role.name}. Use another key."
    )


def _check_host(request: Request) -> None:
    host = request.headers.get("host")
    if not is_served_host(host, request.app.state.service.settings.host):
        raise Forbidden("A service without keys answers only under its own address. Use its IP address.")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden("A service without keys answers no pages of other sites. Serve it with a key.")
