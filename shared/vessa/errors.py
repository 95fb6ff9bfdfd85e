"""The error tree. Each class has a stable code and the HTTP status the service answers with.

The client raises the class again that the service raised, so that one `except` works on both sides.
"""

from typing import ClassVar


class VessaError(Exception):
    """Base of all errors a user can meet.

    message: what was wrong, what was expected, what to do. item: index within a batch.
    retry_after: seconds to wait before asking again. queue_position: of a refused request.
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


class MalformedBody(VessaError):
    """The body cannot be read: truncated, or its header contradicts its bytes."""

    code, status = "malformed_body", 400


class Unauthorized(VessaError):
    """No key, or a wrong one."""

    code, status = "unauthorized", 401


class Forbidden(VessaError):
    """The key may not do this."""

    code, status = "forbidden", 403


class NotFound(VessaError):
    """No such route."""

    code, status = "not_found", 404


class UnknownBank(VessaError):
    """No template bank of this name."""

    code, status = "unknown_bank", 404


class UnknownTemplate(VessaError):
    """No template of this id."""

    code, status = "unknown_template", 404


class UnknownImage(VessaError):
    """The service no longer holds this image id; send the pixels again."""

    code, status = "unknown_image", 404


class UnknownJob(VessaError):
    """No job of this id, or it is another key's."""

    code, status = "unknown_job", 404


class UnknownAnnotation(VessaError):
    """The service keeps no annotation of this id, or no longer, or it is another key's."""

    code, status = "unknown_annotation", 404


class MethodNotAllowed(VessaError):
    """The route exists, the method does not."""

    code, status = "method_not_allowed", 405


class NoTemplate(VessaError):
    """The bank holds no template of a class from another group than the query's."""

    code, status = "no_template", 409


class ClassConflict(VessaError):
    """A class id already has another name in the bank."""

    code, status = "class_conflict", 409


class JobUnfinished(VessaError):
    """The job has no result yet."""

    code, status = "job_unfinished", 409


class TooLarge(VessaError):
    """More bytes, pixels or items than the service takes."""

    code, status = "too_large", 413


class UnsupportedMedia(VessaError):
    """A content type the route does not read."""

    code, status = "unsupported_media", 415


class InvalidImage(VessaError):
    """Not a readable image of a supported format."""

    code, status = "invalid_image", 422


class ShapeMismatch(VessaError):
    """Two arrays that must have the same size do not."""

    code, status = "shape_mismatch", 422


class UnknownClass(VessaError):
    """A class that the bank, or the request's own class map, does not have."""

    code, status = "unknown_class", 422


class InvalidPrompt(VessaError):
    """A box, point or mask-logit prompt out of its range."""

    code, status = "invalid_prompt", 422


class InvalidRequest(VessaError):
    """A field is missing or has a wrong type or value."""

    code, status = "invalid_request", 422


class InvalidDataset(VessaError):
    """A folder that is not a data set, or does not hold what it says."""

    code, status = "invalid_dataset", 422


class InvalidConfig(VessaError):
    """A configuration with an unknown key or a value out of range."""

    code, status = "invalid_config", 422


class InvalidWeights(VessaError):
    """Weights that are missing, damaged or of another model."""

    code, status = "invalid_weights", 422


class QueueFull(VessaError):
    """The service is at capacity; `retry_after` says when to come back."""

    code, status = "queue_full", 429


class LimitReached(VessaError):
    """The key has used up what it may at once, or in a minute; `retry_after` says when to come back."""

    code, status = "limit_reached", 429


class InternalError(VessaError):
    """A fault of the service."""

    code, status = "internal", 500


class NotReady(VessaError):
    """The service is loading or draining."""

    code, status = "not_ready", 503


class StoreUnavailable(VessaError):
    """The template store cannot be reached."""

    code, status = "store_unavailable", 503


class LanguageUnavailable(VessaError):
    """The server of the language model cannot be used; `retry_after` says when to come back."""

    code, status = "language_unavailable", 503


class DeadlineExceeded(VessaError):
    """The request took longer than the service allows."""

    code, status = "deadline_exceeded", 504


class Unreachable(VessaError):
    """The client could not reach the service."""

    code, status = "unreachable", 0


class BadResponse(VessaError):
    """The service answered something that is not its protocol."""

    code, status = "bad_response", 0


# What passes by itself, whatever was asked: come back after `retry_after`.
PASSING = (QueueFull, LimitReached, NotReady, StoreUnavailable, LanguageUnavailable)

ERRORS: dict[str, type[VessaError]] = {cls.code: cls for cls in VessaError.__subclasses__()}


def error_from(
    code: str, message: str, item: int | None = None, retry_after: float | None = None
) -> VessaError:
    """Make the error of a code again; an unknown code becomes InternalError that names it."""
    cls = ERRORS.get(code)
    if cls is None:
        return InternalError(f"{code}: {message}", item=item, retry_after=retry_after)
    return cls(message, item=item, retry_after=retry_after)
