"""The index of a template bank and the interface of its stores.

A store holds, per bank, one versioned *index* (what the bank contains, small JSON) and immutable *blobs*
named by their sha256 (safetensors, one a template). A change rewrites the index under a transaction, so
another process sees either the old bank or the new one, and a process killed at any point leaves the old
one. Versions only grow, also across the deletion of a bank: a label cached under (bank, version) can never
be mistaken for a newer one.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from vessa.errors import StoreUnavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """What the index says about one template.

    blob: sha256 hex of its bytes; classes: {id: name} of the classes in its mask; height, width: pixels;
    model: digest of the weights its feature and memories come from.
    """

    blob: str
    group: str
    classes: dict[int, str]
    height: int
    width: int
    model: str


@dataclass(frozen=True)
class Index:
    """One state of a bank: version, whether it exists (deleted ones keep counting), id -> entry.

    adaptation: sha256 hex of the blob with the bank's own weights, None without; owner: name of the key that
    made the bank, None for one made before keys had names; shared: whether other keys may use it
    """

    version: int = 0
    exists: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    adaptation: str | None = None
    owner: str | None = None
    shared: bool = False

    @property
    def blobs(self) -> set[str]:
        """Digests of all blobs that the bank needs."""
        own = set() if self.adaptation is None else {self.adaptation}
        return {entry.blob for entry in self.entries.values()} | own

    def to_json(self) -> bytes:
        """Return the index as JSON."""
        entries = {key: vars(entry) for key, entry in self.entries.items()}
        return json.dumps(vars(self) | {"entries": entries}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Index":
        """Read what `to_json` wrote; StoreUnavailable when it is damaged."""
        try:
            raw: dict[str, Any] = json.loads(data)
            entries = {
                key: Entry(**{**value, "classes": {int(k): str(v) for k, v in value["classes"].items()}})
                for key, value in raw["entries"].items()
            }
            about = (raw.get("adaptation"), raw.get("owner"), bool(raw.get("shared", False)))
            return cls(int(raw["version"]), bool(raw["exists"]), entries, *about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreUnavailable("the index of a template bank is damaged; restore the store") from error


# Returns the wanted entries and whether the bank exists, or None to change nothing. May run several times.
Edit = Callable[[Index], Index | None]


class Store(Protocol):
    """Atomic, versioned keeper of bank indexes and blobs. Every method may raise StoreUnavailable."""

    def names(self) -> list[str]:
        """Return the existing banks, sorted."""
        ...

    def version(self, bank: str) -> int:
        """Return the bank's version cheaply, 0 when it never existed."""
        ...

    def read(self, bank: str) -> Index:
        """Return the bank's index; the empty one when it never existed."""
        ...

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None (and a warning in the log) when it is missing or damaged."""
        ...

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit` and add those of `blobs` (by digest) that the new index names; raises the version."""
        ...


def blob_digest(data: bytes) -> str:
    """Return the name of a blob: its sha256, hex."""
    return hashlib.sha256(data).hexdigest()


def named_blobs(blobs: Mapping[str, bytes], index: Index) -> dict[str, bytes]:
    """Return the blobs that the index names: what an edit turned down must not stay behind."""
    return {digest: data for digest, data in blobs.items() if digest in index.blobs}


def checked_blob(bank: str, digest: str, data: bytes | None) -> bytes | None:
    """Return the bytes of a blob, or None and a warning in the log when they do not match its digest."""
    if data is None or blob_digest(data) != digest:
        problem = "missing" if data is None else "damaged or half-written"
        log.warning("bank %s: blob %s is %s; it is ignored", bank, digest[:16], problem)
        return None
    return data
