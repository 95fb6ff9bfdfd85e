"""Stage 1: losses by hand, tasks without leaks, synthetic data, exact resume."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from vessa.datasets import open_dataset
from vessa.errors import InvalidWeights
from vessa_server.model.presets import PRESETS
from vessa_server.model.vessa import Vessa
from vessa_server.pretraining.checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from vessa_server.pretraining.data.augmentation import (
    rough_boxes,
    rough_logits,
    rough_points,
    shade,
    warp,
    windows_around,
)
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_server.pretraining.data.pools import Pool, pool_of_dataset, pool_of_study
from vessa_server.pretraining.data.regions import MAX_AREA, region_episode
from vessa_server.pretraining.data.synthetic import heart_patient, phantom_study, random_study
from vessa_server.pretraining.data.tasks import StudySource, Tasks
from vessa_server.pretraining.data.varied_studies import inset_study, varied_study
from vessa_server.pretraining.distributed import Processes
from vessa_server.pretraining.loop import PretrainConfig, Pretraining, validation_episodes
from vessa_server.pretraining.losses import (
    LossWeights,
)
from vessa_server.pretraining.step import Shares, prepare, prepare_layouts, training_loss


def test_layouts_are_of_slices_that_show_a_class():
    images, masks = Tasks([], StudySource(3, 96, []), 4, 1.0).layouts(np.random.default_rng(0), 5)
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
    tasks = Tasks([pool], StudySource(0, 64, [pool]), 0, 0.0, redraw=3)
    pool.vectors = np.eye(len(pool.images), dtype=np.float32)
    counts = set()
    for _ in range(30):
        for episode in tasks.batch(rng, 4):
            counts.add(len(episode.templates))
            target = study.groups[episode.target[0, 0]]
            for template, mask in zip(episode.templates, episode.template_masks, strict=True):
                assert study.groups[template[0, 0]] != target
                assert all((mask == c).any() for c in episode.classes)
    assert counts == {1, 2, 3}


def test_half_of_the_templates_are_the_most_similar_ones():
    study = phantom_study(
        "heart", np.random.default_rng(0), protocol="cine MR", patients=2, slices=5, size=64
    )
    pool = pool_of_study(study, "heart")
    pool.bank = np.array([0])
    pool.vectors = np.eye(len(pool.images), dtype=np.float32) * 1e-3
    pool.vectors[:, 0] = [1, 0, 0, 0, 0, 1, 1, 1, 1, 1]  # every target looks like the first template
    rng = np.random.default_rng(1)
    episodes = [e for _ in range(200) if (e := pool.draw(rng, 2)) is not None]
    first = [np.array_equal(e.templates[0], pool.images[0]) for e in episodes]
    assert 0.5 < np.mean(first) < 0.8


def _hearts(patients=3):
    """A pool as of real cine MR: phantom slices of which only the left ventricle's cavity is annotated."""
    study = phantom_study(
        "heart", np.random.default_rng(5), protocol="cine MR", patients=patients, slices=3, size=96
    )
    masks = (np.stack(study.masks) == 3).astype(np.uint8)
    return Pool("cine", np.stack(study.images), masks, study.groups, {1: "LV cavity (endocardial contour)"})


def test_composites_set_a_whole_heart_where_the_real_one_is():
    pool = _hearts()
    heart = StudySource(0, 96, [pool])._pool(np.random.default_rng(0), "composite")
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
    without = pool_of_study(random_study(np.random.default_rng(0), patients=3), "s")
    assert StudySource(0, 96, [without])._pool(np.random.default_rng(0), "composite").name == "varied"


def test_papillary_muscles_belong_to_the_cavity():
    tissue, mask = next(heart_patient(np.random.default_rng(2), 160, 4))
    muscle = (tissue == 2) & (mask == 3)
    assert 0.02 < muscle.sum() / (mask == 3).sum() < 0.6
    assert (tissue[mask == 2] == 2).all()  # no cavity is called myocardium


def test_the_heart_ends_at_the_apex_and_is_widest_at_the_base():
    areas = []
    for seed in range(8):
        masks = [mask for _, mask in heart_patient(np.random.default_rng(seed), 120, 8)]
        areas.append([[(m == c).sum() for c in (1, 3)] for m in masks])
    right, left = np.array(areas).mean(0).T
    assert right[0] > 1.1 * right[4] > 0
    assert right[-1] < 0.1 * right[0]
    assert left[-1] < 0.3 * left[0]


def test_region_tasks_follow_superpixels_of_one_image():
    pool, rng = _hearts(), np.random.default_rng(0)
    episodes = [e for i in range(60) if (e := region_episode(pool.images[i % 9], rng, 2)) is not None]
    assert len(episodes) > 30
    for episode in episodes:
        assert all(t is episode.target for t in episode.templates)
        assert len(episode.templates) == 2
        shares = [(episode.target_mask == c).mean() for c in episode.classes]
        assert 1 <= len(shares) <= 3
        assert all(0 < share < 2 * MAX_AREA + 0.2 for share in shares)


def test_no_region_is_found_in_an_empty_image():
    assert region_episode(np.zeros((96, 96), np.uint8), np.random.default_rng(0)) is None


