"""Views: replay of geometry, CutMix, complementary dropout."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from vessa_trainer.config import ViewsConfig
from vessa_trainer.data import augmentation

SIZE = 64


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def shapes():
    """Images that are their own label: a disk of value 1 in each."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.stack([((y - 30) ** 2 + (x - 20 - 6 * i) ** 2 < 150).float() for i in range(4)])


def test_image_label_and_confidence_stay_aligned(shapes, generator):
    geometry = augmentation.draw_geometry(4, SIZE, 48, ViewsConfig(scale=(0.5, 2.0)), generator)
    image = geometry.image(shapes[:, None])[:, 0]
    labels = geometry.labels(shapes.byte())
    confidence = geometry.confidence(shapes)
    assert labels.dtype == torch.int64
    assert torch.equal(labels.float(), confidence)
    assert ((image > 0.5) == (labels == 1)).float().mean() > 0.995


def test_a_label_replayed_is_the_transformed_images_own_label(shapes, generator):
    """Segmenting the view gives what replaying the plain image's segmentation gives."""
    geometry = augmentation.draw_geometry(4, SIZE, 64, ViewsConfig(), generator)
    segmented_view = (geometry.image(shapes[:, None])[:, 0] > 0.5).long()
    replayed = geometry.labels((shapes > 0.5).byte())
    overlap = 2 * (segmented_view * replayed).sum() / (segmented_view.sum() + replayed.sum())
    assert overlap > 0.98


def test_what_lies_outside_is_not_valid(generator):
    config = ViewsConfig(scale=(0.5, 0.5), flip_p=0.0)
    geometry = augmentation.draw_geometry(3, SIZE, SIZE, config, generator)
    valid = geometry.valid(torch.ones(3, SIZE, SIZE, dtype=torch.bool))
    assert valid.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (geometry.image(torch.ones(3, 1, SIZE, SIZE))[:, 0][~valid] < 1).all()


def test_a_view_of_scale_one_and_the_full_geometry_change_nothing(shapes, generator):
    config = ViewsConfig(scale=(1.0, 1.0), flip_p=0.0)
    drawn = augmentation.draw_geometry(4, SIZE, SIZE, config, generator)
    assert torch.allclose(drawn.image(shapes[:, None])[:, 0], shapes, atol=1e-5)
    assert torch.equal(augmentation.full_geometry(4, SIZE, SIZE).labels(shapes.byte()), shapes.long())


def test_mirrored_views_are_mirrored(shapes, generator):
    geometry = augmentation.draw_geometry(4, SIZE, SIZE, ViewsConfig(scale=(1.0, 1.0), flip_p=1.0), generator)
    assert torch.equal(geometry.labels(shapes.byte()), shapes.flip(-1).long())


