"""The service about itself: probes, metrics, documentation, and what runs here."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from vessa.schemas import ServiceInfo
from vessa_server import __version__
from vessa_server.api.authentication import CallerDep, require_admin, require_key
from vessa_server.api.dependencies import BanksDep, EngineDep, service_of
from vessa_server.api.openapi import FAILURES, answering, docs_page
from vessa_server.auth.keys import Role
from vessa_server.observability.metrics import METRICS_TYPE

probes = APIRouter()  # the only routes without a key
operations = APIRouter(dependencies=[Depends(require_key)])


@probes.get("/livez")
async def livez() -> dict[str, str]:
    """Answer as long as the process runs; it needs no key."""
    return {"status": "ok"}


@probes.get("/readyz", responses={503: FAILURES[503]})
def readyz(request: Request) -> dict[str, str]:
    """Answer 200 when weights are loaded and the device lives, else 503; it needs no key."""
    service_of(request).check_ready()
    return {"status": "ready"}


@operations.get(
    "/metrics",
    dependencies=[Depends(require_admin)],
    response_class=Response,
    responses=answering("text/plain"),
)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
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


@operations.get("/info")
def info(engine: EngineDep, banks: BanksDep, caller: CallerDep) -> ServiceInfo:
    """Describe what runs here: version, weights, device, limits, banks, and the annotator's parts in use.

    An admin also sees which banks are set aside as damaged.
    """
    about, listed = engine.info, banks.list()
    damaged = dict(engine.banks.damaged) if caller.role is Role.admin else {}
    return ServiceInfo(
        version=__version__,
        preset=about.preset,
        model=about.model,
        device=about.device,
        limits=engine.settings.public_limits(),
        banks=listed,
        labels_version=engine.labels_version,
        parts=engine.parts,
        damaged_banks=damaged,
        trained_on=None if about.trained_on is None else list(about.trained_on),
    )
