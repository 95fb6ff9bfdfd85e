"""Our call path through SAM 2.1 against the package's own tracker, on an official graph."""

import dataclasses

import pytest
import torch

from vessa_server.model.presets import PRESETS
from vessa_server.model.segmenter import PromptBatch, Segmenter

FRAMES = 16  # of the imagined video; one frame gives NaN in the pointers' position


@pytest.fixture(scope="module")
def segmenter():
    """SAM 2.1 tiny at 256 px, with everything that starts at zero drawn at random."""
    torch.manual_seed(0)
    preset = dataclasses.replace(PRESETS["base"].segmenter, image_size=256)
    segmenter = Segmenter(preset).eval()
    with torch.no_grad():
        for parameter in segmenter.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
        # Random weights call most things absent; that path has a test of its own.
        segmenter.sam.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(10)
    return segmenter


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 256, 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def masks():
    masks = torch.zeros(2, 1, 256, 256)
    masks[0, :, 60:140, 80:160] = 1
    masks[1, :, 100:200, 30:120] = 1
    return masks


def features_of(sam, images):
    """What the official tracker works on: flattened features, positions and sizes of three levels."""
    _, features, positions, sizes = sam._prepare_backbone_features(sam.forward_image(images))
    return features, positions, sizes


def track(sam, images, index, masks=None, remembered=None, point=None):
    """One official step on one frame of the video whose other frames are `remembered`."""
    features, positions, sizes = features_of(sam, images)
    return sam.track_step(
        frame_idx=index,
        is_init_cond_frame=masks is not None,
        current_vision_feats=features,
        current_vision_pos_embeds=positions,
        feat_sizes=sizes,
        point_inputs=point,
        mask_inputs=masks,
        output_dict={"cond_frame_outputs": remembered or {}, "non_cond_frame_outputs": {}},
        num_frames=FRAMES,
        run_mem_encoder=masks is not None,
    )


@torch.inference_mode()
def test_memory_and_pointers_are_those_of_a_frame_with_a_mask(segmenter, images, masks):
    pixels = (images[:2] - segmenter.mean) / segmenter.std
    official = track(segmenter.sam, pixels, 0, masks)
    ours = segmenter.encode_memory(segmenter.encode_images(images[:2]), masks)
    spatial = official["maskmem_features"].flatten(2).transpose(1, 2)
    assert ours.shape == (2, 256 + 4, 64)
    # The tracker takes a mask for logits of +-10, which a sigmoid brings within 5e-5 of 0 and 1.
    assert torch.allclose(ours[:, :256], spatial, atol=2e-3)
    assert torch.allclose(ours[:, 256:].flatten(1), official["obj_ptr"], atol=1e-5)


@torch.inference_mode()
def test_an_empty_template_is_remembered_as_an_absent_object(segmenter, images, masks):
    nothing = torch.zeros_like(masks)
    pixels = (images[:2] - segmenter.mean) / segmenter.std
    official = track(segmenter.sam, pixels, 0, nothing)
    ours = segmenter.encode_memory(segmenter.encode_images(images[:2]), nothing)
    spatial = official["maskmem_features"].flatten(2).transpose(1, 2)
    assert torch.allclose(ours[:, :256], spatial, atol=2e-3)
    assert torch.allclose(ours[:, 256:].flatten(1), segmenter.sam.no_obj_ptr.expand(2, -1), atol=1e-6)


