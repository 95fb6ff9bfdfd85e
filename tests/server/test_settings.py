"""Settings: safe defaults, the environment, and sentences that say what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from vessa.errors import InvalidConfig
from vessa_server.settings import Settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "INSECURE", "PORT", "HOST", "WEIGHTS", "STORE", "DEVICE", "WITHOUT"):
        monkeypatch.delenv(f"VESSA_{name}", raising=False)


def test_defaults_are_safe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = Settings()
    assert settings.loopback
    assert not settings.insecure
    assert settings.storage.store == f"folder:{tmp_path}/vessa/banks"
    assert (settings.port, settings.weights, settings.key) == (8700, "nano", "")


def test_environment_is_read_and_arguments_go_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESSA_PORT", "9000")
    monkeypatch.setenv("VESSA_HOST", "0.0.0.0")
    assert Settings().port == 9000
    assert Settings(port=9001).port == 9001
    assert not Settings().loopback


def test_parts_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().without == frozenset()
    for text, parts in (
        ("language", {"language"}),
        ("language, memory", {"language", "memory"}),
        ("", set()),
    ):
        monkeypatch.setenv("VESSA_WITHOUT", text)
        assert Settings().without == parts
    monkeypatch.setenv("VESSA_WITHOUT", "eyes")
    with pytest.raises(InvalidConfig, match="without"):
        Settings()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"port": "x"}, "port: "),
        ({"port": 70000}, "port: .*65535"),
        ({"device": "gpu"}, "device: "),
        ({"queue_items": 3, "max_items": 4}, "max_items \\(4\\) must not exceed queue_items \\(3\\)"),
        ({"max_body_bytes": 0}, "max_body_bytes: "),
        ({"max_pixels": 10**9}, "max_pixels: "),
        ({"insecure": True, "api_key": "geheimgeheimgeheim"}, "insecure and api_key exclude each other"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidConfig, match=sentence) as caught:
        Settings(**given)
    assert "geheim" not in str(caught.value)


def test_each_setting_of_a_group_is_read_from_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESSA_MAX_ITEMS", "7")
    monkeypatch.setenv("VESSA_STORE", "folder:/somewhere")
    monkeypatch.setenv("VESSA_AUDIT_FILE", "/somewhere/audit.jsonl")
    monkeypatch.setenv("VESSA_VLLM_KEY", "geheim")
    settings = Settings(max_items=8)
    assert settings.limits.max_items == 8
    assert Settings().limits.max_items == 7
    assert settings.storage.store == "folder:/somewhere"
    assert settings.audit.audit_file == Path("/somewhere/audit.jsonl")
    assert "geheim" not in repr(settings)
    again = Settings(**settings.model_dump())
    assert again.limits == settings.limits


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="max_itmes"):
        Settings(max_itmes=3)


def test_an_empty_key_is_no_key_and_a_key_is_not_shown() -> None:
    assert Settings(api_key="  ").key == ""
    assert "geheim" not in repr(Settings(api_key="geheim" * 3))
