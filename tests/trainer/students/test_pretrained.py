"""The student's encoder: ImageNet weights key by key, and the ways to get them."""

import importlib.resources

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vessa.errors import InvalidConfig, InvalidWeights
from vessa_trainer.config import OptimConfig, StudentConfig
from vessa_trainer.students import pretrained
from vessa_trainer.students.encoder_unet import EncoderUNet
from vessa_trainer.students.networks import build_student, parameter_groups

LITE = StudentConfig(size=64, crop=64, encoder="tf_efficientnet_lite0", pretrained=False)
MILITARY_UNIFORM = 652  # of ImageNet's classes


@pytest.fixture(scope="module")
def packaged():
    path = pretrained.packaged_file()
    if path is None:
        pytest.skip("the extra vessa-trainer[pretrained] is not installed")
    return path


def test_the_packaged_weights_classify_a_photograph(packaged):
    """A photograph in the public domain, of an admiral in uniform."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    model.load_state_dict(pretrained.packaged_state(packaged))
    photo = importlib.resources.files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    with photo.open("rb") as file:
        pixels = np.asarray(Image.open(file).convert("RGB").resize((224, 224)), np.float32) / 255
    x = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]
    with torch.no_grad():
        probability = model(x).softmax(1)[0]
    assert int(probability.argmax()) == MILITARY_UNIFORM
    assert probability.max() > 0.3


def test_the_student_starts_from_the_packaged_weights(packaged):
    student = build_student(StudentConfig(size=64, crop=64, encoder="tf_efficientnet_lite0"), 1, 4)
    state = pretrained.packaged_state(packaged)
    for name, value in student.encoder.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_changed_package_is_refused(packaged, tmp_path):
    copy = tmp_path / "weights.pth"
    copy.write_bytes(packaged.read_bytes()[:-1])
    with pytest.raises(InvalidWeights, match=r"SHA-256 .* expected 579344248a93"):
        pretrained.packaged_state(copy)


def test_an_encoder_is_read_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    file = tmp_path / "lite0.safetensors"
    save_file(whole.state_dict(), file)
    config = StudentConfig(size=64, crop=64, encoder="tf_efficientnet_lite0", weights=str(file))
    student = build_student(config, 1, 2)
    assert torch.equal(student.encoder.conv_stem.weight, whole.conv_stem.weight)


@pytest.mark.parametrize("what", ["missing", "damaged", "other", "shape"])
def test_a_file_without_these_weights_is_refused(tmp_path, what):
    file = tmp_path / "lite0.safetensors"
    if what == "damaged":
        file.write_bytes(b"\x08")
    if what == "other":
        save_file({"weight": torch.zeros(3)}, file)
    if what == "shape":
        state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
        save_file(state | {"bn1.weight": torch.zeros(3)}, file)
    config = StudentConfig(size=64, crop=64, encoder="tf_efficientnet_lite0", weights=str(file))
    with pytest.raises(InvalidWeights, match="not a readable safetensors file|lack|do not fit"):
        build_student(config, 1, 2)


def test_weights_that_do_not_come_name_the_ways_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pretrained, "_PACKAGE", "no_such_package")
    with pytest.raises(
        InvalidWeights, match=r"vessa-trainer\[pretrained\].*student.weights.*pretrained=false"
    ):
        build_student(StudentConfig(size=64, crop=64, encoder="tf_efficientnet_lite0"), 1, 2)


@pytest.mark.parametrize(
    ("name", "message"), [("no_such_net", "cannot build"), ("vit_tiny_patch16_224", "strides|cannot build")]
)
def test_an_encoder_without_the_levels_of_a_unet_is_refused(name, message):
    with pytest.raises(InvalidConfig, match=message):
        EncoderUNet(StudentConfig(size=64, crop=64, encoder=name, pretrained=False), 2)


def test_the_encoder_learns_at_its_own_rate():
    student = build_student(LITE, 1, 2)
    encoder, decoder = parameter_groups(student, OptimConfig(lr=1e-2, encoder_lr=0.25))
    assert encoder["lr"] == pytest.approx(2.5e-3)
    assert decoder["lr"] == pytest.approx(1e-2)
    counted = sum(p.numel() for g in (encoder, decoder) for p in g["params"])
    assert counted == sum(p.numel() for p in student.parameters())


def test_brightness_and_contrast_do_not_matter_to_the_encoder():
    torch.manual_seed(0)
    student = build_student(LITE, 1, 2).eval()
    image = torch.rand(1, 1, 64, 64) * 0.5 + 0.2
    with torch.no_grad():
        assert torch.allclose(student(image), student(image * 0.8 + 0.15), atol=0.05)
