"""Post-processing: chosen where validation gains by it, kept with the run, applied case by case."""

import numpy as np
import pytest

from vessa_trainer.prediction.postprocessing import Postprocessing, Rule, choose


def volume(*blocks):
    """Labels (3, 12, 12) with blocks (class, z, y, x, side)."""
    labels = np.zeros((3, 12, 12), np.uint8)
    for class_id, z, y, x, side in blocks:
        labels[z, y : y + side, x : x + side] = class_id
    return labels


TRUTH = volume((1, 0, 0, 0, 4), (1, 1, 0, 0, 4), (2, 2, 6, 6, 3), (2, 2, 6, 0, 3))
SPECKLED = volume((1, 0, 0, 0, 4), (1, 1, 0, 0, 4), (1, 2, 0, 8, 2), (2, 2, 6, 6, 3), (2, 2, 6, 0, 3))


def test_a_rule_is_chosen_for_the_class_that_gains_and_no_other():
    chosen = choose([list(TRUTH)], [list(SPECKLED)], [1, 2], by_volume=True)
    assert list(chosen.rules) == [1]
    assert chosen.rules[1].largest
    assert chosen.rules[1].before == pytest.approx(2 * 32 / 68)
    assert chosen.rules[1].after == 1
    assert np.array_equal(np.stack(chosen.apply(list(SPECKLED))), TRUTH)


def test_a_class_of_two_components_loses_only_small_ones():
    speckled = SPECKLED.copy()
    speckled[0, 10, 10] = 2
    chosen = choose([list(TRUTH)], [list(speckled)], [2], by_volume=True)
    assert not chosen.rules[2].largest
    assert 1 < chosen.rules[2].smallest < 9
    assert np.array_equal(np.stack(chosen.apply(list(speckled))) == 2, TRUTH == 2)


def test_what_gains_nothing_is_not_chosen():
    assert choose([list(TRUTH)], [list(TRUTH)], [1, 2], by_volume=True).rules == {}
    assert choose([[None]], [[TRUTH[0]]], [1], by_volume=True).rules == {}


def test_a_class_of_one_component_keeps_it_alone_unless_validation_loses():
    """Class 1 has one component in the labeled volumes; validation shows no stray one, a new case does."""
    chosen = choose([list(TRUTH)], [list(TRUTH)], [1, 2], by_volume=True, single=[1])
    assert {i: rule.largest for i, rule in chosen.rules.items()} == {1: True}
    assert np.array_equal(np.stack(chosen.apply(list(SPECKLED))), TRUTH)
    assert choose([list(TRUTH)], [list(TRUTH)], [2], by_volume=True, single=[2]).rules == {}


def test_images_of_their_own_are_cleaned_one_by_one():
    rule = Rule(largest=True, smallest=0, before=0.5, after=0.6)
    slices = [TRUTH[2], np.zeros((5, 7), np.uint8)]
    cleaned = Postprocessing({2: rule}, by_volume=False).apply(slices)
    assert [(c == 2).sum() for c in cleaned] == [9, 0]
    assert [c.shape for c in cleaned] == [(12, 12), (5, 7)]


def test_rules_are_kept_with_the_run(tmp_path):
    assert Postprocessing.read(tmp_path).rules == {}
    chosen = choose([list(TRUTH)], [list(SPECKLED)], [1, 2], by_volume=True)
    chosen.write(tmp_path)
    assert Postprocessing.read(tmp_path) == chosen
