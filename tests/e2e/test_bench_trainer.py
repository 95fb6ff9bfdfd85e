"""Run `make bench-trainer` to its last line, without a judgement on speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--size=32", "--batch=2", "--steps=2", "--warmup=1", "--assisted-steps=8", "--patients=8"]


@pytest.mark.slow
def test_the_benchmark_of_the_trainer_ends_with_its_figures():
    command = [sys.executable, "benchmarks/trainer.py", *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    for key in ("step_over_upstream", "redis_batch_over_step", "cached_over_raw_bytes"):
        assert figures[key] > 0
    assert 0 <= figures["label_wait_share"] < 1
    assert figures["labels_refreshed"] > 0
    assert (figures["crop"], figures["batch"], figures["threads"]) == (32, 2, 1)