def test_rotated_views_are_rotated_as_torchvision_would(generator):
    """A wide bar, turned about its center by the angle that the grid states, within the configured range."""
    bar = torch.zeros(4, 1, SIZE, SIZE)
    bar[:, :, 24:40, 8:56] = 1
    config = ViewsConfig(scale=(1.0, 1.0), flip_p=0.0, rotate_p=1.0, rotate=30.0)
    geometry = augmentation.draw_geometry(4, SIZE, SIZE, config, generator)
    along = geometry.grid[:, SIZE // 2, -1] - geometry.grid[:, SIZE // 2, 0]
    angles = torch.rad2deg(torch.atan2(along[:, 1], along[:, 0]))
    assert (angles.abs() <= 30).all()
    assert angles.unique().numel() == 4
    for view, image, angle in zip(geometry.image(bar), bar, angles, strict=True):
        expected = TF.rotate(image, angle.item(), TF.InterpolationMode.BILINEAR)
        assert ((view > 0.5) == (expected > 0.5)).float().mean() > 0.99


def test_views_of_some_images_on_a_window_show_the_window(shapes):
    """The middle half of two of four images, enlarged to the whole view."""
    geometry = augmentation.full_geometry(4, SIZE, SIZE).of([1, 3]).to("cpu")
    middle = geometry.on(torch.tensor([[0.0, 0.0, 0.5]] * 2)).labels(shapes[[1, 3]].byte())
    inner = shapes[[1, 3], SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4].long()
    assert torch.equal(middle, inner.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_strong_views_change_gray_images_within_range(shapes, generator):
    config = ViewsConfig(jitter_p=1.0, blur_p=1.0, noise_p=1.0)
    image = shapes[:, None] * 0.5 + 0.2
    one, other = (
        augmentation.strong_view(image, config, augmentation.draw_seeds(len(image), generator)) for _ in "ab"
    )
    assert one.shape == image.shape
    assert not torch.equal(one, other)
    assert one.min() >= 0
    assert one.max() <= 1


def test_strong_views_change_color_images(generator):
    image = torch.rand(2, 3, 16, 16, generator=generator)
    config = ViewsConfig(jitter_p=1.0, grayscale_p=1.0, blur_p=0.0)
    gray = augmentation.strong_view(image, config, augmentation.draw_seeds(len(image), generator))
    assert torch.allclose(gray[:, 0], gray[:, 1], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_changed_as_each_image_alone(channels, generator):
    images, config = torch.rand(6, channels, 32, 48, generator=generator), ViewsConfig()
    seeds = augmentation.draw_seeds(6, generator)
    alone = [augmentation.strong_view(images[i : i + 1], config, [seed]) for i, seed in enumerate(seeds)]
    assert torch.allclose(augmentation.strong_view(images, config, seeds), torch.cat(alone), atol=1e-6)
    assert len({augmentation.draw_changes(config, channels == 1, seed) for seed in seeds}) == 6


def test_gray_images_are_changed_as_torchvision_would(generator):
    images, seeds = torch.rand(8, 1, 32, 48, generator=generator), augmentation.draw_seeds(8, generator)
    config = ViewsConfig(jitter_p=0.7, blur_p=0.7, noise_p=0.0)
    ours = augmentation.strong_view(images, config, seeds)
    for image, one, seed in zip(images, ours, seeds, strict=True):
        change = augmentation.draw_changes(config, True, seed)
        image = TF.adjust_gamma(image, change.gamma)
        image = (image - image.mean()) * change.contrast + image.mean()
        image = image * change.brightness
        if change.sigma:
            image = TF.gaussian_blur(image, [2 * round(2 * change.sigma) + 1] * 2, [change.sigma] * 2)
        assert torch.allclose(one, image.clamp(0, 1), atol=1e-6)


def test_noise_has_the_drawn_strength():
    images, seeds = torch.full((4, 1, 64, 64), 0.5), [3, 4, 5, 6]
    config = ViewsConfig(jitter_p=0.0, blur_p=0.0, noise_p=1.0)
    noisy = augmentation.strong_view(images, config, seeds)
    drawn = torch.tensor([augmentation.draw_changes(config, True, seed).noise for seed in seeds])
    assert torch.allclose(noisy.std((1, 2, 3)), drawn, rtol=0.05)


def test_a_strong_view_may_leave_an_image_as_it_is(shapes, generator):
    config = ViewsConfig(jitter_p=0.0, blur_p=0.0, noise_p=0.0)
    assert torch.equal(augmentation.strong_view(shapes[:, None], config, [0] * 4), shapes[:, None])


def test_cutmix_boxes_have_the_published_area_and_aspect(generator):
    boxes = augmentation.cutmix_boxes(200, (SIZE, SIZE), 1.0, generator)
    for box in boxes:
        rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert box.sum() == height * width
        assert 0.015 <= height * width / SIZE**2 <= 0.4
        assert 0.2 < height / width < 5
    shares = augmentation.cutmix_boxes(200, (SIZE, SIZE), 0.5, generator).flatten(1).any(1).float().mean()
    assert 0.4 < shares < 0.6


def test_one_box_pastes_everything_alike(shapes, generator):
    boxes = augmentation.cutmix_boxes(4, (SIZE, SIZE), 1.0, generator)
    image, labels, confidence = shapes[:, None], shapes.long(), shapes * 0.7
    pasted_image = augmentation.paste(image, boxes)
    assert torch.equal(pasted_image[:, 0].long(), augmentation.paste(labels, boxes))
    assert torch.allclose(pasted_image[:, 0] * 0.7, augmentation.paste(confidence, boxes))
    assert torch.equal(pasted_image[0, 0][boxes[0]], shapes[3][boxes[0]])
    assert torch.equal(pasted_image[0, 0][~boxes[0]], shapes[0][~boxes[0]])


def test_a_batch_of_one_has_nothing_to_paste(shapes, generator):
    boxes = augmentation.cutmix_boxes(1, (SIZE, SIZE), 1.0, generator)
    assert torch.equal(augmentation.paste(shapes[:1], boxes), shapes[:1])


def test_dropout_masks_are_complementary_and_spare_half(generator):
    first, second = augmentation.complementary_dropout(8, 1000, generator)
    spared = (first == 1).all(1)
    assert spared.sum() == 4
    assert torch.equal(spared, (second == 1).all(1))
    dropped = ~spared
    assert set(first[dropped].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(first[dropped] + second[dropped], torch.full_like(first[dropped], 2.0))
    assert first[dropped].mean().item() == pytest.approx(1, abs=0.1)
