"""Both stores keep banks atomically: versions, concurrent writers, kills, damage, failures."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from vessa.errors import DamagedBank, InvalidConfig, StoreUnavailable
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.index import Entry, Index, Store, blob_digest
from vessa_server.template_bank.redis_store import RedisStore
from vessa_server.template_bank.store import open_store


def entry(data: bytes) -> Entry:
    return Entry(blob_digest(data), "p1", {1: "wall"}, 4, 5, "m")


def adding(key: str, data: bytes) -> Callable[[Index], Index]:
    return lambda old: Index(exists=True, entries=old.entries | {key: entry(data)})


def put(store: Store, bank: str, key: str, data: bytes) -> Index:
    return store.change(bank, adding(key, data), {blob_digest(data): data})


@pytest.fixture(params=["folder", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return f"folder:{tmp_path / 'banks'}"
    return str(request.getfixturevalue("redis_url"))


@pytest.fixture
def store(address: str) -> Store:
    return open_store(address)


def index_bytes(address: str, bank: str) -> bytes:
    if address.startswith("folder:"):
        return (Path(address.removeprefix("folder:")) / bank / "index.json").read_bytes()
    data = redis.Redis.from_url(address).hget(f"vessa:bank:{{{bank}}}", "index")
    assert isinstance(data, bytes)
    return data


def overwrite_index(address: str, bank: str, data: bytes) -> None:
    """Put bytes in place of a bank's index behind the store's back, as a restored backup or damage would."""
    if address.startswith("folder:"):
        (Path(address.removeprefix("folder:")) / bank / "index.json").write_bytes(data)
    else:
        redis.Redis.from_url(address).hset(f"vessa:bank:{{{bank}}}", "index", data)  # type: ignore[arg-type]


@pytest.fixture
def bank() -> str:
    """A name of its own, for the Redis of the session is shared."""
    return f"b{uuid.uuid4().hex}"


def test_a_bank_that_never_existed_has_version_zero(store: Store, bank: str) -> None:
    assert store.read(bank).version == 0
    assert store.read(bank) == Index()
    assert store.state(bank) == ""
    assert bank not in store.names()


def test_a_change_is_seen_by_another_store_at_once(store: Store, address: str, bank: str) -> None:
    other = open_store(address)
    for version, key in enumerate(("a", "b", "c"), start=1):
        put(store, bank, key, key.encode())
        assert other.read(bank).version == version
        assert other.read(bank).entries[key].classes == {1: "wall"}
        assert other.blob(bank, blob_digest(key.encode())) == key.encode()
    assert bank in other.names()


def test_no_change_leaves_the_version(store: Store, bank: str) -> None:
    put(store, bank, "a", b"a")
    assert store.change(bank, lambda old: None, {}).version == 1
    assert store.read(bank).version == 1


def test_versions_go_on_after_a_bank_was_deleted(store: Store, bank: str) -> None:
    put(store, bank, "a", b"a")
    store.change(bank, lambda old: Index(), {})
    assert bank not in store.names()
    assert store.read(bank).version == 2
    assert put(store, bank, "a", b"a").version == 3


def test_dropped_blobs_are_removed(store: Store, bank: str, caplog: pytest.LogCaptureFixture) -> None:
    put(store, bank, "a", b"a")
    store.change(bank, lambda old: replace(old, entries={}), {})
    assert store.blob(bank, blob_digest(b"a")) is None
    assert "missing" in caplog.text


def test_a_failing_edit_changes_nothing(store: Store, bank: str) -> None:
    put(store, bank, "a", b"a")

    def edit(old: Index) -> Index:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.change(bank, edit, {blob_digest(b"b"): b"b"})
    assert store.read(bank).version == 1
    assert put(store, bank, "c", b"c").entries.keys() == {"a", "c"}


def test_concurrent_writers_lose_nothing(address: str, bank: str) -> None:
    def write(name: str) -> None:
        mine = open_store(address)
        for i in range(8):
            put(mine, bank, f"{name}{i}", f"{name}{i}".encode())

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = open_store(address).read(bank)
    assert index.version == 32
    assert index.entries.keys() == {f"{name}{i}" for name in "abcd" for i in range(8)}


WRITER = """
import sys
from vessa_server.template_bank.index import Entry, Index, blob_digest
from vessa_server.template_bank.store import open_store
store, name = open_store(sys.argv[1]), sys.argv[2]
for i in range(10**6):
    data = b"%d " % i * 5000
    e = Entry(blob_digest(data), "p", {1: "wall"}, 4, 5, "m")
    add = lambda old: Index(exists=True, entries=old.entries | {str(i): e})
    new = store.change(name, add, {e.blob: data})
    print(new.version, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_bank(address: str, bank: str, tmp_path: Path) -> None:
    for seconds in (0.0, 0.05, 0.11):
        store = open_store(address)
        command = [sys.executable, "-c", WRITER, address, bank]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.stdout is not None
        reported = int(process.stdout.readline())
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        reported = int((process.stdout.read().splitlines() or [reported])[-1])
        process.wait()
        process.stdout.close()
        index = store.read(bank)
        assert index.version in {reported, reported + 1}
        for one in index.entries.values():
            assert store.blob(bank, one.blob) is not None
        store.change(bank, lambda old: Index(), {})


def test_a_half_written_blob_is_ignored_with_a_warning(
    tmp_path: Path, bank: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderStore(tmp_path)
    put(store, bank, "a", b"a whole blob")
    put(store, bank, "b", b"another one")
    path = tmp_path / bank / "blobs" / f"{blob_digest(b'a whole blob')}.safetensors"
    path.write_bytes(b"a wh")
    with caplog.at_level(logging.WARNING):
        assert store.blob(bank, path.stem) is None
    assert "damaged or half-written" in caplog.text
    assert store.blob(bank, blob_digest(b"another one")) == b"another one"


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path, bank: str) -> None:
    store = FolderStore(tmp_path)
    put(store, bank, "a", b"a")
    blobs = tmp_path / bank / "blobs"
    (blobs / ".half.1.2").write_bytes(b"x")
    (blobs / f"{blob_digest(b'orphan')}.safetensors").write_bytes(b"orphan")
    put(store, bank, "b", b"b")
    names = {f"{blob_digest(data)}.safetensors" for data in (b"a", b"b")}
    assert {path.name for path in blobs.iterdir()} == names


@pytest.mark.parametrize(
    "damage", ['{"version": 1, "exists"', '{"version": 1, "exists": true, "entries": {"a": 3}}', ""]
)
def test_a_damaged_index_names_its_bank_and_no_other(
    store: Store, address: str, bank: str, damage: str
) -> None:
    put(store, bank, "a", b"a")
    put(store, f"{bank}-whole", "a", b"a")
    overwrite_index(address, bank, damage.encode())
    for call in (lambda: store.read(bank), lambda: put(store, bank, "b", b"b")):
        with pytest.raises(DamagedBank, match=f"Bank '{bank}' is set aside.*store check"):
            call()
    assert {bank, f"{bank}-whole"} <= set(store.names())
    assert put(store, f"{bank}-whole", "b", b"b").version == 2
    store.reset(bank, Index())
    assert bank not in store.names()
    assert store.blobs(bank) == []


def test_the_state_names_the_stored_contents_and_not_the_count(store: Store, address: str, bank: str) -> None:
    first, stored = put(store, bank, "a", b"a"), index_bytes(address, bank)
    assert store.state(bank) == first.state == store.read(bank).state
    second = put(store, bank, "b", b"b")
    overwrite_index(address, bank, stored)  # a backup is restored: the same count comes again
    third = put(store, bank, "c", b"c")
    assert second.version == third.version == 2
    assert len({first.state, second.state, third.state}) == 3
    overwrite_index(address, bank, stored)
    assert open_store(address).state(bank) == first.state


def test_files_of_a_folder_store_are_closed_to_others(tmp_path: Path, bank: str) -> None:
    folder = tmp_path / "banks"
    folder.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        put(FolderStore(folder), bank, "a", b"a")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (folder, *folder.rglob("*"))}
    assert {m for name, m in modes.items() if name in {folder.name, bank, "blobs"}} == {0o700}
    assert {m for name, m in modes.items() if name not in {folder.name, bank, "blobs"}} == {0o600}


def test_a_folder_that_cannot_be_written_says_why_and_not_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="Not a directory") as caught:
        FolderStore(tmp_path / "file" / "banks")
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.retry_after


def test_redis_that_is_not_there_is_unavailable_without_its_address(bank: str) -> None:
    store = RedisStore("redis://:geheim@127.0.0.1:1/0", timeout=0.5)
    for call in (store.names, lambda: store.state(bank), lambda: put(store, bank, "a", b"a")):
        with pytest.raises(StoreUnavailable, match="Redis") as caught:
            call()
        assert "geheim" not in str(caught.value)
        assert caught.value.retry_after


@pytest.mark.parametrize("address", ["", "folder:", "/var/banks", "http://x", "redis://h:port/0"])
def test_an_unknown_store_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidConfig, match="folder:PATH or a redis://"):
        open_store(address)
