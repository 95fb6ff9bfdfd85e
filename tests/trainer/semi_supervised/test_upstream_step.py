"""The step that `make bench-trainer` times ours against is UniMatch V2's, on the same network."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import upstream_step as upstream
from PIL import Image

from vessa_trainer.config import load_config
from vessa_trainer.students.networks import build_student

CROP, BATCH = 32, 4


@pytest.fixture
def samples(tmp_path):
    """Six images with a bright disk and masks that mark it; sizes differ from the crop."""
    y, x = np.mgrid[:40, :48]
    found = []
    for index in range(6):
        disk = np.hypot(y - 20, x - 16 - 3 * index) < 9
        image, mask = tmp_path / f"i{index}.png", tmp_path / f"m{index}.png"
        Image.fromarray(np.where(disk, 200, 40).astype(np.uint8)).save(image)
        Image.fromarray(disk.astype(np.uint8)).save(mask)
        found.append(upstream.Sample(image, mask))
    return found


@pytest.fixture
def step(samples):
    torch.manual_seed(0)
    config = load_config(None, ["student.widths=[4,8,16]", f"student.crop={CROP}"])
    network = build_student(config.student, 1, 2)
    unlabeled = [upstream.Sample(s.image, None) for s in samples]
    return upstream.UpstreamStep(
        network, samples, unlabeled, size=CROP, crop=CROP, batch=BATCH, scale=(0.5, 2.0), lr=1e-2, seed=0
    )


def test_views_are_crops_whose_masks_lie_on_them(step, samples):
    for _ in range(20):
        image, mask = (np.array(v) for v in step._weak(samples[0]))
        assert image.shape == mask.shape == (CROP, CROP)
        inside = mask != 255
        assert (image[~inside] == 0).all()
        assert ((image > 120) == (mask == 1))[inside].mean() > 0.95
        strong = step._strong(Image.fromarray(image))
        assert np.array(strong).shape == (CROP, CROP)


def test_cutmix_boxes_have_the_published_area(step):
    areas = [float(step._box().mean()) for _ in range(200)]
    assert 0.35 < np.mean([a > 0 for a in areas]) < 0.65
    assert all(a == 0 or 0.01 < a <= 0.4 for a in areas)


def test_dropout_is_complementary_and_spares_half(step):
    one, other = step._dropout()[0].chunk(2)
    spared = (one == 1).all(1)
    assert spared.sum() == BATCH // 2
    assert torch.equal((one + other)[~spared], torch.full_like(one[~spared], 2.0))


def test_confident_pixels_are_summed_and_divided_by_all_that_count(step):
    output = torch.randn(2, 2, 4, 4)
    label = torch.randint(0, 2, (2, 4, 4))
    confidence = torch.full((2, 4, 4), 0.9)
    confidence[0] = 0.99
    ignore = torch.zeros(2, 4, 4, dtype=torch.int64)
    ignore[:, 0] = 255
    loss = step._consistency(output, label, confidence, ignore, torch.zeros(2, 4, 4))
    per_pixel = F.cross_entropy(output, label, reduction="none")
    assert loss.item() == pytest.approx((per_pixel[0, 1:].sum() / 24).item(), rel=1e-5)
    everywhere = step._consistency(output, label, confidence, ignore, torch.ones(2, 4, 4))
    swapped = F.cross_entropy(output, label.flip(0), reduction="none")
    assert everywhere.item() == pytest.approx((swapped[1, 1:].sum() / 24).item(), rel=1e-5)


def test_steps_teach_the_network_and_the_teacher_follows(step):
    start = deepcopy(step.network.state_dict())
    first = step()
    assert all(torch.equal(t, s) for t, s in zip(*_parameters(step), strict=True))  # decay 0 at the first
    for _ in range(60):
        last = step()
    assert last < 0.7 * first
    assert not torch.equal(step.network.state_dict()["head.weight"], start["head.weight"])
    assert not any(torch.equal(t, s) for t, s in zip(*_parameters(step), strict=True))
    assert not step.teacher.training


def _parameters(step):
    return list(step.teacher.parameters()), list(step.network.parameters())
