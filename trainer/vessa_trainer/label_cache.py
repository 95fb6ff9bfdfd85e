"""VESSA's labels kept by what they depend on, in Redis or in a local folder.

A key covers everything that could change the answer, so nothing is ever invalidated: what
changed is another key. Values carry a checksum; a damaged one is a miss and is computed again.
"""

import hashlib
import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import redis

from vessa.client import Prompts
from vessa.errors import InvalidConfig
from vessa_trainer.config import CacheConfig
from vessa_trainer.step import PseudoLabel

_log = logging.getLogger(__name__)
_HEADER = struct.Struct("<4s8sII")  # magic, checksum, height, width
_MAGIC = b"VLB1"
_MAX_SIDE = 1 << 15
_PROMPT_FIELDS = ("boxes", "points", "point_labels", "mask_logits", "mask_present")


def label_key(
    image_id: str,
    *,
    bank: str,
    bank_version: int,
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
    parts = [image_id, bank, bank_version, list(classes), group, _prompts_digest(prompts)]
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
    """Compress a label with its checksum."""
    body = zlib.compress(np.stack([label.labels, label.confidence]).tobytes(), 6)
    return _HEADER.pack(_MAGIC, hashlib.sha256(body).digest()[:8], *label.labels.shape) + body


def unpack(value: bytes) -> PseudoLabel | None:
    """Read a packed label; None when it is damaged."""
    if len(value) < _HEADER.size:
        return None
    magic, checksum, height, width = _HEADER.unpack_from(value)
    body = value[_HEADER.size :]
    if magic != _MAGIC or hashlib.sha256(body).digest()[:8] != checksum or max(height, width) > _MAX_SIDE:
        return None
    arrays = np.frombuffer(zlib.decompress(body), np.uint8).reshape(2, height, width)
    return PseudoLabel(arrays[0], arrays[1])


class LabelCache(Protocol):
    """Keeps packed labels. Neither method raises when the place is gone: a cache may forget."""

    def get(self, keys: Sequence[str]) -> list[PseudoLabel | None]:
        """Labels of the keys, None where there is none."""
        ...

    def put(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Keep labels."""
        ...


class FolderCache:
    """One file a label under two-letter folders; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, made when missing."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def get(self, keys: Sequence[str]) -> list[PseudoLabel | None]:
        """Labels of the keys, None where there is none or a damaged one."""
        labels = []
        for key in keys:
            try:
                labels.append(unpack(self._path(key).read_bytes()))
            except OSError:
                labels.append(None)
        return labels

    def put(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Write each label whole or not at all."""
        for key, label in labels.items():
            path = self._path(key)
            path.parent.mkdir(exist_ok=True)
            fresh = path.with_name(f".{key}.{os.getpid()}")
            try:
                fresh.write_bytes(pack(label))
                fresh.replace(path)
            except OSError as error:
                _log.warning("label cache %s cannot be written: %s", self.folder, error.strerror)
                return


class RedisCache:
    """Labels in Redis: one MGET for a batch, one pipeline to write it.

    A Redis that went away is reported once and costs nothing but requests to the annotator; when
    it is back it is used again.
    """

    def __init__(self, url: str, expire_s: float | None) -> None:
        """Connect lazily. expire_s: seconds a label is kept, None for ever."""
        self._redis = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=2)
        self._expire_ms = None if expire_s is None else int(expire_s * 1000)
        self.failures = 0
        self._away = False

    def _note(self, error: Exception | None) -> None:
        if error is not None:
            self.failures += 1
            if not self._away:
                _log.warning(
                    "the label cache in Redis is away (%s): going on without it", type(error).__name__
                )
        elif self._away:
            _log.warning("the label cache in Redis is back")
        self._away = error is not None

    def get(self, keys: Sequence[str]) -> list[PseudoLabel | None]:
        """Labels of the keys, None where there is none or a damaged one."""
        if not keys:
            return []
        try:
            values = self._redis.mget([f"vessa:label:{k}" for k in keys])
        except redis.RedisError as error:
            self._note(error)
            return [None] * len(keys)
        self._note(None)
        return [unpack(v) if isinstance(v, bytes) else None for v in values]

    def put(self, labels: Mapping[str, PseudoLabel]) -> None:
        """Write labels in one round trip."""
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                for key, label in labels.items():
                    pipe.set(f"vessa:label:{key}", pack(label), px=self._expire_ms)
                pipe.execute()
        except redis.RedisError as error:
            self._note(error)
        else:
            self._note(None)


def open_cache(config: CacheConfig) -> LabelCache:
    """Open the cache of a config: folder:PATH or a Redis address. Raises InvalidConfig."""
    if config.url.startswith("folder:"):
        return FolderCache(Path(config.url.removeprefix("folder:")).expanduser())
    if config.url.startswith(("redis://", "rediss://", "unix://")):
        return RedisCache(config.url, config.expire_s)
    raise InvalidConfig(f"cache.url must be folder:PATH or redis://HOST:PORT/DB, got '{config.url}'")
