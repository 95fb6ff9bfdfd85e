"""The language model behind vLLM: the state at <SEG> from `/v1/embeddings` of its pooling runner.

The template comes first, so that vLLM's prefix cache serves every target of a template; an image travels
once and is named by the digest of its pixels afterwards. What is served there is compared with the weights
at the start, and again after every failure. The calls block: they are made on the device thread.
"""

import base64
import hashlib
import io
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import stamina
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vessa.errors import InvalidConfig, InvalidWeights, LanguageUnavailable, VessaError
from vessa_server.model.language.instructions import answer, ask
from vessa_server.model.language.vlm import SEG, Probe, as_seen

log = logging.getLogger(__name__)

_ATTEMPTS = 4
_LONGEST_WAIT_S = 2.0  # between two tries, whatever a proxy's Retry-After says: the device waits
_WATCH_S = 2.0
_CONNECT_S = 5.0
_REMEMBERED = 10_000  # images that vLLM is believed to hold
_OTHER_WEIGHTS = 0.05  # relative distance of the probe's state; see docs/decisions/
_LARGEST_JSON = 4 << 20


@dataclass(frozen=True)
class VllmAddress:
    """Where vLLM serves `language/` of the weights; timeout_s: the longest wait for a batch of states."""

    url: str
    key: str = field(repr=False)
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Picture:
    """One image as vLLM gets it: its name, and a PNG as a data address."""

    uuid: str
    data: str

    @classmethod
    def of(cls, pixels: Tensor) -> "Picture":
        """Encode pixels, uint8 (3, S, S)."""
        array = np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", compress_level=1)
        name = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
        return cls(name, "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())


@dataclass(frozen=True)
class ConversationStart:
    """The start of a conversation: a template's picture and what is asked about it."""

    picture: Picture
    class_name: str
    instruction: str

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return len(self.picture.data)


class _RepeatableError(Exception):
    """A failure that may pass; wait_s: how long vLLM asked to wait."""

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class _RefusedError(Exception):
    """vLLM read the request and did not take it."""


def serve_command(language: Path, dtype: str) -> list[str]:
    """Return the command by which vLLM serves `language/`; place, port and key come after it.

    dtype: float32 or bfloat16; vLLM's own choice for a float32 checkpoint is float16, which overflows
    Raises InvalidConfig for any other.
    """
    if dtype not in ("float32", "bfloat16"):
        raise InvalidConfig(f"vLLM serves states in float32 or bfloat16, not {dtype!r}")
    pooler = {"seq_pooling_type": "LAST", "use_activation": False}  # else the state is scaled to length 1
    command = ["vllm", "serve", str(language), "--served-model-name", "vessa"]
    command += ["--runner", "pooling", "--convert", "embed", "--pooler-config", json.dumps(pooler)]
    command += ["--dtype", dtype, "--max-model-len", "2048"]
    return [*command, "--limit-mm-per-prompt", json.dumps({"image": 2, "video": 0})]


class LanguageService:
    """Asks vLLM for states. One thread asks at a time; another one watches whether vLLM is there.

    folder: `language/` of the weights; image_size: px; expected: the probe's state, from vessa.json
    """

    def __init__(
        self, address: VllmAddress, folder: Path, image_size: int, expected: Sequence[float] | None
    ) -> None:
        """Read what answers must look like; `connect` comes next. Raises InvalidWeights, InvalidConfig."""
        if expected is None:
            raise InvalidWeights(
                "vessa.json does not say which state vLLM must answer with: these weights are of an older "
                "version; write them anew with `vessa-server weights export WEIGHTS --out FOLDER`"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
            self.hidden_size = int(config["text_config"]["hidden_size"])
            self._seg_id = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(SEG)
        except Exception as error:  # tokenizers raises nothing narrower
            raise InvalidWeights(f"{folder.name}/ is not a Qwen3-VL directory with a tokenizer") from error
        if self._seg_id is None or len(expected) != self.hidden_size:
            raise InvalidWeights(f"{folder.name}/ does not fit vessa.json: no {SEG}, or another state's size")
        self.image_size = image_size
        self._expected = torch.tensor(expected)
        self._timeout = address.timeout_s
        self._sent: OrderedDict[str, None] = OrderedDict()
        self._model = ""
        self._failure: str | None = None
        self._asking = threading.Lock()
        self._closed = threading.Event()
        headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
        try:
            self._http = httpx.Client(base_url=address.url, headers=headers, trust_env=False)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InvalidConfig("VESSA_VLLM_URL or VESSA_VLLM_KEY cannot be used as it is") from error

    def connect(self) -> None:
        """Compare what is served with the weights, then watch it in a thread of its own.

        Raises LanguageUnavailable while vLLM does not answer, InvalidConfig for a key it refuses,
        InvalidWeights when it serves anything else than these weights.
        """
        with self._asking:
            self._compare()
        threading.Thread(target=self._watch, name="vessa-vllm", daemon=True).start()

    def close(self) -> None:
        """Stop watching and close all connections."""
        self._closed.set()
        self._http.close()

    def check(self) -> None:
        """Raise LanguageUnavailable while vLLM cannot be used."""
        if self._failure is not None:
            raise LanguageUnavailable(self._failure, retry_after=2 * _WATCH_S)

    def read_templates(
        self, overlays: Tensor, class_names: Sequence[str], instructions: Sequence[str]
    ) -> list[ConversationStart]:
        """Prepare N conversations up to where the target comes; overlays: (N, 3, S, S) float in [0, 1]."""
        pictures = [Picture.of(p) for p in as_seen(overlays, self.image_size)]
        return [ConversationStart(*told) for told in zip(pictures, class_names, instructions, strict=True)]

    def states_after(self, read: Sequence[ConversationStart], targets: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the states at <SEG>, (N, hidden) float32, of N conversations, each with its target.

        targets: (M, 3, S, S) float in [0, 1]; rows: which of them follows each conversation
        Raises LanguageUnavailable; at once while vLLM is known to be away.
        """
        self.check()
        pictures = [Picture.of(p) for p in as_seen(targets, self.image_size)]
        pairs = [(told, pictures[row]) for told, row in zip(read, rows, strict=True)]
        with self._asking:
            self.check()  # it may have been lost while others asked
            try:
                return self._states(pairs).to(targets.device)
            except VessaError as error:
                self._fail(error)
        self.check()
        raise AssertionError("a failure was just noted")

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            log.error("vLLM cannot be used: %s", error)
        self._failure = str(error)
        self._sent.clear()

    def _watch(self) -> None:
        """Look whether vLLM is there; after a failure, whether it serves these weights."""
        while not self._closed.wait(_WATCH_S):
            with self._asking:
                try:
                    if self._failure is None:
                        self._send("GET", "/health", None, 0)
                    else:
                        self._compare()
                        self._failure = None
                        log.info("vLLM can be used again")
                except Exception as error:  # whatever a server or proxy says: who watches goes on
                    if not self._closed.is_set():
                        self._fail(error)

    def _compare(self) -> None:
        """Compare name, last token and state of the probe with what these weights give."""
        models = self._json("GET", "/v1/models", None).get("data")
        first = models[0] if isinstance(models, list) and models else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str):
            raise InvalidWeights("vLLM names no model that it serves")
        self._model, self._sent = name, OrderedDict()
        overlays, targets = (as_seen(images, self.image_size)[0] for images in Probe.images())
        told = ConversationStart(Picture.of(overlays), Probe.CLASS, Probe.INSTRUCTION)
        pair = (told, Picture.of(targets))
        tokens = self._json("POST", "/tokenize", self._body([pair]) | {"messages": self._messages(*pair)})
        if not isinstance(ids := tokens.get("tokens"), list) or ids[-1:] != [self._seg_id]:
            raise InvalidWeights(f"vLLM's conversation does not end in {SEG}: it serves another language/")
        state = self._states([pair])[0]
        distance = float((state - self._expected).norm() / self._expected.norm())
        if not distance <= _OTHER_WEIGHTS:  # also when it is not a number
            raise InvalidWeights(
                f"vLLM serves other weights than these, or with other flags: its state is {distance:.0%} "
                f"off, at most {_OTHER_WEIGHTS:.0%} is rounding; serve the language/ beside vessa.json"
            )

    def _states(self, pairs: Sequence[tuple[ConversationStart, Picture]]) -> Tensor:
        """Ask for a batch of states; images go by name, and whole where vLLM has forgotten one."""
        size = 4 * self.hidden_size * len(pairs)
        try:
            data = self._send("POST", "/v1/embeddings", self._body(pairs), size)
        except _RefusedError as refused:
            if not self._sent:
                raise InvalidWeights(str(refused)) from refused
            self._sent.clear()
            try:
                data = self._send("POST", "/v1/embeddings", self._body(pairs), size)
            except _RefusedError as again:
                raise InvalidWeights(str(again)) from again
        for told, target in pairs:
            for picture in (told.picture, target):
                self._sent[picture.uuid] = None
                self._sent.move_to_end(picture.uuid)
        while len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)
        if len(data) != size:
            raise InvalidWeights(f"vLLM answered {len(data)} bytes for {len(pairs)} states, expected {size}")
        states = torch.from_numpy(np.frombuffer(data, "<f4").reshape(len(pairs), -1).astype(np.float32))
        if not states.isfinite().all():
            raise InvalidWeights("vLLM answered a state that is not finite: serve with bfloat16 or float32")
        return states

    def _body(self, pairs: Sequence[tuple[ConversationStart, Picture]]) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [self._messages(*pair) for pair in pairs],
            # Without it the answer would be closed by a token, and the state be that token's.
            "continue_final_message": True,
            "add_generation_prompt": False,
            "encoding_format": "bytes_only",
            "embed_dtype": "float32",
            "endianness": "little",
        }

    def _messages(self, told: ConversationStart, target: Picture) -> list[dict[str, Any]]:
        question = {"type": "text", "text": ask(told.instruction, told.class_name)}
        return [
            {"role": "user", "content": [self._image(told.picture), question, self._image(target)]},
            {"role": "assistant", "content": answer(told.class_name)},
        ]

    def _image(self, picture: Picture) -> dict[str, Any]:
        url = None if picture.uuid in self._sent else {"url": picture.data}
        return {"type": "image_url", "image_url": url, "uuid": picture.uuid}

    def _json(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            data = json.loads(self._send(method, path, body, _LARGEST_JSON))
        except (_RefusedError, ValueError) as error:
            raise InvalidWeights(f"{path} of VESSA_VLLM_URL does not answer as vLLM does: {error}") from error
        if not isinstance(data, dict):
            raise InvalidWeights(f"{path} of VESSA_VLLM_URL does not answer as vLLM does")
        return data

    def _send(self, method: str, path: str, body: dict[str, Any] | None, most: int) -> bytes:
        """Return an answer of at most so many bytes; what may pass is tried again, within the timeout."""
        deadline = time.monotonic() + self._timeout
        content = None if body is None else json.dumps(body).encode()
        try:
            for attempt in stamina.retry_context(
                on=_wait, attempts=_ATTEMPTS, timeout=self._timeout, wait_initial=0.1, wait_max=2.0
            ):
                with attempt:
                    return self._once(method, path, content, most, deadline)
        except _RepeatableError as error:
            raise LanguageUnavailable(f"the language model's server cannot be used: {error}") from error
        raise AssertionError("stamina gives at least one attempt")

    def _once(self, method: str, path: str, content: bytes | None, most: int, deadline: float) -> bytes:
        left = max(deadline - time.monotonic(), 0.1)
        request = self._http.build_request(
            method,
            path,
            content=content,
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(left, connect=min(left, _CONNECT_S)),
        )
        try:
            response = self._http.send(request, stream=True)
            try:
                status, wait = response.status_code, response.headers.get("Retry-After", "")
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if status == 200 and len(data) > most and most:
                        raise InvalidWeights(f"{path} of vLLM answered more than the {most} bytes expected")
                    if len(data) > _LARGEST_JSON and status != 200:
                        break
                    if time.monotonic() > deadline:
                        raise _RepeatableError(f"no whole answer within {self._timeout:g} s")
            finally:
                response.close()
        except httpx.TimeoutException as error:
            raise _RepeatableError(f"no answer within {left:.3g} s") from error
        except httpx.HTTPError as error:
            raise _RepeatableError(f"no answer ({type(error).__name__})") from error
        except RuntimeError as error:  # closed while it was asked
            raise _RepeatableError("this service is shutting down") from error
        if status in (401, 403):
            raise InvalidConfig("vLLM refuses the key: VESSA_VLLM_KEY must be its --api-key")
        if status in (408, 429) or status >= 500:
            raise _RepeatableError(f"it answers {status}", float(wait) if wait.isdigit() else None)
        if status != 200:
            raise _RefusedError(f"it answers {status}: {bytes(data[:300]).decode(errors='replace')}")
        return bytes(data)


def _wait(error: Exception) -> bool | float:
    """Tell stamina whether and when to try again."""
    if not isinstance(error, _RepeatableError):
        return False
    return True if error.wait_s is None else min(error.wait_s, _LONGEST_WAIT_S)
