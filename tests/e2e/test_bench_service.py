"""Run `make bench-service` to its last line, without a judgement on speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_of_the_service_ends_with_its_figures(nano_weights):
    command = [sys.executable, "benchmarks/service.py", "--quick", f"--weights={nano_weights}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    ratios = ("http_over_bare", "batched_over_single", "over_litserve", "prompts_only_over_full")
    for key in (*ratios, "p99_overload_over_capacity"):
        assert figures[key] > 0
    assert figures["refused_without_retry_after"] == figures["lost"] == 0
    assert figures["answered"] + figures["refused"] == 3 * figures["clients"]
