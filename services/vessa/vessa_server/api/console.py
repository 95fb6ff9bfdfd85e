"""The console: its pages, and signing in with a key or a one-time link."""

from typing import Annotated

from fastapi import APIRouter, Cookie, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from vessa.errors import InvalidRequest, NotFound
from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.auth.sessions import COOKIE, IDLE_S, Session, Sessions
from vessa_server.console.files import CONTENT_SECURITY_POLICY, StaticFile, static_file

pages = APIRouter(include_in_schema=False)
sessions_api = APIRouter(include_in_schema=False)

_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class SignIn(BaseModel):
    """Body of POST /session: a key, or the token of a one-time link."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field("", max_length=512)
    link: str = Field("", max_length=128)


class SessionInfo(BaseModel):
    """The session of this browser: its key's name and role, and its CSRF token."""

    key: str
    role: str
    csrf: str


def sessions_of(request: Request) -> Sessions:
    """Return the browser sessions of this app."""
    sessions: Sessions = request.app.state.sessions
    return sessions


@pages.get("/")
def index(request: Request) -> Response:
    """Return the console's one page; it holds no data before somebody signs in."""
    return _answer(request, static_file("index.html"))


@pages.get("/console/{path:path}")
def asset(path: str, request: Request) -> Response:
    """Return a file of the console. Raises NotFound for a name outside its list."""
    return _answer(request, static_file(path))


@sessions_api.post("/session")
async def sign_in(body: SignIn, request: Request, response: Response) -> SessionInfo:
    """Open a session by a key or by a one-time link; the answer sets its cookie."""
    if bool(body.key) == bool(body.link):
        raise InvalidRequest("give either key or link")
    sessions = sessions_of(request)
    if body.link:
        cookie, session = sessions.open_by_link(body.link)
    else:
        cookie, session = await run_in_threadpool(sessions.open_by_key, body.key.strip())
    secure = request.url.scheme == "https"
    response.set_cookie(
        COOKIE, cookie, max_age=int(IDLE_S), httponly=True, samesite="strict", secure=secure, path="/"
    )
    response.headers["Cache-Control"] = "no-store"
    return _info(session)


@sessions_api.get("/session", dependencies=[Depends(require_key)])
async def session_info(
    request: Request, response: Response, vessa_session: Annotated[str, Cookie()] = ""
) -> SessionInfo:
    """Return who is signed in and the CSRF token, for a page that was loaded again."""
    response.headers["Cache-Control"] = "no-store"
    if request.app.state.access.key is None:
        return SessionInfo(key="anyone", role="admin", csrf="")
    return _info(await run_in_threadpool(sessions_of(request).find, vessa_session))


@sessions_api.delete("/session", status_code=204)
async def sign_out(
    request: Request, caller: CallerDep, vessa_session: Annotated[str, Cookie()] = ""
) -> Response:
    """End the session and drop its cookie."""
    sessions_of(request).close(vessa_session)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, path="/")
    return response


def _info(session: Session) -> SessionInfo:
    return SessionInfo(key=session.caller.name, role=session.caller.role.name, csrf=session.csrf)


def _answer(request: Request, file: StaticFile | None) -> Response:
    if file is None:
        raise NotFound("the console has no such file")
    headers = _HEADERS | {"ETag": file.etag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    if file.encoding:
        headers["Content-Encoding"] = file.encoding
    return Response(file.content, media_type=file.media_type, headers=headers)
