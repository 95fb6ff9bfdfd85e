"""Cache the annotator's labels in Redis or in a local folder.

A key is a digest of everything that a label depends on, so that no entry is ever invalidated. Values carry a
checksum; a damaged value counts as a cache miss.
"""

import hashlib
import json
import logging
import struct
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from vessa import atomic_write
from vessa.client import Prompts
from vessa.errors import InvalidConfig
from vessa.redaction.redis_url import with_password
from vessa_trainer.config import CacheConfig
from vessa_trainer.outages import CACHE, Incidents
from vessa_trainer.pseudo_labels.types import PseudoLabel

_log = logging.getLogger(__name__)
_MAGIC, _CHECKSUM = b"VLB2", 8
_SIZE = struct.Struct("<II")  # height, width, px
_MAX_PIXELS = 80_000_000  # of one image; no annotator takes more
_PREFIX, _CLAIM_PREFIX = "vessa:label:", "vessa:claim:"
_CLAIM_S = 10  # a batch of labels takes less; else two ask, which costs time and nothing else
_PROMPT_FIELDS = ("boxes", "points", "point_labels", "mask_logits", "mask_present")


def label_key(
    image_id: str,
    *,
    bank: str,
    bank_digest: str,
    classes: Sequence[str],
    group: str | None,
    prompts: Prompts | None,
    model: str,
    labels_version: str,
    template_choice: str,
    seed: int,
) -> str:
    """Hash everything that a label depends on (64 hex digits).

    `group` is part of it: the query's own patient is left out of the retrieval.
    """
    parts: list[object] = [image_id, bank, bank_digest, list(classes), group, _prompts_digest(prompts)]
    parts += [model, labels_version, template_choice, seed if template_choice == "sample" else 0]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _prompts_digest(prompts: Prompts | None) -> str:
    if prompts is None:
        return ""
    digest = hashlib.sha256()
    for name in _PROMPT_FIELDS:
        value = getattr(prompts, name)
        if value is not None:
            array = np.ascontiguousarray(value, np.float32)
            digest.update(f"{name}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def pack(label: PseudoLabel) -> bytes:
    """Compress a label with its size and a checksum of both."""
    body = zlib.compress(np.stack([label.labels, label.confidence]).tobytes(), 6)
    rest = _SIZE.pack(*label.labels.shape) + body
    return _MAGIC + _checksum(rest) + rest


def unpack(value: bytes) -> PseudoLabel | None:
    """Read a packed label; None when it is damaged. Never allocates more than the size it declares."""
    rest = value[len(_MAGIC) + _CHECKSUM :]
    if not value.startswith(_MAGIC) or len(rest) < _SIZE.size:
        return None
    if value[len(_MAGIC) : len(_MAGIC) + _CHECKSUM] != _checksum(rest):
        return None
    height, width = _SIZE.unpack_from(rest)
    if height * width > _MAX_PIXELS:
        return None
    stream = zlib.decompressobj()
    try:
        pixels = stream.decompress(rest[_SIZE.size :], 2 * height * width + 1)
    except zlib.error:
        return None
    if len(pixels) != 2 * height * width:
        return None
    labels, confidence = np.frombuffer(pixels, np.uint8).reshape(2, height, width)
    return PseudoLabel(labels, confidence)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM]


