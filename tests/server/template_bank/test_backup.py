"""Backups of a store are restored: by copying its folder, or Redis' own dump."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from vessa_server.auth.keys import RedisKeys, Role, create_key
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.repair import check_banks
from vessa_server.template_bank.store import check_store, open_store


def contents(address: str) -> dict[str, Any]:
    """Return all that a caller can read of a store, after a check that nothing is damaged."""
    store = open_store(address)
    assert list(check_banks(store)) == []
    banks = TemplateBanks(store)
    return {name: (store.state(name), [t.id for t in banks.get(name).templates]) for name in store.names()}


def test_a_copied_folder_is_the_store_of_that_time(tmp_path: Path, template_of: Callable[..., Any]) -> None:
    address = f"folder:{tmp_path / 'banks'}"
    banks = TemplateBanks(open_store(address))
    banks.add("heart", [template_of(0), template_of(1)])
    banks.add("liver", [template_of(2)])
    before = contents(address)
    shutil.copytree(tmp_path / "banks", tmp_path / "backup")
    banks.add("heart", [template_of(3)])
    banks.delete("liver")
    assert contents(address) != before
    shutil.rmtree(tmp_path / "banks")  # the disk is lost
    shutil.copytree(tmp_path / "backup", tmp_path / "banks")
    assert contents(address) == before
    # A running annotator notices it: the digest names the contents, and the count may be the older one.
    assert len(banks.get("heart").templates) == 2
    assert banks.add("heart", [template_of(4)])
    assert len(contents(address)["heart"][1]) == 3


def test_a_folder_copied_amid_changes_is_mended_by_the_check(
    tmp_path: Path, template_of: Callable[..., Any]
) -> None:
    banks = TemplateBanks(open_store(f"folder:{tmp_path / 'banks'}"))
    templates = [template_of(seed) for seed in range(12)]
    banks.add("b", templates[:2])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for template in templates[2:]:
                banks.add("b", [template])
            for template in templates[2:]:
                banks.remove("b", template.id)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(10):
            copy = tmp_path / f"copy-{number}"
            # as cp and rsync: files that vanish meanwhile are left out
            subprocess.run(["cp", "-r", str(tmp_path / "banks"), str(copy)], stderr=subprocess.DEVNULL)
            store = open_store(f"folder:{copy}")
            list(check_banks(store, repair=True))
            assert list(check_banks(store)) == []
            assert {t.id for t in templates[:2]} <= {t.id for t in TemplateBanks(store).get("b").templates}
    finally:
        stop.set()
        writer.join()


def test_a_dump_of_redis_is_the_store_of_that_time(
    tmp_path: Path, template_of: Callable[..., Any], start_redis: Any, port: int, free_tcp_port: int
) -> None:
    (tmp_path / "data").mkdir()
    address = f"redis://127.0.0.1:{port}/0"
    server = start_redis(tmp_path / "data", port)
    try:
        banks = TemplateBanks(open_store(address))
        banks.add("heart", [template_of(0), template_of(1)])
        create_key(RedisKeys(address), "alice", Role.annotate)
        before, keys = contents(address), RedisKeys(address).all()
        redis.Redis.from_url(address).save()  # BGSAVE where others work with it
        shutil.copy(tmp_path / "data" / "dump.rdb", tmp_path / "backup.rdb")
        banks.add("heart", [template_of(2)])
        banks.delete("heart")
        create_key(RedisKeys(address), "bob", Role.annotate)
    finally:
        server.kill()  # the machine is lost
        server.wait()
    (tmp_path / "restored").mkdir()
    shutil.copy(tmp_path / "backup.rdb", tmp_path / "restored" / "dump.rdb")
    # A Redis that starts with `appendonly yes` reads no dump, so it is switched on afterwards.
    server, address = (
        start_redis(tmp_path / "restored", free_tcp_port),
        f"redis://127.0.0.1:{free_tcp_port}/0",
    )
    try:
        redis.Redis.from_url(address).config_set("appendonly", "yes")
        assert contents(address) == before
        assert RedisKeys(address).all() == keys
        assert check_store(address) == []
    finally:
        server.kill()  # SIGTERM is refused while the first append-only file is written
        server.wait()
