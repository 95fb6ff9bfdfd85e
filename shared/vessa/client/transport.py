"""How the clients reach a service: address and key, what is worth another try, which error comes of what."""

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx

from vessa.client import endpoints
from vessa.client.endpoints import Call
from vessa.errors import BadResponse, Unauthorized, Unreachable, VessaError

log = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8700"
_REPEATABLE_STATUS = {429, 502, 503, 504}
_NO_EFFECT_STATUS = {429}  # refused before anything was done
_LONGEST_WAIT = 60.0  # seconds; who is told to come back later than that is told so, and not kept waiting

_T = TypeVar("_T")


class RepeatableError(Exception):
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
    if not isinstance(error, RepeatableError):
        return False
    log.info("worth another try: %s", error)
    after = error.error.retry_after
    if after is None:
        return True
    return after <= _LONGEST_WAIT and timedelta(seconds=after)


def result_of(call: Call[_T], response: httpx.Response) -> _T:
    """Read an answer, or raise the service's error as the class it was there."""
    if response.is_success:
        return call.read(response)
    error = endpoints.read_error(response)
    if error.item is not None and error.item in range(len(call.rows)):
        error.item = call.rows[error.item]  # counted within the request; the caller counts within its list
    repeatable = {"always": _REPEATABLE_STATUS, "unsent": _NO_EFFECT_STATUS, "never": set[int]()}[call.repeat]
    # A 500 in another form than the annotator's is a proxy's (Ray Serve's): the annotator died at work on it.
    died = call.repeat == "always" and response.status_code == 500 and isinstance(error, BadResponse)
    raise RepeatableError(error) if died or response.status_code in repeatable else error


def failure_of(url: str, timeout: float, call: Call[Any], error: httpx.RequestError) -> Exception:
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
    return RepeatableError(failure) if again else failure


class Connection:
    """What both clients are made with; see AnnotatorClient."""

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        timeout: float,
        attempts: int,
        wait_initial: float,
        in_flight: int,
    ) -> None:
        if timeout <= 0 or attempts < 1 or wait_initial < 0 or in_flight < 1:
            raise ValueError(
                "expected timeout > 0 s, attempts >= 1, wait_initial >= 0 s and in_flight >= 1, "
                f"got {timeout}, {attempts}, {wait_initial} and {in_flight}"
            )
        self._attempts, self._wait_initial, self._in_flight = attempts, wait_initial, in_flight
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
