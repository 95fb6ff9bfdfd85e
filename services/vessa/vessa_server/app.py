"""Build the FastAPI app and serve it."""

import asyncio
import logging
import math
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

import uvicorn
from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from vessa.volumes import isolated, packed_array
from vessa_server import __version__
from vessa_server.active_learning import CandidateCache
from vessa_server.api.banks import banks_api
from vessa_server.api.console.phantoms import phantoms_api
from vessa_server.api.console.routes import operator_api, pages, sessions_api
from vessa_server.api.console.suggestions import worklist_suggestions
from vessa_server.api.console.volumes import worklist_volumes
from vessa_server.api.console.worklists import worklists_api
from vessa_server.api.error_handlers import add_error_handlers
from vessa_server.api.groups import groups
from vessa_server.api.h11_limits import bounded_http
from vessa_server.api.jobs import jobs_api
from vessa_server.api.openapi import FAILURES
from vessa_server.api.segment import segmentation
from vessa_server.api.status import monitoring, operations, probes
from vessa_server.api.suggest import suggestions
from vessa_server.api.viewers.labelstudio import labelstudio_api
from vessa_server.api.viewers.monailabel import monailabel_api, monailabel_sign_in
from vessa_server.api.viewers.nninteractive import nninteractive_api
from vessa_server.auth.api_key import resolve_access
from vessa_server.auth.audit_log import open_audit
from vessa_server.auth.client_address import client_address
from vessa_server.auth.rate_limits import KeyLimits
from vessa_server.auth.sessions import Sessions
from vessa_server.observability.logs import log_to_stderr
from vessa_server.observability.metrics import Observe
from vessa_server.observability.request_context import current_request
from vessa_server.observability.trace_export import export_traces
from vessa_server.serving.lifecycle import Service, WorkerFactory
from vessa_server.serving.worker import Worker
from vessa_server.serving.worker_process import WorkerProcess
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.viewers.sessions import ViewerSessions
from vessa_server.volume_jobs.jobs import Jobs
from vessa_server.worklists.store import WorklistStore, folder_of

log = logging.getLogger(__name__)

DESCRIPTION = """Reference-guided segmentation of medical images.

Every route but /livez and /readyz needs the header `Authorization: Bearer <key>`. A key has a role: monitor
(reads /metrics alone), annotate, curate (may change template banks too) or admin. A failure is {"error":
{"code", "message", "item", "request_id"}}.
"""
_SWITCH_S = 0.0005
_VIEWERS = {
    "nninteractive": (nninteractive_api,),
    "monailabel": (monailabel_sign_in, monailabel_api),
    "labelstudio": (labelstudio_api,),
}


def in_own_process(settings: Settings, banks: TemplateBanks) -> Worker:
    """Load the annotator into a process of its own, which opens the banks' store itself."""
    return WorkerProcess(settings)


