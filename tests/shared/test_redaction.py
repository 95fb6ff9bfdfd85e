"""Redaction of secrets: URLs, keys, tokens, remembered values, trees and log lines."""

from __future__ import annotations

import io
import logging

import pytest

from vessa.redaction import (
    RedactingFormatter,
    argument_warning,
    redact,
    redacted,
    remember_secret,
    remember_url,
    secrets,
)

KEY = "vessa_" + "Ab1-_" * 9


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://:s3cret@redis:6379/1", "redis://***@redis:6379/1"),
        ("redis://trainer:s3cret@redis/1", "redis://***@redis/1"),
        ("rediss://u:s3/cr?et@host:1/0", "rediss://***@host:1/0"),
        ("redis://u:p@s3cret@host/0", "redis://***@host/0"),
        ("see https://ghtoken@host/path.", "see https://***@host/path."),
        ('{"url": "http://a:s3cret@b", "x": 1}', '{"url": "http://***@b", "x": 1}'),
        ("unix:///run/redis.sock?password=s3cret&db=1", "unix:///run/redis.sock?password=***&db=1"),
        ("https://h/p?a=1&access_token=s3cret", "https://h/p?a=1&access_token=***"),
        ("postgresql+psycopg://u:s3cret@db/x", "postgresql+psycopg://***@db/x"),
        (f"key {KEY} was used", "key *** was used"),
        ("Authorization: Bearer s3cret-token-123", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrst", "***"),
    ],
)
def test_secrets_in_texts_are_replaced(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8700/segment",
        "https://host:8700/package@1.2",
        "https://host/package@1.2",
        "a mail to someone@example.org",
        "redis://redis:6379/0",
        "vessa_server.app",
        "12:30 @ noon",
    ],
)
def test_texts_without_a_secret_stay(text: str) -> None:
    assert redact(text) == text


def test_a_remembered_secret_is_replaced_in_every_form() -> None:
    remember_secret("pa/ss wörd")
    for form in ("pa/ss wörd", "pa%2Fss%20w%C3%B6rd", "pa%2Fss+w%C3%B6rd"):
        assert redact(f"the server said {form}!") == "the server said ***!"


def test_the_password_of_a_remembered_url_is_replaced_alone() -> None:
    remember_url("redis://trainer:s3cret-77@redis:6379/1")
    assert redact("WRONGPASS for s3cret-77") == "WRONGPASS for ***"
    assert redact("user trainer") == "user trainer"


def test_a_value_of_a_few_characters_is_not_remembered() -> None:
    remember_secret("")
    remember_secret("abc")
    assert redact("abcdef") == "abcdef"


def test_trees_are_redacted_by_type_and_keep_their_shape() -> None:
    tree = {
        "cache": {"url": "redis://:s3cret@h/0", "size": 3},
        "urls": ["http://a:s3cret@b", None, True],
        "pair": ("x", KEY),
        "api_key": "anything",
        "redis://:s3cret@h": 1,
        "tokens_seen": 5,
        "token": "",
    }
    assert redacted(tree) == {
        "cache": {"url": "redis://***@h/0", "size": 3},
        "urls": ["http://***@b", None, True],
        "pair": ("x", "***"),
        "api_key": "***",
        "redis://***@h": 1,
        "tokens_seen": 5,
        "token": "",
    }


def test_log_lines_are_redacted_with_their_arguments_and_tracebacks() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter(logging.Formatter("%(message)s")))
    log = logging.Logger("test")
    log.addHandler(handler)
    try:
        raise OSError("cannot connect to redis://:s3cret@h/0")
    except OSError:
        log.exception("failed at %s", "redis://:s3cret@h/0")
    assert "s3cret" not in stream.getvalue()
    assert "redis://***@h/0" in stream.getvalue()


@pytest.mark.parametrize(
    ("arguments", "held"),
    [
        (["train", "--set", "cache.url=redis://trainer:s3cret@redis/1"], True),
        (["segment", "--api-key", "a-key-of-ones-own"], True),
        (["segment", "--api-key=a-key-of-ones-own"], True),
        (["segment", KEY], True),
        (["train", "--set", "cache.url=redis://trainer@redis/1?password_file=/run/password"], False),
        (["segment", "--bank", "heart"], False),
    ],
)
def test_secrets_among_arguments_are_warned_of(arguments: list[str], held: bool) -> None:
    warning = argument_warning(arguments)
    assert (warning is not None) == held
    assert "s3cret" not in str(warning)
