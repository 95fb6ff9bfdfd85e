"""Trace requests across trainer, client and annotator with OpenTelemetry (extra `otel`).

Without the extra the functions do nothing. With it they cost little until a program sets up an exporter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from opentelemetry import propagate, trace
except ImportError:  # the extra is optional
    INSTALLED = False
else:
    INSTALLED = True


def trace_headers() -> dict[str, str]:
    """Return the request headers with which the service continues the current trace; none without a trace."""
    headers: dict[str, str] = {}
    if INSTALLED:
        propagate.inject(headers)
    return headers


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """Record the block as a span of the current trace."""
    if not INSTALLED:
        yield
        return
    with trace.get_tracer("vessa").start_as_current_span(name, attributes=attributes):
        yield
