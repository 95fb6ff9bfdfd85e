"""The commands that check, repair and erase a store, and that verify the audit log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from typer.testing import CliRunner

from vessa_server.auth.audit_log import open_audit
from vessa_server.auth.keys import Caller, FileKeys, Role, create_key
from vessa_server.cli.main import app as cli
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.store import open_store
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.store import folder_of as worklists_folder

PATIENT = "patient-4711"


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    lines = result.stdout.strip().splitlines()
    assert lines, (result.output, result.exception)
    return result.exit_code, json.loads(lines[-1])


@pytest.fixture(params=["folder", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that the commands find by VESSA_STORE."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("VESSA_KEYS_FILE", str(tmp_path / "keys.jsonl"))
    monkeypatch.setenv("VESSA_JOBS_FOLDER", str(tmp_path / "jobs"))
    monkeypatch.setenv("VESSA_WORKLISTS_FOLDER", str(tmp_path / "worklists"))
    place = f"folder:{tmp_path / 'banks'}"
    if request.param == "redis":
        place = str(request.getfixturevalue("redis_url"))
        redis.Redis.from_url(place).flushdb()
    monkeypatch.setenv("VESSA_STORE", place)
    return place


@pytest.fixture
def banks(address: str, template_of: Callable[..., Any]) -> TemplateBanks:
    """Two banks; both hold a template of the patient."""
    found = TemplateBanks(open_store(address))
    found.add("a", [template_of(0, group=PATIENT), template_of(1, group="other")])
    found.add("b", [template_of(2, group=PATIENT)])
    return found


def tear_index(address: str, bank: str) -> None:
    if address.startswith("folder:"):
        (Path(address.removeprefix("folder:")) / bank / "index.json").write_text('{"vers')
    else:
        redis.Redis.from_url(address).hset(f"vessa:bank:{{{bank}}}", "index", '{"vers')


def damage_blob(address: str, bank: str, digest: str) -> None:
    if address.startswith("folder:"):
        path = Path(address.removeprefix("folder:")) / bank / "blobs" / f"{digest}.safetensors"
        path.write_bytes(path.read_bytes()[:50])
    else:
        redis.Redis.from_url(address).hset(f"vessa:blobs:{{{bank}}}", digest, b"damage")


@pytest.mark.usefixtures("banks")
def test_a_whole_store_has_no_faults() -> None:
    assert run("store", "check") == (0, {"faults": [], "left": 0})


def test_a_torn_index_is_built_again_from_its_templates(address: str, banks: TemplateBanks) -> None:
    tear_index(address, "a")
    code, result = run("store", "check")
    assert (code, result["left"], result["faults"][0]["where"]) == (1, 1, "bank a: index")
    assert run("store", "check", "--repair")[0] == 0
    mended = banks.get("a")
    assert {t.group for t in mended.templates} == {PATIENT, "other"}
    assert run("store", "check") == (0, {"faults": [], "left": 0})


def test_a_damaged_template_is_removed(address: str, banks: TemplateBanks) -> None:
    whole = banks.get("a")
    damage_blob(address, "a", next(iter(whole.entries.values())).blob)
    assert run("store", "check")[1]["left"] == 1
    assert run("store", "check", "--repair")[0] == 0
    mended = TemplateBanks(open_store(address)).get("a")
    assert (len(mended.templates), len(mended.entries)) == (1, 1)
    assert mended.digest != whole.digest


@pytest.mark.usefixtures("address")
def test_damaged_key_records_and_jobs_are_found(tmp_path: Path) -> None:
    keys = FileKeys(tmp_path / "keys.jsonl")
    create_key(keys, "alice", Role.annotate)
    with keys.path.open("a") as file:
        file.write("{\n")
    (tmp_path / "jobs" / "j1").mkdir(parents=True)
    (tmp_path / "jobs" / "j1" / "job.json").write_text("{")
    code, result = run("store", "check")
    assert (code, result["left"]) == (1, 2)
    assert run("store", "check", "--repair")[0] == 0
    assert list(keys.all()) == ["alice"]
    assert not (tmp_path / "jobs" / "j1").exists()


@pytest.mark.usefixtures("address")
def test_damaged_worklists_are_found_and_items_removed() -> None:
    settings = Settings()
    lists = WorklistStore(worklists_folder(settings), settings.console.worklist_bytes)
    worklist = lists.create("list", "bank", Caller("anna", Role.annotate))
    item = lists.add(worklist, np.zeros((4, 4), np.uint8), "a", "")
    (path,) = lists.folder.rglob(f"{item.id}.json")
    path.write_text("{")
    code, result = run("erase", "--group", PATIENT)
    assert (code, len(result["unreadable_worklist_items"])) == (1, 1)
    code, result = run("store", "check")
    assert (code, result["left"], result["faults"][0]["problem"]) == (1, 1, "its state cannot be read")
    assert run("store", "check", "--repair")[0] == 0
    assert not list(lists.folder.rglob("*.png"))
    (head,) = lists.folder.rglob("worklist.json")
    head.write_text("{")
    assert run("store", "check", "--repair")[0] == 1  # only its owner knows its bank


def test_a_patient_is_erased_from_disk_and_redis(
    address: str, banks: TemplateBanks, tmp_path: Path, template_of: Callable[..., Any]
) -> None:
    pixels = template_of(0, group=PATIENT).image.tobytes()[:64]
    code, result = run("erase", "--group", PATIENT)
    assert (code, result["banks"], result["templates"], result["jobs"]) == (0, ["a", "b"], 2, 0)
    assert any("label caches" in line for line in result["not_reached"])
    assert [t.group for t in banks.get("a").templates] == ["other"]
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    if address.startswith("redis"):
        client = redis.Redis.from_url(address)
        held += b"".join(client.dump(key) for key in client.scan_iter())
    assert PATIENT.encode() not in held
    assert pixels not in held
    audit = open_audit(Settings())
    assert audit.verify()[1] == []
    assert b"erase" in audit.path.read_bytes()


@pytest.mark.usefixtures("address")
def test_cached_labels_are_erased_when_asked_for(redis_url: str) -> None:
    client = redis.Redis.from_url(redis_url)
    client.set("vessa:label:1", b"x")
    client.set("unrelated", b"y")
    assert run("erase", "--group", PATIENT, "--labels", redis_url)[1]["labels"] == 1
    assert (client.exists("vessa:label:1"), client.exists("unrelated")) == (0, 1)
    client.flushdb()


@pytest.mark.usefixtures("address")
def test_nothing_but_labels_is_erased_from_a_folder(tmp_path: Path) -> None:
    """A wrong folder must not lose its files."""
    folder, key = tmp_path / "labels", "ab" + "0" * 62
    labels = [f"ab/{key}", f"ab/.{key}.claim", f"ab/.{key}.1234abcd.part"]
    others = ["thesis.txt", "ab/notes.txt", "images/p1.png", f"{key}", f"ab/cd/{key}"]
    for name in labels + others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert run("erase", "--group", PATIENT, "--labels", f"folder:{folder}")[1]["labels"] == 1
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == set(others)


def test_a_damaged_bank_is_named_by_erase(address: str, banks: TemplateBanks) -> None:
    tear_index(address, "b")
    code, result = run("erase", "--group", PATIENT)
    assert (code, result["unreadable_banks"], result["banks"]) == (1, ["b"], ["a"])


@pytest.mark.usefixtures("banks")
def test_the_audit_log_is_verified() -> None:
    run("erase", "--group", PATIENT)
    assert run("audit", "verify")[0] == 0
    audit = open_audit(Settings())
    audit.path.write_bytes(audit.path.read_bytes().replace(b'"asked"', b'"ASKED"'))
    code, result = run("audit", "verify")
    assert (code, len(result["faults"])) == (1, 1)
