"""A second round: predicted volumes join the bank if validation says that labels improve."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig
from vessa_trainer.config import load_config
from vessa_trainer.experiments import second_round as module
from vessa_trainer.experiments.run import fit
from vessa_trainer.experiments.second_round import FILE, second_round

RESUME = "vessa-trainer second-round run --out second"


@pytest.fixture(scope="module")
def trained(start_annotator, tmp_path_factory):
    """A running annotator of the shipped weights: untrained ones gain nothing by better templates."""
    return start_annotator(tmp_path_factory.mktemp("trained"), VESSA_WEIGHTS="nano")


@pytest.fixture
def client(trained):
    with AnnotatorClient(trained.url, trained.api_key) as opened:
        yield opened


@pytest.fixture(scope="module")
def first(phantoms, trained, tmp_path_factory):
    """A finished first round of two steps."""
    folder = tmp_path_factory.mktemp("first")
    config = load_config(
        None,
        [
            "semi.method=vessa",
            f"data.root={phantoms}",
            f"annotator.url={trained.url}",
            f"annotator.api_key={trained.api_key}",
            f"cache.url=folder:{folder / 'labels'}",
            f"out={folder / 'run'}",
            "student={size: 32, crop: 32, widths: [4, 8, 16]}",
            "feedback.enabled=false",
            "batch_labeled=2",
            "batch_unlabeled=2",
            "steps=2",
            "eval_every=2",
        ],
    )
    fit(config, resume_line=RESUME)
    return folder / "run"


@pytest.fixture
def start(first, trained, monkeypatch, tmp_path):
    """Start a second round after the first; the key comes from the environment, as a run keeps none."""
    monkeypatch.setenv("VESSA_API_KEY", trained.api_key)
    shutil.copytree(first, tmp_path / "run")

    def run(**counts):
        return second_round(
            tmp_path / "run",
            tmp_path / "second",
            url=trained.url,
            resume_line=RESUME,
            console=Console(quiet=True),
            **{"candidates": 3, "templates": 1} | counts,
        )

    return run


def masks_of_student(monkeypatch, change):
    """Let the student predict the true masks of unlabeled patients, changed."""

    def predict(run, found, seed, count, console):
        groups = found.plan.splits.unlabeled[:count]
        return {
            group: [(s, change(group, found.data.mask(s))) for s in found.data.slices() if s.group == group]
            for group in groups
        }

    monkeypatch.setattr(module, "_predict", predict)


def displaced(mask, pixels):
    return np.roll(mask, pixels, axis=1)


def test_the_patient_that_leads_back_best_joins_the_bank(start, client, phantoms, monkeypatch, tmp_path):
    labeled, train = ((phantoms / "splits" / f"{n}.txt").read_text().split() for n in ("labeled_1", "train"))
    good = next(group for group in reversed(train) if group not in labeled)
    masks_of_student(monkeypatch, lambda group, mask: mask if group == good else displaced(mask, 12))
    banks = {bank.name for bank in client.banks()}
    record = start(candidates=4)
    dice = {c["group"]: c["dice"] for c in record["tried"]}
    assert len(dice) > 1
    assert record["templates"] == [max(dice, key=dice.get)] == [good]
    assert good in client.bank(record["bank"]).groups
    assert not any("-back-" in bank.name for bank in client.banks())  # the trial banks are gone
    assert record["bank"] in {bank.name for bank in client.banks()} - banks
    assert json.loads((tmp_path / "second" / FILE).read_text()) == record


def test_a_second_student_is_trained_from_better_labels(start, monkeypatch, tmp_path):
    masks_of_student(monkeypatch, lambda group, mask: mask)
    label_dice = module._dice

    def of_a_poor_first_bank(client, config, found, bank, cases):
        return label_dice(client, config, found, bank, cases) - 0.5 * ("-r2-" not in bank)

    monkeypatch.setattr(module, "_dice", of_a_poor_first_bank)
    record = start(templates=3)
    assert record["label_dice_after"] > record["label_dice_before"]
    better = record["second_val_dice"] > record["first_val_dice"]
    assert record["selected"] == str(tmp_path / ("second" if better else "run"))
    assert (tmp_path / "second" / "summary.json").is_file()
    assert start(templates=3) == record  # finished: nothing is trained anew


def test_worse_labels_end_the_round(start, monkeypatch, tmp_path):
    masks_of_student(monkeypatch, lambda group, mask: displaced(mask, 12))
    record = start(templates=3)
    assert record["label_dice_after"] <= record["label_dice_before"]
    assert record["second"] is None
    assert record["selected"] == str(tmp_path / "run")
    assert not (tmp_path / "second" / "summary.json").exists()


def test_a_student_that_finds_nothing_is_said(start, monkeypatch):
    monkeypatch.setattr(module, "_predict", lambda *given: {"heart001": []})
    with pytest.raises(InvalidConfig, match="finds no class in 1 unlabeled patients"):
        start()


def test_a_run_without_a_service_has_no_second_round(tiny, tmp_path):
    fit(tiny("semi.method=supervised"), resume_line=RESUME)
    with pytest.raises(InvalidConfig, match="was not trained with a service"):
        second_round(
            tmp_path / "run",
            tmp_path / "second",
            url=None,
            candidates=1,
            templates=1,
            resume_line=RESUME,
            console=Console(quiet=True),
        )


def test_the_student_s_own_masks_are_tried(start, monkeypatch):
    found = {}

    def noted(*given):
        found.update(predict(*given))
        return {"heart001": []}

    predict = module._predict
    monkeypatch.setattr(module, "_predict", noted)
    with pytest.raises(InvalidConfig, match="finds no class"):
        start()
    assert len(found) == 3
    assert all(mask.dtype == np.uint8 and mask.any() for masks in found.values() for _, mask in masks)
