"""Several processes of one run: their parts of a batch, and that two of them are one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vessa.errors import InvalidConfig
from vessa_trainer.data import augmentation
from vessa_trainer.semi_supervised.distributed import ALONE, Processes, join
from vessa_trainer.students import checkpoint

STEPS = Path(__file__).with_name("exact_steps.py")
CLOSE = 1e-9


def test_alone_a_process_has_the_whole_batch():
    assert ALONE.places(3) == [0, 1, 2]
    tensor = torch.ones(2, 3)
    assert ALONE.gather(tensor) is tensor
    assert ALONE.first
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert join("cpu") is ALONE


def test_parts_make_up_the_batch_and_hold_the_pairs_of_cutmix():
    parts = [Processes(3, rank).places(12) for rank in range(3)]
    assert sorted(p for part in parts for p in part) == list(range(12))
    values = torch.arange(12.0)[:, None, None].expand(12, 4, 4)
    boxes = torch.zeros(12, 4, 4, dtype=torch.bool)
    boxes[:, 1:3] = True
    whole = augmentation.paste(values, boxes)
    for part in parts:
        assert torch.equal(augmentation.paste(values[part], boxes[part]), whole[part])


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(InvalidConfig, match="must be multiples of 4, got 6"):
        Processes(2, 0).places(6)


def test_a_device_of_several_processes_has_no_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidConfig, match="expected cpu or cuda, got 'cuda:1'"):
        join("cuda:1")


METHODS = ("unimatch_v2", "vessa", "semisam")


@pytest.fixture(scope="module")
def steps(phantoms, tmp_path_factory):
    """Return the folder of the steps of all methods, below `1` by one process and below `2` by two."""
    folder = tmp_path_factory.mktemp("steps")
    for count in (1, 2):
        what = [str(STEPS), str(phantoms), str(folder / str(count)), *METHODS]
        if count > 1:
            what = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *what]
        done = subprocess.run([sys.executable, *what], capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_take_the_steps_of_one(steps, method):
    one, two = (checkpoint.read(steps / str(count) / method / "weights.safetensors") for count in (1, 2))
    for ours, theirs in zip(one[1]["figures"], two[1]["figures"], strict=True):
        assert ours == pytest.approx(theirs, abs=CLOSE)
    assert one[0].keys() == two[0].keys()
    apart = {k: (v.double() - two[0][k].double()).abs().max().item() for k, v in one[0].items()}
    # a bias before BatchNorm has no gradient but rounding, of which AdamW makes steps of full size
    assert {k: v for k, v in apart.items() if v > CLOSE and not _before_norm(k)} == {}
    if method != "unimatch_v2":
        asked = [json.loads((steps / "2" / method / f"asked-{rank}.json").read_text()) for rank in range(2)]
        (alone,) = [json.loads((steps / "1" / method / "asked-0.json").read_text())]
        for step, whole in enumerate(alone):
            assert sorted(asked[0][step] + asked[1][step]) == sorted(whole)


def _before_norm(name):
    *_, layer, kind = name.split(".")
    return (layer in "03" and kind == "bias") or (layer in "14" and kind == "running_mean")
