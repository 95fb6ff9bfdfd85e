"""Atomic writes: a name holds the old bytes or all of the new ones, and no other file stays behind."""

import os
import subprocess
import sys
import threading

import pytest

from vessa import atomic_write

# Replaces a file in two halves, and waits between them when it is asked to.
_WRITER = """
import sys, time
from pathlib import Path
from vessa import atomic_write
path, pause = Path(sys.argv[1]), sys.argv[2] == "pause"
number = 0
while True:
    with atomic_write.replacing(path) as fresh, fresh.open("wb") as file:
        number += 1
        half = bytes([number % 256]) * 200_000
        file.write(half)
        file.flush()
        print(number, flush=True)
        time.sleep(60 if pause else 0)
        file.write(half)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_writer(path, mode):
    return subprocess.Popen([sys.executable, "-c", _WRITER, path, mode], stdout=subprocess.PIPE)


def test_it_writes_bytes_and_text(tmp_path):
    atomic_write.write_bytes(tmp_path / "a", b"\x00\xff")
    atomic_write.write_text(tmp_path / "b", "ä\n")
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "ä\n".encode()
    assert names(tmp_path) == ["a", "b"]


def test_a_kill_in_the_middle_leaves_the_old_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with start_writer(path, "pause") as writer:
        writer.stdout.readline()
        writer.kill()
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    assert atomic_write.remove_leftovers(tmp_path) == 1
    assert names(tmp_path) == ["file"]


def test_a_kill_at_any_time_leaves_one_version_whole(tmp_path):
    path = tmp_path / "file"
    for writes in (1, 2, 3, 5):
        with start_writer(path, "go on") as writer:
            for _ in range(writes):
                writer.stdout.readline()
            writer.kill()
        data = path.read_bytes() if path.exists() else b""
        assert data == data[:1] * 400_000 or (writes == 1 and not data)


@pytest.mark.parametrize("sync", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, sync):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted():
        with atomic_write.replacing(path, sync=sync) as fresh:
            fresh.write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(("mode", "umask", "expected"), [(0o600, 0o022, 0o600), (0o666, 0o027, 0o640)])
def test_the_mode_holds_from_the_first_byte_on(tmp_path, mode, umask, expected):
    path = tmp_path / "file"
    before = os.umask(umask)
    try:
        with atomic_write.replacing(path, mode) as fresh:
            assert fresh.stat().st_mode & 0o777 == expected
            fresh.write_bytes(b"x")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == expected


def test_the_file_and_its_folder_are_synced_in_this_order(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    path = tmp_path / "file"

    def note(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), path.exists()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    atomic_write.write_bytes(path, b"x")
    (first, renamed_before), (second, renamed_after) = synced
    assert os.path.dirname(first) == second == str(tmp_path)
    assert (renamed_before, renamed_after) == (False, True)


def test_writers_of_one_name_do_not_mix(tmp_path):
    path = tmp_path / "file"
    threads = [
        threading.Thread(target=atomic_write.write_bytes, args=(path, bytes([n]) * 100_000)) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = path.read_bytes()
    assert data == data[:1] * 100_000
    assert names(tmp_path) == ["file"]


def test_leftovers_are_found_in_folders_below_and_other_files_stay(tmp_path):
    (tmp_path / "below").mkdir()
    kept = [tmp_path / ".file.lock", tmp_path / "x.part", tmp_path / "below" / "file"]
    for path in [*kept, tmp_path / "below" / ".file.01234567.part"]:
        path.touch()
    assert atomic_write.remove_leftovers(tmp_path) == 1
    assert all(path.exists() for path in kept)
