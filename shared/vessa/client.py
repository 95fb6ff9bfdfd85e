"""Clients of the annotator, sync and async.

Requests are built and answers read by plain functions in `vessa.protocol`; the two clients here
only send. What may be repeated safely is repeated, waiting as long as Retry-After says.
"""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack

import httpx
import stamina

from vessa import protocol
from vessa.annotation import Annotation, Image, Prompts, SegmentOptions
from vessa.errors import BadResponse, Unauthorized, Unreachable, VessaError
from vessa.protocol import Call
from vessa.schemas import AdaptationInfo, BankInfo, ServiceInfo, TemplateInfo

__all__ = ["Annotation", "AnnotatorClient", "AsyncAnnotatorClient", "Prompts", "default_key_file"]

DEFAULT_URL = "http://127.0.0.1:8700"
_REPEATABLE_STATUS = {429, 502, 503, 504}
_NO_EFFECT_STATUS = {429}  # refused before anything was done
_LONGEST_WAIT = 60.0  # seconds; who is told to come back later than that is told so, and not kept waiting

_T = TypeVar("_T")


class _RepeatableError(Exception):
    """A failure worth another try; carries what to raise when there is none left."""

    def __init__(self, error: VessaError) -> None:
        super().__init__(str(error))
        self.error = error


def default_key_file() -> Path:
    """Where the annotator keeps the key it made at its first start, on this machine."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "vessa" / "api-key"


def find_key() -> str | None:
    """Return the key from VESSA_API_KEY, else from the key file, else None."""
    key = os.environ.get("VESSA_API_KEY")
    if key:
        return key
    try:
        # Bytes that are no text become characters that no key has, and the client says so.
        return default_key_file().read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _wait(error: Exception) -> bool | timedelta:
    """Tell stamina whether and when to try again."""
    if not isinstance(error, _RepeatableError):
        return False
    after = error.error.retry_after
    if after is None:
        return True
    return after <= _LONGEST_WAIT and timedelta(seconds=after)


def _result(call: Call[_T], response: httpx.Response) -> _T:
    """Read an answer, or raise the service's error as the class it was there."""
    if response.is_success:
        return call.read(response)
    error = protocol.read_error(response)
    if error.item is not None and error.item in range(len(call.rows)):
        error.item = call.rows[error.item]  # counted within the request; the caller counts within its list
    repeatable = {"always": _REPEATABLE_STATUS, "unsent": _NO_EFFECT_STATUS, "never": set[int]()}[call.repeat]
    raise _RepeatableError(error) if response.status_code in repeatable else error


def _failure(url: str, timeout: float, call: Call[Any], error: httpx.RequestError) -> Exception:
    """Turn httpx's error into ours, repeatable where that is safe and promises something."""
    kind = type(error).__name__
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return Unreachable(f"'{url}' or the key is not usable ({kind}): expected http://host:port")
    if isinstance(error, httpx.DecodingError | httpx.TooManyRedirects):
        return BadResponse(f"{url} answered something that is not HTTP as agreed ({kind})")
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        # Not repeated: the service may still be at work on it, and would then do it twice.
        return Unreachable(
            f"the annotator at {url} took longer than {timeout:g} s ({kind}): "
            "send fewer images at once, or allow more by `timeout`"
        )
    failure = Unreachable(
        f"no answer from the annotator at {url} ({kind}): "
        "start it with `vessa-server serve`, or give its address (`--url`, VESSA_URL)"
    )
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    again = call.repeat == "always" or (call.repeat == "unsent" and unsent)
    return _RepeatableError(failure) if again else failure


