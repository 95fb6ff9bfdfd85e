"""Calibration of a bank: its own templates say when a class is absent; prompts overrule it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessa.codec import image_digest
from vessa_server.inference import pipeline as pipeline_module
from vessa_server.inference.annotator import Annotator
from vessa_server.inference.calibration import Calibration, calibrate, held_out
from vessa_server.model.weights import directory
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem, SegmentResult, TemplateItem

CLASSES = {1: "disk", 2: "ring"}


@pytest.fixture
def annotator(nano_weights: Path, tmp_path: Path, example: Any) -> Annotator:
    """Untrained weights and a bank of six examples of two patients."""
    model, digest = directory.read(nano_weights)
    annotator = Annotator(model, TemplateBanks(FolderStore(tmp_path)), 1 << 28, digest)
    items = [TemplateItem(*example(seed), CLASSES, f"p{seed % 2}") for seed in range(6)]
    annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
    return annotator


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
    assert calibrate(sure).absence == 0.95  # never higher
    doubtful = [(template, answer({1: 0.96, 2: 0.96}))] * 4
    assert calibrate(doubtful).absence == pytest.approx(1 - 3 * 0.04, abs=2e-3)
    assert calibrate([(template, answer({1: 0.6, 2: 0.6}))] * 4).absence == 0
    absent = [(replace(template, classes={1: "disk"}), answer({1: 0.999, 2: 0.1}))] * 8
    assert calibrate(absent).absence == 0.95  # what the template does not show counts for nothing


def test_few_templates_give_no_threshold(annotator: Annotator) -> None:
    template = annotator.banks.get("bank").templates[0]
    assert calibrate([(template, answer({1: 0.999, 2: 0.999}))] * 3) == Calibration()


def test_a_template_is_held_out_with_its_patient_where_there_are_others(
    annotator: Annotator, example: Any
) -> None:
    pairs = held_out(annotator.banks.get("bank"))
    assert len(pairs) == 6
    assert all(len(others.templates) == 5 and template not in others.templates for template, others in pairs)
    items = [TemplateItem(*example(seed), CLASSES, "third") for seed in (6, 7)]
    annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
    for template, others in held_out(annotator.banks.get("bank")):
        assert template.group not in {t.group for t in others.templates}


def test_a_single_template_needs_no_calibration(annotator: Annotator) -> None:
    for template in annotator.banks.get("bank").templates[1:]:
        annotator.banks.remove("bank", template.id)
    assert held_out(annotator.banks.get("bank")) == []


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

    def counted(pairs: Any) -> Calibration:
        calls.append(len(pairs))
        return calibrate(pairs)

    monkeypatch.setattr(pipeline_module, "calibrate", counted)
    annotator.segment([query(example), query(example, group="p0")])
    annotator.segment([query(example, template_choice="sample")])
    assert calls == [6]
    annotator.segment([query(example, template_choice="top3")])
    assert calls == [6, 6]  # three templates in memory give other peaks
    annotator.banks.remove("bank", annotator.banks.get("bank").templates[0].id)
    annotator.segment([query(example)])
    assert calls == [6, 6, 5]
