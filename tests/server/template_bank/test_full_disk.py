"""Test that deleting and revoking work on a full disk."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessa.errors import StoreUnavailable
from vessa_server.auth.audit_log import Actor, AuditLog
from vessa_server.auth.keys import Caller, FileKeys, Role, create_key
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.worklists.store import WorklistStore

ALICE = Caller("alice", Role.annotate)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB of this test's own; skipped where it cannot be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3M", "none", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount on this machine")
    if done.returncode:
        pytest.skip("a file system of one's own needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """Write until nothing fits any more."""
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_full_disk_still_deletes_and_revokes(small: Path, template_of: Any) -> None:
    banks = TemplateBanks(FolderStore(small / "banks"))
    keys = FileKeys(small / "keys" / "keys.jsonl")
    audit = AuditLog(small / "log" / "audit.jsonl", 1 << 20, 2)
    actor = Actor("admin", "here", "r")
    banks.add("a", [template_of(0), template_of(1)])
    banks.add("b", [template_of(2)])
    for name in ("alice", "bob"):
        create_key(keys, name, Role.annotate)
    with audit.change(actor, "key.create"):
        pass
    lists = WorklistStore(small / "lists", 1 << 20)
    for name in ("one", "two"):
        worklist = lists.create(name, "a", ALICE)
        item = lists.add(worklist, np.zeros((8, 8), np.uint8), "image", "")
    fill(small)
    with pytest.raises(StoreUnavailable, match="No space left"):
        banks.add("a", [template_of(3)])
    with pytest.raises(StoreUnavailable), audit.change(actor, "template.add"):
        pytest.fail("a change that cannot be recorded was made")
    with audit.change(actor, "key.revoke"):
        assert keys.remove("alice")
    with audit.change(actor, "bank.delete"):
        banks.remove("a", banks.get("a").templates[0].id)
        banks.delete("b")
    with audit.change(actor, "worklist.remove"):
        lists.remove(worklist, item.id)
    with audit.change(actor, "worklist.delete"):
        lists.delete("one", ALICE)
    assert (len(lists.worklists(ALICE)), lists.items(worklist)) == (1, [])
    assert list(keys.all()) == ["bob"]
    assert [bank.name for bank in banks.all()] == ["a"]
    assert audit.verify()[1] == []