class _Base:
    def __init__(
        self, url: str | None, api_key: str | None, timeout: float, attempts: int, wait_initial: float
    ) -> None:
        if timeout <= 0 or attempts < 1 or wait_initial < 0:
            raise ValueError(
                "expected timeout > 0 s, attempts >= 1 and wait_initial >= 0 s, "
                f"got {timeout}, {attempts} and {wait_initial}"
            )
        self.url = (url or os.environ.get("VESSA_URL") or DEFAULT_URL).rstrip("/")
        self._timeout = timeout
        try:
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise Unreachable(f"'{self.url}' is not an address: expected http://host:port") from error
        key = api_key or find_key()
        if key and not (key.isascii() and key.isprintable()):
            raise Unauthorized("the API key holds characters that no key has; copy it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": headers,
            "timeout": httpx.Timeout(timeout, connect=5.0),
        }
        self._retry: dict[str, Any] = {
            "on": _wait,
            "attempts": attempts,
            "timeout": None,
            "wait_initial": wait_initial,
        }


class AnnotatorClient(_Base):
    """Talks to one annotator. Safe to share between threads.

    url: None takes VESSA_URL, else port 8700 of this machine; api_key: None looks in VESSA_API_KEY,
    then in the local key file; transport: an httpx transport in place of the network; timeout: seconds
    a request may take;
    attempts: tries a repeatable request gets. Every method raises VessaError subclasses, among them
    Unreachable when nobody answers.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        wait_initial: float = 0.2,
    ) -> None:
        """Open a client; use it as a context manager or `close` it."""
        super().__init__(url, api_key, timeout, attempts, wait_initial)
        self._http = httpx.Client(transport=transport, **self._options)

    def __enter__(self) -> "AnnotatorClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _send(self, call: Call[_T]) -> _T:
        try:
            for attempt in stamina.retry_context(**self._retry):
                with attempt:
                    try:
                        response = self._http.request(call.method, call.path, **call.options)
                    except httpx.RequestError as error:
                        raise _failure(self.url, self._timeout, call, error) from error
                    return _result(call, response)
        except _RepeatableError as error:
            raise error.error from error.__cause__
        raise AssertionError("stamina gives at least one attempt")

    def info(self) -> ServiceInfo:
        """What is running there."""
        return self._send(protocol.info())

    def ready(self) -> bool:
        """Whether it takes requests now."""
        try:
            return self._send(protocol.ready())
        except VessaError:
            return False

    def banks(self) -> list[BankInfo]:
        """All template banks."""
        return self._send(protocol.banks())

    def bank(self, name: str) -> BankInfo:
        """One template bank. Raises UnknownBank."""
        return self._send(protocol.bank(name))

    def templates(self, bank: str) -> list[TemplateInfo]:
        """The templates of a bank."""
        return self._send(protocol.templates(bank))

    def add_templates(
        self,
        bank: str,
        images: Sequence[Image],
        masks: Sequence[Image],
        classes: Mapping[int, str],
        groups: Sequence[str],
    ) -> list[TemplateInfo]:
        """Add annotated images; the same image, mask, classes and group are added once.

        images: uint8 (H, W[, 3]); masks: uint8 (H, W) class ids; groups: the patient of each.
        """
        calls = protocol.add_templates(bank, images, masks, classes, groups)
        return protocol.in_order(len(images), ((call, self._send(call)) for call in calls))

    def delete_template(self, bank: str, template: str) -> None:
        """Remove one template. Raises UnknownTemplate."""
        self._send(protocol.delete_template(bank, template))

    def delete_bank(self, name: str) -> None:
        """Remove a bank with all its templates. Raises UnknownBank."""
        self._send(protocol.delete_bank(name))

    def adapt(self, bank: str, seconds: float = 120.0) -> AdaptationInfo:
        """Let the annotator learn from a bank's templates for at most `seconds`, in the background.

        Raises UnknownBank, InvalidRequest for a bank with too few templates or too long a time, QueueFull
        while another bank is being adapted to. `adaptation` tells how it goes.
        """
        return self._send(protocol.adapt(bank, seconds))

    def adaptation(self, bank: str) -> AdaptationInfo:
        """How the adaptation of a bank goes, or went. Raises UnknownBank."""
        return self._send(protocol.adapt(bank))

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again. Raises UnknownBank."""
        self._send(protocol.forget_adaptation(bank))

    def segment(
        self,
        images: Sequence[Image] | None = None,
        *,
        bank: str,
        image_ids: Sequence[str] | None = None,
        **options: Unpack[SegmentOptions],
    ) -> list[Annotation]:
        """Segment images, or images the service has seen, by their ids.

        images: uint8 (H, W[, 3]), sizes may differ; image_ids: of images of one size; further options:
        classes, groups, prompts, template_choice, seed, probabilities, see
        `vessa.annotation.SegmentOptions`. An item that failed has its `error` set; the others are not
        touched by it.
        """
        count, calls = protocol.segment(images, bank=bank, image_ids=image_ids, **options)
        return protocol.in_order(count, ((call, self._send(call)) for call in calls))