def create_app(settings: Settings | None = None, worker_factory: WorkerFactory = in_own_process) -> FastAPI:
    """Return the app. It loads when its lifespan starts; until then all but /livez answer 503 not_ready.

    worker_factory: loads the annotator, in the loading thread; `serving.worker.load` keeps it in this
    process.
    """
    settings = settings or Settings()
    service = Service(settings, worker_factory)
    isolated.share_by(lambda: current_request().key)
    access = resolve_access(settings)
    jobs = Jobs(settings, service, access.current)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        jobs.start()
        await run_in_threadpool(app.state.worklists.sweep)
        sweeping = asyncio.create_task(app.state.viewer_sessions.sweep_forever(access.current))
        yield
        sweeping.cancel()
        await run_in_threadpool(jobs.stop, settings.queue.drain_s)
        await run_in_threadpool(service.stop)

    app = FastAPI(
        title="VESSA annotator",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.service, app.state.jobs = service, jobs
    app.state.access = access
    app.state.audit = open_audit(settings)
    bounds = settings.limits
    app.state.candidates = CandidateCache(2 * bounds.max_candidates)
    app.state.limits = KeyLimits(
        bounds.key_requests,
        bounds.key_images_per_minute,
        share=max(1, bounds.max_requests * 3 // 4),
        reads=bounds.key_reads,
        changes_per_minute=bounds.key_changes_per_minute,
        failures_per_minute=bounds.failed_keys_per_minute,
    )
    app.state.reading = CapacityLimiter(bounds.max_reads)
    app.state.key_reading = WeakValueDictionary()  # a limiter of each key that reads now
    app.state.sessions = Sessions(app.state.access)
    app.state.worklists = WorklistStore(folder_of(settings), settings.console.worklist_bytes)
    app.state.viewer_sessions = ViewerSessions(settings.viewers)
    routers = [
        banks_api,
        segmentation,
        worklists_api,
        worklist_suggestions,
        worklist_volumes,
        jobs_api,
        suggestions,
        groups,
        operator_api,
        operations,
    ]
    if settings.console.serve_console:
        routers += [sessions_api, phantoms_api]
        app.include_router(pages)
    if "nninteractive" in settings.viewers.serve_viewers:
        packed_array.check_library()
    for name in sorted(settings.viewers.serve_viewers):
        routers += _VIEWERS[name]
    for router in routers:  # in the order in which they are tried
        app.include_router(router, responses=FAILURES)
    app.include_router(monitoring, responses=FAILURES)
    app.include_router(probes)
    add_error_handlers(app)
    app.add_middleware(
        Observe,
        metrics=service.metrics,
        client_of=lambda scope: client_address(scope, settings.trusted_proxies),
    )
    return app


def _console_line(settings: Settings, app: FastAPI) -> str:
    """Return how to open the console; the link signs in once, and is made only where a person reads it."""
    host = "127.0.0.1" if settings.loopback else settings.host
    address = f"http://{host}:{settings.port}/"
    if settings.insecure or not sys.stdout.isatty():
        return f"Console: {address}"
    return f"Console: {address}#link={app.state.sessions.create_link()} (signs in once, within 15 minutes)"


def prepare_process(settings: Settings) -> None:
    """Set up logs, traces and the interpreter of a process that serves the app; call it once, first."""
    log_to_stderr(settings)
    unknown = sorted(n for n in os.environ if n.startswith("VESSA_") and n not in Settings.variables())
    if unknown:  # a misspelt limit would silently not hold
        log.warning("%d environment variables are not settings: %s", len(unknown), ", ".join(unknown))
    if settings.traces:
        export_traces()
    # While a batch changes, the worker waits for this process: its thread must not wait for a whole 5 ms.
    sys.setswitchinterval(_SWITCH_S)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then accept no more connections and finish the requests in progress.

    Prints where the key is before it loads, and logs the progress of loading. Raises the error that made
    loading fail.
    """
    prepare_process(settings)
    app = create_app(settings)
    service: Service = app.state.service
    print(app.state.access.describe(show_key=sys.stdout.isatty()), flush=True)
    if settings.console.serve_console:
        print(_console_line(settings, app), flush=True)
    if settings.insecure and not settings.loopback:
        log.warning(
            "serving without a key on %s: everyone who can reach this address can use and change it",
            settings.host,
        )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level=settings.log_level,
            log_config=None,
            lifespan="on",
            http=bounded_http(
                settings.limits.max_connections,
                settings.limits.write_timeout_s,
                settings.limits.max_unread_bytes,
            ),
            access_log=False,  # Observe writes one line a request, with key, bank and real address
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=math.ceil(settings.limits.body_timeout_s),
            timeout_graceful_shutdown=math.ceil(settings.queue.drain_s),
        )
    )

    def give_up() -> None:
        server.should_exit = True

    service.on_failure = give_up
    server.run()
    if service.failure is not None:
        raise service.failure
