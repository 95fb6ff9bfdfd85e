"""Turn every failure into the one error form."""

import math

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vessa.errors import InvalidRequest, MethodNotAllowed, NotFound, Retryable, Unauthorized, VessaError
from vessa.redaction import redact
from vessa.schemas import ErrorBody, ErrorResponse
from vessa_server.observability.request_context import current_request

CLIENT_LEFT = 499  # nobody reads it; it makes the metrics tell disconnects from failures


def add_error_handlers(app: FastAPI) -> None:
    """Answer every failure of the app's routes in the one error form."""
    app.add_exception_handler(VessaError, _on_vessa_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def error_response(error: VessaError) -> Response:
    """Return {"error": {"code", "message", "item"}} with the error's status and its Retry-After."""
    headers = {}
    if isinstance(error, Retryable):
        headers["Retry-After"] = str(math.ceil(error.retry_after or 1))
    if error.queue_position is not None:
        headers["X-Queue-Position"] = str(error.queue_position)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    identity = current_request().id
    body = ErrorResponse(
        error=ErrorBody(code=error.code, message=redact(str(error)), item=error.item, request_id=identity)
    )
    status = error.status or 500
    return Response(body.model_dump_json(), status, headers, "application/json")


def _on_vessa_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, VessaError)
    request.app.state.service.metrics.errors.labels(error.code).inc()
    return error_response(error)


def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return error_response(InvalidRequest(f"{where}: {first['msg']}"))


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFound("there is no such route; GET /docs lists them"))
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"this route does not take {request.method[:20]}"))
        # Starlette's own names the methods of one route alone, and several may share a path.
        there = (r for r in iter_route_contexts(request.app.routes) if r.path_regex.match(request.url.path))
        response.headers["Allow"] = ", ".join(
            sorted({method for route in there for method in route.methods or ()})
        )
        return response
    return error_response(InvalidRequest("the request could not be read"))


def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)
