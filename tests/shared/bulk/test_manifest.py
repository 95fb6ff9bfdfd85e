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


def test_retry_removes_the_lines_of_failed_files(path: Path) -> None:
    with Manifest(path, SETTINGS) as manifest:
        manifest.add([{"file": "a"}, {"file": "b", "error": {}}])
    with Manifest(path, SETTINGS) as manifest:
        assert manifest.missing(["a", "b"]) == []
    with Manifest(path, SETTINGS, retry=True) as manifest:
        assert manifest.missing(["a", "b"]) == ["b"]


def test_other_settings_and_a_second_process_are_refused(path: Path) -> None:
    with Manifest(path, SETTINGS), pytest.raises(InvalidConfig, match="another process"):
        Manifest(path, SETTINGS)
    with Manifest(path, SETTINGS) as manifest:
        manifest.add([{"file": "b", "error": {}}])
    for retry in (False, True):
        with pytest.raises(InvalidConfig, match="other settings"):
            Manifest(path, {"bank": "c"}, retry=retry)
    assert len(lines(path)) == 2  # a refused retry removes no line


@pytest.mark.parametrize("line", [b"[]\n", b"no json\n", b'{"file": 3}\n'])
def test_a_file_that_is_not_a_manifest_is_not_changed(path: Path, line: bytes) -> None:
    path.write_bytes(b'{"settings": {"bank": "b"}}\n' + line)
    with pytest.raises(InvalidRequest, match=r"line 2 .* is not a manifest line"):
        Manifest(path, SETTINGS)
    assert path.read_bytes().endswith(line)
