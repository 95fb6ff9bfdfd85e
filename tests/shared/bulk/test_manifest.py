"""The manifest: complete lines, resume after a kill, one process at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vessa.bulk.manifest import Manifest
from vessa.errors import InvalidConfig, InvalidRequest

SETTINGS = {"bank": "b"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "manifest.jsonl"


def test_written_files_are_finished_after_reopening(path: Path) -> None:
    names = [f"a/{i}.png" for i in range(300)] + ["ü\udcff.png"]
    with Manifest(path, SETTINGS) as manifest:
        assert manifest.missing(names) == names
        manifest.add([{"file": name} for name in names[:200]])
    with Manifest(path, SETTINGS) as manifest:
        assert len(manifest) == 200
        assert manifest.missing(names) == names[200:]
        manifest.add([{"file": name} for name in names[200:]])
    with Manifest(path, SETTINGS) as manifest:
        assert manifest.missing(names) == []
    assert [line.get("file") for line in lines(path)] == [None, *names]


def test_a_line_cut_off_at_any_byte_is_written_again(path: Path) -> None:
    with Manifest(path, SETTINGS) as manifest:
        manifest.add([{"file": "a"}, {"file": "b"}])
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with Manifest(path, SETTINGS) as manifest:
            manifest.add([{"file": name} for name in manifest.missing(["a", "b"])])
        assert path.read_bytes() == whole


def test_lines_that_are_not_valid_are_removed(path: Path) -> None:
    with Manifest(path, SETTINGS) as manifest:
        manifest.add([{"file": "a"}, {"file": "b", "error": {}}])
    with Manifest(path, SETTINGS) as manifest:
        assert manifest.missing(["a", "b"]) == []
    with Manifest(path, SETTINGS, valid=lambda record: "error" not in record) as manifest:
        assert manifest.missing(["a", "b"]) == ["b"]
    assert [line.get("file") for line in lines(path)] == [None, "a"]


def test_only_the_owner_may_read_it(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with Manifest(path, SETTINGS) as manifest:
        manifest.add([{"file": "a"}, {"file": "b"}])
    path.chmod(0o644)  # as an older version wrote it
    for valid in (lambda record: True, lambda record: record["file"] != "b"):
        with Manifest(path, SETTINGS, valid=valid):
            pass
        assert {p.stat().st_mode & 0o777 for p in path.parent.iterdir()} == {0o600}


def test_other_settings_and_a_second_process_are_refused(path: Path) -> None:
    with Manifest(path, SETTINGS), pytest.raises(InvalidConfig, match="another process"):
        Manifest(path, SETTINGS)
    with Manifest(path, SETTINGS) as manifest:
        manifest.add([{"file": "b", "error": {}}])
    with pytest.raises(InvalidConfig, match="other settings"):
        Manifest(path, {"bank": "c"}, valid=lambda record: False)
    assert len(lines(path)) == 2  # a refused opening removes no line


@pytest.mark.parametrize("line", [b"[]\n", b"no json\n", b'{"file": 3}\n'])
def test_a_file_that_is_not_a_manifest_is_not_changed(path: Path, line: bytes) -> None:
    path.write_bytes(b'{"settings": {"bank": "b"}}\n' + line)
    with pytest.raises(InvalidRequest, match=r"line 2 .* is not a manifest line"):
        Manifest(path, SETTINGS)
    assert path.read_bytes().endswith(line)
