"""The context of the request that is served, for logs and errors."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class RequestContext:
    """What the log says of the request that is served. key: name of its key, "-" before it is known."""

    id: str = "-"
    key: str = "-"


# Filled in place: a dependency that runs in a worker thread sees the object, but could not set the variable.
CURRENT_REQUEST: ContextVar[RequestContext | None] = ContextVar("vessa_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the request that this code serves, an empty one outside of any."""
    return CURRENT_REQUEST.get() or RequestContext()
