"""Replicas of the service under Ray Serve: one address, a fixed number of them or as many as the load needs.

Each replica serves the very app of `vessa-server serve` on its share of a GPU, and they share banks through
Redis. Ray Serve sends a request to the less busy of two replicas, starts another one for one that died, and
lets their number follow the requests that wait or are in work. Needs the extra `ray`.
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

# Ray reads these when it is imported. Nothing is reported to anybody, a token guards its ports, its proxy may
# take longer than 5 s to start on a busy machine, and replicas are no idle-time work (its own nice is 15).
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
class Scale:
    """How many replicas there are, and what each of them gets.

    least, most: replicas, of one number where they are equal; gpus, cpus: of each, also parts of one;
    target: requests, waiting or in work, for each replica, which their number follows
    Raises InvalidConfig.
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
    """One replica: Ray Serve makes the app and runs its lifespan, which loads the weights."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Remember the settings, all values of `Settings`."""
        self._settings = Settings(**settings)

    def __serve_build_asgi_app__(self) -> Any:
        """Make the app, in the process of the replica."""
        prepare_process(self._settings)
        app = create_app(self._settings)
        self._service: Service = app.state.service
        return app

    async def check_health(self) -> None:
        """Wait for the weights, so that no request comes before; later look for a hung device.

        Ray replaces a replica that fails. A vLLM that is away is no reason: it would be for the next one.
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
            await asyncio.to_thread(self._service.check_ready)  # it asks another process


def run(settings: Settings, scale: Scale, address: str | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then let the requests in work end.

    address: of a Ray cluster, as `ray.init` takes it; None starts one on this machine, for this call alone
    Raises InvalidConfig where replicas could not share their banks.
    """
    if not settings.storage.store.startswith(("redis://", "rediss://")):
        raise InvalidConfig("replicas share their banks through Redis: set VESSA_STORE=redis://...")
    access = resolve_access(settings)
    given = settings.model_dump()
    given["language_model"]["vllm_key"] = settings.language_model.vllm_key.get_secret_value()
    # All replicas take one key, and the device that Ray shows them or none.
    given |= {"api_key": access.key or "", "device": "cuda" if scale.gpus else "cpu"}
    if address is None:
        ray.init(address="local", include_dashboard=False)  # the dashboard takes jobs, which are code
    else:
        ray.init(address=address)
    stop = threading.Event()
    try:
        _deploy(settings, scale, given)
        for number in (signal.SIGTERM, signal.SIGINT):  # until here they end this process as usual
            signal.signal(number, lambda *_: stop.set())
        print(access.describe(show_key=sys.stdout.isatty()), flush=True)
        print(f"serving on http://{settings.host}:{settings.port}", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _deploy(settings: Settings, scale: Scale, given: dict[str, Any]) -> None:
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
        max_queued_requests=settings.limits.max_requests,  # at the proxy; then it answers 503
        graceful_shutdown_timeout_s=math.ceil(settings.queue.drain_s) + 5,
        health_check_timeout_s=30,
        **number,
    )
    try:
        serve.run(deployment.bind(given), name="vessa", route_prefix="/")
    except RuntimeError as error:  # what Ray makes of a replica that failed to load, several times
        raise InternalError("no replica could start; the log above says why") from error
