"""Compare a real vLLM with the language model in process: states, masks, prefix cache, failures.

`make test-vllm` prints the figures as one JSON object in its last line.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from vessa.codec import image_digest
from vessa.datasets import Dataset, open_dataset
from vessa.errors import InvalidConfig, InvalidWeights, LanguageUnavailable
from vessa_server.evaluation import seed_bank
from vessa_server.inference.annotator import load_annotator
from vessa_server.model.language.prefix_cache import InProcess
from vessa_server.model.language.remote import VllmAddress
from vessa_server.model.language.remote.service import Picture
from vessa_server.model.language.vlm import as_seen
from vessa_server.model.weights import directory
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
ACDC = Path(__file__).resolve().parents[3] / "shared" / "data" / "acdc"
IMAGES = 20
NAMES = ["left ventricle", "myocardium", "liver", "left ventricle"]


def pixels(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 160, 160, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def ask(reader: Any, seed: int = 0) -> torch.Tensor:
    """Return the states of four conversations: two templates, two targets."""
    overlays = pixels(2, seed)[[0, 0, 1, 0]]
    read = reader.read_templates(overlays, NAMES, ["Segment it."] * 4)
    return reader.states_after(read, pixels(2, seed + 1), [0, 0, 0, 1])


@pytest.fixture(scope="module")
def in_process():
    return InProcess(directory.read("nano")[0].language)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Return real images if they are available, else phantoms."""
    if ACDC.is_dir():
        return open_dataset(ACDC)
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=6, slices=8, size=160, seed=0)
    return open_dataset(folder / "heart")


def test_states_are_those_of_the_model_in_process(connect, in_process):
    service = connect()
    for seed in (0, 0, 7):  # whole pictures, named ones from the prefix cache, and others
        assert (ask(service, seed) - ask(in_process, seed)).abs().max() < 1e-4


def test_a_picture_that_vllm_does_not_hold_is_sent_again(connect, in_process):
    service = connect()
    for picture in as_seen(pixels(2, 51), 128):
        service._sent[Picture.of(picture).uuid] = None  # as if it had been sent before vLLM forgot it
    assert (ask(service, 50) - ask(in_process, 50)).abs().max() < 1e-4
    service.check()


def test_wrong_keys_and_wrong_weights_are_refused(connect, nano_weights):
    with pytest.raises(InvalidConfig, match="VESSA_VLLM_KEY"):
        connect(key="another")
    with pytest.raises(InvalidWeights, match="serves other weights"):
        connect(nano_weights)


def test_masks_are_those_of_the_model_in_process(vllm, dataset, tmp_path, figures):
    test = dataset.groups()[:1]
    slices = [s for s in dataset.slices() if s.group not in test and dataset.mask(s) is not None]
    shown = [s for s in slices if dataset.mask(s).any()]
    shown = shown[:: max(1, len(shown) // IMAGES)][:IMAGES]
    before = [vllm.metric(f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries")]
    labels = []
    for name, address in (("in", None), ("vllm", VllmAddress(vllm.url, vllm.key))):
        banks = TemplateBanks(FolderStore(tmp_path / name))
        annotator = load_annotator("nano", "cpu", banks, 1 << 30, vllm=address)
        seed_bank(annotator, dataset, test)
        images = [dataset.image(s) for s in shown]
        pairs = zip(images, shown, strict=True)
        items = [SegmentItem(image_digest(i), i, "evaluation", group=s.group) for i, s in pairs]
        answers = [
            a for start in range(0, len(items), 8) for a in annotator.segment(items[start : start + 8])
        ]
        labels.append(np.concatenate([a.labels.ravel() for a in answers]))
        if address is not None:
            annotator.model.reader.close()
    hits, queries = (
        vllm.metric(f"vllm:prefix_cache_{name}_total") - old
        for name, old in zip(("hits", "queries"), before, strict=True)
    )
    dice = {}
    for value in sorted(dataset.classes):
        own, other = (found == value for found in labels)
        assert own.any()
        dice[value] = 2 * (own & other).sum() / (own.sum() + other.sum())
    figures |= {
        "images": len(shown),
        "data": dataset.name,
        "dice_to_in_process": round(float(min(dice.values())), 6),
        "prefix_hit_share": round(hits / queries, 4),
    }
    assert len(shown) == IMAGES
    assert figures["dice_to_in_process"] >= 0.999
    assert hits > 0


def test_a_killed_vllm_is_told_and_used_again_when_it_is_back(vllm, connect, in_process):
    service = connect()
    ask(service)
    vllm.stop(9)
    with pytest.raises(LanguageUnavailable):
        ask(service)
    with pytest.raises(LanguageUnavailable):
        service.check()
    vllm.start()
    wait_for(service)
    assert (ask(service) - ask(in_process)).abs().max() < 1e-4


def wait_for(service: Any, seconds: float = 120) -> None:
    """Wait until the service is ready again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return service.check()
        except LanguageUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_vllm_guards_states_by_the_key(vllm):
    assert httpx.post(f"{vllm.url}/v1/embeddings", json={"model": "vessa", "input": "x"}).status_code == 401
