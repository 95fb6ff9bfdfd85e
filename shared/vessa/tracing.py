"""Traces across the trainer, the client and the annotator, where OpenTelemetry is installed (extra `otel`).

Its API does nothing until a program sets up an exporter, so these calls cost next to nothing without one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from opentelemetry import propagate, trace
except ImportError:  # an optional extra
    INSTALLED = False
else:
    INSTALLED = True


def trace_headers() -> dict[str, str]:
    """Return the headers that let the one who is asked continue this trace; none outside of any."""
    headers: dict[str, str] = {}
    if INSTALLED:
        propagate.inject(headers)
    return headers


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """Time what happens inside as a span of the current trace."""
    if not INSTALLED:
        yield
        return
    with trace.get_tracer("vessa").start_as_current_span(name, attributes=attributes):
        yield
