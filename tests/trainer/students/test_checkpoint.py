"""Checkpoints: written whole or not at all, read strictly, optimizers as they were."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from vessa.errors import InvalidWeights
from vessa_trainer.students import checkpoint
from vessa_trainer.students.networks import UNet


def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    return layers.to(memory_format=torch.channels_last)


def step(model, optimizer, seed):
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(image).square().mean().backward()
    optimizer.step()


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1, 255], dtype=torch.uint8)}
    metadata = {"state": {"step": 3, "best": 0.1}, "classes": {"1": "ä"}}
    path = tmp_path / "new" / "last.safetensors"
    checkpoint.write(path, tensors, metadata)
    read, read_metadata = checkpoint.read(path)
    assert all(torch.equal(read[k], v) for k, v in tensors.items())
    assert read_metadata == metadata


def test_other_tools_can_read_it(tmp_path):
    checkpoint.write(tmp_path / "c", {"a": torch.ones(2)}, {})
    with safe_open(tmp_path / "c", "np") as file:
        assert file.get_tensor("a").tolist() == [1, 1]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"a": torch.zeros(2)}, {})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, {"a": torch.ones(2)}, {})
    assert checkpoint.read(path)[0]["a"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "folder"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "last.safetensors"
    checkpoint.write(path, {"a": torch.zeros(200)}, {"state": {}})
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    if damage == "garbage":
        path.write_bytes(b"PK\x03\x04 a pickle in a zip")
    if damage in ("missing", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    with pytest.raises(InvalidWeights, match="last.safetensors is missing or no readable checkpoint"):
        checkpoint.read(path)


def test_a_changed_byte_anywhere_is_noticed(tmp_path):
    path = tmp_path / "last.safetensors"
    tensors = {"a": torch.arange(64.0), "step": torch.tensor(7), "b": torch.ones(3, dtype=torch.bfloat16)}
    checkpoint.write(path, tensors, {"state": {"step": 3}})
    whole = path.read_bytes()
    for place in range(8, len(whole)):  # the first 8 bytes are the length of the header
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InvalidWeights, match=r"last\.safetensors is (damaged|missing)"):
            checkpoint.read(path)


def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(tmp_path, caplog):
    save_file({"a": torch.ones(2)}, tmp_path / "old", {"state": "{}"})
    assert checkpoint.read(tmp_path / "old")[1] == {"state": {}}
    assert "old has no checksum" in caplog.text


def test_modules_are_loaded_strictly():
    model = net()
    state = checkpoint.module_state(model, "student")
    assert set(state) == {f"student.{k}" for k in model.state_dict()}
    other = net()
    with torch.no_grad():
        other[0].weight.zero_()
    checkpoint.load_module(other, state, "student")
    assert torch.equal(other[0].weight, model[0].weight)
    with pytest.raises(InvalidWeights, match="the checkpoint's teacher does not fit this config"):
        checkpoint.load_module(other, state, "teacher")
    with pytest.raises(InvalidWeights, match="size mismatch"):
        checkpoint.load_module(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), state, "student")


def test_an_optimizer_goes_on_exactly_from_a_file(tmp_path):
    """Also with weights in channels-last order, whose moments a file stores in plain order."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for seed in range(3):
        step(model, optimizer, seed)
    tensors = checkpoint.module_state(model, "student") | checkpoint.optimizer_state(optimizer)
    checkpoint.write(tmp_path / "c", tensors, {})
    other = net()
    again = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    read, _ = checkpoint.read(tmp_path / "c")
    checkpoint.load_module(other, read, "student")
    checkpoint.load_optimizer(again, read)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, again, seed)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_that_has_not_stepped_has_no_state():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert checkpoint.optimizer_state(optimizer) == {}
    checkpoint.load_optimizer(optimizer, {"student.x": torch.zeros(1)})
    step(model, optimizer, 0)


def test_a_student_starts_from_a_run_with_other_classes(tmp_path):
    torch.manual_seed(0)
    before = UNet(1, 4, (4, 8))
    checkpoint.write(tmp_path / checkpoint.BEST, checkpoint.module_state(before, "teacher"), {})
    same, other = UNet(1, 4, (4, 8)), UNet(1, 3, (4, 8))
    head = other.head.weight.clone()
    checkpoint.start_from(same, tmp_path)
    checkpoint.start_from(other, tmp_path)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in before.state_dict().items())
    assert torch.equal(other.down[0][0].weight, before.down[0][0].weight)
    assert torch.equal(other.head.weight, head)
    with pytest.raises(InvalidWeights, match="does not fit this config"):
        checkpoint.start_from(UNet(1, 4, (4, 16)), tmp_path)
    with pytest.raises(InvalidWeights, match="is missing or no readable checkpoint"):
        checkpoint.start_from(same, tmp_path / "nowhere")
