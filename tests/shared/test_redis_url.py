"""Redis addresses whose password is in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vessa.errors import InvalidConfig
from vessa.redaction import secrets
from vessa.redaction.redis_url import with_password


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


def test_the_password_is_read_from_its_file_and_redacted(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("s3c/ret\n")
    url = with_password(f"redis://trainer@redis:6379/1?password_file={file}&socket_timeout=2")
    assert url == "redis://trainer:s3c%2Fret@redis:6379/1?socket_timeout=2"
    assert with_password(f"redis://redis/0?password_file={file}") == "redis://:s3c%2Fret@redis/0"
    assert secrets.redact("denied: s3c/ret") == "denied: ***"


@pytest.mark.parametrize("url", ["redis://h:1/0", "redis://u:p@h/0", "unix:///run/redis.sock?db=1"])
def test_other_addresses_stay(url: str) -> None:
    assert with_password(url) == url


@pytest.mark.parametrize("content", [None, "", " \n", b"\xff"])
def test_a_missing_or_empty_file_is_named(tmp_path: Path, content: str | bytes | None) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidConfig, match="password_file"):
        with_password(f"redis://u@h/0?password_file={file}")


def test_a_password_beside_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("x")
    with pytest.raises(InvalidConfig, match="no password beside it"):
        with_password(f"redis://u:p@h/0?password_file={tmp_path / 'p'}")
