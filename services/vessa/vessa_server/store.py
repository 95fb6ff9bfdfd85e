"""Where template banks are kept: a folder, or Redis.

A store holds, per bank, one versioned *index* (what the bank contains, small JSON) and immutable *blobs*
named by their sha256 (safetensors, one a template). A change rewrites the index under a transaction, so
another process sees either the old bank or the new one, and a process killed at any point leaves the old
one. Versions only grow, also across the deletion of a bank: a label cached under (bank, version) can never
be mistaken for a newer one.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import redis

from vessa.errors import InvalidConfig, StoreUnavailable

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5.0
LOCK_WAIT_S = 20.0


@dataclass(frozen=True)
class Entry:
    """What the index says about one template.

    blob: sha256 hex of its bytes; classes: {id: name} of the classes in its mask; height, width: pixels;
    model: digest of the weights its feature and memories come from.
    """

    blob: str
    group: str
    classes: dict[int, str]
    height: int
    width: int
    model: str


@dataclass(frozen=True)
class Index:
    """One state of a bank: version, whether it exists (deleted ones keep counting), id -> entry.

    adaptation: sha256 hex of the blob with the bank's own weights, None without; owner: name of the key that
    made the bank, None for one made before keys had names; shared: whether other keys may use it
    """

    version: int = 0
    exists: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    adaptation: str | None = None
    owner: str | None = None
    shared: bool = False

    @property
    def blobs(self) -> set[str]:
        """Digests of all blobs that the bank needs."""
        own = set() if self.adaptation is None else {self.adaptation}
        return {entry.blob for entry in self.entries.values()} | own

    def to_json(self) -> bytes:
        """Return the index as JSON."""
        entries = {key: vars(entry) for key, entry in self.entries.items()}
        return json.dumps(vars(self) | {"entries": entries}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Index":
        """Read what `to_json` wrote; StoreUnavailable when it is damaged."""
        try:
            raw: dict[str, Any] = json.loads(data)
            entries = {
                key: Entry(**{**value, "classes": {int(k): str(v) for k, v in value["classes"].items()}})
                for key, value in raw["entries"].items()
            }
            about = (raw.get("adaptation"), raw.get("owner"), bool(raw.get("shared", False)))
            return cls(int(raw["version"]), bool(raw["exists"]), entries, *about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreUnavailable("the index of a template bank is damaged; restore the store") from error


# Returns the wanted entries and whether the bank exists, or None to change nothing. May run several times.
Edit = Callable[[Index], Index | None]


class Store(Protocol):
    """Atomic, versioned keeper of bank indexes and blobs. Every method may raise StoreUnavailable."""

    def names(self) -> list[str]:
        """Return the existing banks, sorted."""
        ...

    def version(self, bank: str) -> int:
        """Return the bank's version cheaply, 0 when it never existed."""
        ...

    def read(self, bank: str) -> Index:
        """Return the bank's index; the empty one when it never existed."""
        ...

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None (and a warning in the log) when it is missing or damaged."""
        ...

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` and add those of `blobs` (by digest) that the new index names; raises the version."""
        ...


def blob_digest(data: bytes) -> str:
    """Return the name of a blob: its sha256, hex."""
    return hashlib.sha256(data).hexdigest()


def _named(blobs: Mapping[str, bytes], index: Index) -> dict[str, bytes]:
    """Return the blobs that the index names: what an edit turned down must not stay behind."""
    return {digest: data for digest, data in blobs.items() if digest in index.blobs}


def _checked(bank: str, digest: str, data: bytes | None) -> bytes | None:
    if data is None or blob_digest(data) != digest:
        problem = "missing" if data is None else "damaged or half-written"
        log.warning("bank %s: blob %s is %s; it is ignored", bank, digest[:16], problem)
        return None
    return data


