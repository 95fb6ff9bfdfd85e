"""Test access: the key and its file, every route, and the refusals of an open service."""

from __future__ import annotations

import base64
import logging
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient

from vessa.client import AnnotatorClient, default_key_file
from vessa.errors import InvalidConfig
from vessa_server.api.authentication import require_key, require_monitor, require_password
from vessa_server.app import create_app
from vessa_server.auth.api_key import resolve_access
from vessa_server.auth.client_address import client_address, is_served_host
from vessa_server.auth.rate_limits import Allowance
from vessa_server.settings import Settings

OPEN_ROUTES = {"/livez", "/readyz"}
# The console's files hold no data, and POST /session checks a key or a one-time link itself.
CONSOLE_ROUTES = {"/", "/console/{path:path}", "/session"}
# 3D Slicer asks whether it must sign in, and signs in by a key.
SIGN_IN_ROUTES = {"/monailabel/{bank}/auth/", "/monailabel/{bank}/auth/token"}
VIEWERS = "nninteractive,monailabel,labelstudio"


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in ("VESSA_API_KEY", "VESSA_INSECURE"):
        monkeypatch.delenv(name, raising=False)


def app_of(**settings: Any) -> FastAPI:
    return create_app(Settings(api_key="k" * 20, serve_viewers=VIEWERS, **settings))


def test_every_route_but_the_probes_depends_on_the_key() -> None:
    unprotected = set()
    for context in iter_route_contexts(app_of().routes):
        # A mount or a plain Starlette route has no dependant and would count as unprotected.
        dependant = getattr(context, "dependant", None)
        calls = {part.call for part in dependant.dependencies} if dependant else set()
        if not calls & {require_key, require_monitor, require_password}:
            unprotected.add(context.path)
    assert unprotected == OPEN_ROUTES | CONSOLE_ROUTES | SIGN_IN_ROUTES


