"""The console: its pages, signing in, and what it shows an operator (keys, audit log, training runs)."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Cookie, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from vessa.errors import InvalidRequest, NotFound, Unauthorized, VessaError
from vessa_server.api.authentication import CallerDep, require_admin, require_curator, require_key
from vessa_server.api.dependencies import READ, BoundedJsonRoute, limits_of, service_of
from vessa_server.api.openapi import answering
from vessa_server.auth.api_key import Access
from vessa_server.auth.audit_log import AuditLog
from vessa_server.auth.sessions import COOKIE, IDLE_S, Session, Sessions
from vessa_server.console.files import CONTENT_SECURITY_POLICY, StaticFile, static_file
from vessa_server.observability.request_context import current_request
from vessa_server.serving.lifecycle import Service
from vessa_server.settings import Settings

pages = APIRouter(include_in_schema=False)
sessions_api = APIRouter(include_in_schema=False, route_class=BoundedJsonRoute)

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
    try:
        if body.link:
            cookie, session = sessions.open_by_link(body.link)
        else:
            cookie, session = await run_in_threadpool(sessions.open_by_key, body.key.strip())
    except Unauthorized:
        limits_of(request).failed(current_request().source)
        raise
    current_request().key = session.caller.name  # for the log
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


operator_api = APIRouter(dependencies=[Depends(require_key), *READ])
# A run's report shows cases of patients, so that looking at runs needs more than the right to segment.
CURATE = [Depends(require_curator)]

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LONGEST_METRICS = 8 << 20  # bytes of metrics.jsonl that are read, the newest
_LONGEST_REPORT = 64 << 20
_TAIL = 1 << 20  # bytes of the audit log that are read
_REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "sandbox allow-scripts"
)


class KeyInfo(BaseModel):
    """A named key, without its secret."""

    name: str
    role: str
    created: str
    requests: int | None
    images_per_minute: int | None


class QueueInfo(BaseModel):
    """Images that wait for the device, requests in progress, their limits, and the state of the worker."""

    waiting: int
    queue_items: int
    requests: int
    max_requests: int
    worker: str


class RunInfo(BaseModel):
    """A training run. state: running while metrics come, done once it has a summary."""

    name: str
    state: str
    step: int | None = None
    summary: dict[str, Any] | None = None
    has_report: bool = False


@operator_api.get("/keys", dependencies=[Depends(require_admin)])
def list_keys(request: Request) -> list[KeyInfo]:
    """The named keys, without secrets; `vessa-server keys` makes and revokes them."""
    access: Access = request.app.state.access
    return [
        KeyInfo(
            name=key.name,
            role=key.role.name,
            created=key.created,
            requests=key.requests,
            images_per_minute=key.images_per_minute,
        )
        for key in sorted(access.keys.all().values(), key=lambda k: k.name)
    ]


@operator_api.get("/audit", dependencies=[Depends(require_admin)])
def audit_lines(request: Request, count: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[dict[str, Any]]:
    """The newest lines of the audit log, the newest first."""
    audit: AuditLog = request.app.state.audit
    try:
        with audit.path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in reversed(lines):
        found += _objects([line])  # the first line read may be cut, others damaged
        if len(found) == count:
            break
    return found


@operator_api.get("/queue", dependencies=[Depends(require_admin)])
def queue_state(request: Request) -> QueueInfo:
    """How much waits for the device and what is in progress, beside the limits."""
    service: Service = service_of(request)
    settings: Settings = service.settings
    try:
        service.check_ready()
        waiting, worker = service.engine().queue.depth, "ready"
    except VessaError as error:
        waiting, worker = 0, str(error)
    return QueueInfo(
        waiting=waiting,
        queue_items=settings.queue.queue_items,
        requests=service.in_progress,
        max_requests=settings.limits.max_requests,
        worker=worker,
    )


@operator_api.get("/runs", dependencies=CURATE)
def list_runs(request: Request) -> list[RunInfo]:
    """The training runs in the folder that VESSA_RUNS_FOLDER names; none where it names none."""
    folder = _runs_folder(request)
    if folder is None:
        return []
    found = [
        path
        for path in folder.iterdir()
        if _RUN_NAME.fullmatch(path.name) and (path / "config.yaml").is_file()
    ]
    return [_run(path) for path in sorted(found)]


@operator_api.get("/runs/{name}/metrics", dependencies=CURATE)
def run_metrics(name: str, request: Request) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    path = _run_folder(name, request) / "metrics.jsonl"
    # The last line of a run that writes now may be unfinished, and the first one cut.
    return _objects(_tail(path, _LONGEST_METRICS))


@operator_api.get(
    "/runs/{name}/report.html",
    response_class=Response,
    responses=answering("text/html"),
    dependencies=CURATE,
)
def run_report(name: str, request: Request) -> Response:
    """A run's report; the page is sandboxed, so that it cannot use the session."""
    path = _run_folder(name, request) / "report.html"
    if not path.is_file() or path.stat().st_size > _LONGEST_REPORT:
        raise NotFound(f"run {name[:80]!r} has no report yet")
    return Response(
        path.read_bytes(),
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": _REPORT_POLICY, "X-Content-Type-Options": "nosniff"},
    )


def _runs_folder(request: Request) -> Path | None:
    settings: Settings = request.app.state.service.settings
    folder = settings.console.runs_folder
    return folder if folder is not None and folder.is_dir() else None


def _run_folder(name: str, request: Request) -> Path:
    folder = _runs_folder(request)
    if folder is None or not _RUN_NAME.fullmatch(name) or not (folder / name / "config.yaml").is_file():
        raise NotFound(f"there is no run {name[:80]!r} in the folder of VESSA_RUNS_FOLDER")
    return folder / name


def _run(path: Path) -> RunInfo:
    try:
        written = _objects([(path / "summary.json").read_bytes()])
    except OSError:
        written = []  # it is written at the end of a run
    rows = _objects(_tail(path / "metrics.jsonl", 1 << 16))
    step = rows[-1].get("step") if rows else None
    return RunInfo(
        name=path.name,
        state="done" if written else "running",
        step=step if isinstance(step, int) else None,
        summary=written[0] if written else None,
        has_report=(path / "report.html").is_file(),
    )


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    """Return the JSON objects among some lines; damaged lines are left out."""
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _tail(path: Path, most: int) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - most))
            return file.read().splitlines()
    except OSError:
        return []