def test_random_anatomies_differ_between_studies_and_agree_within_one():
    studies = [varied_study(np.random.default_rng(s), patients=3, slices=2, size=96) for s in range(12)]
    again = varied_study(np.random.default_rng(3), patients=3, slices=2, size=96)
    assert all(np.array_equal(a, b) for a, b in zip(studies[3].images, again.images, strict=True))
    counts = [len(s.classes) for s in studies]
    assert min(counts) >= 2
    assert max(counts) <= 20
    assert len(set(counts)) > 3
    for study in studies:
        found = set(np.unique(np.stack(study.masks))) - {0}
        assert found <= set(study.classes)
        assert len(found) >= min(2, len(study.classes)) - 1
        assert np.stack(study.images).std() > 5


def test_left_and_right_are_named_on_the_same_sides_in_all_patients():
    sides = []
    for seed in range(40):
        study = varied_study(np.random.default_rng(seed), patients=3, slices=2, size=96)
        names = {n: c for c, n in study.classes.items()}
        for mask in study.masks:
            left, right = (mask == names.get(f"{s} structure", 255) for s in ("left", "right"))
            if left.any() and right.any():
                sides.append(np.argwhere(left)[:, 1].mean() > np.argwhere(right)[:, 1].mean())
    assert len(sides) > 10
    assert np.mean(sides) > 0.9


def test_insets_lie_elsewhere_in_each_patient_and_change_only_their_surroundings():
    pool = _hearts()
    study = inset_study(np.random.default_rng(4), pool.images, ["a"] * 3 + ["b"] * 3 + ["c"] * 3)
    masks = np.stack(study.masks)
    assert masks.any((1, 2)).sum() > 5
    for image, mask, real in zip(study.images, masks, pool.images, strict=True):
        far = ndimage.distance_transform_edt(mask == 0) > 12
        assert np.abs(image[far].astype(int) - real[far]).max() <= 1


def test_studies_are_renewed_and_come_back_on_resume():
    source = StudySource(2, 64, [])
    going = Tasks([], source, 3, 1.0, redraw=4, renew=2)
    rng = np.random.default_rng(0)
    first = [p.images.tobytes() for p in going.synthetic]
    for _ in range(9):
        going.batch(rng, 1)
    now = [p.images.tobytes() for p in going.synthetic]
    assert not set(first) & set(now)  # four replacements went round the three slots
    resumed = Tasks([], source, 3, 1.0, redraw=4, renew=2)
    resumed.restore(9)
    assert [p.images.tobytes() for p in resumed.synthetic] == now
    assert [p.bank.tolist() for p in resumed.synthetic] == [p.bank.tolist() for p in going.synthetic]


def test_the_classes_of_an_episode_share_its_images():
    rng = np.random.default_rng(0)
    study = phantom_study("heart", rng, protocol="cine MR", patients=4, slices=4, size=96)
    pool = pool_of_study(study, "heart")
    pool.redraw_bank(rng)
    episode = next(e for _ in range(50) if (e := pool.draw(rng, 3)) is not None and len(e.classes) == 2)
    batch = prepare([episode, episode], torch.tensor([1, 2]), 64, 32)
    assert batch.targets.shape == (2, 3, 64, 64)
    assert batch.templates.shape == (2, 3, 3, 64, 64)
    assert batch.template_masks.shape == (4, 3, 64, 64)
    assert batch.rows.tolist() == [0, 0, 1, 1]
    assert batch.target_masks.shape == (4, 1, 64, 64)
    assert not (batch.target_masks[0] * batch.target_masks[1]).any()  # classes do not overlap
    assert not torch.equal(batch.target_masks[0], batch.target_masks[2])  # each episode moves on its own
    alone = prepare([episode], torch.tensor([2]), 64, 32)  # and the same in whatever batch it is
    assert torch.equal(batch.targets[1:], alone.targets)
    assert torch.equal(batch.truth[2:], alone.truth)
    assert torch.equal(batch.prompts.mask_logits[2:], alone.prompts.mask_logits)
    assert batch.spoken[2:] == alone.spoken


def test_bfloat16_changes_the_loss_little():
    torch.manual_seed(0)
    model = Vessa(PRESETS["nano"])
    tasks = Tasks([], StudySource(3, 160, []), 2, 1.0)
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
    tasks = Tasks([], StudySource(7, 96, []), 3, 1.0, renew=2)
    config = PretrainConfig(steps=steps, batch=2, warmup=2, validate_every=2)
    episodes = validation_episodes([StudySource(8, 96, []).pool(0)], 2, 0)
    torch.manual_seed(0)
    model, processes = Vessa(PRESETS["nano"]), Processes(torch.device("cpu"))
    provenance = {"command": "test"}
    return Pretraining(model, config, tasks, episodes, tmp_path / name, provenance, processes)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = _run(tmp_path, 4, "whole")
    whole.run()
    first = _run(tmp_path, 4, "halves")
    first._describe()
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


def test_a_damaged_checkpoint_is_named(tmp_path):
    save_checkpoint(tmp_path, {"a": torch.arange(9.0)}, {"step": 3}, Processes(torch.device("cpu")))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded[0]["a"].tolist() == list(range(9))
    (state,) = tmp_path.glob("state-*.safetensors")
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InvalidWeights, match="differs from its checksum"):
        load_checkpoint(tmp_path)
    state.write_bytes(whole)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:-9])
    with pytest.raises(InvalidWeights, match=CHECKPOINT):
        load_checkpoint(tmp_path)
