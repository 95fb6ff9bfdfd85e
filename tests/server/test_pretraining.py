"""Stage 1: losses by hand, tasks without leaks, synthetic data, exact resume."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vessa.datasets import open_dataset
from vessa_server.model.presets import PRESETS
from vessa_server.pretraining.augment import rough_boxes, rough_logits, shade, warp
from vessa_server.pretraining.loop import PretrainConfig, Pretraining, validation_pairs
from vessa_server.pretraining.losses import (
    LossWeights,
    mask_loss,
    quality_loss,
    retrieval_loss,
    soft_dice,
)
from vessa_server.pretraining.phantoms import write_phantoms
from vessa_server.pretraining.synthetic import phantom_study, random_study
from vessa_server.pretraining.tasks import Tasks, pool_of_dataset, pool_of_study, synthetic_pools


def test_mask_loss_is_equation_3():
    logits = torch.tensor([[[[0.0, math.log(3)]]]])  # probabilities 0.5 and 0.75
    target = torch.tensor([[[[0.0, 1.0]]]])
    bce = -(math.log(0.5) + math.log(0.75)) / 2
    dice = 1 - (2 * 0.75 + 1) / (1.25 + 1 + 1)
    expected = 2 * bce + 0.5 * dice
    assert mask_loss(logits, target, LossWeights()).item() == pytest.approx(expected, rel=1e-5)


def test_dice_of_a_perfect_and_of_a_missed_mask():
    target = torch.ones(1, 1, 4, 4)
    assert soft_dice(torch.full((1, 1, 4, 4), 30.0), target).item() == pytest.approx(1)
    assert soft_dice(torch.full((1, 1, 4, 4), -30.0), target, 1e-6).item() == pytest.approx(0, abs=1e-6)


def test_quality_loss_scores_present_masks_only():
    logits = torch.tensor([[[[5.0, -5.0]]], [[[5.0, -5.0]]]])
    target = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])  # IoU 0.5; absent
    presence = torch.tensor([0.0, 0.0])
    loss = quality_loss(torch.tensor([0.5, 0.9]), presence, logits, target)
    assert loss.item() == pytest.approx(math.log(2))


def test_retrieval_loss_prefers_the_same_image():
    vectors = torch.eye(3)
    assert retrieval_loss(vectors, vectors) < retrieval_loss(vectors, vectors.roll(1, 0))


def test_template_and_target_are_never_of_one_group():
    rng = np.random.default_rng(0)
    study = phantom_study("heart", rng, protocol="cine MR", patients=4, slices=4, size=64)
    for index, image in enumerate(study.images):
        image[0, 0] = index  # marks the slice
    pool = pool_of_study(study, "heart")
    tasks = Tasks([pool], [], 0.0, redraw=3)
    for _ in range(30):
        for pair in tasks.batch(rng, 4):
            template, target = study.groups[pair.template[0, 0]], study.groups[pair.target[0, 0]]
            assert template != target
            assert all((pair.template_mask == c).any() for c in pair.classes)


def test_the_bank_is_a_twentieth_of_the_groups():
    study = random_study(np.random.default_rng(1), patients=3, size=64)
    study.groups[:] = ["a", "b", "c"]
    pool = pool_of_study(study, "shapes")
    pool.redraw_bank(np.random.default_rng(0))
    assert len(pool.bank) == 1
    pool.group_names = [str(i) for i in range(60)]
    pool.redraw_bank(np.random.default_rng(0))
    assert len(pool.bank) == 3


def test_synthetic_studies_are_deterministic_and_have_every_class():
    studies = [
        phantom_study("abdomen", np.random.default_rng(5), protocol="CT", patients=2, slices=6, size=96)
        for _ in range(2)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(studies[0].images, studies[1].images, strict=True))
    assert set(np.unique(studies[0].masks)) == {0, 1, 2, 3, 4}
    heart = phantom_study("heart", np.random.default_rng(5), protocol=None, patients=2, slices=3, size=96)
    assert set(np.unique(heart.masks)) == {0, 1, 2, 3}


def test_the_phantom_myocardium_surrounds_the_cavity():
    study = phantom_study("heart", np.random.default_rng(0), protocol="cine MR", patients=5, slices=4)
    for mask in study.masks:
        cavity = mask == 3
        grown = np.zeros_like(cavity)
        grown[1:] |= cavity[:-1]
        grown[:-1] |= cavity[1:]
        grown[:, 1:] |= cavity[:, :-1]
        grown[:, :-1] |= cavity[:, 1:]
        assert set(np.unique(mask[grown & ~cavity])) <= {2}


def test_phantoms_are_written_as_a_data_set(tmp_path):
    first = write_phantoms(tmp_path / "a", patients=6, slices=2, size=64, seed=3)
    write_phantoms(tmp_path / "b", patients=6, slices=2, size=64, seed=3)
    assert first["heart"]["images"] == 12
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    dataset = open_dataset(tmp_path / "a" / "heart")
    splits = [set(dataset.split(f"splits/{name}.txt")) for name in ("train", "val", "test")]
    assert set.union(*splits) == set(dataset.groups())
    assert sum(map(len, splits)) == 6
    assert set(dataset.split("splits/labeled_1.txt")) <= splits[0]
    pool = pool_of_dataset(dataset, dataset.groups(), 64)
    assert pool.images.shape == (12, 64, 64)
    with Image.open(tmp_path / "a" / "heart" / "images" / "heart000_01.png") as image:
        assert image.mode == "L"


def test_image_and_mask_move_together():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(4, 1, 64, 64)
    masks[:, :, 20:44, 24:40] = 1
    moved, moved_masks = warp(masks, masks, generator, strength=1.0)
    assert ((moved > 0.5) == (moved_masks > 0.5)).float().mean() > 0.99
    assert not torch.equal(moved_masks, masks)
    shaded = shade(moved, generator)
    assert shaded.min() >= 0
    assert shaded.max() <= 1


def test_simulated_prompts_lie_on_the_mask():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, 16:32, 8:24] = 1
    boxes, labels = rough_boxes(masks, generator, jitter=0.0)
    assert boxes[0].tolist() == [[8.0, 16.0], [24.0, 32.0]]
    assert labels.tolist() == [[2, 3], [-1, -1]]
    logits = rough_logits(masks, 32, generator)
    assert logits.shape == (2, 1, 32, 32)
    assert logits[0, 0, 10:14, 6:10].mean() > logits[0, 0, 24:, 24:].mean() + 2


def _run(tmp_path, steps, name):
    pools = synthetic_pools(7, 4, 160)
    config = PretrainConfig(steps=steps, batch=2, warmup=2, validate_every=2)
    pairs = validation_pairs(pools, 2, 0)
    return Pretraining(
        PRESETS["nano"], config, Tasks([], pools, 1.0), pairs, tmp_path / name, {"command": "test"}
    )


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = _run(tmp_path, 4, "whole")
    whole.run()
    first = _run(tmp_path, 4, "halves")
    while first.step < 2:
        first._step()
    first._validate()
    first.save()
    second = _run(tmp_path, 4, "halves")
    assert second.resume()
    second.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert whole.best == second.best
    manifest = json.loads((tmp_path / "halves" / "weights" / "vessa.json").read_text())
    assert manifest["provenance"]["command"] == "test"


def test_a_run_that_diverges_says_so(tmp_path):
    run = _run(tmp_path, 4, "broken")
    with torch.no_grad():
        next(run.model.segmenter.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run._step()
