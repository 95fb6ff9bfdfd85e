"""Keep template banks in Redis."""

import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import redis

from vessa.errors import StoreUnavailable
from vessa_server.storage.files import RETRY_AFTER_S
from vessa_server.storage.redis_connection import connect, reachable
from vessa_server.template_bank.index import Edit, Index, checked_blob, named_blobs


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
        return checked_blob(bank, digest, data)

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
        if fresh := named_blobs(blobs, new):
            pipe.hset(store, mapping=fresh)
        if dropped:
            pipe.hdel(store, *dropped)
        (pipe.sadd if new.exists else pipe.srem)("vessa:banks", bank)
        pipe.execute()
        return new