class AsyncAnnotatorClient(_Base):
    """The same client for asyncio; see AnnotatorClient."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        wait_initial: float = 0.2,
    ) -> None:
        """Open a client; use it as an async context manager or `aclose` it."""
        super().__init__(url, api_key, timeout, attempts, wait_initial)
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def __aenter__(self) -> "AsyncAnnotatorClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _send(self, call: Call[_T]) -> _T:
        try:
            async for attempt in stamina.retry_context(**self._retry):
                with attempt:
                    try:
                        response = await self._http.request(call.method, call.path, **call.options)
                    except httpx.RequestError as error:
                        raise _failure(self.url, self._timeout, call, error) from error
                    return _result(call, response)
        except _RepeatableError as error:
            raise error.error from error.__cause__
        raise AssertionError("stamina gives at least one attempt")

    async def info(self) -> ServiceInfo:
        """What is running there."""
        return await self._send(protocol.info())

    async def ready(self) -> bool:
        """Whether it takes requests now."""
        try:
            return await self._send(protocol.ready())
        except VessaError:
            return False

    async def banks(self) -> list[BankInfo]:
        """All template banks."""
        return await self._send(protocol.banks())

    async def bank(self, name: str) -> BankInfo:
        """One template bank. Raises UnknownBank."""
        return await self._send(protocol.bank(name))

    async def templates(self, bank: str) -> list[TemplateInfo]:
        """The templates of a bank."""
        return await self._send(protocol.templates(bank))

    async def add_templates(
        self,
        bank: str,
        images: Sequence[Image],
        masks: Sequence[Image],
        classes: Mapping[int, str],
        groups: Sequence[str],
    ) -> list[TemplateInfo]:
        """Add annotated images; see AnnotatorClient."""
        calls = protocol.add_templates(bank, images, masks, classes, groups)
        return protocol.in_order(len(images), [(call, await self._send(call)) for call in calls])

    async def delete_template(self, bank: str, template: str) -> None:
        """Remove one template. Raises UnknownTemplate."""
        await self._send(protocol.delete_template(bank, template))

    async def delete_bank(self, name: str) -> None:
        """Remove a bank with all its templates. Raises UnknownBank."""
        await self._send(protocol.delete_bank(name))

    async def adapt(self, bank: str, seconds: float = 120.0) -> AdaptationInfo:
        """See AnnotatorClient.adapt."""
        return await self._send(protocol.adapt(bank, seconds))

    async def adaptation(self, bank: str) -> AdaptationInfo:
        """How the adaptation of a bank goes, or went. Raises UnknownBank."""
        return await self._send(protocol.adapt(bank))

    async def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again. Raises UnknownBank."""
        await self._send(protocol.forget_adaptation(bank))

    async def segment(
        self,
        images: Sequence[Image] | None = None,
        *,
        bank: str,
        image_ids: Sequence[str] | None = None,
        **options: Unpack[SegmentOptions],
    ) -> list[Annotation]:
        """Segment images; see AnnotatorClient."""
        count, calls = protocol.segment(images, bank=bank, image_ids=image_ids, **options)
        return protocol.in_order(count, [(call, await self._send(call)) for call in calls])
