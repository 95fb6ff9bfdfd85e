"""Find and mend damage in a store of template banks."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from vessa.codec import read_header
from vessa.errors import DamagedBank, MalformedBody
from vessa_server.template_bank.index import Entry, Index, Store

_LABELED = {"id", "group", "model", "classes"}


@dataclass(frozen=True)
class Fault:
    """Describe one damage. where: bank and file; repair: what `--repair` does about it."""

    where: str
    problem: str
    repair: str

    def to_dict(self) -> dict[str, str]:
        """Return the fields, for JSON."""
        return asdict(self)


def check_banks(store: Store, *, repair: bool = False) -> Iterator[Fault]:
    """Yield the faults of all banks of a store; repair: mend each one.

    Stop the annotators before a repair: a blob that one has just written is not in an index yet.
    """
    for bank in store.names():
        try:
            index = store.read(bank)
        except DamagedBank:
            rebuilt = _rebuild(store, bank)
            yield Fault(
                f"bank {bank}: index",
                "it cannot be read",
                f"build it from {len(rebuilt.entries)} readable templates; its owner is lost, so only "
                "admins see it until it is shared",
            )
            if repair:
                store.reset(bank, rebuilt)
            continue
        yield from _check_blobs(store, bank, index, repair=repair)


def _check_blobs(store: Store, bank: str, index: Index, *, repair: bool) -> Iterator[Fault]:
    kept = index
    for identity, entry in index.entries.items():
        if store.blob(bank, entry.blob) is None:
            yield Fault(
                f"bank {bank}: template {identity[:16]}",
                "its file is missing or damaged",
                "remove the template from the bank; add it again",
            )
            kept = replace(kept, entries={k: v for k, v in kept.entries.items() if k != identity})
    if index.adaptation is not None and store.blob(bank, index.adaptation) is None:
        yield Fault(f"bank {bank}: own weights", "they are missing or damaged", "remove them; adapt again")
        kept = replace(kept, adaptation=None)
    unused = [digest for digest in store.blobs(bank) if digest not in index.blobs]
    if unused:
        yield Fault(
            f"bank {bank}: {len(unused)} files",
            "no template uses them: a process was killed while it wrote or deleted",
            "delete them",
        )
    if repair and (kept is not index or unused):
        store.reset(bank, replace(kept, version=index.version + 1))


def _rebuild(store: Store, bank: str) -> Index:
    """Return an index of the templates whose files can be read."""
    entries: dict[str, Entry] = {}
    for digest in store.blobs(bank):
        data = store.blob(bank, digest)
        if data is not None and (found := _entry_of(digest, data)) is not None:
            entries[found[0]] = found[1]
    return Index(version=1, exists=True, entries=entries)


def _entry_of(digest: str, data: bytes) -> tuple[str, Entry] | None:
    """Return the id and the index entry of a template's bytes; None for other blobs."""
    try:
        header, _ = read_header(data)
        about = json.loads(header["__metadata__"]["template"])
        mask = load_tensors(data)["mask"]
        classes = {int(key): str(name) for key, name in about["classes"].items()}
        if not about.keys() >= _LABELED or not set(np.unique(mask)) - {0} <= classes.keys():
            return None
        height, width = mask.shape
        entry = Entry(digest, str(about["group"]), classes, height, width, str(about["model"]), len(data))
        return str(about["id"]), entry
    except (MalformedBody, SafetensorError, KeyError, TypeError, ValueError):
        return None
