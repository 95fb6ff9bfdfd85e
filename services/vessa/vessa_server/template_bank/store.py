"""Where template banks are kept: a folder, or Redis.

A store holds, per bank, one versioned *index* (what the bank contains, small JSON) and immutable *blobs*
named by their sha256 (safetensors, one a template). A change rewrites the index under a transaction, so
another process sees either the old bank or the new one, and a process killed at any point leaves the old
one. Versions only grow, also across the deletion of a bank: a label cached under (bank, version) can never
be mistaken for a newer one.
"""

import logging

from vessa.errors import InvalidConfig
from vessa_server.storage.redis_connection import is_redis
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.index import Store
from vessa_server.template_bank.redis_store import RedisStore

log = logging.getLogger(__name__)


def open_store(address: str) -> Store:
    """Open `folder:PATH`, `redis://...`, `rediss://...` or `unix://...`; InvalidConfig for anything else."""
    scheme, _, rest = address.partition(":")
    if scheme == "folder" and rest:
        return FolderStore(rest)
    if is_redis(address):
        return RedisStore(address)
    raise InvalidConfig("the store must be folder:PATH or a redis:// address")
