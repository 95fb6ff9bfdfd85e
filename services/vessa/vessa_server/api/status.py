"""Routes about the service itself: probes, metrics, documentation, information."""

import asyncio
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, FastAPI, Request, Response

from vessa.errors import NotReady
from vessa.schemas import ServiceInfo
from vessa_server import __version__
from vessa_server.api.authentication import CallerDep, require_key, require_monitor
from vessa_server.api.dependencies import READ, BanksDep, EngineDep, service_of
from vessa_server.api.openapi import FAILURES, answering, docs_page
from vessa_server.auth.keys import Role
from vessa_server.observability.metrics import METRICS_TYPE

CHECK_S = 3.0
_CHECKS = 4  # threads of their own: a thread pool full of requests must not delay a probe
probes = APIRouter()  # the only routes without a key
operations = APIRouter(dependencies=[Depends(require_key)])
monitoring = APIRouter(dependencies=[Depends(require_monitor)])


@probes.get("/livez")
async def livez() -> dict[str, str]:
    """Answer as long as the process runs; it needs no key."""
    return {"status": "ok"}


@probes.get("/readyz", responses={503: FAILURES[503]})
async def readyz(request: Request) -> dict[str, str]:
    """Answer 200 when the service can work, else 503 with the reason; it needs no key.

    It checks the weights, the worker, the store and the thread of volume jobs, within a bounded time.
    """
    await _check_ready(request.app)
    return {"status": "ready"}


@monitoring.get(
    "/metrics",
    response_class=Response,
    responses=answering("text/plain"),
)
async def metrics(request: Request) -> Response:
    """Return the Prometheus metrics, to keys of the role monitor or admin."""
    return Response(service_of(request).metrics.expose(), headers={"content-type": METRICS_TYPE})


@operations.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Return this list of routes as a page."""
    return Response(docs_page(request.app.openapi()), media_type="text/html")


@operations.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> dict[str, Any]:
    """Return the OpenAPI description."""
    description: dict[str, Any] = request.app.openapi()
    return description


@operations.get("/info", dependencies=READ)
def info(request: Request, engine: EngineDep, banks: BanksDep, caller: CallerDep) -> ServiceInfo:
    """Describe what runs here: version, weights, device, limits, banks, and the annotator's parts in use.

    An admin also sees which banks are set aside as damaged, and what should be mended.
    """
    about, listed = engine.info, banks.list()
    admin = caller.role is Role.admin
    return ServiceInfo(
        version=__version__,
        preset=about.preset,
        model=about.model,
        device=about.device,
        limits=engine.settings.public_limits(),
        banks=listed,
        labels_version=engine.labels_version,
        parts=engine.parts,
        damaged_banks=dict(engine.banks.damaged) if admin else {},
        warnings=service_of(request).warnings if admin else [],
        trained_on=None if about.trained_on is None else list(about.trained_on),
    )


async def _check_ready(app: FastAPI) -> None:
    """Raise NotReady, StoreUnavailable or LanguageUnavailable unless weights, worker, store and jobs work."""
    if not hasattr(app.state, "checks"):
        app.state.checks = CapacityLimiter(_CHECKS)
    try:
        async with asyncio.timeout(CHECK_S):
            await run_sync(_check, app, limiter=app.state.checks, abandon_on_cancel=True)
    except TimeoutError:
        raise NotReady(
            f"The service did not answer its own check within {CHECK_S:g} s. Retry later; see the log.",
            retry_after=5.0,
        ) from None


def _check(app: FastAPI) -> None:
    app.state.service.check_ready()
    app.state.jobs.check()