def test_every_route_of_viewers_refuses_a_missing_and_a_wrong_key() -> None:
    app = app_of(failed_keys_per_minute=0)
    paths = {(m, c.path) for c in iter_route_contexts(app.routes) for m in c.methods}
    viewers = {p for p in paths if p[1].startswith(tuple(f"/{name}/" for name in VIEWERS.split(",")))}
    http, basic = TestClient(app), base64.b64encode(b"user:wrong").decode()
    for method, path in viewers:
        if path in SIGN_IN_ROUTES:
            continue
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {basic}"}):
            answer = http.request(method, re.sub(r"{\w+}", "x", path), headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized"), path
    wrong = http.post("/monailabel/x/auth/token", content=b"username=a&password=wrong")
    assert wrong.status_code == 401
    assert len(viewers) > 40


def test_every_route_refuses_a_missing_and_a_wrong_key(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app.state.limits, "failures_per_minute", 0)
    tried = 0
    for context in iter_route_contexts(server.app.routes):
        path = re.sub(r"\{\w+\}", "x", context.path)
        if path in OPEN_ROUTES | CONSOLE_ROUTES:
            continue
        for method in context.methods:
            for header in (
                "",
                "Bearer wrong",
                "Basic " + "a" * 20,
                f"bearer{server.settings.key}",
                "Bearer ä",
            ):
                answer = server.http.request(
                    method, path, headers={"Authorization": header.encode()}, content=b"x" * 100
                )
                assert answer.status_code == 401, (method, path, header)
                assert answer.json()["error"]["code"] == "unauthorized"
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                tried += 1
    assert tried >= 12 * 5


def test_host_and_path_tricks_open_nothing(server: Any) -> None:
    for path in ("/livez/../info", "/readyz/../banks", "//info", "/info/", "/livez/info", "/INFO", "/%69nfo"):
        for headers in (
            {},
            {"Host": "livez"},
            {"X-Forwarded-For": "127.0.0.1"},
            {"X-Original-URL": "/livez"},
        ):
            answer = server.http.get(path, headers={"Authorization": "", **headers})
            # httpx reads //info as another host's root, which is the console's page without data.
            assert answer.status_code in ({200} if path == "//info" else {401, 404}), path
            assert "labels_version" not in answer.text


def test_probes_need_no_key_and_tell_nothing(server: Any) -> None:
    for path in OPEN_ROUTES:
        answer = server.http.get(path, headers={"Authorization": ""})
        assert answer.status_code == 200
        assert set(answer.json()) == {"status"}


def test_no_cross_origin_headers_are_sent(server: Any) -> None:
    answer = server.http.get("/info", headers={"Origin": "https://other.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    assert server.http.options("/segment", headers=preflight).status_code == 405


def test_a_key_is_made_at_the_first_start_and_shown_with_its_place() -> None:
    access = resolve_access(Settings())
    path = default_key_file()
    assert access.created
    assert access.file == path
    assert access.key == path.read_text().strip()
    assert len(access.key or "") >= 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert str(access.key) in access.describe(show_key=True)
    assert str(access.key) not in access.describe(show_key=False)  # stdout is a file or a container's log
    assert str(path) in access.describe(show_key=False)
    with AnnotatorClient() as client:
        assert client._http.headers["Authorization"] == f"Bearer {access.key}"


def test_the_second_start_uses_the_same_key_and_does_not_show_it() -> None:
    first, second = resolve_access(Settings()), resolve_access(Settings())
    assert second.key == first.key
    assert not second.created
    assert str(first.key) not in second.describe(show_key=True)


def test_servers_that_start_together_agree_on_the_key() -> None:
    with ThreadPoolExecutor(16) as pool:
        keys = {access.key for access in pool.map(lambda _: resolve_access(Settings()), range(16))}
    assert len(keys) == 1
    assert [path.name for path in default_key_file().parent.iterdir()] == ["api-key"]


def test_a_key_file_open_to_others_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    resolve_access(Settings())
    default_key_file().chmod(0o644)
    with caplog.at_level(logging.WARNING):
        resolve_access(Settings())
    assert stat.S_IMODE(default_key_file().stat().st_mode) == 0o600
    assert "open to others" in caplog.text


@pytest.mark.parametrize("content", ["", "short\n", "é" * 30])
def test_a_useless_key_file_is_an_error_and_not_an_open_service(content: str) -> None:
    default_key_file().parent.mkdir(parents=True)
    default_key_file().write_text(content)
    with pytest.raises(InvalidConfig, match="key file"):
        resolve_access(Settings())


def test_a_configured_key_is_used_and_never_written_or_shown() -> None:
    access = resolve_access(Settings(api_key="my-own-key-123456"))
    assert access.key == "my-own-key-123456"
    assert "my-own" not in access.describe(show_key=True)
    assert not default_key_file().exists()


def test_open_only_when_told_and_then_it_says_so() -> None:
    access = resolve_access(Settings(insecure=True))
    assert access.key is None
    assert "INSECURE" in access.describe(show_key=True)


def test_an_open_service_refuses_pages_of_other_sites(server_of: Any) -> None:
    server = server_of(Settings(insecure=True), wait=False)
    own = {"Host": "127.0.0.1:8700"}
    assert server.http.get("/metrics", headers=own).status_code == 200
    same = server.http.get("/metrics", headers={**own, "Origin": "http://127.0.0.1:8700"})
    assert same.status_code == 200
    answer = server.http.get("/metrics", headers={**own, "Origin": "https://other.example"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden"
    for host in ("rebound.example", "rebound.example:8700", "10.0.0.1", "localhost.example", ""):
        answer = server.http.get("/metrics", headers={"Host": host, "Origin": f"http://{host}"})
        assert answer.status_code == 403, host


@pytest.mark.parametrize(
    ("host", "bound", "served"),
    [
        ("localhost:8700", "127.0.0.1", True),
        ("[::1]:8700", "::1", True),
        ("127.0.0.1", "localhost", True),
        ("192.168.1.4:8700", "0.0.0.0", True),
        ("192.168.1.4", "192.168.1.4", True),
        ("192.168.1.5", "192.168.1.4", False),
        ("evil.example", "0.0.0.0", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        (None, "127.0.0.1", False),
    ],
)
def test_an_open_service_answers_under_its_own_address(host: str | None, bound: str, served: bool) -> None:
    assert is_served_host(host, bound) is served


@pytest.mark.parametrize("key", ["short", "0123456789abcde", "ä" * 20])
def test_a_short_configured_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidConfig, match="16 ASCII characters") as caught:
        Settings(api_key=key)
    assert key not in str(caught.value)


def test_wrong_keys_of_one_address_are_limited(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app.state.limits, "failures_per_minute", 3)
    monkeypatch.setattr(server.app.state.limits, "_failures", Allowance())

    def ask(key: str) -> int:
        return int(server.http.get("/info", headers={"Authorization": f"Bearer {key}"}).status_code)

    assert [ask("wrong") for _ in range(5)] == [401, 401, 401, 429, 429]
    assert ask(server.settings.key) == 200  # a valid key is not locked out by others' mistakes


@pytest.mark.parametrize(
    ("forwarded", "trusted", "expected"),
    [
        ("203.0.113.9", "10.0.0.0/8", "203.0.113.9"),
        ("6.6.6.6, 203.0.113.9", "10.0.0.0/8", "203.0.113.9"),
        ("203.0.113.9, 10.1.1.1", "10.0.0.0/8", "203.0.113.9"),
        ("203.0.113.9", "", "10.2.3.4"),
        ("nonsense", "10.0.0.0/8", "10.2.3.4"),
    ],
)
def test_the_client_behind_a_trusted_gateway_is_named(forwarded: str, trusted: str, expected: str) -> None:
    scope = {"client": ("10.2.3.4", 5), "headers": [(b"x-forwarded-for", forwarded.encode())]}
    assert client_address(scope, Settings(trusted_proxies=trusted).trusted_proxies) == expected
