"""Whose banks are whose, what is written down of changes, and what one key may take."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from vessa.errors import InvalidRequest, LimitReached, StoreUnavailable, UnknownBank
from vessa_server.auth.audit_log import Actor, AuditLog, open_audit
from vessa_server.auth.keys import Caller, FileKeys, Role, create_key
from vessa_server.auth.rate_limits import KeyLimits
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.retrieval import check_name

ACTOR = Actor("alice", "10.0.0.1", "r1")


@pytest.fixture
def audit(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "log" / "audit.jsonl", 1000, 3)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_keys_bank_is_as_if_it_were_not_there(server: Any, bank: str, key_of: Any) -> None:
    server.as_key(key_of("curate", "alice")).seed(bank)
    bob = server.as_key(key_of("curate", "bob"))
    image = np.zeros((1, 48, 64), np.uint8)
    identity = server.http.get("/templates", params={"bank": bank}).json()[0]["id"]
    missing = bob.http.get("/banks/nothing").json()["error"]["message"]
    answers = [
        bob.http.get(f"/banks/{bank}"),
        bob.http.get("/templates", params={"bank": bank}),
        bob.http.get(f"/templates/{identity}", params={"bank": bank}),
        bob.http.get(f"/templates/{identity}/overlay.png", params={"bank": bank}),
        bob.http.delete(f"/templates/{identity}", params={"bank": bank}),
        bob.http.delete(f"/banks/{bank}"),
        bob.http.put(f"/banks/{bank}/share"),
        bob.http.delete(f"/banks/{bank}/share"),
        bob.http.post(f"/banks/{bank}/adapt"),
        bob.http.get(f"/banks/{bank}/adapt"),
        bob.http.delete(f"/banks/{bank}/adapt"),
        bob.segment({"images": image}, bank=bank),
    ]
    for answer in answers:
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"] == "unknown_bank"
        assert answer.json()["error"]["message"] == missing.replace("nothing", bank)
    assert bob.seed_answer(bank).status_code == 404
    assert bank not in [info["name"] for info in bob.http.get("/banks").json()]
    assert bank not in [info["name"] for info in bob.http.get("/info").json()["banks"]]
    info = server.http.get(f"/banks/{bank}").json()  # the admin sees all
    assert (info["owner"], info["templates"], info["version"]) == ("alice", 2, 1)


def test_a_shared_bank_is_used_by_all_and_changed_by_curators(server: Any, bank: str, key_of: Any) -> None:
    alice, bob = (server.as_key(key_of("curate", name)) for name in ("alice", "bob"))
    eve = server.as_key(key_of("annotate", "eve"))
    alice.seed(bank, 1)
    assert alice.http.put(f"/banks/{bank}/share").json()["shared"]
    bob.seed(bank, 2)
    assert bank in [info["name"] for info in eve.http.get("/banks").json()]
    assert eve.segment({"images": np.zeros((1, 48, 64), np.uint8)}, bank=bank).status_code == 200
    for refused in (bob.http.delete(f"/banks/{bank}"), bob.http.delete(f"/banks/{bank}/share")):
        assert refused.status_code == 403
    assert alice.http.get(f"/banks/{bank}").json()["owner"] == "alice"
    assert not alice.http.delete(f"/banks/{bank}/share").json()["shared"]
    assert eve.http.get(f"/banks/{bank}").status_code == 404
    assert alice.http.delete(f"/banks/{bank}").status_code == 204


def test_two_keys_that_make_one_bank_at_once_do_not_share_it(tmp_path: Path, template_of: Any) -> None:
    banks = TemplateBanks(FolderStore(tmp_path))
    CallersBanks(banks, Caller("alice", Role.curate)).add("b", [template_of(0)])
    bob = CallersBanks(banks, Caller("bob", Role.curate))
    with pytest.raises(UnknownBank):  # asked in the transaction, not before it
        bob.add("b", [template_of(1)])
    assert len(banks.get("b").templates) == 1


def test_a_bank_from_before_keys_had_names_is_the_admins(tmp_path: Path, template_of: Any) -> None:
    banks = TemplateBanks(FolderStore(tmp_path))
    banks.add("old", [template_of(0)])
    assert CallersBanks(banks, Caller("local", Role.admin)).get("old").owner is None
    with pytest.raises(UnknownBank):
        CallersBanks(banks, Caller("alice", Role.curate)).get("old")


def test_a_change_is_written_down_before_and_after(server: Any, bank: str, key_of: Any) -> None:
    alice = server.as_key(key_of("curate", "alice"))
    path = server.app.state.audit.path
    before = len(lines_of(path)) if path.exists() else 0
    added = alice.seed(bank, 1)
    alice.http.delete(f"/templates/{added[0]['id']}", params={"bank": bank}, headers={"X-Request-ID": "r-7"})
    alice.http.delete("/templates/unknown", params={"bank": bank})
    alice.http.delete(f"/banks/{bank}")
    lines = lines_of(path)[before:]
    assert [(line["action"], line["state"]) for line in lines] == [
        ("template.add", "asked"), ("template.add", "done"),
        ("template.remove", "asked"), ("template.remove", "done"),
        ("template.remove", "asked"), ("template.remove", "failed"),
        ("bank.delete", "asked"), ("bank.delete", "done"),
    ]  # fmt: skip
    assert {(line["key"], line["source"], line["bank"]) for line in lines} == {("alice", "testclient", bank)}
    assert lines[1]["templates"] == [added[0]["id"]]
    assert lines[2]["request"] == lines[3]["request"] == "r-7"
    assert lines[5]["error"] == "unknown_template"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_audit_log_keeps_files_that_are_not_old_enough(audit: AuditLog) -> None:
    for number in range(40):
        with audit.change(ACTOR, "template.remove", number=number):
            pass
    assert len(audit.files()) > audit.most_files  # a busy hour pushes nothing out
    assert audit.verify() == (80, [])


def test_a_changed_removed_or_inserted_line_is_found(audit: AuditLog) -> None:
    audit = replace(audit, most_bytes=10_000)
    for number in range(4):
        with audit.change(ACTOR, "template.remove", number=number):
            pass
    whole = audit.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = whole.replace(b'"number": 1', b'"number": 7')
    for damage in (
        changed,
        b"".join(lines[:3] + lines[4:]),
        b"".join(lines[:-1]),
        b"".join(lines[:3] + lines[2:]),
    ):
        audit.path.write_bytes(damage)
        assert audit.verify()[1], damage
    audit.path.write_bytes(b"")
    assert audit.verify()[1]
    audit.path.write_bytes(whole)
    assert audit.verify() == (8, [])


def test_the_audit_log_is_bounded_and_loses_the_oldest(audit: AuditLog) -> None:
    audit = replace(audit, most_days=1e-9)
    for number in range(40):
        with audit.change(ACTOR, "template.remove", number=number):
            pass
    files = sorted(p.name for p in audit.path.parent.iterdir() if not p.name.startswith("."))
    assert files == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all((audit.path.parent / name).stat().st_size <= audit.most_bytes for name in files)
    kept = [line["number"] for name in reversed(files) for line in lines_of(audit.path.parent / name)]
    assert kept == sorted(kept)
    assert kept[-2:] == [39, 39]


def test_no_bank_can_be_called_like_the_log_and_no_caller_fill_it(tmp_path: Path) -> None:
    log = open_audit(Settings(insecure=True, store=f"folder:{tmp_path}"))
    with pytest.raises(InvalidRequest):
        check_name(log.path.parent.name)
    with log.change(ACTOR, "template.remove", template="x" * 60_000):
        pass
    assert log.path.stat().st_size < 1000


def test_what_is_learned_from_one_bank_is_not_given_to_another(template_of: Any, tmp_path: Path) -> None:
    banks = TemplateBanks(FolderStore(tmp_path))
    banks.add("b", [template_of(0, group="a")], owner="ann")
    learned_from = banks.get("b")
    for owner, template in (("bob", 0), ("ann", 1)):
        banks.delete("b")
        banks.add("b", [template_of(template, group="a")], owner=owner)
        with pytest.raises(UnknownBank, match="is another one by now"):
            banks.adapt("b", None, learned_from=learned_from)


def test_what_cannot_be_written_down_is_not_done(audit: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    with audit.change(ACTOR, "a"):
        pass
    whole = audit.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="audited: No space"), audit.change(ACTOR, "b"):
        pytest.fail("the change was made")
    assert audit.path.read_bytes() == whole


def test_requests_at_once_are_limited_by_key() -> None:
    limits = KeyLimits(requests=2)
    alice, bob = Caller("alice", Role.annotate), Caller("bob", Role.annotate, requests=1)
    with limits.work(alice), limits.work(alice), limits.work(bob):
        for caller in (alice, bob):
            with pytest.raises(LimitReached) as caught, limits.work(caller):
                pass
            assert caught.value.retry_after == 1
    with limits.work(bob):
        pass


def test_images_a_minute_are_limited_by_key() -> None:
    now = [0.0]
    limits = KeyLimits(requests=9, images_per_minute=60, clock=lambda: now[0])
    alice, bob = Caller("alice", Role.annotate), Caller("bob", Role.annotate, images_per_minute=6)
    limits.take(alice, 90)  # more than a minute's passes, and is paid for
    with pytest.raises(LimitReached) as caught:
        limits.take(alice, 1)
    assert caught.value.retry_after == 31
    limits.take(bob, 6)
    now[0] = 31.0
    limits.take(alice, 1)
    with pytest.raises(LimitReached):
        limits.take(alice, 1)
    limits.take(bob, 1)


def test_a_key_over_its_limit_is_told_when_to_come_back(server: Any, bank: str, key_of: Any) -> None:
    server.seed(bank)
    server.http.put(f"/banks/{bank}/share")
    eve = server.as_key(key_of("annotate", "eve", images_per_minute=1))
    image = np.zeros((1, 48, 64), np.uint8)
    answers = [eve.segment({"images": image}, bank=bank) for _ in range(2)]
    assert [a.status_code for a in answers] == [200, 429]
    assert answers[1].json()["error"]["code"] == "limit_reached"
    assert 1 <= int(answers[1].headers["Retry-After"]) <= 61
    assert server.segment({"images": image}, bank=bank).status_code == 200  # others are not touched


def test_no_log_of_a_run_holds_a_key(start_annotator: Any, tmp_path: Path) -> None:
    service = start_annotator(tmp_path, VESSA_LOG_LEVEL="debug", VESSA_LOG_FORMAT="json")
    secret = create_key(FileKeys(tmp_path / "vessa" / "keys.jsonl"), "alice", Role.curate)
    wrong = "a-wrong-key-0123456789"
    with httpx.Client(base_url=service.url) as http:
        for key in (secret, service.api_key, wrong, f"{secret}x"):
            for header in (f"Bearer {key}", f"Basic {key}", key):
                http.get("/banks/unknown", headers={"Authorization": header, "X-Request-ID": f"ask {key}"})
        assert http.delete("/banks/b", headers={"Authorization": f"Bearer {secret}"}).status_code == 404
    logs = {p: p.read_text() for p in (tmp_path / "log", tmp_path / "banks" / ".audit" / "audit.jsonl")}
    for path, text in logs.items():
        assert len(text.splitlines()) > 1
        assert [key for key in (secret, service.api_key, wrong) if key in text] == [], path
    assert '"key": "alice"' in logs[tmp_path / "log"]
