"""Keys with names and roles, kept as hashes in a file or, where the template store is Redis, in Redis.

A key is 256 random bits, so one SHA-256 is all the hashing it needs: slow hashes protect secrets that can be
guessed. Running servers see changes: of a file at the next request, in Redis within a second.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

from vessa import atomic_write
from vessa.client import default_key_file
from vessa.errors import InvalidRequest, StoreUnavailable
from vessa_server.settings import Settings
from vessa_server.storage.files import disk
from vessa_server.storage.redis_connection import connect, is_redis, reachable

LOCAL = "local"  # the admin key that a service makes itself, or that VESSA_API_KEY sets
KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_FRESH_S = 1.0  # for so long what Redis said of the keys is believed
_REDIS_HASH = "vessa:keys"


class Role(IntEnum):
    """What a key may do; each role may do what those below it may."""

    annotate = 1  # segment
    curate = 2  # change template banks
    admin = 3  # everything, in all banks


@dataclass(frozen=True)
class Key:
    """A key as it is kept.

    digest: SHA-256 of the key, hex; created: ISO 8601, UTC; requests: how many may be in work at once,
    images_per_minute: how many images, None for the service's own limits
    """

    name: str
    role: Role
    digest: str
    created: str
    requests: int | None = None
    images_per_minute: int | None = None

    def to_json(self) -> str:
        """Return the key as JSON."""
        return json.dumps(asdict(self) | {"role": self.role.name})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Key":
        """Read what `to_json` wrote; StoreUnavailable when it is damaged."""
        try:
            raw: dict[str, Any] = json.loads(text)
            return cls(**{**raw, "role": Role[raw["role"]]})
        except (ValueError, KeyError, TypeError) as error:
            raise StoreUnavailable(
                "the list of keys is damaged; restore it, or create the keys anew"
            ) from error


@dataclass(frozen=True)
class Caller:
    """Who asks: a key's name, its role and its own limits."""

    name: str
    role: Role
    requests: int | None = None
    images_per_minute: int | None = None


def digest_of(key: str) -> str:
    """Return what is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys(Protocol):
    """Where keys are kept. Every method may raise StoreUnavailable."""

    def all(self) -> dict[str, Key]:
        """Return the keys by name."""
        ...

    def put(self, key: Key) -> bool:
        """Keep a key; False when its name is taken."""
        ...

    def remove(self, name: str) -> bool:
        """Forget a key; False when there is none of this name."""
        ...


class FileKeys:
    """Keys in a file of mode 0600, one JSON object a line; written whole, read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: tuple[tuple[int, int, int], dict[str, Key]] | None = None

    def all(self) -> dict[str, Key]:
        """Return the keys by name."""
        with disk("read"):
            try:
                stat = self.path.stat()
                signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                known = self._read
                if known is None or known[0] != signature:
                    found = [Key.from_json(line) for line in self.path.read_bytes().splitlines()]
                    known = self._read = (signature, {key.name: key for key in found})
            except FileNotFoundError:
                return {}
        return known[1]

    def put(self, key: Key) -> bool:
        """Keep a key."""
        return self._change(lambda keys: None if key.name in keys else {**keys, key.name: key})

    def remove(self, name: str) -> bool:
        """Forget a key."""
        return self._change(
            lambda keys: None if name not in keys else {n: k for n, k in keys.items() if n != name}
        )

    def _change(self, edit: Callable[[dict[str, Key]], dict[str, Key] | None]) -> bool:
        with self._locked():
            wanted = edit(self.all())
            if wanted is not None:
                with disk("written"):
                    text = "".join(key.to_json() + "\n" for key in wanted.values())
                    atomic_write.write_bytes(self.path, text.encode(), 0o600)
        return wanted is not None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk("locked"):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = self.path.with_name(f".{self.path.name}.lock")
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # held for a moment, and dropped by the kernel should we die
            yield
        finally:
            os.close(handle)


class RedisKeys:
    """Keys in the Redis of the template store, so that all annotators on it know the same."""

    def __init__(self, url: str) -> None:
        self._redis = connect(url)
        self._lock = threading.Lock()
        self._read: tuple[float, dict[str, Key]] | None = None

    def all(self) -> dict[str, Key]:
        """Return the keys by name, as they were at most a second ago."""
        with self._lock:
            known = self._read
            if known is None or time.monotonic() - known[0] > _FRESH_S:
                with reachable():
                    raw: Any = self._redis.hgetall(_REDIS_HASH)
                found = [Key.from_json(text) for text in raw.values()]
                known = self._read = (time.monotonic(), {key.name: key for key in found})
            return known[1]

    def put(self, key: Key) -> bool:
        """Keep a key."""
        self._read = None
        with reachable():
            return bool(self._redis.hsetnx(_REDIS_HASH, key.name, key.to_json()))

    def remove(self, name: str) -> bool:
        """Forget a key."""
        self._read = None
        with reachable():
            removed: Any = self._redis.hdel(_REDIS_HASH, name)
        return bool(removed)


def open_keys(settings: Settings) -> Keys:
    """Return where the keys are kept: `keys_file`, else the Redis of the store, else beside the local key."""
    if settings.keys_file is None and is_redis(settings.storage.store):
        return RedisKeys(settings.storage.store)
    beside = (settings.key_file or default_key_file()).with_name("keys.jsonl")
    return FileKeys(settings.keys_file or beside)


def create_key(
    keys: Keys, name: str, role: Role, requests: int | None = None, images_per_minute: int | None = None
) -> str:
    """Make a key and return it, this once: its hash is kept. InvalidRequest for a name that is taken."""
    if not KEY_NAME.fullmatch(name) or name == LOCAL:
        raise InvalidRequest(f"a key's name is 1 to 32 of a-z 0-9 . _ - and not '{LOCAL}', got {name[:40]!r}")
    secret = f"vessa_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    if not keys.put(Key(name, role, digest_of(secret), created, requests, images_per_minute)):
        raise InvalidRequest(f"there is a key {name!r} already; revoke it first, or take another name")
    return secret
