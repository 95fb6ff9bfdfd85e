"""Find the service's address and key, decide which failures to retry, and map them to errors."""

import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx

from vessa import certificates
from vessa.client import endpoints, proxies
from vessa.client.endpoints import Call
from vessa.errors import BadResponse, Unauthorized, Unreachable, VessaError

log = logging.getLogger(__name__)

DEFAULT_URL = "http://127.0.0.1:8700"
# HTTP statuses, not errors, because a proxy in front of the annotator returns them as well.
_REPEATABLE_STATUS = {429, 502, 503, 504}
_NO_EFFECT_STATUS = {429}  # the service refused the request before it did anything
_LONGEST_WAIT = 60.0  # seconds; Retry-After values longer than this are raised to the caller

_T = TypeVar("_T")


class RepeatableError(Exception):
    """A failure after which the request is sent again; carries the error to raise after the last attempt."""

    def __init__(self, error: VessaError) -> None:
        super().__init__(str(error))
        self.error = error


def default_key_file() -> Path:
    """Return the file with the key that the annotator made at its first start on this machine."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "vessa" / "api-key"


def find_key() -> str | None:
    """Return the key from VESSA_API_KEY, else from the key file, else None."""
    key = os.environ.get("VESSA_API_KEY")
    if key:
        return key
    try:
        # Bytes that are not text become characters that no key has, and the client raises Unauthorized.
        return default_key_file().read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def _wait(error: Exception) -> bool | timedelta:
    """Return, for stamina, whether to retry or after which time."""
    if not isinstance(error, RepeatableError):
        return False
    log.info("request will be retried: %s", error)
    after = error.error.retry_after
    if after is None:
        return True
    return after <= _LONGEST_WAIT and timedelta(seconds=after)


def result_of(call: Call[_T], response: httpx.Response) -> _T:
    """Read a response, or raise the error of the class that the service raised."""
    if response.is_success:
        return call.read(response)
    error = endpoints.read_error(response)
    if isinstance(error, BadResponse) and (through := proxies.advice(str(response.request.url))):
        error = BadResponse(error.message + through)
    if error.item is not None and error.item in range(len(call.rows)):
        error.item = call.rows[error.item]  # from the index in the request to that in the caller's list
    repeatable = {"always": _REPEATABLE_STATUS, "unsent": _NO_EFFECT_STATUS, "never": set[int]()}[call.repeat]
    # A status 500 without the annotator's error message comes from a proxy, such as Ray Serve: the annotator
    # died while it worked on the request.
    died = call.repeat == "always" and response.status_code == 500 and isinstance(error, BadResponse)
    raise RepeatableError(error) if died or response.status_code in repeatable else error


def failure_of(url: str, timeout: float, call: Call[Any], error: httpx.RequestError) -> Exception:
    """Turn an error of httpx into ours, as a RepeatableError where a retry is safe and may help."""
    kind = type(error).__name__
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return Unreachable(f"the address '{url}' or the key is invalid ({kind}): expected http://host:port")
    if isinstance(error, httpx.DecodingError | httpx.TooManyRedirects):
        return BadResponse(f"the response of {url} cannot be read ({kind}): check the address")
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        # Not repeated: the service may still be working on it and would do the work twice.
        return Unreachable(
            f"the annotator at {url} took longer than the limit of {timeout:g} s ({kind}): "
            "send fewer images at once, or raise `timeout`"
        )
    if (untrusted := certificates.tls_advice(error)) is not None:
        return Unreachable(f"no secure connection to the annotator at {url}: {untrusted}")
    failure = Unreachable(
        f"no response from the annotator at {url} ({kind}): "
        f"start it with `vessa-server serve`, or set its address (`--url`, VESSA_URL){proxies.advice(url)}"
    )
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    again = call.repeat == "always" or (call.repeat == "unsent" and unsent)
    return RepeatableError(failure) if again else failure


class Connection:
    """Settings that both clients share; see AnnotatorClient for the arguments."""

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
            raise Unreachable(f"the address '{self.url}' is invalid: expected http://host:port") from error
        proxies.require_usable_proxy(self.url)
        key = api_key or find_key()
        if key and not (key.isascii() and key.isprintable()):
            raise Unauthorized("the API key contains characters that no key has: copy it again")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": headers,
            "timeout": httpx.Timeout(timeout, connect=5.0),
            # Whatever HTTP_PROXY says: keys and images for this machine stay on it.
            "trust_env": not proxies.is_loopback(self.url),
            **certificates.verification(self.url),
        }
        self._retry: dict[str, Any] = {
            "on": _wait,
            "attempts": attempts,
            "timeout": None,
            "wait_initial": wait_initial,
        }
