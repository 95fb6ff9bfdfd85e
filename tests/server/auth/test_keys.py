"""Named keys: how they are kept, what each role may do on each route, and what the command line does."""

from __future__ import annotations

import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from typer.testing import CliRunner

from vessa.errors import InvalidRequest
from vessa_server.auth.keys import FileKeys, Keys, RedisKeys, Role, create_key, digest_of, open_keys
from vessa_server.cli.main import app as cli
from vessa_server.settings import Settings

# The probes, the console's page and its files without data, and signing in, which takes the key itself.
OPEN = {
    ("GET", "/livez"), ("GET", "/readyz"), ("GET", "/"), ("GET", "/console/{path:path}"),
    ("POST", "/session"),
}  # fmt: skip
# What each route needs. A route that is missing here fails the test: say whom it is for.
NEEDS = {
    Role.monitor: {("GET", "/metrics")},
    Role.admin: {("DELETE", "/groups/{group}"), ("GET", "/keys"), ("GET", "/audit"), ("GET", "/queue")},
    Role.curate: {
        ("GET", "/runs"), ("GET", "/runs/{name}/metrics"), ("GET", "/runs/{name}/report.html"),
        ("POST", "/templates"), ("DELETE", "/templates/{identity}"), ("DELETE", "/banks/{bank}"),
        ("POST", "/banks/{bank}/adapt"), ("DELETE", "/banks/{bank}/adapt"),
        ("PUT", "/banks/{bank}/share"), ("DELETE", "/banks/{bank}/share"), ("POST", "/phantoms"),
    },
    Role.annotate: {
        ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/info"), ("GET", "/banks"),
        ("GET", "/banks/{bank}"), ("GET", "/annotations/{identity}"),
        ("GET", "/banks/{bank}/adapt"), ("GET", "/templates"), ("GET", "/templates/{identity}"),
        ("GET", "/templates/{identity}/overlay.png"), ("POST", "/segment"),
        ("POST", "/banks/{bank}/suggest"),
        ("POST", "/jobs"), ("GET", "/jobs"), ("GET", "/jobs/{identity}"), ("DELETE", "/jobs/{identity}"),
        ("GET", "/jobs/{identity}/result"), ("GET", "/jobs/{identity}/provenance"),
        ("GET", "/worklists"), ("POST", "/worklists"), ("GET", "/worklists/{name}"),
        ("DELETE", "/worklists/{name}"), ("POST", "/worklists/{name}/items"),
        ("GET", "/worklists/{name}/export"), ("POST", "/worklists/{name}/suggest"),
        ("POST", "/slices"), ("POST", "/worklists/{name}/volumes"),
        ("DELETE", "/worklists/{name}/volumes/{volume}"), ("POST", "/worklists/{name}/volumes/{volume}/job"),
        ("POST", "/worklists/{name}/volumes/{volume}/labels"),
        ("GET", "/worklists/{name}/volumes/{volume}/image.nii"),
        ("GET", "/worklists/{name}/volumes/{volume}/labels.nii"),
        ("GET", "/worklists/{name}/items/{identity}"),
        ("DELETE", "/worklists/{name}/items/{identity}"),
        ("GET", "/worklists/{name}/items/{identity}/image.png"),
        ("GET", "/worklists/{name}/items/{identity}/labels.png"),
        ("PUT", "/worklists/{name}/items/{identity}/labels"),
        ("POST", "/worklists/{name}/items/{identity}/segment"),
        ("POST", "/worklists/{name}/items/{identity}/undo"),
        ("POST", "/worklists/{name}/items/{identity}/decision"),
        ("DELETE", "/worklists/{name}/items/{identity}/decision"),
        ("GET", "/session"), ("DELETE", "/session"),
    },
}  # fmt: skip


