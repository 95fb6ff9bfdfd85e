"""Run replicas of the service under Ray Serve behind one address: a fixed number, or by load.

Each replica serves the app of `vessa-server serve` on its share of a GPU; replicas share banks through Redis.
Ray Serve sends a request to the less busy of two replicas, replaces a replica that died, and scales their
number with the waiting and running requests. Needs the extra `ray`.
"""

import asyncio
import contextlib
import math
import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any

# Ray reads these when it is imported: no usage reports, a token guards its ports, its proxy may take longer
# than 5 s to start on a busy machine, and replicas run at normal priority (Ray's default nice is 15).
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
import ray
from ray import serve

from vessa.errors import InternalError, InvalidConfig, LanguageUnavailable, NotReady
from vessa_server.app import create_app, prepare_process
from vessa_server.auth.api_key import resolve_access
from vessa_server.serving.lifecycle import Service
from vessa_server.settings import Settings

_POLL_S = 0.1


@dataclass(frozen=True)
class ReplicaScaling:
    """Number of replicas, and the resources of each. Raises InvalidConfig.

    least, most: limits of the number of replicas; equal limits fix it
    gpus, cpus: of each replica, also fractions
    target: waiting and running requests per replica, to which their number is scaled
    """

    least: int = 1
    most: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    target: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise InvalidConfig(f"expected 1 <= replicas <= max-replicas, not {self.least} and {self.most}")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise InvalidConfig(f"a replica gets a part of one GPU or whole ones, not {self.gpus}")


class Replica:
    """One replica; Ray Serve builds the app and runs its lifespan, which loads the weights."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Store the settings: all values of `Settings`."""
        self._settings = Settings(**settings)

    def __serve_build_asgi_app__(self) -> Any:
        """Build the app in the process of the replica."""
        prepare_process(self._settings)
        app = create_app(self._settings)
        self._service: Service = app.state.service
        return app

    async def check_health(self) -> None:
        """Wait for the weights, so that no request comes before; later check that the worker responds.

        Ray replaces a replica whose check fails. An unreachable vLLM is no failure: the next replica could
        not reach it either.
        """
        while True:
            try:
                self._service.engine()
                break
            except NotReady:
                if self._service.failure is not None:
                    raise self._service.failure from None
                await asyncio.sleep(_POLL_S)
        with contextlib.suppress(LanguageUnavailable):
            await asyncio.to_thread(self._service.check_ready)  # it calls another process


def run(settings: Settings, scale: ReplicaScaling, address: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in progress.

    address: of a Ray cluster, as `ray.init` takes it; None starts one on this machine, for this call alone
    Raises InvalidConfig where replicas could not share their banks.
    """
    if not settings.storage.store.startswith(("redis://", "rediss://")):
        raise InvalidConfig("replicas share their banks through Redis: set VESSA_STORE=redis://...")
    access = resolve_access(settings)
    given = settings.model_dump()
    given["language_model"]["vllm_key"] = settings.language_model.vllm_key.get_secret_value()
    # All replicas share one key. Each sees only the GPUs that Ray assigns to it.
    given |= {"api_key": access.key or "", "device": "cuda" if scale.gpus else "cpu"}
    if address is None:
        ray.init(address="local", include_dashboard=False)  # the dashboard accepts jobs, which are code
    else:
        ray.init(address=address)
    stop = threading.Event()
    try:
        _deploy(settings, scale, given)
        for number in (signal.SIGTERM, signal.SIGINT):  # before this, both signals end the process at once
            signal.signal(number, lambda *_: stop.set())
        print(access.describe(show_key=sys.stdout.isatty()), flush=True)
        print(f"serving on http://{settings.host}:{settings.port}", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(settings: Settings, scale: ReplicaScaling, given: dict[str, Any]) -> None:
    http = {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.limits.body_timeout_s + settings.limits.request_timeout_s + 10,
        "keep_alive_timeout_s": 30,
    }
    serve.start(proxy_location="EveryNode", http_options=http)
    if scale.least == scale.most:
        number: dict[str, Any] = {"num_replicas": scale.least}
    else:
        number = {
            "autoscaling_config": {
                "min_replicas": scale.least,
                "max_replicas": scale.most,
                "target_ongoing_requests": scale.target,
                "look_back_period_s": 10,
                "upscale_delay_s": 10,
                "downscale_delay_s": 300,
            }
        }
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name="annotator",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=settings.limits.max_requests,
        max_queued_requests=settings.limits.max_requests,  # at the proxy, which answers 503 beyond it
        graceful_shutdown_timeout_s=math.ceil(settings.queue.drain_s) + 5,
        health_check_timeout_s=30,
        **number,
    )
    try:
        serve.run(deployment.bind(given), name="vessa", route_prefix="/")
    except RuntimeError as error:  # raised after a replica failed to load several times
        raise InternalError("no replica could start; see the log above") from error
