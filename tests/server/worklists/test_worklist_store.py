"""Worklists on disk: damage, kills, erasure, permissions and quotas stay one owner's matter."""

from __future__ import annotations

import io
import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import nifti, phantom

from vessa.errors import InternalError, TooLarge, UnknownWorklist
from vessa.volumes import Bounds
from vessa_server.auth.keys import Caller, Role
from vessa_server.worklists import store as module
from vessa_server.worklists.export import export_worklist
from vessa_server.worklists.records import StoredVolume, Worklist
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.volumes import add_volume, get_volume, remove_volume, volumes_of
from vessa_server.worklists.volumes import files_of as volume_files

ANNA, BEN = Caller("anna", Role.annotate), Caller("ben", Role.annotate)
PATIENT = "patient-4711"
IMAGE = np.arange(48, dtype=np.uint8).reshape(6, 8)


@pytest.fixture
def store(tmp_path: Path) -> WorklistStore:
    """An empty store in a folder whose parents do not exist yet."""
    return WorklistStore(tmp_path / "new" / "deeper" / "worklists", 1 << 20)


def folder_of(store: WorklistStore, name: str) -> Path:
    """The folder of the one worklist of this name."""
    (path,) = (path for path in store.folder.glob(f"*/{name}") if path.is_dir())
    return path


def files_of(store: WorklistStore, ending: str = "") -> list[Path]:
    """All files of all worklists but the locks."""
    return [p for p in store.folder.rglob(f"*{ending}") if p.is_file() and not p.name.endswith(".lock")]


def test_files_and_all_new_folders_are_closed_to_others(store: WorklistStore, tmp_path: Path) -> None:
    worklist = store.create("list", "bank", ANNA)
    store.set_labels(worklist, store.add(worklist, IMAGE, "a", ""), IMAGE > 9)
    found = {p: p.stat().st_mode & 0o777 for p in (tmp_path / "new").rglob("*")}
    found[tmp_path / "new"] = (tmp_path / "new").stat().st_mode & 0o777
    wrong = {p.name: oct(m) for p, m in found.items() if m != (0o700 if p.is_dir() else 0o600)}
    assert len(found) > 8
    assert wrong == {}


def test_a_folder_that_others_can_read_is_closed(
    store: WorklistStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.folder.mkdir(parents=True, mode=0o755)
    store.folder.chmod(0o755)
    store.create("list", "bank", ANNA)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert "was open to other users" in caplog.text


def test_a_damaged_head_is_one_worklists_matter(
    store: WorklistStore, caplog: pytest.LogCaptureFixture
) -> None:
    worklist = store.create("torn", "bank", ANNA)
    item = store.add(worklist, IMAGE, "a", "")
    store.create("whole", "bank", ANNA)
    (folder_of(store, "torn") / "worklist.json").write_text('{"name"')
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert [w.name for w in store.worklists(ANNA)] == ["whole"]
    assert caplog.text.count("torn/worklist.json is damaged") == 1
    with pytest.raises(InternalError, match="POST /worklists with its name and bank restores it"):
        store.get("torn", ANNA)
    assert store.items(store.create("torn", "bank", ANNA)) == [item]


def test_a_damaged_worklist_can_be_deleted(store: WorklistStore) -> None:
    store.add(store.create("torn", "bank", ANNA), IMAGE, "a", "")
    (folder_of(store, "torn") / "worklist.json").write_text("")
    with pytest.raises(UnknownWorklist):
        store.delete("torn", BEN)
    store.delete("torn", ANNA)
    assert files_of(store) == []


@pytest.mark.parametrize("damage", ["", '{"id": "x"}', '{"id": 3, "decision": "maybe"}', "[]"])
def test_a_damaged_item_is_left_out_and_can_be_removed(store: WorklistStore, damage: str) -> None:
    worklist = store.create("list", "bank", ANNA)
    torn, whole = store.add(worklist, IMAGE, "torn", ""), store.add(worklist, IMAGE, "whole", "")
    (folder_of(store, "list") / f"{torn.id}.json").write_text(damage)
    assert store.items(worklist) == [whole]
    with pytest.raises(InternalError, match="Remove it"):
        store.item(worklist, torn.id)
    assert list(store.damaged()) == [f"{folder_of(store, 'list').relative_to(store.folder)}/{torn.id}"]
    store.remove(worklist, torn.id)
    assert not list(folder_of(store, "list").glob(f"{torn.id}*"))
    assert store.damaged() == {}


@pytest.mark.parametrize("kind", ["folder", "nnunet", "coco"])
def test_an_export_leaves_out_damaged_images_and_counts_them(store: WorklistStore, kind: Any) -> None:
    worklist = store.create("list", "bank", ANNA)
    torn, whole = store.add(worklist, IMAGE, "torn", ""), store.add(worklist, IMAGE, "whole", "")
    path = folder_of(store, "list") / f"{torn.id}.image.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(InternalError, match="missing or damaged"):
        store.image(worklist, torn)
    parts = list(export_worklist(store, worklist, {1: "heart"}, kind, Bounds()))
    with zipfile.ZipFile(io.BytesIO(b"".join(parts))) as archive:
        assert archive.testzip() is None
        counts = json.loads(archive.read("export.json"))
        assert sum(name.endswith(".png") for name in archive.namelist()) == 1
    assert (counts["images"], counts["damaged_left_out"]) == (2, 1)
    assert max(map(len, parts)) < 1000
    assert whole.name == "whole"


def test_an_erased_patient_is_nowhere_on_the_disk(store: WorklistStore) -> None:
    """As a group, as the name of an image without one, and among the templates of another image."""
    for name, caller in (("one", ANNA), ("two", BEN)):
        worklist = store.create(name, "bank", caller)
        store.add(worklist, IMAGE, "slice", PATIENT)
        store.add(worklist, IMAGE, PATIENT, "")
        other = store.add(worklist, IMAGE, "other", "somebody")
        use = {"id": "t", "group": PATIENT, "similarity": 0.5}
        store.set_labels(worklist, other, IMAGE, templates={"heart": [use, use | {"group": "else"}]})
    # Its list lost its head: erasure must search it all the same.
    (folder_of(store, "two") / "worklist.json").write_text("")
    assert store.erase_group(PATIENT) == 4
    held = b"".join(path.read_bytes() for path in files_of(store))
    assert PATIENT.encode() not in held
    (left,) = store.items(store.get("one", ANNA))
    assert [use["group"] for use in left.templates["heart"]] == ["erased", "else"]


def test_what_killed_processes_left_is_swept(store: WorklistStore, monkeypatch: pytest.MonkeyPatch) -> None:
    worklist = store.create("list", "bank", ANNA)
    item = store.add(worklist, IMAGE, "a", "")
    store.create("gone", "bank", ANNA)
    folder = folder_of(store, "list")
    (folder / f"{'0' * 32}.image.png").write_bytes(b"pixels of an item that was never finished")
    (folder / f".{item.id}.json.1234.part").write_bytes(b"half a file")
    (folder / f"{item.id}.7.labels.png").write_bytes(b"labels that no state names")
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_: None)
        store.delete("gone", ANNA)
    assert len(files_of(store)) == 7
    store.sweep()
    assert sorted(p.name for p in files_of(store)) == sorted(
        ["worklist.json", f"{item.id}.json", f"{item.id}.image.png"]
    )


