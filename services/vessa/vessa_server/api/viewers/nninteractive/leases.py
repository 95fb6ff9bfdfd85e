"""Give viewers sessions, which the protocol calls leases."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.concurrency import run_in_threadpool

from vessa.errors import UnknownClass
from vessa_server.api.authentication import CallerDep
from vessa_server.api.dependencies import BanksDep
from vessa_server.api.viewers.access import sessions_of
from vessa_server.api.viewers.nninteractive.failures import DetailedRoute
from vessa_server.viewers.sessions import LIVENESS_S, ViewerSession
from vessa_server.viewers.target import Target

PROTOCOL = "nninteractive"
_VERSION = "2.6.0"  # of nnInteractive whose protocol this is
_CAPABILITIES = {
    "supported_interactions": {
        "points": True,
        "bbox2d": True,
        "bbox3d": True,
        "scribble": True,
        "lasso": True,
    },
    "channel_mapping": {},
    "num_interaction_channels": 0,
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": False,
    "preferred_scribble_thickness": [1, 1, 1],
    "interaction_decay": None,
    "inference_session_version": _VERSION,
    "license": "Apache-2.0 (VESSA); the weights have their own",
    "supports_undo": True,
    "do_autozoom": True,
}

leases_api = APIRouter(route_class=DetailedRoute)


@dataclass(eq=False)
class LeaseWork:
    """Hold what a lease works on. class_id: that of the address, None where it names none."""

    class_id: int | None
    through: bool = True
    target: Target | None = None


async def lease_of(
    request: Request, caller: CallerDep, x_lease_token: Annotated[str, Header(max_length=128)] = ""
) -> ViewerSession:
    """Return the session of the lease that a request names. Raises UnknownSession."""
    use = request.method == "POST" and not request.url.path.endswith("/heartbeat")
    return sessions_of(request).get(PROTOCOL, x_lease_token, caller, use=use)


LeaseDep = Annotated[ViewerSession, Depends(lease_of)]


@leases_api.get("/healthz")
@leases_api.get("/{name}/healthz")
async def healthz() -> dict[str, str]:
    """Say that the service answers."""
    return {"status": "ok"}


@leases_api.post("/claim")
@leases_api.post("/{name}/claim")
async def claim(request: Request, bank: str, caller: CallerDep, banks: BanksDep, name: str = "") -> Any:
    """Open a session for one viewer. Raises UnknownBank, UnknownClass."""
    classes = (await run_in_threadpool(banks.get, bank)).classes
    ids = {known: key for key, known in classes.items()}
    if name and name not in ids:
        raise UnknownClass(f"bank {bank!r} has no class {name[:80]!r}; it has {sorted(ids)}")
    sessions = sessions_of(request)
    session = sessions.open(PROTOCOL, caller, bank, beats=True)
    session.work = LeaseWork(ids.get(name))
    return {
        "lease_token": session.token,
        "idle_timeout_seconds": sessions.bounds.viewer_idle_s,
        "liveness_timeout_seconds": LIVENESS_S,
        "max_sessions": sessions.bounds.viewer_sessions,
    }


@leases_api.get("/capabilities")
@leases_api.get("/{name}/capabilities")
async def capabilities() -> dict[str, Any]:
    """Say which tools work."""
    return _CAPABILITIES


@leases_api.post("/release")
@leases_api.post("/{name}/release")
async def release(request: Request, lease: LeaseDep) -> dict[str, bool]:
    """End the session."""
    sessions_of(request).close(lease)
    return {"released": True}


@leases_api.post("/heartbeat")
@leases_api.post("/{name}/heartbeat")
async def heartbeat(request: Request, lease: LeaseDep) -> dict[str, float]:
    """Say that the viewer still runs."""
    return {"remaining_seconds": sessions_of(request).remaining(lease)}


@leases_api.get("/lease_status")
@leases_api.get("/{name}/lease_status")
async def lease_status(request: Request, lease: LeaseDep) -> dict[str, float]:
    """Say how long an unused session lasts."""
    sessions = sessions_of(request)
    return {
        "remaining_seconds": sessions.remaining(lease),
        "idle_timeout_seconds": sessions.bounds.viewer_idle_s,
    }
