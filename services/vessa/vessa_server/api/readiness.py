"""Check within a bounded time whether the service can work."""

import asyncio

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI

from vessa.errors import NotReady

CHECK_S = 3.0
_CHECKS = 4  # threads of their own: a thread pool full of requests must not delay a probe


async def check_ready(app: FastAPI) -> None:
    """Raise NotReady, StoreUnavailable or LanguageUnavailable unless weights, worker, store and jobs work."""
    if not hasattr(app.state, "checks"):
        app.state.checks = CapacityLimiter(_CHECKS)
    try:
        async with asyncio.timeout(CHECK_S):
            await run_sync(_check, app, limiter=app.state.checks, abandon_on_cancel=True)
    except TimeoutError:
        raise NotReady(
            f"The service did not answer its own check within {CHECK_S:g} s. Retry later; see the log.",
            retry_after=5.0,
        ) from None


def _check(app: FastAPI) -> None:
    app.state.service.check_ready()
    app.state.jobs.check()
