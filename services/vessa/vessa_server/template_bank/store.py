"""Open and check the store of template banks that an address names: a folder, or Redis."""

from vessa.errors import InvalidConfig
from vessa_server.storage.redis_connection import check_redis, is_redis
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.index import Store
from vessa_server.template_bank.redis_store import RedisStore


def open_store(address: str) -> Store:
    """Open `folder:PATH`, `redis://...`, `rediss://...` or `unix://...`. Raises InvalidConfig for others."""
    scheme, _, rest = address.partition(":")
    if scheme == "folder" and rest:
        return FolderStore(rest)
    if is_redis(address):
        return RedisStore(address)
    raise InvalidConfig("The store must be folder:PATH or a redis:// address. Set VESSA_STORE.")


def check_store(address: str) -> list[str]:
    """Check what the store needs; return warnings. Raises StoreUnavailable within a bounded time."""
    return check_redis(address) if is_redis(address) else []
