"""The language model behind HTTP: same states, images sent once, and every way in which a server can fail.

`Speaker` is a real HTTP server with vLLM's protocol and a real language model, for what vLLM itself cannot be
made to do; tests/vllm holds the same client to the real vLLM.
"""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vessa.errors import InvalidConfig, InvalidWeights, LanguageUnavailable
from vessa_server.model.language.prefix_cache import InProcess
from vessa_server.model.language.remote import LanguageService, VllmAddress
from vessa_server.model.language.remote.service import _RepeatableError, _wait
from vessa_server.model.weights import directory
from vessa_server.settings import Settings

VLLM_KEY = "a-key-of-the-language-model"
Opener = Callable[..., LanguageService]


class Speaker:
    """Answers as vLLM does, from a language model; `fault` says what goes wrong, `left` how often."""

    def __init__(self, weights: Path) -> None:
        self.language = directory.read(weights)[0].language
        self.pictures: dict[str, torch.Tensor] = {}
        self.sent = self.asked = 0
        self.fault, self.left = "", 0
        self.name = "vessa"
        methods = {"methods": ["GET", "POST"]}
        paths = {"/health": self.health, "/v1/models": self.models, "/tokenize": self.tokens}
        paths["/v1/embeddings"] = self.states
        app = Starlette(routes=[Route(path, call, **methods) for path, call in paths.items()])
        config = uvicorn.Config(
            app, host="127.0.0.1", port=0, log_level="critical", ws="none", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)

    def fails(self, *faults: str) -> bool:
        """Whether one of these faults is due now."""
        if self.fault not in faults or not self.left:
            return False
        self.left -= 1
        return True

    async def health(self, request: Request) -> Response:
        return Response(status_code=404 if self.fails("no health") else 200)

    async def models(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {VLLM_KEY}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if self.fails("no json"):
            return Response("<html>")
        return JSONResponse({"data": [{"id": self.name}]})

    async def tokens(self, request: Request) -> Response:
        body = await request.json()
        last = 0 if self.fails("last token") or not body["continue_final_message"] else self.language.seg_id
        return JSONResponse({"tokens": [1, 2, last]})

    async def states(self, request: Request) -> Response:
        self.asked += 1
        body = await request.json()
        if self.fails("500"):
            return JSONResponse({"error": "engine"}, 500)
        if self.fails("busy"):
            return Response(status_code=503, headers={"Retry-After": "0"})
        if self.fails("slow"):
            await asyncio.sleep(3)
        if self.fails("forgets"):
            self.pictures.clear()
        if body["model"] != self.name:
            return JSONResponse({"error": "no such model"}, 404)
        try:
            pairs = [self._pair(messages) for messages in body["messages"]]
        except KeyError:
            return JSONResponse({"error": "no image of this uuid"}, 400)
        states = await asyncio.to_thread(self._look, pairs)
        if self.fails("other weights"):
            states = states[:, ::-1].copy()
        if self.fails("not a number"):
            states[0, 0] = np.nan
        data = states.astype("<f4").tobytes()
        if self.fails("short"):
            data = data[:-4]
        if self.fails("endless"):
            data *= 3
        return StreamingResponse(self._body(data), headers={"Content-Length": str(len(data))})

    async def _body(self, data: bytes) -> Any:
        yield data[:8]
        if self.fails("cut"):
            raise ConnectionResetError
        yield data[8:]

    def _pair(self, messages: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, str, str]:
        template, text, target = messages[0]["content"]
        return self._picture(template), self._picture(target), text["text"], messages[1]["content"]

    def _picture(self, part: dict[str, Any]) -> torch.Tensor:
        if part["image_url"] is not None:
            self.sent += 1
            file = io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))
            pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
            self.pictures[part["uuid"]] = pixels.float() / 255
        return self.pictures[part["uuid"]]

    @torch.inference_mode()
    def _look(self, pairs: list[Any]) -> np.ndarray:
        overlays, targets = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
        names = [pair[3].removeprefix("The ").removesuffix(" is <SEG>") for pair in pairs]
        asked = [pair[2].split(" Structure: ")[0] for pair in pairs]
        return self.language(overlays, targets, names, asked)[0].numpy()


