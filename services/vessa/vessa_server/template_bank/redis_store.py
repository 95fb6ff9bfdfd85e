"""Keep template banks in Redis."""

import contextlib
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import redis

from vessa.errors import StoreUnavailable
from vessa_server.storage.files import RETRY_AFTER_S
from vessa_server.storage.redis_connection import connect, reachable
from vessa_server.template_bank.index import Edit, Index, checked_blob, named_blobs, state_of


class RedisStore:
    """Keep banks in Redis, shared by several annotators.

    Keys: set `vessa:banks`; hash `vessa:bank:{name}` (version, index, state); hash `vessa:blobs:{name}`
    (digest -> bytes). A change is one WATCH/MULTI transaction, repeated when another writer was faster.
    `storage.redis_connection.check_redis` says what Redis must be configured for.
    """

    def __init__(self, url: str, *, timeout: float = 5.0, attempts: int = 200) -> None:
        """Connect at the first command.

        url: redis://, rediss:// or unix://; timeout: seconds for one command; attempts: at a contended
        change
        """
        self._redis = connect(url, timeout)
        self._attempts = attempts

    def names(self) -> list[str]:
        """Return the names of the existing banks and of those with a damaged index, sorted."""
        with reachable():
            members: Any = self._redis.smembers("vessa:banks")
        return sorted(name.decode() for name in members)

    def state(self, bank: str) -> str:
        """Return the digest of the stored index."""
        with reachable(), self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(_head(bank), "state")
            pipe.hstrlen(_head(bank), "index")
            state, length = pipe.execute()
        if state is not None and state.endswith(b":%d" % length):
            return str(state.decode())
        # A release before 0.2 wrote no state, and a restored index may not fit it: the bytes are hashed.
        with reachable():
            data: Any = self._redis.hget(_head(bank), "index")
        return "" if data is None else state_of(data)

    def read(self, bank: str) -> Index:
        """Return the bank's index."""
        with reachable():
            data: Any = self._redis.hget(_head(bank), "index")
        return Index() if data is None else Index.from_json(data, bank)

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None when it is missing or damaged."""
        with reachable():
            data: Any = self._redis.hget(_blobs(bank), digest)
        return checked_blob(bank, digest, data)

    def blobs(self, bank: str) -> list[str]:
        """Return the digests under which blobs are stored."""
        with reachable():
            names: Any = self._redis.hkeys(_blobs(bank))
        return sorted(name.decode() for name in names)

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` in one transaction."""

        def attempt(pipe: Any) -> Index:
            data = pipe.hget(_head(bank), "index")
            old = Index() if data is None else Index.from_json(data, bank)
            wanted = edit(old)
            if wanted is None:
                return old
            return _store(pipe, bank, replace(wanted, version=old.version + 1), blobs, old.blobs)

        new = self._transaction(bank, attempt)
        if not new.exists and not blobs:
            self._forget_deleted()
        return new

    def reset(self, bank: str, index: Index) -> Index:
        """Store an index whatever is stored now."""

        def attempt(pipe: Any) -> Index:
            there = {name.decode() for name in pipe.hkeys(_blobs(bank))}
            return _store(pipe, bank, index, {}, there)

        return self._transaction(bank, attempt)

    def _forget_deleted(self) -> None:
        """Let Redis rewrite its append-only file, which still holds the templates of a deleted bank."""
        with contextlib.suppress(redis.RedisError):  # not allowed, not used, or running already
            self._redis.bgrewriteaof()

    def _transaction(self, bank: str, attempt: Any) -> Index:
        for _ in range(self._attempts):
            with reachable(), self._redis.pipeline(transaction=True) as pipe:
                try:
                    pipe.watch(_head(bank))
                    result: Index = attempt(pipe)
                    return result
                except redis.WatchError:
                    time.sleep(random.uniform(0, 0.02))
        raise StoreUnavailable(
            f"Other writers changed this bank in each of {self._attempts} attempts. Retry later.",
            retry_after=RETRY_AFTER_S,
        )


def _store(pipe: Any, bank: str, wanted: Index, blobs: Mapping[str, bytes], there: set[str]) -> Index:
    """Queue the commands that store an index and remove blobs it does not name, and execute them."""
    new, data = wanted.stored()
    dropped, fresh = there - new.blobs, named_blobs(blobs, new)

    def write() -> None:
        pipe.multi()
        pipe.hset(_head(bank), mapping={"version": new.version, "index": data, "state": new.state})
        if fresh:
            pipe.hset(_blobs(bank), mapping=fresh)
        if dropped:
            pipe.hdel(_blobs(bank), *dropped)
        (pipe.sadd if new.exists else pipe.srem)("vessa:banks", bank)
        pipe.execute()

    try:
        write()
    except redis.OutOfMemoryError:
        # A full Redis refuses every command of a transaction, but deletes outside of one.
        if fresh:
            raise
        pipe.watch(_head(bank))  # until `multi`, commands run at once
        if new.exists:
            if dropped:
                pipe.hdel(_blobs(bank), *dropped)
            write()
        else:  # its version starts again at 0; the state, not the version, identifies contents
            pipe.delete(_head(bank), _blobs(bank))
            pipe.srem("vessa:banks", bank)
    return new


def _head(bank: str) -> str:
    return f"vessa:bank:{{{bank}}}"


def _blobs(bank: str) -> str:
    return f"vessa:blobs:{{{bank}}}"
