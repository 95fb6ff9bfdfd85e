"""Kill a real training run and its services: the resumed run equals the uninterrupted one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import bound
from safetensors.torch import load_file

from vessa_server.pretraining.data.phantoms import write_phantoms

SIZE, STEPS, SAVED_EVERY = 32, 60, 7
TIMED = ("feed", "wait_seconds")  # of a row of metrics: what the clock says


@pytest.fixture(scope="session")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hearts")
    write_phantoms(folder, patients=6, slices=3, size=SIZE, seed=0)
    return folder / "heart"


class Trainer:
    """Run `vessa-trainer fit` in separate processes with one config and one run directory."""

    def __init__(self, out: Path, data: Path, keys: dict[str, Any]) -> None:
        self.out, self.config = out, out.with_suffix(".yaml")
        tree = {
            "data": {"root": str(data)},
            "out": str(out),
            "student": {"size": SIZE, "crop": SIZE, "widths": [16, 32, 64, 128, 256]},
            "semi": {"conf_threshold": 0.3, "vessa_threshold": 0.3, "method": "unimatch_v2"},
            "steps": STEPS,
            "batch_labeled": 2,
            "batch_unlabeled": 2,
            "eval_every": 20,
            "checkpoint_every": SAVED_EVERY,
            "threads": 1,
        }
        tree["semi"] |= keys.pop("semi", {})
        self.config.write_text(yaml.safe_dump(tree | keys))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "vessa_trainer", "fit", "--config", str(self.config), "--resume"]
        return subprocess.Popen(bound(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self) -> dict[str, Any]:
        process = self.start()
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 0, said[-3000:]
        summary: dict[str, Any] = json.loads((self.out / "summary.json").read_text())
        return summary

    def kill(self, when: Callable[[], bool]) -> None:
        """Start the run and kill it as soon as a condition holds."""
        process = self.start()
        wait_until(lambda: when() or process.poll() is not None, pause=0.0005)
        assert process.poll() is None, process.communicate()[0][-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)

    def rows(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def reached(self, step: int) -> bool:
        """Return whether the process has logged a step; a new process first removes later rows."""
        return any(row["step"] >= step for row in self.rows())

    def away(self) -> set[str]:
        """Return the outages that are recorded so far."""
        path = self.out / "incidents.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return {row["what"] for row in map(json.loads, lines) if row["away"]}

    def writing(self) -> list[Path]:
        return list(self.out.glob(".last.safetensors.*"))


def wait_until(true: Callable[[], bool], seconds: float = 250, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(pause)


def curve(trainer: Trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in trainer.rows()]


def assert_same_run(ours: Trainer, whole: Trainer) -> None:
    assert curve(ours) == curve(whole)
    for name in ("last.safetensors", "best.safetensors"):
        one, other = (load_file(t.out / name) for t in (ours, whole))
        assert one.keys() == other.keys()
        assert [k for k in one if not torch.equal(one[k], other[k])] == []
    one, other = (json.loads((t.out / "summary.json").read_text()) for t in (ours, whole))
    for key in ("val", "test", "best_step", "steps"):
        assert one[key] == other[key]


@pytest.fixture
def trainer_of(tmp_path: Path, hearts: Path) -> Callable[..., Trainer]:
    return lambda name, **keys: Trainer(tmp_path / name, hearts, keys)


def test_a_run_killed_within_a_step_and_within_a_write_is_the_same_run(
    trainer_of: Callable[..., Trainer],
) -> None:
    whole, killed = trainer_of("whole"), trainer_of("killed")
    assert whole.finish()["interruptions"] == []
    killed.kill(lambda: killed.reached(10))
    killed.kill(lambda: bool(killed.writing()) and (killed.out / "last.safetensors").is_file())
    left = killed.writing()
    summary = killed.finish()
    assert_same_run(killed, whole)
    assert len(left) == 1  # the kill fell into the writing, and what was cut is gone
    assert not killed.writing()
    assert [one["what"] for one in summary["interruptions"]] == ["trainer"] * 2
    assert all(one["seconds"] > 0 for one in summary["interruptions"])
    page = (killed.out / "report.html").read_text()
    assert "Interruptions" in page
    assert "stopped after it was saved at step" in page


def assisted(annotator: Any, cache: str, **keys: Any) -> dict[str, Any]:
    """Return the config of a run with VESSA and feedback that one seed determines."""
    return {
        "semi": {"method": "vessa"},
        "annotator": {"url": annotator.url, "api_key": annotator.api_key, "patience_s": 200},
        "feedback": {"start": 0.3, "every": 9},
        "cache": {"url": cache},
        "deterministic": True,
        **keys,
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["unimatch_v2", "vessa"])
def test_three_kills_at_random_steps_change_nothing(
    trainer_of: Callable[..., Trainer], annotator: Any, tmp_path: Path, method: str
) -> None:
    """Each VESSA run has a cache of its own, and two kills fall into a feedback round."""
    trainers = []
    for name in ("whole", "killed"):
        keys = {} if method == "unimatch_v2" else assisted(annotator, f"folder:{tmp_path / name}-labels")
        trainers.append(trainer_of(name, **keys))
    whole, killed = trainers
    whole.finish()
    draw = random.Random(time.time_ns())
    for at in (10, 30, 50):
        # a row is written every 10 steps; the kill comes up to ten steps later
        pause = draw.uniform(0, 0.3)
        killed.kill(lambda at=at, pause=pause: killed.reached(at) and not time.sleep(pause))
    killed.finish()
    assert_same_run(killed, whole)
    assert not (killed.out / "feedback").exists()


@pytest.mark.slow
def test_redis_and_annotator_restarted_in_mid_run_cost_time_and_nothing_else(
    trainer_of: Callable[..., Trainer],
    start_annotator: Callable[..., Any],
    start_redis: Callable[..., subprocess.Popen[bytes]],
    port: int,
    tmp_path: Path,
) -> None:
    service = start_annotator(tmp_path)
    redis = start_redis(tmp_path, port)
    keys = assisted(service, f"redis://127.0.0.1:{port}/0", steps=150)
    whole, disturbed = trainer_of("whole", **keys), trainer_of("disturbed", **keys)
    whole.finish()
    redis.kill()
    redis.wait(10)
    redis = start_redis(tmp_path, port)  # empty: the labels of the first run are gone
    process = disturbed.start()
    wait_until(lambda: disturbed.reached(50))
    redis.kill()
    service.process.kill()
    service.process.wait(10)
    redis.wait(10)
    wait_until(lambda: disturbed.away() == {"annotator", "label cache"})
    redis = start_redis(tmp_path, port)
    again = start_annotator(tmp_path, VESSA_PORT=service.url.rsplit(":", 1)[1])
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said[-3000:]
    assert again.process.poll() is None
    redis.terminate()
    redis.wait(10)
    assert_same_run(disturbed, whole)
    summary = json.loads((disturbed.out / "summary.json").read_text())
    assert {one["what"] for one in summary["interruptions"]} == {"annotator", "label cache"}
    assert all(one["seconds"] > 0 for one in summary["interruptions"])
    page = (disturbed.out / "report.html").read_text()
    for text in ("Interruptions", "annotator", "label cache"):
        assert text in page