@pytest.fixture(scope="module")
def running(nano_weights: Path) -> Iterator[Speaker]:
    speaker = Speaker(nano_weights)
    yield speaker
    speaker.stop()


@pytest.fixture
def speaker(running: Speaker) -> Speaker:
    running.fault, running.left, running.name = "", 0, "vessa"
    running.sent = running.asked = 0
    running.pictures.clear()
    return running


@pytest.fixture
def opened(nano_weights: Path) -> Iterator[Opener]:
    """Open a client that is not connected yet: `opened(speaker, key=..., timeout=...)`."""
    services = []

    def make(speaker: Speaker, key: str = VLLM_KEY, timeout: float = 20.0) -> LanguageService:
        expected = directory.manifest(nano_weights)["language_state"]
        address = VllmAddress(speaker.url, key, timeout)
        services.append(LanguageService(address, nano_weights / "language", 128, expected))
        return services[-1]

    yield make
    for service in services:
        service.close()


@pytest.fixture
def connected(opened: Opener, speaker: Speaker) -> LanguageService:
    service = opened(speaker)
    service.connect()
    speaker.sent = speaker.asked = 0
    return service


NAMES = ["liver", "left atrium", "liver"]
ASKED = ["Segment it."] * 3


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 160, 160, generator=torch.Generator().manual_seed(seed))


def ask(reader: Any, seed: int = 0) -> torch.Tensor:
    """States of three conversations about two targets."""
    with torch.inference_mode():
        return reader.states_after(
            reader.read_templates(pixels(3), NAMES, ASKED), pixels(2, seed + 1), [0, 1, 1]
        )


def test_states_are_those_of_the_model_in_process(connected, speaker):
    assert torch.allclose(ask(connected), ask(InProcess(speaker.language)), atol=1e-4)


def test_a_picture_travels_once(connected, speaker):
    first = ask(connected)
    assert speaker.asked == 1
    before = speaker.sent
    assert torch.equal(ask(connected), first)
    assert speaker.sent == before
    ask(connected, seed=5)
    assert speaker.sent == before + 3  # the targets are new: one of them is in two conversations


def test_a_forgotten_picture_is_sent_again(connected, speaker):
    first = ask(connected)
    speaker.fault, speaker.left = "forgets", 1
    assert torch.equal(ask(connected), first)
    connected.check()


@pytest.mark.parametrize("fault", ["500", "busy", "cut"])
def test_what_passes_is_tried_again(connected, speaker, fault):
    speaker.fault, speaker.left = fault, 2
    assert torch.allclose(ask(connected), ask(InProcess(speaker.language)), atol=1e-4)
    assert speaker.asked == 3
    connected.check()


@pytest.mark.parametrize("fault", ["500", "busy", "cut", "short", "endless", "not a number"])
def test_what_stays_is_told_and_mends_itself(connected, speaker, fault):
    speaker.fault, speaker.left = fault, 1000
    with pytest.raises(LanguageUnavailable) as told:
        ask(connected)
    assert told.value.status == 503
    assert told.value.retry_after
    asked = speaker.asked
    with pytest.raises(LanguageUnavailable):
        connected.check()  # what /readyz asks
    with pytest.raises(LanguageUnavailable):
        ask(connected)  # at once, so that a batch that is halved does not wait again and again
    assert speaker.asked <= asked + 2 * 4  # the watcher alone may have asked
    speaker.fault = ""
    wait_for(connected)
    assert torch.allclose(ask(connected), ask(InProcess(speaker.language)), atol=1e-4)


def test_an_answer_that_nobody_expects_does_not_end_the_watch(connected, speaker):
    speaker.fault, speaker.left = "no health", 1
    deadline = time.monotonic() + 60
    while connected._failure is None:  # a 404, such as a proxy's while vLLM is exchanged
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait_for(connected)
    assert torch.allclose(ask(connected), ask(InProcess(speaker.language)), atol=1e-4)


@pytest.mark.parametrize(("told", "waited"), [(None, True), (0.0, 0.0), (300.0, 2.0)])
def test_no_proxy_decides_how_long_the_device_waits(told, waited):
    assert _wait(_RepeatableError("busy", told)) == waited
    assert _wait(ValueError()) is False


