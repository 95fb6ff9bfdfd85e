"""Connect to Redis and turn its failures into StoreUnavailable."""

import contextlib
import logging
from collections.abc import Iterator

import redis

from vessa.errors import InvalidConfig, StoreUnavailable
from vessa_server.storage.files import RETRY_AFTER_S

log = logging.getLogger(__name__)


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
