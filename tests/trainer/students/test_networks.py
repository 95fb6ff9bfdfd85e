"""The students: shapes, dropout of channels, weights that do not fit."""

import pytest
import torch
from safetensors.torch import save_file

from vessa.errors import InvalidWeights
from vessa_trainer.config import StudentConfig
from vessa_trainer.data.augmentation import complementary_dropout
from vessa_trainer.students.networks import build_student

UNET = StudentConfig(name="unet", size=32, crop=32, widths=(4, 8, 16))
LITE = StudentConfig(size=64, crop=64, encoder="tf_efficientnet_lite0", pretrained=False)
DPT = StudentConfig(name="dpt", size=56, crop=56, backbone="tiny", pretrained=False)


@pytest.fixture(params=[UNET, LITE, DPT], ids=["unet", "lite0", "dpt"])
def config(request):
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("channels", [1, 3])
def test_logits_have_the_size_of_the_image(config, channels):
    student = build_student(config, channels, 4)
    assert student(torch.rand(2, channels, config.crop, config.crop)).shape == (
        2,
        4,
        config.crop,
        config.crop,
    )


def test_other_multiples_than_the_crop_will_do(config):
    student = build_student(config, 1, 3).eval()
    height, width = 4 * config.multiple, 7 * config.multiple
    assert student(torch.rand(1, 1, height, width)).shape == (1, 3, height, width)


def test_every_parameter_learns(config):
    student = build_student(config, 1, 3)
    student(torch.rand(2, 1, config.crop, config.crop)).square().mean().backward()
    without = {n for n, p in student.named_parameters() if p.grad is None}
    assert without <= {"backbone.mask_token"}


def test_dropout_masks_act_on_their_own_image(config):
    student = build_student(config, 1, 3).eval()
    image = torch.rand(2, 1, config.crop, config.crop)
    with torch.no_grad():
        plain = student(image)
        ones = [torch.ones(2, c) for c in student.feature_channels]
        assert torch.allclose(student(image, ones), plain, atol=1e-5)
        masks = [m.clone() for m in ones]
        for mask in masks:
            mask[1, ::2] = 0
        dropped = student(image, masks)
    assert torch.allclose(dropped[0], plain[0], atol=1e-5)
    assert not torch.allclose(dropped[1], plain[1], atol=1e-3)


def test_dropping_every_channel_leaves_nothing_of_the_image(config):
    student = build_student(config, 1, 3).eval()
    nothing = [torch.zeros(2, c) for c in student.feature_channels]
    with torch.no_grad():
        one, other = student(torch.rand(2, 1, config.crop, config.crop), nothing)
    assert torch.allclose(one, other, atol=1e-6)


def test_complementary_masks_fit_the_features(config):
    student = build_student(config, 1, 3)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.cat(complementary_dropout(2, c, generator)) for c in student.feature_channels]
    images = torch.rand(4, 1, config.crop, config.crop)
    assert torch.isfinite(student(images, masks)).all()


def test_gray_images_enter_dinov2_as_equal_colors():
    torch.manual_seed(0)
    student = build_student(DPT, 1, 2).eval()
    gray = torch.rand(1, 1, 56, 56)
    with torch.no_grad():
        assert torch.allclose(student(gray), student(gray.expand(-1, 3, -1, -1)), atol=1e-6)


def test_a_backbone_is_read_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    theirs = build_student(DPT, 1, 2)
    file = tmp_path / "backbone.safetensors"
    save_file(theirs.backbone.state_dict(), file)
    config = StudentConfig(name="dpt", size=56, crop=56, backbone="tiny", weights=str(file))
    ours = build_student(config, 1, 2)
    for key, value in theirs.backbone.state_dict().items():
        assert torch.equal(ours.backbone.state_dict()[key], value)


@pytest.mark.parametrize("what", ["missing", "damaged", "other"])
def test_a_wrong_weights_file_is_refused(tmp_path, what):
    file = tmp_path / "backbone.safetensors"
    if what == "damaged":
        file.write_bytes(b"\x08")
    if what == "other":
        save_file({"weight": torch.zeros(3)}, file)
    config = StudentConfig(name="dpt", size=56, crop=56, backbone="tiny", weights=str(file))
    with pytest.raises(InvalidWeights, match="does not hold the weights of this DINOv2 backbone"):
        build_student(config, 1, 2)


def test_hub_weights_that_do_not_come_name_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = StudentConfig(name="dpt", size=56, crop=56, backbone="tiny", pretrained=True)
    with pytest.raises(InvalidWeights, match=r"student.weights, or student.pretrained=false"):
        build_student(config, 1, 2)
