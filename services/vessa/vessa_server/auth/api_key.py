"""Who may call: a bearer key and its role, checked by a dependency of each route.

Every route needs a key except the two probes `/livez` and `/readyz`, which say how far the service is and no
more. That includes `/docs`: reach it with the header `Authorization: Bearer <key>`. The key that a service
makes at its first start, or that VESSA_API_KEY sets, is the admin key "local"; others come from
`vessa-server keys`.
"""

import hmac
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from vessa.client import default_key_file
from vessa.errors import InvalidConfig, Unauthorized
from vessa.redaction import remember_secret
from vessa_server.auth.keys import LOCAL, Caller, Keys, Role, digest_of, open_keys
from vessa_server.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """How callers are let in.

    key: the admin key "local", None = anyone (insecure); keys: the named ones; file: where a generated key is
    kept; created: just now.
    """

    key: str | None
    keys: Keys
    file: Path | None = None
    created: bool = False

    def local(self, presented: str) -> Caller | None:
        """Return the caller with the admin key "local", None for any other key."""
        if self.key is not None and hmac.compare_digest(presented.encode(), self.key.encode()):
            return Caller(LOCAL, Role.admin)
        return None

    def identify(self, presented: str) -> Caller:
        """Return whose key this is, the local one aside; Unauthorized for nobody's, StoreUnavailable."""
        digest = digest_of(presented)
        for key in self.keys.all().values():
            if hmac.compare_digest(key.digest, digest):
                return Caller(key.name, key.role, key.requests, key.images_per_minute)
        raise Unauthorized("the key is wrong")

    def describe(self) -> str:
        """Return the line that is printed at start. It shows a key only when it has just been made."""
        if self.key is None:
            return "INSECURE: anyone who can connect may use this service (--insecure)"
        if self.file is None:
            return "API key: the one in VESSA_API_KEY"
        if self.created:
            return f"API key: {self.key} (generated now, kept in {self.file})"
        return f"API key: the one kept in {self.file}"


def resolve_access(settings: Settings) -> Access:
    """Return the configured key, the one of the key file, or a new one written there (mode 0600)."""
    keys = open_keys(settings)
    if settings.insecure:
        return Access(None, keys)
    if settings.key:
        remember_secret(settings.key)
        return Access(settings.key, keys)
    path = settings.key_file or default_key_file()
    try:
        created = _create_key(path)
        if not created and path.stat().st_mode & 0o077:
            log.warning("the key file %s was open to others; its mode is 0600 again", path)
            path.chmod(0o600)
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"the key file {path} cannot be used; set VESSA_API_KEY or repair it") from error
    if len(key) < 16 or not key.isascii():
        raise InvalidConfig(
            f"the key file {path} holds no key of 16 characters or more; delete it for a new one"
        )
    remember_secret(key)
    return Access(key, keys, path, created)


def _create_key(path: Path) -> bool:
    """Write a new key unless there is one; of two servers that start at once, both read the first."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(fresh, path)  # fails when the name is taken, and never shows half a key
    except FileExistsError:
        return False
    finally:
        fresh.unlink(missing_ok=True)
    return True
