"""Answer failures as the clients of the nnInteractive protocol read them."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from vessa.errors import Retryable, VessaError
from vessa_server.api.dependencies import service_of
from vessa_server.api.error_handlers import error_response


class DetailedRoute(APIRoute):
    """Answer failures with the field `detail` too, which the protocol's clients show."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of the route."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except VessaError as error:
                service_of(request).metrics.errors.labels(error.code).inc()
                return _failure(error, claim=request.url.path.endswith("/claim"))

        return answer


def _failure(error: VessaError, *, claim: bool) -> Response:
    """Return the answer to a failure; a claim that must wait gets 503, as the protocol's clients expect."""
    response = error_response(error)
    content = json.loads(bytes(response.body)) | {"detail": str(error)}
    status = 503 if claim and isinstance(error, Retryable) else response.status_code
    kept = {"retry-after", "www-authenticate", "x-queue-position"}
    headers = {name: value for name, value in response.headers.items() if name in kept}
    return Response(json.dumps(content), status, headers, "application/json")
