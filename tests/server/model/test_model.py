"""The annotator's network: geometry, language model, segmenter, weights directory."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vessa.errors import InvalidWeights
from vessa_server.model.geometry import Square, resize, to_tensor
from vessa_server.model.language.instructions import answer, ask, spell_out
from vessa_server.model.presets import PRESETS, Preset
from vessa_server.model.prompt_encoding import hold_to_box
from vessa_server.model.segmenter import PromptBatch
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.model.weights import directory


@pytest.fixture(scope="module")
def model(nano_weights):
    return directory.read(nano_weights)[0]


@pytest.fixture
def images():
    return torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks():
    masks = torch.zeros(2, 1, 160, 160)
    masks[0, :, 40:90, 50:100] = 1
    masks[1, :, 60:120, 20:70] = 1
    return masks


def test_a_square_gives_back_what_entered_it():
    square = Square(60, 100)
    array = torch.rand(1, 2, 60, 100)
    assert torch.allclose(square.leave(square.enter(array, 100)), array, atol=1e-6)
    assert square.points(torch.tensor([[0.0, 0.0]]), 200).tolist() == [[0.0, 40.0]]


def test_gray_and_color_images_become_three_channels():
    gray = np.full((4, 5), 255, np.uint8)
    assert to_tensor(gray).shape == (1, 3, 4, 5)
    color = np.zeros((4, 5, 3), np.uint8)
    color[..., 1] = 255
    assert to_tensor(color)[0, :, 0, 0].tolist() == [0, 1, 0]


def test_the_overlay_is_green_inside_the_mask_only(images, masks):
    shown = overlay(images, masks, opacity=0.5)
    assert torch.equal(shown[0, :, 0, 0], images[0, :, 0, 0])
    assert shown[0, 1, 60, 60] == pytest.approx(0.5 + images[0, 1, 60, 60].item() / 2)
    assert shown[0, 0, 60, 60] == pytest.approx(images[0, 0, 60, 60].item() / 2)


def test_nano_is_small_enough():
    assert sum(p.numel() for p in Vessa(PRESETS["nano"]).parameters()) <= 12e6


def test_patches_are_those_of_qwens_own_processor(model):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    own = model.language.processor.image_processor(
        images=[Image.fromarray(p) for p in pixels], return_tensors="pt"
    )
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    patches, grid = model.language.pixels(tensors)
    assert torch.allclose(patches, own["pixel_values"], atol=1e-6)
    assert torch.equal(grid, own["image_grid_thw"])


def test_the_conversation_has_two_images_and_ends_in_seg(model):
    tokens, _ = model.language.encode("Segment it.", "liver")
    image = model.language.model.config.image_token_id
    assert tokens[-1] == model.language.seg_id
    assert tokens.count(model.language.seg_id) == 1
    assert tokens.count(image) == 2 * 16


@torch.inference_mode()
def test_the_state_does_not_depend_on_the_batch(model, images, masks):
    shown = overlay(images, masks)
    names = ["liver", "the left atrium of the heart"]
    both, _ = model.see(shown, images, names, ["Segment it."] * 2)
    alone, _ = model.see(shown[:1], images[:1], names[:1], ["Segment it."])
    assert torch.allclose(both[:1], alone, atol=1e-4)


@torch.inference_mode()
def test_class_name_template_and_target_each_change_the_state(model, images, masks):
    shown = overlay(images, masks)
    base = model.see(shown[:1], images[:1], ["liver"], ["Segment it."])[0]
    assert not torch.allclose(base, model.see(shown[:1], images[:1], ["spleen"], ["Segment it."])[0])
    assert not torch.allclose(base, model.see(shown[1:], images[:1], ["liver"], ["Segment it."])[0])
    assert not torch.allclose(base, model.see(shown[:1], images[1:], ["liver"], ["Segment it."])[0])


@torch.inference_mode()
def test_memory_language_and_prompts_each_change_the_mask(model, images, masks):
    segmenter = model.segmenter
    features = segmenter.encode_images(images)
    memory = segmenter.encode_memory(features, masks)[:, None]
    assert memory.shape == (2, 1, segmenter.side**2, segmenter.memory_width)
    h_seg = torch.rand(2, 128)
    base = model.draw(features, memory, h_seg)[0]
    assert base.shape == (2, 1, 80, 80)
    box = PromptBatch(torch.tensor([[[50.0, 40.0], [100.0, 90.0]]] * 2), torch.tensor([[2, 3]] * 2))
    logits = PromptBatch(mask_logits=torch.randn(2, 1, 80, 80), mask_present=torch.tensor([True, False]))
    others = [
        model.draw(features, None, h_seg)[0],
        model.draw(features, memory, None)[0],
        model.draw(features, memory.flip(0), h_seg)[0],
        model.draw(features, memory, h_seg, box)[0],
    ]
    assert all(not torch.allclose(base, other) for other in others)
    prompted = model.draw(features, memory, h_seg, logits)[0]
    assert not torch.allclose(base[0], prompted[0])
    assert torch.allclose(base[1], prompted[1], atol=1e-4)  # an absent mask is no mask


@torch.inference_mode()
def test_classes_of_one_image_share_its_work_and_not_its_result(model, images, masks):
    segmenter = model.segmenter
    features = segmenter.encode_images(images)
    memory = segmenter.encode_memory(features, masks)[:, None][[0, 1, 1, 0]]
    rows = torch.tensor([1, 0, 1, 1])
    shared = model.draw(features, memory, None, rows=rows)[0]
    apart = model.draw(features[rows], memory, None)[0]
    assert torch.allclose(shared, apart, atol=1e-4)
    assert not torch.allclose(shared[0], shared[2], atol=1e-4)
    alone = model.draw(features, None, None, rows=rows)[0]
    assert torch.allclose(alone, model.draw(features[rows], None, None)[0], atol=1e-4)


@torch.inference_mode()
def test_several_templates_share_the_memory(model, images, masks):
    features = model.segmenter.encode_images(images)
    memory = model.segmenter.encode_memory(features, masks)
    twice = torch.stack([memory[:1], memory[:1]], 1)
    once = model.draw(features[:1], memory[:1, None], None)[0]
    assert torch.allclose(model.draw(features[:1], twice, None)[0], once, atol=1e-4)


def test_weights_survive_a_round_trip(model, tmp_path):
    digest = directory.write(model, tmp_path / "again", {"command": "test"})
    again, read_digest = directory.read(tmp_path / "again")
    assert digest == read_digest
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_damaged_file_is_refused(nano_weights, model, tmp_path):
    directory.write(model, tmp_path / "w", {})
    path = tmp_path / "w" / "segmenter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InvalidWeights, match=r"segmenter\.safetensors does not have the checksum"):
        directory.read(tmp_path / "w")
    path.unlink()
    with pytest.raises(InvalidWeights, match="is missing"):
        directory.read(tmp_path / "w")


def test_a_partial_file_is_refused_with_the_names_of_the_keys(model, nano_weights, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(nano_weights / "projector.safetensors")
    del state["0.bias"]
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "p.safetensors")
    with pytest.raises(InvalidWeights, match=r"missing \['0\.bias'\], unknown \['extra'\]"):
        directory.load_strictly(model.projector, tmp_path / "p.safetensors")


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InvalidWeights, match=r"expected a directory with a vessa\.json"):
        directory.read(tmp_path / "nothing")
    (tmp_path / "vessa.json").write_text("{}")
    with pytest.raises(InvalidWeights, match="damaged"):
        directory.read(tmp_path)


def test_presets_survive_json():
    for preset in PRESETS.values():
        assert Preset.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset
    with pytest.raises(InvalidWeights, match="does not describe a preset"):
        Preset.from_dict({"name": "nano"})


def test_resize_leaves_a_fitting_array_alone(images):
    assert resize(images, (160, 160)) is images


def test_nothing_is_drawn_outside_of_a_box():
    logits = torch.ones(1, 1, 20, 20)
    square = Square(40, 40)
    held = hold_to_box(logits, np.array([10, 20, 30, 26]), square, -20.0)
    rows, columns = torch.nonzero(held[0, 0] > 0, as_tuple=True)
    assert (rows.min(), rows.max()) == (9, 13)  # a tenth of 20 px around it, and half a position
    assert (columns.min(), columns.max()) == (4, 15)
    assert (held[0, 0, 0] == -20).all()


def test_abbreviations_are_read_as_the_words_they_stand_for():
    assert spell_out("RV cavity") == "right ventricle cavity"
    assert spell_out("LV myocardium") == "left ventricle myocardium"
    assert spell_out("clavicle") == "clavicle"
    assert ask("Find it.", "LV cavity") == ask("Find it.", "left ventricle cavity")
    assert answer("LV cavity") == "The left ventricle cavity is <SEG>"
