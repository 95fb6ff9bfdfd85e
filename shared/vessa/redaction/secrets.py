"""Remove secrets from what people share: run files, logs, error messages.

A secret is recognised by its type, not by the name of its field: the user information of any URL, an
annotator's key, a bearer token, a token of a known issuer, and every value that `remember_secret` was given.
"""

import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus, unquote

REDACTED = "***"
SHORTEST_SECRET = 4  # a shorter value would be replaced inside ordinary words

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?P<rest>[^\s\"'<>]+)")
_PORT = re.compile(r"[^:@]*:\d*(?=[/?#,;)\]}]|$)")
_QUERY = re.compile(
    r"(?P<name>[?&;][^=&?#\s\"'<>]*(?:passw|pwd|secret|token|key|auth|credential|signature|sig)[^=&?#\s]*=)"
    r"[^&#\s\"'<>]+",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"(?:vessa_[A-Za-z0-9_\-]{20,}"
    r"|hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_\-]{16,}"
    r"|sk-[A-Za-z0-9_\-]{16,}|AKIA[A-Z0-9]{12,})"
)
_HEADER = re.compile(r"(?P<scheme>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=\-]{8,}", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(?:^|[_\-.])(?:password|passwd|pwd|secret|token|api_?key|credential)s?$", re.I)

_NAMES_FILE = re.compile(r"^[^@]*rediss?://[^:@/]*@[^@]*[?&]password_file=[^@]*$")  # a user, and no password

_known: set[str] = set()
_lock = threading.Lock()


def remember_secret(secret: str) -> None:
    """Redact this value wherever it occurs from now on, also in its URL-encoded forms.

    Call it with every password and key that this process reads. Values under four characters are ignored.
    """
    forms = {secret, quote(secret, safe=""), quote_plus(secret), unquote(secret)}
    with _lock:
        _known.update(form for form in forms if len(form) >= SHORTEST_SECRET)


def remember_url(url: str) -> None:
    """Remember the password of a URL, so that messages of a library that quote it alone are redacted."""
    match = _URL.match(url)
    if match is None or "@" not in match["rest"]:
        return
    userinfo = match["rest"].rpartition("@")[0]
    _, colon, password = userinfo.partition(":")
    remember_secret(password if colon else userinfo)


def redact(text: str) -> str:
    """Return a text with every secret in it replaced by `***`."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    text = _URL.sub(_without_userinfo, text)
    text = _QUERY.sub(lambda match: match["name"] + REDACTED, text)
    text = _HEADER.sub(lambda match: match["scheme"] + REDACTED, text)
    return _TOKENS.sub(REDACTED, text)


def redacted(value: Any) -> Any:
    """Return a JSON-like tree (mappings, sequences, texts, numbers) with every secret replaced by `***`.

    Texts under a name such as `password` or `api_key` are replaced as a whole, whatever they hold.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {_redacted_key(key): _redacted_field(key, item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [redacted(item) for item in value]
        return items if isinstance(value, list) else type(value)(items)
    if isinstance(value, bytes):
        return redact(value.decode("utf-8", "replace")).encode()
    if hasattr(value, "get_secret_value"):  # a pydantic secret
        return REDACTED if value.get_secret_value() else ""
    return value


def argument_warning(arguments: Sequence[str]) -> str | None:
    """Return a warning when a command's arguments hold a secret, None when they hold none."""
    named = ("--api-key", "--key", "--password", "--token")
    held = any(redact(argument) != argument for argument in arguments if not _NAMES_FILE.search(argument))
    if not held and not any(argument.partition("=")[0] in named for argument in arguments):
        return None
    return (
        "The command line holds a secret, which other users of this machine can read in the process list. "
        "Use VESSA_API_KEY or the key file for a key, and password_file in the address of Redis."
    )


class RedactingFormatter(logging.Formatter):
    """Redact what another formatter returns: the message, its arguments and the traceback."""

    def __init__(self, formatter: logging.Formatter) -> None:
        """Wrap a formatter."""
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without secrets."""
        return redact(self._formatter.format(record))


def _without_userinfo(match: re.Match[str]) -> str:
    rest = match["rest"]
    if "@" not in rest:
        return match[0]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A password may hold an unencoded slash: then the authority ends within it, and has a colon but no port.
    cut_off = ":" in authority and _PORT.match(rest) is None
    if "@" not in authority and not cut_off:
        return match[0]  # an @ in the path, such as a version
    return f"{match['scheme']}{REDACTED}@{rest.rpartition('@')[2]}"


def _redacted_key(key: Any) -> Any:
    return redact(key) if isinstance(key, str) else key


def _redacted_field(key: Any, item: Any) -> Any:
    if isinstance(key, str) and isinstance(item, str) and item and _SECRET_NAME.search(key):
        return REDACTED
    return redacted(item)