@pytest.fixture(params=["file", "redis"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Keys in a file, or in a real Redis."""
    if request.param == "file":
        yield FileKeys(tmp_path / "new" / "keys.jsonl")
        return
    found = RedisKeys(request.getfixturevalue("redis_url"))
    found._redis.delete("vessa:keys")
    yield found
    found._redis.delete("vessa:keys")


def test_only_the_hash_of_a_key_is_kept(keys: Keys) -> None:
    secret = create_key(keys, "alice", Role.curate, requests=3)
    kept = keys.all()["alice"]
    assert (kept.name, kept.role, kept.requests, kept.images_per_minute) == ("alice", Role.curate, 3, None)
    assert kept.digest == digest_of(secret)
    assert secret not in kept.to_json()
    assert len(secret) >= 43  # 256 bits


def test_a_name_is_taken_once_and_free_after_it_was_revoked(keys: Keys) -> None:
    first = create_key(keys, "alice", Role.annotate)
    with pytest.raises(InvalidRequest, match="exists"):
        create_key(keys, "alice", Role.admin)
    assert keys.all()["alice"].digest == digest_of(first)
    assert keys.remove("alice")
    assert not keys.remove("alice")
    assert keys.all() == {}
    assert create_key(keys, "alice", Role.annotate) != first


def test_keys_made_at_once_are_all_kept(keys: Keys) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: create_key(keys, f"k{i}", Role.annotate), range(24)))
    keys.put(keys.all().popitem()[1])  # what was read before is not believed any more
    assert len(keys.all()) == 24


@pytest.mark.parametrize("name", ["", "local", "Alice", "a b", "../x", "a" * 33, "é"])
def test_a_name_is_plain(keys: Keys, name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        create_key(keys, name, Role.annotate)


@pytest.mark.parametrize(
    "damage",
    ['{"name": "bob"', '{"name": "bob", "role": "king", "digest": "", "created": ""}', "[]", "", "\x00\xff"],
)
def test_a_damaged_line_refuses_its_key_and_no_other(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = FileKeys(tmp_path / "keys.jsonl")
    create_key(keys, "alice", Role.annotate)
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    keys.path.write_text(f"{damage}\n{keys.path.read_text()}\n", encoding="latin-1")
    assert list(keys.all()) == ["alice"]
    damaged = [1] if damage else []
    assert keys.damaged_lines() == damaged
    assert ("line 1 of the key file" in caplog.text) == bool(damaged)
    create_key(keys, "carol", Role.annotate)
    assert keys.remove("alice")
    assert len(keys.damaged_lines()) == len(damaged)
    keys.drop_damaged_lines()
    assert (list(keys.all()), keys.damaged_lines()) == (["carol"], [])


def test_a_damaged_record_in_redis_refuses_its_key_and_no_other(redis_url: str) -> None:
    keys = RedisKeys(redis_url)
    keys._redis.delete("vessa:keys")
    create_key(keys, "alice", Role.annotate)
    keys._redis.hset("vessa:keys", "bob", "{")
    assert list(RedisKeys(redis_url).all()) == ["alice"]
    keys._redis.delete("vessa:keys")


def test_a_key_file_that_others_can_write_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = FileKeys(tmp_path / "keys.jsonl")
    create_key(keys, "alice", Role.annotate)
    keys.path.chmod(0o622)
    FileKeys(keys.path).all()
    assert "other users can write" in caplog.text


def test_keys_lie_where_the_replicas_of_the_store_find_them(tmp_path: Path) -> None:
    assert isinstance(open_keys(Settings(store="redis://localhost:1/0")), RedisKeys)
    beside = open_keys(Settings(store=f"folder:{tmp_path}", key_file=tmp_path / "api-key"))
    assert isinstance(beside, FileKeys)
    assert beside.path == tmp_path / "keys.jsonl"
    told = open_keys(Settings(store="redis://localhost:1/0", keys_file=tmp_path / "k"))
    assert isinstance(told, FileKeys)
    assert told.path == tmp_path / "k"


def as_key(server: Any, key: str, method: str, path: str, **options: Any) -> Any:
    return server.http.request(method, path, headers={"Authorization": f"Bearer {key}"}, **options)


def test_every_route_takes_its_role_and_those_above(server: Any, key_of: Any) -> None:
    known = {pair: role for role, pairs in NEEDS.items() for pair in pairs}
    found = {(m, c.path) for c in iter_route_contexts(server.app.routes) for m in c.methods} - OPEN
    assert found == known.keys(), "a new route: say in NEEDS whom it is for"
    held = {role: key_of(role.name) for role in Role}
    for (method, path), needed in known.items():
        place = re.sub(r"\{\w+\}", "x", path)
        for role, key in held.items():
            answer = as_key(server, key, method, place)
            refused = answer.status_code == 403
            allowed = role in (needed, Role.admin) if needed is Role.monitor else role >= needed
            assert refused != allowed, (method, path, role.name, answer.text)
            if refused:
                assert answer.json()["error"]["code"] == "forbidden"
                assert "needs the role" in answer.json()["error"]["message"]


def test_a_running_service_sees_a_new_key_and_a_revoked_one(server: Any) -> None:
    keys = server.app.state.access.keys
    key = create_key(keys, "passing-by", Role.annotate)
    assert as_key(server, key, "GET", "/info").status_code == 200
    keys.remove("passing-by")
    assert as_key(server, key, "GET", "/info").status_code == 401


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["keys", *arguments])


def test_the_command_line_creates_lists_and_revokes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VESSA_KEYS_FILE", str(tmp_path / "keys.jsonl"))
    monkeypatch.setenv("VESSA_STORE", f"folder:{tmp_path / 'banks'}")
    made = run("create", "alice", "--role", "curate", "--images-per-minute", "60")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip().splitlines()[-1]
    kept = FileKeys(tmp_path / "keys.jsonl").all()["alice"]
    assert (kept.digest, kept.role, kept.images_per_minute) == (digest_of(key), Role.curate, 60)
    listed = json.loads(run("list", "--json").stdout.splitlines()[-1])["keys"]
    assert [(row["name"], row["role"]) for row in listed] == [("alice", "curate")]
    assert isinstance(run("create", "alice").exception, InvalidRequest)
    assert run("revoke", "alice").exit_code == 0
    assert isinstance(run("revoke", "alice").exception, InvalidRequest)
    audit = (tmp_path / "banks" / ".audit" / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in audit.splitlines()]
    assert [(line["action"], line["state"]) for line in lines][:2] == [
        ("key.create", "asked"),
        ("key.create", "done"),
    ]
    assert [line["state"] for line in lines].count("failed") == 2
    assert key not in audit
