"""Hold the context of the current request, for logs, errors and the audit log."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class RequestContext:
    """Describe the current request; "-" stands for what is not known yet.

    id: of the request; key: name of its key; bank: name of its template bank; source: address of the client
    """

    id: str = "-"
    key: str = "-"
    bank: str = "-"
    source: str = "-"


# Filled in place: a dependency that runs in a worker thread sees the object, but could not set the variable.
CURRENT_REQUEST: ContextVar[RequestContext | None] = ContextVar("vessa_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the current request, an empty one outside of any."""
    return CURRENT_REQUEST.get() or RequestContext()
