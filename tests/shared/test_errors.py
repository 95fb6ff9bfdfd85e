"""The error tree: stable codes, one class for each, and branches that say what the caller can do."""

from __future__ import annotations

import pytest

from vessa.errors import (
    ERRORS,
    ClientError,
    InputError,
    InternalError,
    QueueFull,
    Retryable,
    ServiceError,
    VessaError,
    error_from,
)

# Callers rely on these codes: a change breaks clients of another version.
STABLE = {
    "malformed_body": 400, "unauthorized": 401, "forbidden": 403, "not_found": 404, "unknown_bank": 404,
    "unknown_template": 404, "unknown_image": 404, "method_not_allowed": 405, "no_template": 409,
    "class_conflict": 409, "too_large": 413, "unsupported_media": 415, "invalid_image": 422,
    "shape_mismatch": 422, "unknown_class": 422, "invalid_prompt": 422, "invalid_request": 422,
    "invalid_dataset": 422, "invalid_config": 422, "invalid_weights": 422, "queue_full": 429, "internal": 500,
    "not_ready": 503, "store_unavailable": 503, "deadline_exceeded": 504, "unreachable": 0, "bad_response": 0,
    "job_unfinished": 409, "unknown_job": 404, "unknown_worklist": 404, "unknown_session": 410,
    "limit_reached": 429, "language_unavailable": 503,
    "unknown_annotation": 404, "damaged_bank": 500,
}  # fmt: skip


def test_codes_and_statuses_are_stable():
    assert {code: cls.status for code, cls in ERRORS.items()} == STABLE


def test_each_class_has_its_own_code_and_a_docstring():
    assert all(cls.__doc__ and vars(cls)["code"] == code for code, cls in ERRORS.items())
    assert (VessaError.code, VessaError.status) == ("internal", 500)


def test_each_error_is_on_one_branch_of_the_tree():
    branches = (ClientError, ServiceError, Retryable)
    for cls in ERRORS.values():
        assert sum(issubclass(cls, branch) for branch in branches) == 1, cls


def test_the_branch_agrees_with_the_status():
    for cls in ERRORS.values():
        expected = {4: ClientError, 5: ServiceError}.get(cls.status // 100)
        if cls.status in (0, 429, 503, 504):
            expected = Retryable
        assert issubclass(cls, expected), cls


def test_errors_about_one_image_are_input_errors():
    codes = {code for code, cls in ERRORS.items() if issubclass(cls, InputError)}
    assert codes == {
        "malformed_body", "unknown_image", "no_template", "too_large", "unsupported_media", "invalid_image",
        "shape_mismatch", "invalid_prompt",
    }  # fmt: skip


@pytest.mark.parametrize("code", STABLE)
def test_a_code_becomes_its_class_again(code):
    error = error_from(code, "expected this", item=3, retry_after=2.0)
    assert type(error) is ERRORS[code]
    assert (str(error), error.message) == ("expected this", "expected this")
    assert (error.item, error.retry_after, error.queue_position) == (3, 2.0, None)


def test_an_unknown_code_is_kept_in_the_message():
    error = error_from("of_tomorrow", "expected this", item=1)
    assert type(error) is InternalError
    assert str(error) == "of_tomorrow: expected this"
    assert error.item == 1


def test_vessa_error_catches_all_and_details_are_optional():
    error = QueueFull("full", queue_position=4)
    assert isinstance(error, VessaError)
    assert (error.item, error.retry_after, error.queue_position) == (None, None, 4)