class LabelCache(Protocol):
    """Keeps labels. Neither method raises when the place is gone: a cache may forget.

    failures: how often the place could not be read or written.
    """

    failures: int

    def get(self, keys: Sequence[str]) -> list[PseudoLabel | None]:
        """Labels of the keys, None where there is none or a damaged one."""
        ...

    def put(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Keep labels."""
        ...

    def claim(self, keys: Sequence[str]) -> set[str]:
        """Return the keys that the caller is to ask the annotator for; another is asking for the rest.

        A claim that its owner does not release, as one that was killed, ends after some seconds. Where the
        place is gone all keys are the caller's.
        """
        ...

    def release(self, keys: Collection[str]) -> None:
        """End claims."""
        ...


class FolderCache:
    """One file a label under two-letter folders; several processes of one user may share it.

    Folders have mode 0700 and files 0600, because labels show patients.
    """

    def __init__(self, folder: Path, expire_s: float | None = None) -> None:
        """Use a folder, made when missing. Raises InvalidConfig when it cannot be made.

        expire_s: seconds after which a label is no longer taken, None for never.
        """
        self.folder = Path(folder)
        self._expire_s = expire_s
        self.failures = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise InvalidConfig(f"the label cache {folder} cannot be made: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, keys: Sequence[str]) -> list[PseudoLabel | None]:
        """Labels of the keys, None where there is none or a damaged one."""
        labels: list[PseudoLabel | None] = []
        for key in keys:
            try:
                labels.append(self._read(self._path(key)))
            except FileNotFoundError:
                labels.append(None)
            except OSError as error:
                self._failed("read", error)
                labels.append(None)
        return labels

    def _read(self, path: Path) -> PseudoLabel | None:
        if self._expire_s is not None and time.time() - path.stat().st_mtime > self._expire_s:
            return None
        return unpack(path.read_bytes())

    def _failed(self, what: str, error: OSError) -> None:
        self.failures += 1
        if self.failures == 1:
            _log.warning("the label cache %s cannot be %s: %s", self.folder, what, error.strerror)

    def claim(self, keys: Sequence[str]) -> set[str]:
        """Take the keys that nobody else is asking for."""
        return {key for key in keys if self._claimed(self._claim_path(key))}

    def _claim_path(self, key: str) -> Path:
        return self.folder / key[:2] / f".{key}.claim"

    def _claimed(self, path: Path) -> bool:
        try:
            if path.is_file() and time.time() - path.stat().st_mtime > _CLAIM_S:
                path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600, exist_ok=False)
        except (FileExistsError, FileNotFoundError):  # another's, or one just ended: it is looked up again
            return False
        except OSError:
            return True  # no way to agree: `put` says what is wrong with the folder
        return True

    def release(self, keys: Collection[str]) -> None:
        """End claims."""
        for key in keys:
            with suppress(OSError):
                self._claim_path(key).unlink(missing_ok=True)

    def put(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Write each label whole or not at all; a full disk is reported once."""
        for key, label in labels.items():
            path = self._path(key)
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # No sync: a label that a power cut damages fails its checksum and is requested again.
                atomic_write.write_bytes(path, pack(label), 0o600, sync=False)
            except OSError as error:
                self._failed("written", error)
                return


class RedisCache:
    """Labels in Redis: one MGET for a batch, one pipeline to write it.

    A Redis that went away is reported once and left alone for `pause_s` seconds at a time; while it
    is away labels cost requests to the annotator and nothing else. One that answers but refuses to
    store (out of memory) is reported once as well.
    """

    def __init__(
        self, url: str, expire_s: float | None, *, pause_s: float = 5.0, incidents: Incidents | None = None
    ) -> None:
        """Connect lazily. Raises InvalidConfig.

        expire_s: seconds a label is kept, None for ever; incidents: where it is noted that Redis was away
        """
        try:
            self._redis = redis.Redis.from_url(
                with_password(url), socket_timeout=5, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise InvalidConfig(f"cache.url is no Redis address: {error}") from error
        self._expire_ms = None if expire_s is None else max(1, int(expire_s * 1000))
        self._pause_s = pause_s
        self._away_until: float | None = None
        self._refused = False
        self._incidents = incidents
        self.failures = 0

    def get(self, keys: Sequence[str]) -> list[PseudoLabel | None]:
        """Labels of the keys, None where there is none or a damaged one."""
        nothing: list[PseudoLabel | None] = [None] * len(keys)
        if not keys or self._resting():
            return nothing
        try:
            values = self._redis.mget([f"{_PREFIX}{k}" for k in keys])
        except redis.RedisError as error:
            self._failed(error)
            return nothing
        self._answered()
        return [unpack(v) if isinstance(v, bytes) else None for v in values]

    def put(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Write labels in one round trip."""
        if not labels or self._resting():
            return
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for key, label in labels.items():
                    pipe.set(f"{_PREFIX}{key}", pack(label), px=self._expire_ms)
                pipe.execute()
        except redis.RedisError as error:
            self._failed(error)
        else:
            self._answered()

    def claim(self, keys: Sequence[str]) -> set[str]:
        """Take the keys that nobody else is asking for, in one round trip."""
        if not keys or self._resting():
            return set(keys)
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.set(f"{_CLAIM_PREFIX}{key}", 1, nx=True, ex=_CLAIM_S)
                answers = pipe.execute()
        except redis.RedisError as error:
            self._failed(error)
            return set(keys)
        return {key for key, answer in zip(keys, answers, strict=True) if answer}

    def release(self, keys: Collection[str]) -> None:
        """End claims."""
        if not keys or self._resting():
            return
        try:
            self._redis.delete(*(f"{_CLAIM_PREFIX}{key}" for key in keys))
        except redis.RedisError as error:
            self._failed(error)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _resting(self) -> bool:
        return self._away_until is not None and time.monotonic() < self._away_until

    def _failed(self, error: redis.RedisError) -> None:
        self.failures += 1
        if isinstance(error, redis.ResponseError):
            if not self._refused:
                _log.warning("the label cache in Redis refuses: %s", error)
            self._refused = True
            return
        if self._away_until is None:
            if self._incidents is not None:
                self._incidents.away(CACHE, f"Redis: {type(error).__name__}")
            _log.warning("the label cache in Redis is away (%s): going on without it", type(error).__name__)
        self._away_until = time.monotonic() + self._pause_s

    def _answered(self) -> None:
        if self._away_until is not None:
            if self._incidents is not None:
                self._incidents.back(CACHE)
            _log.warning("the label cache in Redis is back")
        self._away_until = None


def open_cache(config: CacheConfig, incidents: Incidents | None = None) -> FolderCache | RedisCache:
    """Open the cache of a config: folder:PATH or a Redis address. Raises InvalidConfig."""
    if config.url.startswith("folder:"):
        return FolderCache(Path(config.url.removeprefix("folder:")).expanduser(), config.expire_s)
    if config.url.startswith(("redis://", "rediss://", "unix://")):
        return RedisCache(config.url, config.expire_s, incidents=incidents)
    raise InvalidConfig(f"cache.url must be folder:PATH or redis://HOST:PORT/DB, got '{config.url}'")
