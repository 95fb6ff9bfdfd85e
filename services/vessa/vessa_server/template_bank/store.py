"""Open the store of template banks that an address names: a folder, or Redis."""

from vessa.errors import InvalidConfig
from vessa_server.storage.redis_connection import is_redis
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.index import Store
from vessa_server.template_bank.redis_store import RedisStore


def open_store(address: str) -> Store:
    """Open `folder:PATH`, `redis://...`, `rediss://...` or `unix://...`; InvalidConfig for anything else."""
    scheme, _, rest = address.partition(":")
    if scheme == "folder" and rest:
        return FolderStore(rest)
    if is_redis(address):
        return RedisStore(address)
    raise InvalidConfig("the store must be folder:PATH or a redis:// address")
