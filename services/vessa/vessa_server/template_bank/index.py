"""Define the index of a template bank and the interface of its stores.

A store holds one *index* per bank (what the bank contains, small JSON) and immutable *blobs* named by their
SHA-256 (safetensors, one per template). A change rewrites the index in a transaction: another process sees
the old bank or the new one, and a process killed at any point leaves the old one.

Two things identify a state. `Index.state` is the digest of the stored index: a cache compares it, so that a
store restored from a backup is never mistaken for a newer one. `Index.version` only counts changes, for
people.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vessa.errors import DamagedBank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """Describe one template in the index.

    blob: SHA-256 (hex) of its bytes; classes: {id: name} of the classes in its mask; height, width: px;
    model: digest of the weights that made its feature and memories; size: bytes of the blob, 0 when a
    release before 0.2 wrote the entry
    """

    blob: str
    group: str
    classes: dict[int, str]
    height: int
    width: int
    model: str
    size: int = 0


@dataclass(frozen=True)
class Index:
    """Hold one state of a bank.

    version: number of changes so far, also across a deletion; exists: False for a deleted bank; entries: by
    template id; adaptation: SHA-256 (hex) of the blob with the bank's own weights, None without; owner: name
    of the key that made the bank, None when unknown; shared: whether other keys may use it; state: digest of
    the stored bytes this was read from, empty for an index that is not stored yet
    """

    version: int = 0
    exists: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)
    adaptation: str | None = None
    owner: str | None = None
    shared: bool = False
    state: str = field(default="", compare=False)

    @property
    def blobs(self) -> set[str]:
        """Return the digests of all blobs that the bank needs."""
        own = set() if self.adaptation is None else {self.adaptation}
        return {entry.blob for entry in self.entries.values()} | own

    @property
    def nbytes(self) -> int:
        """Return the bytes of the bank's templates, estimated where the entry does not record them."""
        return sum(entry.size or 2 * entry.height * entry.width for entry in self.entries.values())

    def to_json(self) -> bytes:
        """Return the index as JSON."""
        entries = {key: vars(entry) for key, entry in self.entries.items()}
        fields = {name: value for name, value in vars(self).items() if name != "state"}
        return json.dumps(fields | {"entries": entries}).encode()

    def stored(self) -> tuple["Index", bytes]:
        """Return the index with its state, and the bytes to store."""
        data = self.to_json()
        return replace(self, state=state_of(data)), data

    @classmethod
    def from_json(cls, data: bytes, bank: str) -> "Index":
        """Read what `to_json` wrote. Raises DamagedBank, which names the bank, when it is damaged."""
        try:
            raw: dict[str, Any] = json.loads(data)
            entries = {
                key: Entry(**{**value, "classes": {int(k): str(v) for k, v in value["classes"].items()}})
                for key, value in raw["entries"].items()
            }
            about = (raw.get("adaptation"), raw.get("owner"), bool(raw.get("shared", False)))
            version, exists = int(raw["version"]), bool(raw["exists"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(bank) from error
        return cls(version, exists, entries, *about, state=state_of(data))


def damaged(bank: str) -> DamagedBank:
    """Return the error for a bank whose index cannot be read."""
    return DamagedBank(
        f"Bank {bank!r} is set aside: its index is damaged. An admin can repair it "
        "(vessa-server store check --repair) or delete it."
    )


# Returns the new index, or None to change nothing. May run several times.
Edit = Callable[[Index], Index | None]


class Store(Protocol):
    """Keep bank indexes and blobs, with atomic changes. Every method may raise StoreUnavailable.

    Methods that read an index raise DamagedBank when it cannot be read.
    """

    def names(self) -> list[str]:
        """Return the names of the existing banks and of those with a damaged index, sorted."""
        ...

    def state(self, bank: str) -> str:
        """Return the digest of the stored index cheaply, empty when there is none."""
        ...

    def read(self, bank: str) -> Index:
        """Return the bank's index; the empty one when it never existed."""
        ...

    def blob(self, bank: str, digest: str) -> bytes | None:
        """Return a blob, or None (and a warning in the log) when it is missing or damaged."""
        ...

    def change(self, bank: str, edit: Edit, blobs: Mapping[str, bytes]) -> Index:
        """Apply `edit`, store those of `blobs` (by digest) that the new index names, raise the version.

        Blobs that the new index does not name are removed.
        """
        ...

    def reset(self, bank: str, index: Index) -> Index:
        """Store an index whatever is stored now, also in place of a damaged one; remove other blobs."""
        ...

    def blobs(self, bank: str) -> list[str]:
        """Return the digests under which blobs of the bank are stored, damaged and unused ones too."""
        ...


def blob_digest(data: bytes) -> str:
    """Return the name of a blob: its SHA-256, hex."""
    return hashlib.sha256(data).hexdigest()


def state_of(data: bytes) -> str:
    """Return the identity of a stored index: the digest and the length of its bytes."""
    return f"{blob_digest(data)}:{len(data)}"


def named_blobs(blobs: Mapping[str, bytes], index: Index) -> dict[str, bytes]:
    """Return the blobs that the index names; those of a refused edit are not stored."""
    return {digest: data for digest, data in blobs.items() if digest in index.blobs}


def checked_blob(bank: str, digest: str, data: bytes | None) -> bytes | None:
    """Return the bytes of a blob, or None and a warning in the log when they do not match its digest."""
    if data is None or blob_digest(data) != digest:
        problem = "missing" if data is None else "damaged or half-written"
        log.warning("bank %s: blob %s is %s; it is ignored", bank, digest[:16], problem)
        return None
    return data
