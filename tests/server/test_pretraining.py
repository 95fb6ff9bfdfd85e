"""Stage 1: losses by hand, tasks without leaks, synthetic data, exact resume."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from vessa.datasets import open_dataset
from vessa_server.model.presets import PRESETS
from vessa_server.model.vessa import Vessa
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
from vessa_server.pretraining.step import prepare, training_loss
from vessa_server.pretraining.synthetic import phantom_study, random_study
from vessa_server.pretraining.tasks import (
    Pool,
    Tasks,
    composite_pools,
    pool_of_dataset,
    pool_of_study,
    synthetic_pools,
)


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


def _hearts(patients=3):
    """A pool as of real cine MR: phantom slices of which only the left ventricle's cavity is annotated."""
    study = phantom_study(
        "heart", np.random.default_rng(5), protocol="cine MR", patients=patients, slices=3, size=96
    )
    masks = (np.stack(study.masks) == 3).astype(np.uint8)
    return Pool("cine", np.stack(study.images), masks, study.groups, {1: "LV cavity (endocardial contour)"})


def test_composites_set_a_whole_heart_where_the_real_one_is():
    pool = _hearts()
    (heart,) = composite_pools([pool], 0, 1)
    assert set(heart.classes.values()) == {
        "right ventricle cavity",
        "left ventricle myocardium",
        "left ventricle cavity",
    }
    assert heart.group_names == pool.group_names
    real = {i.tobytes(): m for i, m in zip(pool.images, pool.masks, strict=True)}
    assert not any(i.tobytes() in real for i in heart.images)  # each was painted over
    for mask in heart.masks:
        ours = np.argwhere(mask == 3).mean(0)
        centers = [np.argwhere(m == 1).mean(0) for m in pool.masks if m.any()]
        assert min(np.linalg.norm(ours - c) for c in centers) < 3
    assert (
        composite_pools([pool_of_study(random_study(np.random.default_rng(0), patients=3), "s")], 0, 2) == []
    )


def test_region_tasks_mark_a_region_and_the_ring_around_it():
    pool, rng = _hearts(), np.random.default_rng(0)
    pairs = [p for _ in range(200) if (p := pool.draw_region(rng)) is not None]
    assert len(pairs) > 10
    for pair in pairs:
        assert pair.template is pair.target
        region, ring = pair.template_mask == 1, pair.template_mask == 2
        assert 0 < region.mean() < 0.08
        assert ring.any()
        assert not ndimage.binary_dilation(region)[~(region | ring)].any()


def test_the_classes_of_a_pair_share_its_images():
    pool, rng = synthetic_pools(3, 4, 96)[1], np.random.default_rng(0)
    pool.redraw_bank(rng)
    pair = next(p for _ in range(50) if (p := pool.draw(rng)) is not None and len(p.classes) == 2)
    batch = prepare([pair, pair], None, torch.device("cpu"))
    assert batch.targets.shape[0] == 2
    assert batch.rows.tolist() == [0, 0, 1, 1]
    for row, class_id in enumerate([*pair.classes, *pair.classes]):
        assert np.array_equal(batch.target_masks[row, 0].numpy() > 0, pair.target_mask == class_id)


def test_bfloat16_changes_the_loss_little():
    torch.manual_seed(0)
    model = Vessa(PRESETS["nano"])
    pools = synthetic_pools(3, 2, 160)
    tasks = Tasks([], pools, 1.0)
    batch = prepare(tasks.batch(np.random.default_rng(0), 2), None, torch.device("cpu"))
    plain, half = (
        training_loss(model, batch, LossWeights(), torch.Generator().manual_seed(1), bf16=bf16)[0].item()
        for bf16 in (False, True)
    )
    assert half == pytest.approx(plain, rel=0.02)
    assert half != plain


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
