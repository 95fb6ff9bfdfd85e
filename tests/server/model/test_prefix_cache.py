"""The language model's reading of a template, kept and continued: the same state as in one go."""

import pytest
import torch

from vessa_server.model.language.prefix_cache import read_templates, states_after
from vessa_server.model.vessa import overlay
from vessa_server.model.weights import directory

NAMES = ["liver", "the left atrium of the heart", "spleen"]
ASKED = ["Segment it.", "Find in the target image what the green overlay marks.", "Segment it."]


@pytest.fixture(scope="module")
def language(nano_weights):
    return directory.read(nano_weights)[0].language


@pytest.fixture(scope="module")
def shown():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(3, 3, 128, 128, generator=generator)
    masks = torch.zeros(3, 1, 128, 128)
    for row in range(3):
        masks[row, :, 20 + 10 * row : 70, 30:90] = 1
    return overlay(images, masks), torch.rand(2, 3, 128, 128, generator=generator)


@torch.inference_mode()
def test_a_continued_conversation_has_the_state_of_one_read_at_once(language, shown):
    overlays, targets = shown
    rows = [1, 0, 0]
    expected, _ = language(overlays, targets[rows], NAMES, ASKED)
    prefixes = read_templates(language, overlays, NAMES, ASKED)
    for _ in range(2):  # the second time what the first has left behind must not be seen
        assert torch.allclose(states_after(language, prefixes, targets, rows), expected, atol=1e-4)
        language(overlays[:1], targets[:1], NAMES[1:2], ASKED[:1])
    # whatever else is in the batch, and however long the others' prefixes are
    alone = states_after(language, prefixes[2:], targets[:1], [0])
    assert torch.allclose(alone, expected[2:], atol=1e-4)


@torch.inference_mode()
def test_a_prefix_counts_its_bytes_and_keeps_no_neighbor_alive(language, shown):
    overlays, _ = shown
    together = read_templates(language, overlays, NAMES, ASKED)
    alone = read_templates(language, overlays[:1], NAMES[:1], ASKED[:1])[0]
    assert together[0].nbytes == alone.nbytes
    assert together[0].keys.untyped_storage().nbytes() == together[0].keys.nbytes
    assert torch.allclose(together[0].keys, alone.keys, atol=1e-4)
    layers, heads, length, width = alone.keys.shape
    assert alone.nbytes == 8 * layers * heads * length * width + 8 * 4 * len(alone.rest)
