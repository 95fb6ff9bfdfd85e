"""Train with `torchrun -m vessa_trainer fit`: two processes equal one with the same batches."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vessa_server.pretraining.data.phantoms import write_phantoms

SIZE = 32


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hearts")
    write_phantoms(folder, patients=6, slices=3, size=SIZE, seed=0)
    return folder / "heart"


@pytest.fixture
def fit(tmp_path: Path, hearts: Path) -> Callable[..., dict[str, Any]]:
    def run(name: str, processes: int, keys: dict[str, Any]) -> dict[str, Any]:
        out = tmp_path / name
        tree = {
            "data": {"root": str(hearts)},
            "out": str(out),
            "student": {"size": SIZE, "crop": SIZE, "widths": [4, 8, 16]},
            "semi": {"conf_threshold": 0.3, "vessa_threshold": 0.3, "method": "unimatch_v2"},
            "views": {"cutmix_p": 1.0},
            "steps": 10,
            "batch_labeled": 4,
            "batch_unlabeled": 4,
            "eval_every": 5,
            "threads": 1,
        }
        tree["semi"] |= keys.pop("semi", {})
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(tree | keys))
        what = ["-m", "vessa_trainer", "fit", "--config", str(config), "--resume"]
        if processes > 1:
            what = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *what]
        done = subprocess.run([sys.executable, *what], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-4000:]
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        summary["rows"] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        summary["weights"] = load_file(out / "last.safetensors")
        return summary

    return run


def images_seen(service: Any) -> float:
    """Return the number of images that the annotator has labeled."""
    headers = {"Authorization": f"Bearer {service.api_key}"}
    text = httpx.get(f"{service.url}/metrics", headers=headers).text
    return sum(float(v) for v in re.findall(r"^vessa_batch_items_sum (\S+)$", text, re.MULTILINE))


def test_two_processes_ask_once_for_each_image(
    fit: Callable[..., dict[str, Any]], annotator: Any, tmp_path: Path
) -> None:
    def keys(name: str) -> dict[str, Any]:
        return {
            "semi": {"method": "vessa"},
            "annotator": {"url": annotator.url, "api_key": annotator.api_key},
            "cache": {"url": f"folder:{tmp_path / name}-labels"},
            "feedback": {"enabled": False},
        }

    one = fit("one", 1, keys("one"))
    before = images_seen(annotator)
    two = fit("two", 2, keys("two"))
    asked = images_seen(annotator) - before
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [r["step"] for r in two["rows"]] == [r["step"] for r in one["rows"]]
    (ours,), (theirs,) = ([r for r in run["rows"] if "loss" in r] for run in (one, two))
    # in float32 ten steps of AdamW make that much of rounding; test_processes.py compares in float64
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)
    assert torch.equal(one["weights"]["generator"], two["weights"]["generator"])
    unique = len(list((tmp_path / "two-labels").glob("??/[0-9a-f]*")))
    assert two["feed"]["images"] == one["feed"]["images"]
    assert asked == unique