def wait_for(service: LanguageService, seconds: float = 60) -> None:
    """Wait until the service can be used again."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return service.check()
        except LanguageUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_slow_server_is_not_waited_for_longer_than_asked(opened, speaker):
    service = opened(speaker, timeout=1.0)
    speaker.fault, speaker.left = "slow", 1000
    with pytest.raises(LanguageUnavailable, match="answer within"):
        service.connect()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("last token", "does not end in <SEG>"),
        ("other weights", "serves other weights"),
        ("no json", "as vLLM"),
    ],
)
def test_another_model_is_refused_at_the_start(opened, speaker, fault, words):
    speaker.fault, speaker.left = fault, 1000
    with pytest.raises(InvalidWeights, match=words):
        opened(speaker).connect()


def test_a_wrong_key_is_refused_at_the_start(opened, speaker):
    with pytest.raises(InvalidConfig, match="VESSA_VLLM_KEY"):
        opened(speaker, key="another").connect()


def test_a_server_that_comes_back_with_other_weights_is_not_used(connected, speaker):
    speaker.fault, speaker.left, speaker.name = "other weights", 1000, "another"
    with pytest.raises(LanguageUnavailable, match="404"):
        ask(connected)
    deadline = time.monotonic() + 60
    while "other weights" not in str(connected._failure):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_nobody_there_is_told(opened, nano_weights, port):
    expected = directory.manifest(nano_weights)["language_state"]
    address = VllmAddress(f"http://127.0.0.1:{port}", VLLM_KEY)
    service = LanguageService(address, nano_weights / "language", 128, expected)
    with pytest.raises(LanguageUnavailable, match="ConnectError"):
        service.connect()
    service.close()
    assert VLLM_KEY not in repr(address)


def test_weights_that_name_no_state_are_refused(nano_weights):
    with pytest.raises(InvalidWeights, match="weights export"):
        LanguageService(VllmAddress("http://127.0.0.1:1", VLLM_KEY), nano_weights / "language", 128, None)


@pytest.mark.parametrize(
    "given",
    [
        {"language": "vllm"},
        {"vllm_url": "http://gpu:8000"},
        {"language": "vllm", "vllm_url": "file:///etc/passwd"},
        {"language": "vllm", "vllm_url": "http://user:pw@gpu:8000"},
        {"language": "vllm", "vllm_url": "http://gpu:8000", "without": "language"},
        {"language": "vllm", "vllm_url": "http://gpu:8000", "vllm_timeout_s": 500},
    ],
)
def test_settings_that_contradict_each_other_are_refused(given):
    with pytest.raises(InvalidConfig):
        Settings(**given)


def test_the_service_answers_503_and_is_not_ready_while_the_language_model_is_away(
    server_of, speaker, nano_weights, tmp_path
):
    settings = Settings(
        api_key="a-key-for-tests-0123456789",
        weights=str(nano_weights),
        device="cpu",
        store=f"folder:{tmp_path}",
        language="vllm",
        vllm_url=speaker.url,
        vllm_key=VLLM_KEY,
    )
    server = server_of(settings, wait=False)
    deadline = time.monotonic() + 240  # loading and asking share a machine with the other tests
    while (answer := server.http.get("/readyz")).status_code != 200:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    server.seed("b")
    image = np.zeros((1, 48, 64), np.uint8)
    assert server.segment({"images": image}, bank="b").status_code == 200
    speaker.fault, speaker.left = "500", 1000
    png = io.BytesIO()
    Image.fromarray(image[0] + 1).save(png, "PNG")
    refused = server.http.post("/segment", files={"image": png.getvalue()}, data={"bank": "b"})
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "language_unavailable"
    assert int(refused.headers["Retry-After"]) >= 1
    assert server.http.get("/readyz").json()["error"]["code"] == "language_unavailable"
    assert server.segment({"images": image}, bank="b").status_code == 200  # it was looked at before
    speaker.fault = ""
    wait_for(server.app.state.service.engine().worker.model.reader)
    assert server.http.get("/readyz").status_code == 200
    assert server.segment({"images": image + 1}, bank="b").status_code == 200
    server.app.state.service.stop()
    deadline = time.monotonic() + 20
    while any(thread.name == "vessa-vllm" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a service that has stopped still watches vLLM"
        time.sleep(0.05)