def test_an_image_for_a_deleted_worklist_is_not_stored(store: WorklistStore) -> None:
    worklist = store.create("list", "bank", ANNA)
    item = store.add(worklist, IMAGE, "a", "")
    store.delete("list", ANNA)
    for change in (
        lambda: store.add(worklist, IMAGE, "b", ""),
        lambda: store.set_labels(worklist, item, IMAGE),
        lambda: store.remove(worklist, item.id),
    ):
        with pytest.raises(UnknownWorklist):
            change()
    assert files_of(store) == []


def test_a_key_has_a_limited_number_of_worklists(
    store: WorklistStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WORKLISTS", 2)
    for name in ("a", "b", "a"):
        store.create(name, "bank", ANNA)
    with pytest.raises(TooLarge, match="2 worklists, the limit"):
        store.create("c", "bank", ANNA)
    store.create("c", "bank", BEN)


def test_volumes_go_with_their_last_slice_and_survive_a_sweep(tmp_path: Path) -> None:
    store = WorklistStore(tmp_path / "lists", 1 << 30)
    worklist = store.create("w", "bank", ANNA)
    sent = tmp_path / "00000.input"
    for group in ("stays", "erased"):
        sent.write_bytes(nifti(phantom((20, 16, 3)), np.eye(4)))
        add_volume(store, worklist, [sent], "scan.nii", group, Bounds())
    left = store.place(worklist) / "volumes" / ".left-by-a-kill"
    left.mkdir()
    store.sweep()
    assert not left.exists()
    assert [v.group for v in volumes_of(store, worklist)].count("stays") == 1
    assert len(volumes_of(store, worklist)) == 2
    assert store.erase_group("erased") == 3
    (volume,) = volumes_of(store, worklist)
    assert volume.group == "stays"
    assert len(volume_files(store, worklist, volume)) == 1
    head = store.place(worklist) / "volumes" / volume.id / "volume.json"
    whole = head.read_bytes()
    head.write_bytes(b"{")
    assert volumes_of(store, worklist) == []
    assert [problem for problem, _ in store.damaged().values()] == ["its record cannot be read"]
    head.write_bytes(whole)
    for item in store.items(worklist):
        store.remove(worklist, item.id)
    assert not head.exists()


def added_volume(store: WorklistStore, tmp_path: Path, worklist: Worklist, **about: str) -> StoredVolume:
    """Add a volume of three slices; its file is moved."""
    path = tmp_path / "upload.nii"
    path.write_bytes(nifti(np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.diag([1, 1, 5, 1])))
    return add_volume(
        store, worklist, [path], about.get("name", "scan.nii"), about.get("group", ""), Bounds()
    )


def test_a_volume_with_a_damaged_record_is_added_again_or_removed(
    store: WorklistStore, tmp_path: Path
) -> None:
    worklist = store.create("list", "bank", ANNA)
    volume = added_volume(store, tmp_path, worklist)
    head = folder_of(store, "list") / "volumes" / volume.id / "volume.json"
    assert {p.stat().st_mode & 0o777 for p in store.folder.rglob("*") if p.is_dir()} == {0o700}
    head.write_text("{")
    with pytest.raises(UnknownWorklist):
        get_volume(store, worklist, volume.id)
    assert added_volume(store, tmp_path, worklist) == volume
    assert get_volume(store, worklist, volume.id) == volume
    head.write_text("{")
    assert remove_volume(store, worklist, volume.id) == ""
    assert [p.name for p in files_of(store)] == ["worklist.json"]
    with pytest.raises(UnknownWorklist):
        remove_volume(store, worklist, volume.id)


@pytest.mark.parametrize("about", [{"name": PATIENT}, {"group": PATIENT}])
def test_a_volume_of_an_erased_patient_is_removed_with_its_slices(
    store: WorklistStore, tmp_path: Path, about: dict[str, str]
) -> None:
    worklist = store.create("list", "bank", ANNA)
    added_volume(store, tmp_path, worklist, **about)
    assert store.erase_group(PATIENT) == 3
    assert [p.name for p in files_of(store)] == ["worklist.json"]
