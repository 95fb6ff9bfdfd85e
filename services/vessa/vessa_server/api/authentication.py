"""Authenticate requests by bearer key and role, as dependencies of the routes."""

import logging
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from vessa.errors import Forbidden, Unauthorized
from vessa_server.auth.api_key import Access
from vessa_server.auth.audit_log import Actor
from vessa_server.auth.keys import Caller, Role
from vessa_server.observability.request_context import current_request

log = logging.getLogger(__name__)

_bearer = HTTPBearer(auto_error=False, description="The key of the key file, or VESSA_API_KEY")


async def require_key(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """Let the request through when it presents a key, and return whose; Unauthorized otherwise.

    An insecure service has no key to check. It refuses (Forbidden) requests that a browser sends for another
    site's page, so that visiting a page cannot change the banks of a service on the visitor's machine.
    """
    access: Access = request.app.state.access
    if access.key is None:
        _same_origin(request)
        return Caller("anyone", Role.admin)
    if credentials is None:
        raise Unauthorized("this needs the header 'Authorization: Bearer <key>'")
    presented = credentials.credentials
    # other keys than the local one may have to be read from a file or from Redis
    caller = access.local(presented)
    if caller is None:
        caller = await run_in_threadpool(access.identify, presented)
    current_request().key = caller.name
    return caller


CallerDep = Annotated[Caller, Depends(require_key)]


async def require_curator(caller: CallerDep) -> Caller:
    """Let curators and admins through; Forbidden for others."""
    return _require(caller, Role.curate)


async def require_admin(caller: CallerDep) -> Caller:
    """Let admins through; Forbidden for others."""
    return _require(caller, Role.admin)


def _require(caller: Caller, role: Role) -> Caller:
    if caller.role < role:
        raise Forbidden(f"this needs the role {role.name}; key {caller.name!r} has {caller.role.name}")
    return caller


def actor_of(request: Request, caller: Caller) -> Actor:
    """Return who asks, for the audit log."""
    source = request.client.host if request.client else "unknown"
    return Actor(caller.name, source, current_request().id)


def _same_origin(request: Request) -> None:
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Forbidden("an insecure service answers no pages of other sites")
