"""Advice from curves made by hand: said when it holds, and not before."""

import pytest

from vessa_trainer.reporting.diagnostics import advise, never_labeled, over_run

CLASSES = {1: "right ventricle", 2: "myocardium"}


def run_of(*, teacher, vessa=None, agreement=None, alpha=0.5, shares=None, rows=5):
    """Curves of a run: an entry a validation, before each of which come `rows` rows of steps."""
    found = []
    for index, dice in enumerate(teacher):
        for row in range(rows):
            one = {"step": 100 * index + row + 1, "loss": 1.0}
            if agreement is not None:
                one["agreement"] = agreement[index]
            one |= {"share_teacher_1": 0.1, "share_teacher_2": 0.1} if shares is None else shares[index]
            found.append(one)
        step = {"step": 100 * (index + 1), "val_teacher": {"mean": {"dice": dice}}}
        if vessa is not None:
            step |= {"val_vessa": {"mean": {"dice": vessa[index]}}, "alpha_v": alpha}
        found.append(step)
    return found


def kinds(rows):
    return [one.kind for one in advise(rows, CLASSES)]


def test_a_sound_run_is_left_alone():
    rows = run_of(teacher=[0.3, 0.5, 0.6, 0.7], vessa=[0.6, 0.62, 0.63, 0.66], agreement=[0.4, 0.5, 0.6, 0.7])
    assert over_run(rows, CLASSES) == []


def test_vessa_hurts_when_it_is_behind_three_times_in_a_row():
    teacher, vessa = [0.6, 0.7, 0.7, 0.7], [0.6, 0.6, 0.64, 0.64]
    assert kinds(run_of(teacher=teacher[:3], vessa=vessa[:3])) == []
    (one,) = advise(run_of(teacher=teacher, vessa=vessa), CLASSES)
    assert (one.kind, one.step) == ("VESSA hurts", 400)
    assert "worse than the teacher's by 0.06" in one.text
    assert kinds(run_of(teacher=teacher, vessa=vessa, alpha=0.1)) == []  # it has no say any more
    assert kinds(run_of(teacher=teacher, vessa=[0.6, 0.6, 0.66, 0.6])) == []


@pytest.mark.parametrize("who", ["teacher", "vessa"])
def test_an_echo_is_agreement_that_rises_while_somebody_falls(who):
    curves = {"teacher": [0.7, 0.7, 0.7], "vessa": [0.7, 0.7, 0.7]}
    curves[who] = [0.7, 0.69, 0.66]
    (one,) = advise(run_of(**curves, agreement=[0.6, 0.65, 0.7]), CLASSES)
    assert one.kind == "echo"
    assert "agree more by 0.10" in one.text
    assert kinds(run_of(**curves, agreement=[0.6, 0.6, 0.6])) == []
    curves[who] = [0.7, 0.69, 0.68]
    assert kinds(run_of(**curves, agreement=[0.6, 0.65, 0.7])) == []


def test_a_class_that_no_label_shows_is_named():
    there, gone = ({"share_teacher_1": 0.1, "share_teacher_2": s} for s in (0.01, 0.0))
    (one,) = advise(run_of(teacher=[0.5] * 4, shares=[there, gone, gone, gone]), CLASSES)
    assert (one.kind, one.about) == ("class missing from the labels of the teacher", "myocardium")
    assert kinds(run_of(teacher=[0.5] * 4, shares=[gone, there, gone, gone])) == []
    assert kinds(run_of(teacher=[0.5] * 3, shares=[gone] * 3, rows=2)) == []  # too few to tell


def test_advice_is_given_once_with_the_step_when_it_first_held():
    rows = run_of(teacher=[0.7] * 6, vessa=[0.5] * 6)
    assert [(one.kind, one.step) for one in over_run(rows, CLASSES)] == [("VESSA hurts", 300)]


def test_classes_without_a_labeled_mask_are_named():
    assert [one.about for one in never_labeled([0, 1], CLASSES)] == ["myocardium"]
    assert never_labeled([0, 1, 2], CLASSES) == []
