"""Calibration of a bank: its own templates say when a class is absent; prompts overrule it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vessa.codec import image_digest
from vessa_server.inference import pipeline as pipeline_module
from vessa_server.inference.annotator import Annotator
from vessa_server.inference.calibration import (
    Calibration,
    absence_threshold,
    classes_of_one_piece,
    held_out,
    islands,
    sample_of,
)
from vessa_server.inference.fusion import fuse
from vessa_server.inference.query import Query
from vessa_server.inference.retrieval import class_queries
from vessa_server.model.geometry import Square
from vessa_server.types import SegmentItem, SegmentResult, TemplateItem

CLASSES = {1: "disk", 2: "ring"}


@pytest.fixture
def annotator(annotator_of: Any) -> Annotator:
    """Untrained weights and a bank of six examples of two patients."""
    return annotator_of([f"p{seed % 2}" for seed in range(6)])  # type: ignore[no-any-return]


def pairs_of(annotator: Annotator) -> list[Any]:
    bank = annotator.banks.get("bank")
    return held_out(bank, sample_of(bank))


def query(example: Any, **options: Any) -> SegmentItem:
    image = example(20)[0]
    return SegmentItem(image_digest(image), image, "bank", probabilities=True, **options)


def result_with(annotator: Annotator, item: SegmentItem, threshold: float) -> SegmentResult:
    bank = annotator.banks.get("bank")
    annotator._pipeline._calibrations[bank.digest, "top1"] = Calibration(threshold)
    result = annotator.segment([item])[0]
    assert isinstance(result, SegmentResult)
    return result


def answer(peaks: dict[int, float]) -> Any:
    """A result with the given highest probability of each class."""
    probabilities = np.zeros((len(peaks) + 1, 4, 4), np.float16)
    for row, peak in enumerate(peaks.values(), 1):
        probabilities[row, 1, 1] = peak

    class Result:
        class_ids = tuple(peaks)

    Result.probabilities = probabilities  # type: ignore[attr-defined]
    return Result


def test_the_threshold_follows_the_peaks_of_classes_that_are_shown(annotator: Annotator) -> None:
    template = annotator.banks.get("bank").templates[0]
    sure = [(template, answer({1: 0.999, 2: 0.999}))] * 4
    assert absence_threshold(sure) == 0.95  # never higher
    doubtful = [(template, answer({1: 0.96, 2: 0.96}))] * 4
    assert absence_threshold(doubtful) == pytest.approx(1 - 3 * 0.04, abs=2e-3)
    assert absence_threshold([(template, answer({1: 0.6, 2: 0.6}))] * 4) == 0
    absent = [(replace(template, classes={1: "disk"}), answer({1: 0.999, 2: 0.1}))] * 8
    assert absence_threshold(absent) == 0.95  # what the template does not show counts for nothing


def test_few_templates_give_no_threshold(annotator: Annotator) -> None:
    template = annotator.banks.get("bank").templates[0]
    assert absence_threshold([(template, answer({1: 0.999, 2: 0.999}))] * 3) == 0


def test_a_template_is_held_out_with_its_patient_where_there_are_others(
    annotator: Annotator, example: Any
) -> None:
    pairs = pairs_of(annotator)
    assert len(pairs) == 6
    assert all(len(others.templates) == 5 and template not in others.templates for template, others in pairs)
    items = [TemplateItem(*example(seed), CLASSES, "third") for seed in (6, 7)]
    annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
    for template, others in pairs_of(annotator):
        assert template.group not in {t.group for t in others.templates}


def test_a_single_template_needs_no_calibration(annotator: Annotator) -> None:
    for template in annotator.banks.get("bank").templates[1:]:
        annotator.banks.remove("bank", template.id)
    assert pairs_of(annotator) == []


def test_a_class_below_the_threshold_is_left_out_and_named(annotator: Annotator, example: Any) -> None:
    free = result_with(annotator, query(example), 0.0)
    assert free.absent == ()
    assert free.probabilities is not None
    highest = free.probabilities[1:].reshape(2, -1).max(1).astype(float)
    between = float(highest.mean())
    result = result_with(annotator, query(example), between)
    lower, higher = np.argsort(highest)
    assert result.absent == (result.class_names[lower],)
    assert result.absence_threshold == between
    assert not (result.labels == result.class_ids[lower]).any()
    assert result.probabilities is not None
    assert result.probabilities[1 + lower].max() < 1e-3
    assert np.allclose(result.probabilities.astype(np.float32).sum(0), 1, atol=5e-3)
    assert result.probabilities[1 + higher].max() >= highest[higher]


def test_a_prompt_asserts_presence(annotator: Annotator, example: Any) -> None:
    boxes = np.array([[5, 5, 30, 30], [-1, -1, -1, -1]], np.float32)
    result = result_with(annotator, query(example, classes=("disk", "ring"), boxes=boxes), 1.1)
    assert result.absent == ("ring",)
    points, outside = np.full((2, 1, 2), 9, np.float32), np.array([[1], [0]], np.int8)
    marked = query(example, classes=("disk", "ring"), points=points, point_labels=outside)
    assert result_with(annotator, marked, 1.1).absent == ("ring",)


def test_a_bank_is_calibrated_once_a_state(
    annotator: Annotator, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(pairs: Any) -> float:
        calls.append(len(pairs))
        return absence_threshold(pairs)

    monkeypatch.setattr(pipeline_module, "absence_threshold", counted)
    annotator.segment([query(example), query(example, group="p0")])
    annotator.segment([query(example, template_choice="sample")])
    assert calls == [6]
    annotator.segment([query(example, template_choice="top3")])
    assert calls == [6, 6]  # three templates in memory give other peaks
    annotator.banks.remove("bank", annotator.banks.get("bank").templates[0].id)
    annotator.segment([query(example)])
    assert calls == [6, 6, 5]


def test_islands_are_all_pieces_but_the_largest() -> None:
    mask = np.zeros((9, 9), bool)
    mask[1:4, 1:4] = mask[4, 4] = True  # joined at a corner
    mask[7, 1:3] = mask[1, 7] = True
    assert set(zip(*map(list, np.nonzero(islands(mask))), strict=True)) == {(7, 1), (7, 2), (1, 7)}
    assert not islands(mask & (np.arange(9) < 6)[:, None] & (np.arange(9) < 6)).any()
    assert not islands(np.zeros((3, 3), bool)).any()


def test_classes_of_one_piece_are_learned_from_enough_templates(annotator: Annotator) -> None:
    template = annotator.banks.get("bank").templates[0]
    one, two = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    one[2:8, 2:8], two[2:8, 2:8], two[12:16, 12:16] = 1, 1, 1
    once, twice = (replace(template, mask=mask, classes={1: "disk"}) for mask in (one, two))
    assert classes_of_one_piece([once] * 12) == {1}
    assert classes_of_one_piece([once] * 11) == set()
    assert classes_of_one_piece([once] * 14 + [twice]) == {1}
    assert classes_of_one_piece([once] * 12 + [twice] * 2) == set()


@torch.inference_mode()
def test_islands_of_a_class_of_one_piece_are_removed_and_counted(annotator: Annotator, example: Any) -> None:
    image, bank = example(20)[0], annotator.banks.get("bank")
    height, width = image.shape
    view = annotator._pipeline.encoder.encode([image], [Square(height, width)])[0]
    logits = torch.full((2, 1, 1, 64, 64), -9.0)
    logits[0, ..., 20:40, 10:30] = logits[0, ..., 20:24, 50:54] = 5.0  # a disk and an island of it
    logits[1, ..., 18:26, 48:56] = 3.0  # the ring lies below the island
    masks = [(one, 0.5) for one in logits]

    def fused(calibration: Calibration, **prompts: Any) -> SegmentResult:
        item = query(example, classes=("disk", "ring"), **prompts)
        asked = Query(item, bank, view, calibration=calibration)
        return fuse(asked, class_queries(asked), masks)

    free = fused(Calibration())
    island = islands(free.labels == 1)
    assert island.any()
    result = fused(Calibration(single=frozenset({1})))
    assert result.islands == {"disk": int(island.sum())}
    assert np.array_equal(result.labels == 1, (free.labels == 1) & ~island)
    assert (result.labels[island] == 2).all()  # what lies below it comes to light
    assert not result.confidence[island].any()
    assert np.array_equal(result.confidence[~island], free.confidence[~island])
    points, inside = np.full((2, 1, 2), 9, np.float32), np.array([[1], [-1]], np.int8)
    marked = fused(Calibration(single=frozenset({1})), points=points, point_labels=inside)
    assert marked.islands == {}
