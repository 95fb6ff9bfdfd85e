"""Test scores of labels and the measure of echoed prompts."""

import numpy as np
import pytest

from vessa.client import Prompts
from vessa_trainer.pseudo_labels.quality import Calibration, EchoCheck, PooledDice


def test_dice_is_pooled_over_images_and_averaged_over_classes():
    dice = PooledDice([1, 2])
    dice.add("a", np.array([[1, 1, 0, 2]]), np.array([[1, 0, 0, 2]]))
    dice.add("b", np.array([[1, 0, 0, 0]]), np.array([[1, 1, 0, 0]]))
    first, second = 2 * 2 / (3 + 3), 2 * 1 / (1 + 1)
    assert dice.value() == pytest.approx((first + second) / 2)


def test_an_image_seen_again_replaces_itself():
    dice = PooledDice([1])
    dice.add("a", np.array([[1, 1]]), np.array([[0, 0]]))
    assert dice.value() == 0
    dice.add("a", np.array([[1, 1]]), np.array([[1, 1]]))
    assert dice.value() == 1


def test_a_class_that_never_occurs_does_not_count():
    dice = PooledDice([1, 2])
    assert dice.value() is None
    dice.add("a", np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
    assert dice.value() is None
    dice.add("b", np.array([[1, 0]]), np.array([[1, 0]]))
    assert dice.value() == 1


def test_masks_may_be_given_class_by_class():
    dice = PooledDice([1, 2])
    ours = np.array([[[True, True]], [[False, False]]])
    dice.add("a", ours, np.array([[[True, False]], [[False, True]]]))
    assert dice.value() == pytest.approx((2 / 3 + 0) / 2)


def test_the_calibration_error_is_the_distance_from_how_often_labels_are_right():
    """Five pixels of a structure: two of confidence 1 of which one is right, three of 0.6, all right."""
    calibration = Calibration()
    assert calibration.value() is None
    labels, truth = np.array([[1, 1, 2, 2, 2, 0, 1, 1]]), np.array([[1, 0, 2, 2, 2, 0, 255, 1]])
    confidence = np.array([[255, 255, 153, 153, 153, 255, 255, 0]], np.uint8)
    calibration.add("a", labels, confidence, truth)
    assert calibration.value() == pytest.approx((2 * abs(1 - 0.5) + 3 * abs(0.6 - 1)) / 5)
    low, high = calibration.curve()
    assert (low["confidence"], low["right"], low["share"]) == pytest.approx((0.6, 1, 0.6))
    assert (high["confidence"], high["right"], high["share"]) == pytest.approx((1, 0.5, 0.4))
    calibration.add("a", truth % 255, confidence, truth)  # newer labels of the same image, all right
    assert calibration.curve()[-1]["right"] == 1


def logits(*masks):
    return np.where(np.array(masks) > 0, 6, -6).astype(np.float16)


def test_an_echo_agrees_with_its_prompts_more_than_what_it_replaces():
    prompts = Prompts(mask_logits=logits([[1, 1], [0, 0]]))
    echo = EchoCheck([1])
    echo.add("a", prompts, np.array([[1, 0], [1, 0]]), np.array([[1, 1], [0, 0]]))
    assert echo.before.value() == 0.5
    assert echo.after.value() == 1


def test_labels_are_compared_on_the_grid_of_the_prompts():
    labels = np.zeros((8, 6), np.uint8)
    labels[:4] = 1
    echo = EchoCheck([1])
    echo.add("a", Prompts(mask_logits=logits([[1, 1, 1], [0, 0, 0]])), np.zeros_like(labels), labels)
    assert echo.before.value() == 0
    assert echo.after.value() == 1


def test_a_class_without_a_prompt_was_not_asked_about():
    both = logits([[1, 0]], [[0, 1]])
    labels = np.array([[1, 1]])
    asked = EchoCheck([1, 2])
    asked.add("a", Prompts(mask_logits=both, mask_present=np.array([1, 0])), labels, labels)
    assert asked.after.value() == pytest.approx(2 / 3)
    silent = EchoCheck([1, 2])
    silent.add("a", Prompts(boxes=np.zeros((2, 4))), labels, labels)
    assert silent.after.value() is None
