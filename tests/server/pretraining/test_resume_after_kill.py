"""A Stage-1 run that is killed in the middle goes on as if nothing had been."""

import json
import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

OPTIONS = shlex.split(
    "--steps 6 --batch 2 --studies 2 --validation 2 --validate-every 2 --log-every 1 --seed 5"
)


@contextmanager
def started(out, log):
    """A run in a process of its own, killed at the latest when its block ends."""
    command = [sys.executable, "-m", "vessa_server", "pretrain", "--out", str(out), *OPTIONS]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def curve(out):
    """What a run logged, without the clock; a line that was cut off would be an error."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "minutes"} for line in lines]


def logged(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("loss") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_curve_of_a_killed_run_is_that_of_an_uninterrupted_one(tmp_path):
    said = tmp_path / "log"
    with said.open("ab") as log:
        with started(tmp_path / "whole", log) as whole:
            assert whole.wait(800) == 0, said.read_text()[-3000:]
        with started(tmp_path / "killed", log) as killed:
            deadline = time.monotonic() + 800
            while logged(tmp_path / "killed") < 3:  # one step after the checkpoint of step 2
                assert killed.poll() is None, said.read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.005)
        checkpoint = json.loads((tmp_path / "killed" / "checkpoint.json").read_text())
        assert 2 <= checkpoint["step"] < 6
        with started(tmp_path / "killed", log) as resumed:
            assert resumed.wait(800) == 0, said.read_text()[-3000:]
    assert [line["step"] for line in curve(tmp_path / "whole") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    digests = [
        json.loads((tmp_path / run / "weights" / "vessa.json").read_text())["files"]["segmenter.safetensors"]
        for run in ("whole", "killed")
    ]
    assert digests[0] == digests[1]
