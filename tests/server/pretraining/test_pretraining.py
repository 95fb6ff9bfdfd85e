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
from vessa_server.pretraining.data.augmentation import (
    rough_boxes,
    rough_logits,
    rough_points,
    shade,
    warp,
    windows_around,
)
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_server.pretraining.data.synthetic import phantom_study, random_study
from vessa_server.pretraining.data.tasks import (
    Pool,
    Tasks,
    composite_pools,
    pool_of_dataset,
    pool_of_study,
    synthetic_pools,
)
from vessa_server.pretraining.distributed import Processes
from vessa_server.pretraining.loop import PretrainConfig, Pretraining, validation_pairs
from vessa_server.pretraining.losses import (
    LossWeights,
    iou_loss,
    mask_loss,
    presence_loss,
    retrieval_loss,
    soft_dice,
    whereabouts_loss,
)
from vessa_server.pretraining.step import Shares, prepare, prepare_layouts, training_loss


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


def test_iou_is_taught_on_present_masks_only():
    logits = torch.tensor([[[[5.0, -5.0]]], [[[5.0, -5.0]]]])
    target = torch.tensor([[[[1.0, 1.0]]], [[[0.0, 0.0]]]])  # IoU 0.5; absent
    assert iou_loss(torch.tensor([0.75, 0.9]), logits, target).item() == pytest.approx(0.25**2)
    assert iou_loss(torch.tensor([0.9]), logits[1:], target[1:]).item() == 0
    assert presence_loss(torch.zeros(2), target).item() == pytest.approx(math.log(2))
    assert presence_loss(torch.tensor([30.0, -30.0]), target).item() == pytest.approx(0, abs=1e-6)


def test_retrieval_loss_prefers_the_same_layout():
    layouts = torch.tensor([[0.1, 0.3], [0.1, 0.3], [0.4, 0.0], [0.4, 0.0]])
    kinds = torch.zeros(4, dtype=torch.int64)
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    alike = retrieval_loss(torch.stack([one, one, other, other]), layouts, kinds)
    mixed = retrieval_loss(torch.stack([one, other, one, other]), layouts, kinds)
    assert alike < 0.01 < 1 < mixed
    apart = torch.tensor([0, 0, 1, 1])  # of two kinds: what looks alike across them counts against
    assert retrieval_loss(torch.stack([one] * 4), layouts, apart) == pytest.approx(math.log(3))


def test_whereabouts_are_the_share_of_each_cell():
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2, :2] = 1
    sure = torch.tensor([[30.0, -30.0, -30.0, -30.0]])
    assert whereabouts_loss(sure, target).item() == pytest.approx(0, abs=1e-6)
    assert whereabouts_loss(torch.zeros(1, 4), target).item() == pytest.approx(math.log(2))


def test_layouts_are_of_slices_that_show_a_class():
    pools = synthetic_pools(3, 4, 96)
    images, masks = Tasks([], pools, 1.0).layouts(np.random.default_rng(0), 5)
    assert images.shape == masks.shape == (10, 96, 96)
    assert masks.any((1, 2)).all()
    batch = prepare_layouts(images, masks, 2, torch.Generator().manual_seed(0), 56)
    assert batch.views.shape == (20, 3, 56, 56)
    assert batch.kinds.tolist() == ([0] * 5 + [1] * 5) * 2
    assert batch.layouts.shape[0] == 20


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
    batch = prepare([pair, pair], torch.tensor([1, 2]), 64, 32)
    assert batch.targets.shape == (2, 3, 64, 64)
    assert batch.rows.tolist() == [0, 0, 1, 1]
    assert batch.target_masks.shape == (4, 1, 64, 64)
    assert not (batch.target_masks[0] * batch.target_masks[1]).any()  # classes do not overlap
    assert not torch.equal(batch.target_masks[0], batch.target_masks[2])  # each pair moves on its own
    alone = prepare([pair], torch.tensor([2]), 64, 32)  # and the same in whatever batch it is
    assert torch.equal(batch.targets[1:], alone.targets)
    assert torch.equal(batch.truth[2:], alone.truth)
    assert torch.equal(batch.prompts.mask_logits[2:], alone.prompts.mask_logits)
    assert batch.spoken[2:] == alone.spoken


def test_bfloat16_changes_the_loss_little():
    torch.manual_seed(0)
    model = Vessa(PRESETS["nano"])
    pools = synthetic_pools(3, 2, 160)
    tasks = Tasks([], pools, 1.0)
    batch = prepare(tasks.batch(np.random.default_rng(0), 2), torch.tensor([1, 2]), 160, 80)
    drawn = tasks.layouts(np.random.default_rng(0), 4)
    layouts = prepare_layouts(*drawn, 2, torch.Generator().manual_seed(1), 112)
    head = torch.nn.Linear(128, 64)

    def loss(bf16):
        return training_loss(model, head, batch, layouts, LossWeights(), Shares(), bf16=bf16)[0].item()

    plain, half = loss(False), loss(True)
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


def test_windows_lie_around_what_is_to_be_drawn():
    inside = torch.zeros(2, 1, 100, 100, dtype=torch.bool)
    inside[0, :, 60:80, 10:20] = True
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        windows = windows_around(inside, torch.tensor([1.5, 1.5]), generator)
        assert windows[1].tolist() == [0, 0, 1]  # nothing to look at: the whole image
        x, y, half = windows[0].tolist()
        assert x == pytest.approx(-0.7, abs=0.031)
        assert y == pytest.approx(0.4, abs=0.031)
        assert half == pytest.approx(0.3, rel=0.16)


def test_a_window_fills_the_view():
    masks = torch.zeros(1, 1, 96, 96)
    masks[..., 60:80, 10:30] = 1
    window = torch.tensor([[20 / 48 - 1, 70 / 48 - 1, 20 / 96]])
    generator = torch.Generator().manual_seed(3)
    whole = warp(masks, masks, generator, strength=0.0)[1].mean()
    close = warp(masks, masks, generator, strength=0.0, windows=window, size=48)[1]
    assert close.shape == (1, 1, 48, 48)
    assert close.mean() / whole == pytest.approx(1 / window[0, 2].item() ** 2, rel=0.15)


def test_simulated_prompts_lie_on_the_mask():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, 16:32, 8:24] = 1
    boxes, labels = rough_boxes(masks, generator, jitter=0.0)
    assert boxes[0].tolist() == [[8.0, 16.0], [24.0, 32.0]]
    assert labels.tolist() == [[2, 3], [-1, -1]]
    points, labels = rough_points(masks, generator)
    assert labels.tolist() == [[1, 1], [-1, -1]]
    assert all(masks[0, 0, int(y), int(x)] == 1 for x, y in points[0])
    logits = rough_logits(masks, 32, generator)
    assert logits.shape == (2, 1, 32, 32)
    assert logits[0, 0, 10:14, 6:10].mean() > logits[0, 0, 24:, 24:].mean() + 2


def _run(tmp_path, steps, name):
    pools = synthetic_pools(7, 4, 160)
    config = PretrainConfig(steps=steps, batch=2, warmup=2, validate_every=2)
    pairs = validation_pairs(pools, 2, 0)
    torch.manual_seed(0)
    model, processes = Vessa(PRESETS["nano"]), Processes(torch.device("cpu"))
    provenance = {"command": "test"}
    return Pretraining(model, config, Tasks([], pools, 1.0), pairs, tmp_path / name, provenance, processes)


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
