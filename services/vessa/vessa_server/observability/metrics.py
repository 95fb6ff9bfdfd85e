"""Count and log requests, give them ids, and expose Prometheus metrics, as plain ASGI middleware."""

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from vessa_server.observability.request_context import CURRENT_REQUEST, RequestContext

log = logging.getLogger(__name__)
access = logging.getLogger("vessa_server.access")


REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = {"/livez", "/readyz"}  # called every few seconds
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


class Metrics:
    """Hold the metrics of /metrics. Each service has a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = Counter(
            "vessa_requests",
            "Requests by route and status",
            ["route", "method", "code"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "vessa_request_seconds", "From the first byte to the last", ["route"], registry=self.registry
        )
        self.batch_size = Histogram(
            "vessa_batch_items", "Items in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.batch_seconds = Histogram("vessa_batch_seconds", "Time of a batch", registry=self.registry)
        self.errors = Counter(
            "vessa_errors", "Refused or failed requests and items, by code", ["code"], registry=self.registry
        )
        self.features = Counter(
            "vessa_image_features", "Query images by whether their features were held", ["held"],
            registry=self.registry,
        )  # fmt: skip
        self.queue_depth = Gauge("vessa_queue_depth", "Items waiting for the device", registry=self.registry)

    def show_annotator(
        self, seconds: Callable[[], Mapping[str, float]], bytes_held: Callable[[], Mapping[str, int]]
    ) -> None:
        """Expose what a loaded annotator counts itself: seconds by stage, and bytes by place."""
        self.registry.register(_Annotator(seconds, bytes_held))

    def batch(self, size: int, seconds: float) -> None:
        """Count one batch."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def feature(self, held: bool) -> None:
        """Count one query image."""
        self.features.labels("yes" if held else "no").inc()

    def expose(self) -> bytes:
        """Return the metrics as Prometheus text."""
        return generate_latest(self.registry)


class _Annotator(Collector):
    """Collect the annotator's own counts when the metrics are read."""

    def __init__(
        self, seconds: Callable[[], Mapping[str, float]], bytes_held: Callable[[], Mapping[str, int]]
    ) -> None:
        self._seconds, self._bytes = seconds, bytes_held

    def collect(self) -> Iterator[Metric]:
        stages = CounterMetricFamily(
            "vessa_stage_seconds", "Time in each stage of inference", labels=["stage"]
        )
        for name, value in self._seconds().items():
            stages.add_metric([name], value)
        yield stages
        held = GaugeMetricFamily(
            "vessa_bytes",
            "Memory: cached features and answers, the device's, the worker process's",
            labels=["where"],
        )
        for name, value in self._bytes().items():
            held.add_metric([name], value)
        yield held


class Observe:
    """Give each request an id, count it, log it, and answer where nothing else did (outermost middleware).

    The id is the caller's `X-Request-Id` when that is plain, and comes back in the same header and in the
    log. An exception that reached this place is logged with it and answered 500 in the usual form, without
    its words.
    """

    def __init__(self, app: AsgiApp, metrics: Metrics, client_of: Callable[[Scope], str]) -> None:
        """Wrap an app. client_of: returns the client's address, also behind a gateway."""
        self.app, self.metrics, self._client_of = app, metrics, client_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = _request_id(scope)
        context = RequestContext(identity, source=self._client_of(scope))
        CURRENT_REQUEST.set(context)
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s %s %s failed", identity, scope["method"], _route(scope))
            if not status:
                await _send_internal(send_with_id, identity)
        finally:
            route = _route(scope)
            self.metrics.requests.labels(route, scope["method"], str(status)).inc()
            seconds = time.perf_counter() - start
            self.metrics.latency.labels(route).observe(seconds)
            if route not in _PROBES:
                line = "%s %s %s %d in %.3f s, bank %s"
                access.info(line, context.source, scope["method"], route, status, seconds, context.bank)


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    # The pattern, not the path: paths are the caller's choice and would make endless labels.
    return str(getattr(scope.get("route"), "path", "none"))


async def _send_internal(send: Send, identity: str) -> None:
    error = {
        "code": "internal",
        "message": "The service failed. Its log names the cause, under this request's X-Request-Id.",
        "item": None,
        "request_id": identity,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
