"""What the trainer's tests share: small phantom patients and the configs of tiny runs on them."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import torch

from vessa.client import AnnotatorClient
from vessa.datasets import Dataset, open_dataset
from vessa_server.pretraining.phantoms import write_phantoms
from vessa_trainer.config import Config, load_config

SIZE = 32  # px, of the phantoms and of the tiny students' squares


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Nets this small only lose by more threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder of six synthetic hearts, three slices each: 1 labeled, 3 unlabeled, 1 val, 1 test."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=6, slices=3, size=SIZE, seed=0)
    return folder / "heart"


@pytest.fixture
def dataset(phantoms: Path) -> Dataset:
    """The phantoms, opened."""
    return open_dataset(phantoms)


@pytest.fixture
def tiny(phantoms: Path, tmp_path: Path) -> Callable[..., Config]:
    """Make configs of tiny runs: `tiny("semi.method=vessa", steps=4)`; each test has its own folders."""

    def make(*overrides: str, **keys: object) -> Config:
        small = [
            f"data.root={phantoms}",
            f"out={tmp_path / 'run'}",
            f"cache.url=folder:{tmp_path / 'labels'}",
            f"student.size={SIZE}",
            f"student.crop={SIZE}",
            "student.widths=[4,8,16]",
            "semi.conf_threshold=0.3",
            "semi.vessa_threshold=0.3",
            "batch_labeled=2",
            "batch_unlabeled=2",
            "steps=4",
            "eval_every=2",
            "checkpoint_every=100",
            "annotator.patience_s=20",
        ]
        return load_config(None, [*small, *(f"{k}={v}" for k, v in keys.items()), *overrides])

    return make


@pytest.fixture
def client(annotator) -> Iterator[AnnotatorClient]:
    """A client of the running annotator."""
    with AnnotatorClient(annotator.url, annotator.api_key) as opened:
        yield opened


class OwnRedis:
    """A real Redis of one test, which may stop it and start it again on the same port."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it and wait until it answers."""
        binary = shutil.which("redis-server")
        assert binary is not None
        place = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        self._process = subprocess.Popen([binary, *place, *options], stdout=subprocess.DEVNULL)
        with redis.Redis(port=self.port) as asking:
            for _ in range(400):
                try:
                    asking.ping()
                    return
                except redis.ConnectionError:
                    time.sleep(0.02)
        pytest.fail("redis-server did not start")

    def stop(self) -> None:
        """Stop it; what it held is gone."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A running Redis that the test may stop."""
    server = OwnRedis(tmp_path)
    server.start()
    yield server
    server.stop()