class FolderStore:
    """Keeps each bank in `<folder>/<bank>/`: `index.json` and `blobs/<sha256>.safetensors`.

    Files are written beside their place, synced and renamed. One lock file orders the writers, of this
    process and of others; readers need no lock.
    """

    def __init__(self, folder: Path | str) -> None:
        """Create the folder if needed; StoreUnavailable when that fails."""
        self.folder = Path(folder).expanduser()
        self._versions: dict[str, tuple[tuple[int, int, int], int]] = {}
        with disk("opened"):
            self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Return the existing banks, sorted."""
        with disk("read"):
            found = sorted(path.parent.name for path in self.folder.glob("*/index.json"))
        return [name for name in found if self.read(name).exists]

    def version(self, bank: str) -> int:
        """Return the bank's version; reads the file only when it was replaced."""
        with disk("read"):
            try:
                stat = (self.folder / bank / "index.json").stat()
            except FileNotFoundError:
                return 0
        signature = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        known = self._versions.get(bank)
        if known is None or known[0] != signature:
            # Should the file be replaced in between, the old signature makes the next call read again.
            known = self._versions[bank] = (signature, self.read(bank).version)
        return known[1]

    def read(self, bank: str) -> Index:
        """Return the bank's index."""
        with disk("read"):
            try:
                return Index.from_json((self.folder / bank / "index.json").read_bytes())
            except FileNotFoundError:
                return Index()

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None when it is missing or damaged."""
        with disk("read"):
            try:
                data = self._blob_path(bank, digest).read_bytes()
            except FileNotFoundError:
                data = None
        return _checked(bank, digest, data)

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` under the lock: blobs first, then the index, then what no index names is removed."""
        with self._locked():
            old = self.read(bank)
            wanted = edit(old)
            if wanted is None:
                return old
            new = replace(wanted, version=old.version + 1)
            with disk("written"):
                (self.folder / bank / "blobs").mkdir(parents=True, exist_ok=True)
                for digest, data in _named(blobs, new).items():
                    write_whole(self._blob_path(bank, digest), data)
                write_whole(self.folder / bank / "index.json", new.to_json())
                self._sweep(bank, new)
            return new

    def _blob_path(self, bank: str, digest: str) -> Path:
        return self.folder / bank / "blobs" / f"{digest}.safetensors"

    def _sweep(self, bank: str, index: Index) -> None:
        # Leftovers of deleted templates and of writers that were killed. Safe: every writer holds the lock.
        kept = {self._blob_path(bank, digest).name for digest in index.blobs}
        for path in (self.folder / bank / "blobs").iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk("locked"):
            # The kernel drops a killed holder's lock, so a crash never leaves the store locked.
            handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise StoreUnavailable(
                            "another process holds the template store's lock", retry_after=RETRY_AFTER_S
                        ) from None
                    time.sleep(0.01)
            yield
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk(action: str) -> Iterator[None]:
    """Turn an OSError into StoreUnavailable that says why, but not where."""
    try:
        yield
    except OSError as error:
        log.exception("the template store could not be %s", action)
        reason = os.strerror(error.errno) if error.errno else "input/output error"
        raise StoreUnavailable(
            f"the template store could not be {action}: {reason}", retry_after=RETRY_AFTER_S
        ) from error


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that its name holds the old bytes or all of the new ones, also after a power cut.

    mode: of the file, less the process's umask.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_redis(address: str) -> bool:
    """Whether a store's address is one of Redis."""
    return address.partition(":")[0] in {"redis", "rediss", "unix"}


def connect(url: str, timeout: float = 5.0) -> redis.Redis:
    """Return a client of Redis that connects when it is first used; InvalidConfig for no address of one."""
    try:
        return redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, health_check_interval=30
        )
    except ValueError as error:
        raise InvalidConfig("the store must be folder:PATH or a redis:// address") from error


class RedisStore:
    """Keeps banks in Redis, shared by several annotators.

    Keys: set `vessa:banks`; hash `vessa:bank:{name}` (version, index); hash `vessa:blobs:{name}` (digest ->
    bytes). A change is one WATCH/MULTI transaction, repeated when another writer was faster. What survives a
    restart of Redis is Redis's own setting: run it with `appendonly yes`.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, attempts: int = 200) -> None:
        """Connect lazily.

        url: redis://, rediss:// or unix://; timeout: seconds for one command; attempts: at a contended
        change.
        """
        self._redis = connect(url, timeout)
        self._attempts = attempts

    def names(self) -> list[str]:
        """Return the existing banks, sorted."""
        with reachable():
            members: Any = self._redis.smembers("vessa:banks")
        return sorted(name.decode() for name in members)

    def version(self, bank: str) -> int:
        """Return the bank's version."""
        with reachable():
            version: Any = self._redis.hget(f"vessa:bank:{{{bank}}}", "version")
        return int(version or 0)

    def read(self, bank: str) -> Index:
        """Return the bank's index."""
        with reachable():
            data: Any = self._redis.hget(f"vessa:bank:{{{bank}}}", "index")
        return Index() if data is None else Index.from_json(data)

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None when it is missing or damaged."""
        with reachable():
            data: Any = self._redis.hget(f"vessa:blobs:{{{bank}}}", digest)
        return _checked(bank, digest, data)

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` in one transaction."""
        for _ in range(self._attempts):
            with reachable(), self._redis.pipeline(transaction=True) as pipe:
                try:
                    return self._attempt(pipe, bank, edit, blobs)
                except redis.WatchError:
                    time.sleep(random.uniform(0, 0.02))
        raise StoreUnavailable("too many writers change this bank at once", retry_after=RETRY_AFTER_S)

    def _attempt(self, pipe: Any, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        head, store = f"vessa:bank:{{{bank}}}", f"vessa:blobs:{{{bank}}}"
        pipe.watch(head)
        data = pipe.hget(head, "index")
        old = Index() if data is None else Index.from_json(data)
        wanted = edit(old)
        if wanted is None:
            return old
        new = replace(wanted, version=old.version + 1)
        dropped = old.blobs - new.blobs
        pipe.multi()
        pipe.hset(head, mapping={"version": new.version, "index": new.to_json()})
        if fresh := _named(blobs, new):
            pipe.hset(store, mapping=fresh)
        if dropped:
            pipe.hdel(store, *dropped)
        (pipe.sadd if new.exists else pipe.srem)("vessa:banks", bank)
        pipe.execute()
        return new


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Turn a failure of Redis into StoreUnavailable without its address, which may hold a password."""
    try:
        yield
    except redis.WatchError:
        raise
    except redis.RedisError as error:
        log.warning("Redis failed: %s", error)
        raise StoreUnavailable(
            "the template store (Redis) does not answer or refuses the command", retry_after=RETRY_AFTER_S
        ) from error


def open_store(address: str) -> Store:
    """Open `folder:PATH`, `redis://...`, `rediss://...` or `unix://...`; InvalidConfig for anything else."""
    scheme, _, rest = address.partition(":")
    if scheme == "folder" and rest:
        return FolderStore(rest)
    if is_redis(address):
        return RedisStore(address)
    raise InvalidConfig("the store must be folder:PATH or a redis:// address")
