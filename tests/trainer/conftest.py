"""Share small phantom patients and the configs of tiny runs on them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
import redis
import torch
from PIL import Image
from processes import bound

from vessa.client import AnnotatorClient
from vessa.codec import MEDIA_TYPE, TensorSpec, decode, encode, image_digest
from vessa.datasets import Dataset, open_dataset
from vessa.schemas import BankInfo
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_trainer.config import Config, load_config
from vessa_trainer.experiments.run import fit
from vessa_trainer.pseudo_labels.template_bank import seed_labeled

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


@pytest.fixture(scope="session")
def prompts_only(start_annotator, tmp_path_factory):
    """A running annotator that draws from prompts alone."""
    return start_annotator(tmp_path_factory.mktemp("prompts-only"), VESSA_WITHOUT="language,memory")


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
        command = bound([binary, *place, *options])
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
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


class Wire(httpx.BaseTransport):
    """The way to the real annotator. It notes what is asked, and a test may put faults on it.

    asked: image ids of each request to /segment; by_id: whether it came without pixels. fault: called
    with each request, may return a response of its own, raise, or wait; rewrite: called with the items
    of each answer to /segment, may change them.
    """

    _REQUEST = {
        "images": TensorSpec(("U8",), ((None,) * 3, (None,) * 4)),
        "boxes": TensorSpec(("F32",), ((None,) * 3,)),
        "mask_logits": TensorSpec(("F16",), ((None,) * 4,)),
        "mask_present": TensorSpec(("U8",), ((None,) * 2,)),
    }
    _ANSWER = {name: TensorSpec(("U8",), ((None,) * 3,)) for name in ("labels", "confidence")}

    def __init__(self) -> None:
        self._real = httpx.HTTPTransport()
        self.asked: list[list[str]] = []
        self.by_id: list[bool] = []
        self.fault: Callable[[httpx.Request], httpx.Response | None] | None = None
        self.rewrite: Callable[[list[dict[str, Any]]], None] | None = None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Note, fail or forward."""
        if request.url.path == "/segment":
            tensors, metadata = decode(request.read(), self._REQUEST, max_bytes=1 << 28)
            ids = json.loads(metadata.get("image_ids", "[]"))
            self.by_id.append(bool(ids))
            self.asked.append(ids or [image_digest(i) for i in tensors["images"]])
        answer = self.fault(request) if self.fault is not None else None
        if answer is None:
            answer = self._real.handle_request(request)
        if self.rewrite is not None and request.url.path == "/segment" and answer.status_code == 200:
            tensors, metadata = decode(answer.read(), self._ANSWER, max_bytes=1 << 28)
            items = json.loads(metadata["items"])
            self.rewrite(items)
            body = encode(tensors, metadata | {"items": json.dumps(items)})
            answer.close()
            return httpx.Response(200, content=body, headers={"Content-Type": MEDIA_TYPE})
        return answer

    def close(self) -> None:
        """Close the connections."""
        self._real.close()


def failure(status: int, code: str) -> httpx.Response:
    """The annotator's answer when something failed."""
    return httpx.Response(status, json={"error": {"code": code, "message": f"{code}, says the test"}})


@pytest.fixture
def answer_of() -> Callable[[int, str], httpx.Response]:
    """Make error answers: `answer_of(503, "not_ready")`."""
    return failure


@pytest.fixture
def wire() -> Wire:
    """The way of `wired` to the annotator."""
    return Wire()


@pytest.fixture
def wired(annotator, wire: Wire) -> Iterator[AnnotatorClient]:
    """A client whose requests go over `wire`, each tried once."""
    with AnnotatorClient(annotator.url, annotator.api_key, transport=wire, attempts=1) as opened:
        yield opened


@pytest.fixture
def bank(client: AnnotatorClient, dataset: Dataset, tiny: Callable[..., Config]) -> BankInfo:
    """The bank of the phantoms' labeled patient."""
    return seed_labeled(client, dataset, tiny())


@pytest.fixture
def hearts(phantoms, tmp_path):
    """A copy of the phantoms that a test may change."""
    return shutil.copytree(phantoms, tmp_path / "hearts")


@pytest.fixture
def train(tiny, hearts):
    """Train a tiny student on the changed phantoms: `train(*overrides)`."""

    quick = ("semi.method=supervised", "steps=2", "eval_every=1")

    def run(*overrides, data=hearts):
        return fit(
            tiny(*quick, f"data.root={data}", *overrides), resume_line="vessa-trainer fit --out here --resume"
        )

    return run


@pytest.fixture
def write_hdf5(hearts):
    """Write the hearts in SSL4MIS form: `write_hdf5(folder, name_of, mask_of)`; returns the data folder.

    name_of: the patient's name from the phantom's; mask_of: uint8 (H, W) class ids from the phantom's
    """

    def write(folder, name_of=lambda group: group, mask_of=lambda mask: mask):
        slices = folder / "data" / "slices"
        slices.mkdir(parents=True)
        for path in (hearts / "images").iterdir():
            group, index = path.stem.split("_")
            with (
                h5py.File(slices / f"{name_of(group)}_slice_{int(index)}.h5", "w") as file,
                Image.open(path) as image,
                Image.open(hearts / "masks" / path.name) as mask,
            ):
                file["image"] = np.array(image) / np.float32(255)
                file["label"] = mask_of(np.array(mask))
        return folder

    return write
