"""Read the password of a Redis address from a file, so that no address holds it."""

from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from vessa.errors import InvalidConfig
from vessa.redaction.secrets import remember_secret

PARAMETER = "password_file"


def with_password(url: str) -> str:
    """Return a Redis address with the password of its `password_file`, or the address itself without one.

    redis://USER@HOST:PORT/DB?password_file=PATH keeps the password out of command lines, environments and
    stored configurations. Raises InvalidConfig when the file cannot be read, is empty, or the address also
    holds a password.
    """
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    files = [value for name, value in query if name == PARAMETER]
    if not files:
        return url
    if len(files) > 1 or parts.password is not None or parts.hostname is None:
        raise InvalidConfig(
            f"A Redis address takes one {PARAMETER} and no password beside it: redis://USER@HOST:PORT/DB?"
            f"{PARAMETER}=PATH"
        )
    path = Path(files[0]).expanduser()
    try:
        password = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"The {PARAMETER} {path} of the Redis address cannot be read.") from error
    if not password:
        raise InvalidConfig(f"The {PARAMETER} {path} of the Redis address is empty.")
    remember_secret(password)
    user, _, host = parts.netloc.rpartition("@")
    netloc = f"{user}:{quote(password, safe='')}@{host}"
    rest = urlencode([(name, value) for name, value in query if name != PARAMETER])
    return urlunsplit((parts.scheme, netloc, parts.path, rest, ""))
