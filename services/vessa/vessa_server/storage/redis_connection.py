"""Connect to Redis and turn its failures into StoreUnavailable."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import redis

from vessa.errors import InvalidConfig, StoreUnavailable
from vessa.redaction import remember_url
from vessa.redaction.redis_url import with_password
from vessa_server.storage.files import RETRY_AFTER_S

log = logging.getLogger(__name__)


def is_redis(address: str) -> bool:
    """Return whether a store's address is one of Redis."""
    return address.partition(":")[0] in {"redis", "rediss", "unix"}


def connect(url: str, timeout: float = 5.0) -> redis.Redis:
    """Return a Redis client that connects at its first command. Raises InvalidConfig for a malformed URL.

    timeout: seconds for connecting and for each command
    """
    url = with_password(url)
    remember_url(url)
    try:
        return redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, health_check_interval=30
        )
    except ValueError as error:
        raise InvalidConfig(
            "The store must be folder:PATH or a redis:// address. Set VESSA_STORE."
        ) from error


def check_redis(url: str, timeout: float = 1.0) -> list[str]:
    """Check that Redis can store banks and keys; return warnings.

    Raises StoreUnavailable when it does not answer within `timeout` seconds, evicts keys, or is a replica.
    """
    with contextlib.closing(connect(url, timeout)) as client, reachable():
        facts: dict[str, Any] = {}
        for section in ("memory", "persistence", "replication"):
            facts |= client.info(section)
        policy = str(facts.get("maxmemory_policy", "unknown"))
        if policy.startswith("allkeys-"):
            raise StoreUnavailable(
                f"Redis evicts keys (maxmemory-policy {policy}): banks and keys would be lost. Set "
                "maxmemory-policy to noeviction or volatile-lru.",
                retry_after=RETRY_AFTER_S,
            )
        if facts.get("role") != "master":
            raise StoreUnavailable(
                "Redis is a replica and takes no writes. Set VESSA_STORE to the address of the master.",
                retry_after=RETRY_AFTER_S,
            )
        if not facts.get("aof_enabled"):
            return [
                "Redis has no append-only file (appendonly no): a restart may lose banks and keys. Set "
                "appendonly yes and appendfsync everysec or always."
            ]
        return _check_sync(client)


def _check_sync(client: redis.Redis) -> list[str]:
    try:
        answer: Any = client.config_get("appendfsync")
    except redis.exceptions.NoPermissionError:
        return []  # an ACL user need not read the configuration; docs/privacy.md says what it must be
    if answer.get("appendfsync") == "no":
        return ["Redis does not sync its append-only file (appendfsync no): a power cut loses changes."]
    return []


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Turn a Redis failure into StoreUnavailable without its address, which may hold a password."""
    try:
        yield
    except redis.WatchError:
        raise
    except redis.RedisError as error:
        log.warning("Redis failed: %s", error)
        raise StoreUnavailable(
            "The template store (Redis) does not answer or refuses the command. Retry later; see the log.",
            retry_after=RETRY_AFTER_S,
        ) from error
