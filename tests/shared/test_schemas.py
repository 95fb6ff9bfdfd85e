"""JSON between annotator and client: newer services stay readable, wrong types do not pass."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vessa.schemas import BankInfo, ErrorResponse, ItemInfo, Rle, SegmentAnswer, TemplateInfo

BANK = {"name": "b", "version": 2, "templates": 1, "groups": ["p"], "classes": {"1": "liver"}}
ANSWER = {
    "image_id": "sha256:0", "height": 4, "width": 5, "bank": "b", "bank_version": 2, "model": "m",
    "masks": [
        {"class_id": 1, "class_name": "a", "score": None, "area": 0, "rle": {"size": [4, 5], "counts": "d0"}}
    ],
    "templates": {"liver": [{"id": "t", "group": "p", "similarity": 0.5}]},
}  # fmt: skip


def test_fields_of_a_newer_service_are_ignored():
    assert BankInfo.model_validate(BANK | {"new": 1}) == BankInfo.model_validate(BANK)
    error = ErrorResponse.model_validate({"error": {"code": "c", "message": "m", "hint": "h"}, "trace": 1})
    assert error.error.item is None


def test_json_keeps_class_ids_as_numbers_here():
    bank = BankInfo.model_validate_json(BankInfo.model_validate(BANK).model_dump_json())
    assert bank.classes == {1: "liver"}
    with pytest.raises(ValidationError):
        BankInfo.model_validate(BANK | {"classes": {"one": "liver"}})


def test_what_was_received_cannot_be_changed():
    bank = BankInfo.model_validate(BANK)
    with pytest.raises(ValidationError):
        bank.version = 9


def test_a_segment_answer_survives_json():
    answer = SegmentAnswer.model_validate(ANSWER)
    assert SegmentAnswer.model_validate_json(answer.model_dump_json()) == answer
    assert answer.masks[0].rle == Rle(size=(4, 5), counts="d0")
    assert answer.masks[0].score is None


def test_an_items_status_is_one_of_two():
    assert ItemInfo.model_validate({"status": "ok", "image_id": "x"}).templates == {}
    with pytest.raises(ValidationError):
        ItemInfo.model_validate({"status": "perhaps", "image_id": "x"})


def test_a_template_counts_as_created_unless_the_service_says_otherwise():
    fields = {"id": "t", "bank": "b", "group": "p", "classes": {1: "liver"}, "height": 4, "width": 5}
    assert TemplateInfo.model_validate(fields).created
    assert not TemplateInfo.model_validate(fields | {"created": False}).created
