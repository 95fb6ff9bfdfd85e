"""Store named keys with roles as hashes: in a file or, with a Redis template store, in Redis.

A key is 256 random bits, so one SHA-256 is all the hashing it needs: slow hashes protect secrets that can be
guessed. Running servers see changes: of a file at the next request, in Redis within a second.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
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
from vessa.errors import InvalidRequest
from vessa_server.settings import Settings
from vessa_server.storage.disk_reserve import DiskReserve
from vessa_server.storage.files import disk, make_private, warn_if_writable
from vessa_server.storage.redis_connection import connect, is_redis, reachable

log = logging.getLogger(__name__)

LOCAL = "local"  # the admin key that a service makes itself, or that VESSA_API_KEY sets
KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FRESH_S = 1.0  # keys read from Redis are used for so long
_REDIS_HASH = "vessa:keys"


class Role(IntEnum):
    """What a key may do. From annotate on, each role may do what those below it may."""

    monitor = 0  # read /metrics, and nothing else
    annotate = 1  # segment
    curate = 2  # change template banks
    admin = 3  # everything, in all banks


@dataclass(frozen=True)
class Key:
    """Describe a stored key.

    digest: SHA-256 of the key, hex; created: ISO 8601, UTC; requests: in progress at once;
    images_per_minute: images; None for the service's own limits
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
        """Read what `to_json` wrote. Raises ValueError when it is damaged."""
        try:
            raw: dict[str, Any] = json.loads(text)
            key = cls(**{**raw, "role": Role[raw["role"]]})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("a key's record is damaged") from error
        if not KEY_NAME.fullmatch(str(key.name)) or not _DIGEST.fullmatch(str(key.digest)):
            raise ValueError("a key's record is damaged")
        return key


@dataclass(frozen=True)
class Caller:
    """Name who makes a request: a key's name, its role and its own limits."""

    name: str
    role: Role
    requests: int | None = None
    images_per_minute: int | None = None


def digest_of(key: str) -> str:
    """Return the hash that is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys(Protocol):
    """Store keys. Every method may raise StoreUnavailable; damaged records are skipped with an error."""

    def all(self) -> dict[str, Key]:
        """Return the keys by name."""
        ...

    def put(self, key: Key) -> bool:
        """Store a key. Returns False when its name is taken."""
        ...

    def remove(self, name: str) -> bool:
        """Remove a key. Returns False when there is none of this name."""
        ...


class FileKeys:
    """Store keys in a file of mode 0600, one JSON object a line; read again when it has changed.

    A damaged line is skipped, named in the log, and kept when the file is rewritten: `vessa-server store
    check --repair` removes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reserve = DiskReserve(path.with_name(f".{path.name}.reserve"), 64 * 1024)
        self._read: tuple[tuple[int, int, int], dict[str, Key]] | None = None

    def all(self) -> dict[str, Key]:
        """Return the keys by name."""
        with disk("read"):
            try:
                stat = self.path.stat()
                signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                known = self._read
                if known is None or known[0] != signature:
                    warn_if_writable(self.path)
                    known = self._read = (signature, self._parse(log.error)[0])
            except FileNotFoundError:
                return {}
        return known[1]

    def damaged_lines(self) -> list[int]:
        """Return the numbers of the lines that cannot be read, from 1."""
        with disk("read"):
            return [number for number, _ in self._parse()[1]] if self.path.exists() else []

    def drop_damaged_lines(self) -> None:
        """Write the file again without the lines that cannot be read."""
        self._change(lambda keys: dict(keys), keep_damaged=False)

    def _parse(
        self, report: Callable[..., None] = lambda *_: None
    ) -> tuple[dict[str, Key], list[tuple[int, str]]]:
        """Return the keys by name and the damaged lines with their numbers; empty lines are skipped."""
        keys: dict[str, Key] = {}
        bad: list[tuple[int, str]] = []
        lines = self.path.read_bytes().decode("utf-8", "replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                key = Key.from_json(line)
                keys[key.name] = key
            except ValueError:
                report("line %d of the key file %s is damaged; its key is refused", number, self.path)
                bad.append((number, line))
        return keys, bad

    def put(self, key: Key) -> bool:
        """Store a key."""
        return self._change(lambda keys: None if key.name in keys else {**keys, key.name: key})

    def remove(self, name: str) -> bool:
        """Remove a key; also on a full disk."""
        return self._change(
            lambda keys: None if name not in keys else {n: k for n, k in keys.items() if n != name}
        )

    def _change(
        self, edit: Callable[[dict[str, Key]], dict[str, Key] | None], *, keep_damaged: bool = True
    ) -> bool:
        with self._locked():
            known = self.all()
            wanted = edit(known)
            if wanted is not None:
                with disk("written"):
                    text = "".join(key.to_json() + "\n" for key in wanted.values())
                    if keep_damaged and self.path.exists():
                        text += "".join(line + "\n" for _, line in self._parse()[1])

                    def write() -> None:
                        atomic_write.write_bytes(self.path, text.encode(), 0o600)

                    if len(wanted) < len(known):  # a revoked key must not wait for room on the disk
                        self._reserve.spend(write)
                    else:
                        write()
                        self._reserve.fill()
        return wanted is not None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk("locked"):
            make_private(self.path.parent)
            lock = self.path.with_name(f".{self.path.name}.lock")
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # held for a moment, and dropped by the kernel should we die
            yield
        finally:
            os.close(handle)


class RedisKeys:
    """Store keys in the Redis of the template banks, shared by all its annotators."""

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
                keys = {}
                for name, text in raw.items():
                    try:
                        keys[name.decode()] = Key.from_json(text)
                    except ValueError:
                        log.error("the record of key %r in Redis is damaged; the key is refused", name)
                known = self._read = (time.monotonic(), keys)
            return known[1]

    def put(self, key: Key) -> bool:
        """Store a key."""
        self._read = None
        with reachable():
            return bool(self._redis.hsetnx(_REDIS_HASH, key.name, key.to_json()))

    def remove(self, name: str) -> bool:
        """Remove a key."""
        self._read = None
        with reachable():
            removed: Any = self._redis.hdel(_REDIS_HASH, name)
        return bool(removed)


def open_keys(settings: Settings) -> Keys:
    """Open the named keys: in `keys_file`, else the store's Redis, else beside the local key's file."""
    if settings.keys_file is None and is_redis(settings.storage.store):
        return RedisKeys(settings.storage.store)
    beside = (settings.key_file or default_key_file()).with_name("keys.jsonl")
    return FileKeys(settings.keys_file or beside)


def create_key(
    keys: Keys, name: str, role: Role, requests: int | None = None, images_per_minute: int | None = None
) -> str:
    """Create a key and return it, this once: only its hash is stored.

    Raises InvalidRequest for a name that is taken or malformed.
    """
    if not KEY_NAME.fullmatch(name) or name == LOCAL:
        raise InvalidRequest(
            f"A key's name is 1 to 32 of a-z 0-9 . _ - and not '{LOCAL}'. Got {name[:40]!r}."
        )
    secret = f"vessa_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    if not keys.put(Key(name, role, digest_of(secret), created, requests, images_per_minute)):
        raise InvalidRequest(f"A key {name!r} exists. Revoke it first, or choose another name.")
    return secret