@pytest.mark.parametrize("templates", [1, 2])
@torch.inference_mode()
def test_attention_and_mask_are_those_of_the_tracker(segmenter, images, masks, templates, monkeypatch):
    sam = segmenter.sam
    monkeypatch.setattr(sam, "multimask_output_in_sam", False)
    pixels = (images - segmenter.mean) / segmenter.std
    features = segmenter.encode_images(images)
    memory = segmenter.encode_memory(features[:2], masks)[:templates][None]
    # The most similar template, ours first, is the frame right before the target.
    remembered = {}
    for row in range(templates):
        out = track(sam, pixels[row : row + 1], templates - 1 - row, masks[row : row + 1])
        spatial, pointer = memory[:, row, :256], memory[:, row, 256:]
        out["maskmem_features"] = spatial.transpose(1, 2).reshape(1, 64, 16, 16)  # without the 5e-5
        out["obj_ptr"] = pointer.flatten(1)
        remembered[templates - 1 - row] = out
    flat, positions, sizes = features_of(sam, pixels[2:])
    attended = sam._prepare_memory_conditioned_features(
        frame_idx=templates,
        is_init_cond_frame=False,
        current_vision_feats=flat[-1:],
        current_vision_pos_embeds=positions[-1:],
        feat_sizes=sizes[-1:],
        output_dict={"cond_frame_outputs": remembered, "non_cond_frame_outputs": {}},
        num_frames=FRAMES,
    )
    embedding = segmenter.attend(features[2:], memory)
    assert torch.allclose(embedding, attended, atol=1e-5)
    official = track(sam, pixels[2:], templates, remembered=remembered)
    logits, _, presence = segmenter.decode(embedding, features[2:].details, None, PromptBatch())
    assert torch.allclose(logits, official["pred_masks"], atol=1e-4)
    assert torch.allclose(presence, official["object_score_logits"][:, 0], atol=1e-4)


@torch.inference_mode()
def test_without_memory_the_features_are_those_of_a_first_frame(segmenter, images):
    sam = segmenter.sam
    flat, positions, sizes = features_of(sam, (images[:2] - segmenter.mean) / segmenter.std)
    attended = sam._prepare_memory_conditioned_features(
        frame_idx=0,
        is_init_cond_frame=True,
        current_vision_feats=flat[-1:],
        current_vision_pos_embeds=positions[-1:],
        feat_sizes=sizes[-1:],
        output_dict={},
        num_frames=FRAMES,
    )
    assert torch.equal(segmenter.attend(segmenter.encode_images(images[:2]), None), attended)


@torch.inference_mode()
def test_a_box_is_two_points_with_labels_2_and_3(segmenter, images, masks, monkeypatch):
    sam = segmenter.sam
    monkeypatch.setattr(sam, "multimask_output_in_sam", False)
    pixels = (images - segmenter.mean) / segmenter.std
    features = segmenter.encode_images(images)
    memory = segmenter.encode_memory(features[:1], masks[:1])
    out = track(sam, pixels[:1], 0, masks[:1])
    out["maskmem_features"] = memory[:, :256].transpose(1, 2).reshape(1, 64, 16, 16)
    corners = torch.tensor([[[80.0, 60.0], [160.0, 140.0]]])
    labels = torch.tensor([[2, 3]], dtype=torch.int32)
    prompt = {"point_coords": corners, "point_labels": labels}
    official = track(sam, pixels[2:], 1, remembered={0: out}, point=prompt)
    embedding = segmenter.attend(features[2:], memory[None])
    logits, _, _ = segmenter.decode(embedding, features[2:].details, None, PromptBatch(corners, labels))
    assert torch.allclose(logits, official["pred_masks"], atol=1e-4)


def test_what_is_absent_has_an_empty_mask_outside_of_training(segmenter, images, monkeypatch):
    bias = segmenter.sam.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, -100))
    features = segmenter.encode_images(images[:1])
    embedding = segmenter.attend(features, None)
    with torch.no_grad():
        logits, _, presence = segmenter.decode(embedding, features.details, None, PromptBatch())
        assert presence.item() < 0
        assert (logits == -1024).all()
    segmenter.train()
    logits, _, _ = segmenter.decode(embedding, features.details, None, PromptBatch())
    segmenter.eval()
    assert (logits > -1000).all()


def test_the_single_mask_never_falls_back_to_another(segmenter):
    assert not segmenter.sam.sam_mask_decoder.dynamic_multimask_via_stability


@torch.inference_mode()
def test_position_encodings_follow_the_image_size(segmenter, images):
    preset = dataclasses.replace(segmenter.preset, image_size=512)
    larger = Segmenter(preset).eval()
    larger.load_state_dict(segmenter.state_dict())
    pixels = torch.nn.functional.interpolate(images[:1], 512)
    features = larger.encode_images(pixels)
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 100:300, 200:400] = 1
    memory = larger.encode_memory(features, mask)
    assert memory.shape == (1, 32 * 32 + 4, 64)
    embedding = larger.attend(features, memory[None])
    assert embedding.shape == (1, 256, 32, 32)
    assert embedding.isfinite().all()
    attention = larger.sam.memory_attention.layers[0].cross_attn_image
    assert attention.freqs_cis.shape[0] == 32 * 32
