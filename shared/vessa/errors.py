"""The error tree. Each class has a stable code and the HTTP status that the service answers with.

The first level says what the caller can do:

ClientError     change the request, the data or the configuration; the same request fails again
  InputError    ... and only for this image: other items of the same batch may succeed
ServiceError    report it; the service has a fault
Retryable       wait and send the same request again

The client raises the same class that the service raised, so that one `except` works on both sides.
"""

from collections.abc import Iterator
from typing import ClassVar


class VessaError(Exception):
    """Base of all errors that a user can meet.

    message: what is wrong, what was expected, what to do next
    item: index within a batch; retry_after: seconds to wait before a retry; queue_position: of a refused
    request
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        item: int | None = None,
        retry_after: float | None = None,
        queue_position: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.item = item
        self.retry_after = retry_after
        self.queue_position = queue_position


class ClientError(VessaError):
    """The caller must change the request, the data or the configuration."""


class InputError(ClientError):
    """One image, its mask or its prompts cannot be used; other items of the batch may be fine."""


class ServiceError(VessaError):
    """The service has a fault that neither the caller nor time mends."""


class Retryable(VessaError):
    """A condition that passes: the same request may succeed after `retry_after` seconds."""


class Unauthorized(ClientError):
    """The request has no key or an invalid key."""

    code, status = "unauthorized", 401


class Forbidden(ClientError):
    """The key does not have the role or the bank that the request needs."""

    code, status = "forbidden", 403


class NotFound(ClientError):
    """The route does not exist."""

    code, status = "not_found", 404


class UnknownBank(ClientError):
    """The template bank does not exist."""

    code, status = "unknown_bank", 404


class UnknownTemplate(ClientError):
    """The bank has no template with this id."""

    code, status = "unknown_template", 404


class UnknownJob(ClientError):
    """The job does not exist, or it belongs to another key."""

    code, status = "unknown_job", 404


class UnknownWorklist(ClientError):
    """The worklist or its item does not exist, or it belongs to another key."""

    code, status = "unknown_worklist", 404


class UnknownSession(ClientError):
    """The viewer's session has ended, or it belongs to another key."""

    code, status = "unknown_session", 410


class UnknownAnnotation(ClientError):
    """The annotation is not in the service's cache, or it belongs to another key."""

    code, status = "unknown_annotation", 404


class MethodNotAllowed(ClientError):
    """The route exists but does not accept this method."""

    code, status = "method_not_allowed", 405


class ClassConflict(ClientError):
    """A class id already has another name in the bank."""

    code, status = "class_conflict", 409


class JobUnfinished(ClientError):
    """The job has no result yet."""

    code, status = "job_unfinished", 409


class UnknownClass(ClientError):
    """The bank, or the request's own class map, does not have this class."""

    code, status = "unknown_class", 422


class InvalidRequest(ClientError):
    """A field is missing, or has a wrong type or value."""

    code, status = "invalid_request", 422


class InvalidDataset(ClientError):
    """The folder is not a data set, or its files contradict its description."""

    code, status = "invalid_dataset", 422


class InvalidConfig(ClientError):
    """The configuration has an unknown key or a value out of range."""

    code, status = "invalid_config", 422


class InvalidWeights(ClientError):
    """The weights are missing, damaged or of another model."""

    code, status = "invalid_weights", 422


class MalformedBody(InputError):
    """The body is truncated, or its header contradicts its bytes."""

    code, status = "malformed_body", 400


class UnknownImage(InputError):
    """The service no longer holds the image with this id; send its pixels again."""

    code, status = "unknown_image", 404


class NoTemplate(InputError):
    """The bank has no template of a class from another group than the query's."""

    code, status = "no_template", 409


class TooLarge(InputError):
    """The request has more bytes, pixels or items than the service accepts."""

    code, status = "too_large", 413


class UnsupportedMedia(InputError):
    """The route does not read this content type."""

    code, status = "unsupported_media", 415


class InvalidImage(InputError):
    """The file is not a readable image of a supported format."""

    code, status = "invalid_image", 422


class ShapeMismatch(InputError):
    """Two arrays that must have the same size do not."""

    code, status = "shape_mismatch", 422


class InvalidPrompt(InputError):
    """A box, point or mask-logit prompt is out of its range."""

    code, status = "invalid_prompt", 422


class InternalError(ServiceError):
    """The service failed for a reason that only its log names."""

    code, status = "internal", 500


class QueueFull(Retryable):
    """The service has no free place in its queue."""

    code, status = "queue_full", 429


class LimitReached(Retryable):
    """The key has reached its limit of requests in progress or per minute."""

    code, status = "limit_reached", 429


class NotReady(Retryable):
    """The service is starting or shutting down."""

    code, status = "not_ready", 503


class StoreUnavailable(Retryable):
    """The service cannot reach the template store."""

    code, status = "store_unavailable", 503


class LanguageUnavailable(Retryable):
    """The service cannot use the server of the language model."""

    code, status = "language_unavailable", 503


class DamagedBank(ServiceError):
    """A template bank that is set aside because its stored index cannot be read."""

    code, status = "damaged_bank", 500


class DeadlineExceeded(Retryable):
    """The request took longer than the service allows. The input may be the cause: limit the retries."""

    code, status = "deadline_exceeded", 504


class Unreachable(Retryable):
    """The client could not reach the service."""

    code, status = "unreachable", 0


class BadResponse(Retryable):
    """The response does not follow the annotator's protocol, as from a proxy whose annotator is down."""

    code, status = "bad_response", 0


def _leaves(cls: type[VessaError]) -> Iterator[type[VessaError]]:
    for child in cls.__subclasses__():
        yield from _leaves(child) if child.__subclasses__() else [child]


# Code to class; the levels in between have no code of their own.
ERRORS: dict[str, type[VessaError]] = {cls.code: cls for cls in _leaves(VessaError)}


def error_from(
    code: str, message: str, item: int | None = None, retry_after: float | None = None
) -> VessaError:
    """Make the error of a code; an unknown code becomes an InternalError that names it."""
    cls = ERRORS.get(code)
    if cls is None:
        return InternalError(f"{code}: {message}", item=item, retry_after=retry_after)
    return cls(message, item=item, retry_after=retry_after)
