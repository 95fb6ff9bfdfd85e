"""Connect to Redis and turn its failures into StoreUnavailable."""

import contextlib
import logging
from collections.abc import Iterator

import redis

from vessa.errors import InvalidConfig, StoreUnavailable
from vessa.redaction import remember_url
from vessa_server.storage.files import RETRY_AFTER_S

log = logging.getLogger(__name__)


def is_redis(address: str) -> bool:
    """Return whether a store's address is one of Redis."""
    return address.partition(":")[0] in {"redis", "rediss", "unix"}


def connect(url: str, timeout: float = 5.0) -> redis.Redis:
    """Return a Redis client that connects at its first command. Raises InvalidConfig for a malformed URL.

    timeout: seconds for connecting and for each command
    """
    remember_url(url)
    try:
        return redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, health_check_interval=30
        )
    except ValueError as error:
        raise InvalidConfig("the store must be folder:PATH or a redis:// address") from error


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
