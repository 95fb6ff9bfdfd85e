"""Template banks: ids, retrieval and its sampling (Eq. 1), changes by several processes, re-encoding."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vessa.errors import (
    ClassConflict,
    DamagedBank,
    InvalidImage,
    InvalidRequest,
    TooLarge,
    UnknownBank,
    UnknownTemplate,
    VessaError,
)
from vessa_server.template_bank.bank import Quota, TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.index import blob_digest
from vessa_server.template_bank.retrieval import Bank, check_name, sample_template
from vessa_server.template_bank.template import Template, View, template_id


def unit(*values: float) -> np.ndarray[Any, Any]:
    array = np.array(values, dtype=np.float32)
    return array / np.linalg.norm(array)


@pytest.fixture
def template(template_of: Any) -> Any:
    return template_of


@pytest.fixture
def banks(tmp_path: Path) -> TemplateBanks:
    return TemplateBanks(FolderStore(tmp_path / "banks"))


def test_a_template_survives_its_blob(template: Any) -> None:
    one: Template = template(3)
    blob = one.to_blob()
    back = Template.from_blob(one.id, one.entry(blob), blob)
    for name in ("image", "mask"):
        assert np.array_equal(getattr(back, name), getattr(one, name))
        assert getattr(back, name).dtype == getattr(one, name).dtype
    assert {key: value.tolist() for key, value in back.whole.memories.items()} == {
        key: value.tolist() for key, value in one.whole.memories.items()
    }
    assert (back.id, back.group, back.classes, back.model) == (one.id, one.group, one.classes, one.model)


def test_a_blob_that_is_something_else_is_refused(template: Any) -> None:
    entry = template().entry(b"")
    with pytest.raises(ValueError, match="not a template"):
        Template.from_blob("x", entry, b"not safetensors")


def test_the_id_depends_on_all_content_and_on_nothing_else(template: Any) -> None:
    one = template()
    same = template_id(one.image.copy(), one.mask, {**one.classes, 9: "not in the mask"}, "p1")
    assert same == one.id
    others = {
        template_id(one.image + np.uint8(1), one.mask, one.classes, "p1"),
        template_id(one.image, one.mask[::-1], one.classes, "p1"),
        template_id(one.image, one.mask, {**one.classes, 1: "other"}, "p1"),
        template_id(one.image, one.mask, one.classes, "p2"),
        template_id(one.image.T, one.mask.T, one.classes, "p1"),
    }
    assert len(others) == 5
    assert one.id not in others


def test_retrieval_orders_by_cosine_and_leaves_out_the_own_group_and_other_classes(template: Any) -> None:
    near, same = template(0, group="a", feature=unit(1, 0)), template(1, group="b", feature=unit(1, 1))
    far = template(2, group="c", feature=unit(-1, 0))
    other = template(3, group="d", feature=unit(1, 0), classes={2: "wall"})
    bank = Bank("b", 1, (far, same, near, other))
    found = bank.retrieve(unit(1, 0), 1, exclude_group=None)
    assert [t.group for t, _ in found] == ["a", "b", "c"]
    assert [score for _, score in found] == pytest.approx([1, 2**-0.5, -1])
    assert [t.group for t, _ in bank.retrieve(unit(1, 0), 1, exclude_group="a", top=1)] == ["b"]
    assert bank.retrieve(unit(1, 0), 7, exclude_group=None) == []
    assert Bank("b", 1, (near,)).retrieve(unit(1, 0), 1, exclude_group="a") == []


def test_a_closer_look_and_the_layout_count_too(template: Any) -> None:
    one, other = template(0, group="a", feature=unit(1, 0)), template(1, group="b", feature=unit(1, 0.1))
    assert one.layout.keys() == one.classes.keys()
    close = [View(unit(0, 1), {}, (0, 0, 40)), View(unit(1, 0), {}, (0, 0, 40))]
    bank = Bank("a", 1, (replace(one, close=close[0]), replace(other, close=close[1])))

    def first(**options: Any) -> Template:
        return bank.retrieve(unit(1, 0), 1, exclude_group=None, **options)[0][0]

    assert first() is bank.templates[0]
    assert first(close=unit(1, 0)) is bank.templates[1]
    smaller = replace(one, close=View(unit(1, 0), {}, (0, 0, 80)))  # half as large in its window
    larger = replace(one, id="larger", close=View(unit(1, 0), {}, (0, 0, 40)))
    pair = Bank("a", 1, (smaller, larger))
    for template_, asked in ((smaller, smaller.layout), (larger, larger.layout)):
        found = pair.retrieve(unit(1, 0), 1, exclude_group=None, close=unit(1, 0), layout=asked)
        assert found[0][0] is template_
        assert found[0][1] == pytest.approx(1)  # the cosine, whatever the layout


def test_equal_similarities_have_a_stable_order(template: Any) -> None:
    twins = [template(i, feature=unit(1, 0)) for i in range(4)]
    orders = {
        tuple(t.id for t, _ in Bank("b", 1, tuple(order)).retrieve(unit(1, 0), 1, exclude_group=None))
        for order in (twins, twins[::-1])
    }
    assert len(orders) == 1


def test_templates_of_other_weights_are_not_retrieved(template: Any) -> None:
    bank = Bank("b", 1, (template(0, model="mine"), template(1, model="other")), model="mine")
    found = bank.retrieve(unit(*np.ones(8)), 1, exclude_group=None)
    assert [t.model for t, _ in found] == ["mine"]


def test_sampling_follows_equation_1(template: Any) -> None:
    matches = [(template(i), score) for i, score in enumerate((0.9, 0.8, 0.6))]
    rng = np.random.default_rng(0)
    drawn = [sample_template(matches, 0.1, rng)[1] for _ in range(20000)]
    weights = np.exp(np.array([0.9, 0.8, 0.6]) / 0.1)
    share = [drawn.count(score) / len(drawn) for score in (0.9, 0.8, 0.6)]
    assert share == pytest.approx((weights / weights.sum()).tolist(), abs=0.01)
    assert sample_template(matches, 1e-4, rng)[1] == 0.9  # a small temperature takes the best


def test_sampling_from_nothing_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least one match"):
        sample_template([])


def test_adding_twice_adds_once(banks: TemplateBanks, template: Any) -> None:
    first = banks.add("heart", [template(0), template(1), template(0)])
    assert [info.created for info in first] == [True, True, False]
    version = banks.get("heart").version
    again = banks.add("heart", [template(1), template(2)])
    assert [info.created for info in again] == [False, True]
    assert banks.get("heart").version == version + 1
    banks.add("heart", [template(1)])
    assert banks.get("heart").version == version + 1
    assert banks.get("heart").info().templates == 3


def test_class_conflicts_leave_the_bank_as_it_was(banks: TemplateBanks, template: Any) -> None:
    banks.add("heart", [template(0)])
    with pytest.raises(ClassConflict, match="class id 1 is 'ventricle' in this bank, not 'lung'"):
        banks.add("heart", [template(1), template(2, classes={1: "lung", 2: "wall"})])
    with pytest.raises(ClassConflict, match="class 'wall' has id 2 in this bank, not 3"):
        banks.add("heart", [template(2, classes={3: "wall"})])
    assert banks.get("heart").info().templates == 1
    assert banks.get("heart").version == 1


def test_a_bank_has_a_limit(tmp_path: Path, template: Any) -> None:
    banks = TemplateBanks(FolderStore(tmp_path), max_templates=2)
    banks.add("b", [template(0), template(1)])
    with pytest.raises(TooLarge, match="at most 2"):
        banks.add("b", [template(2)])
    assert not banks.add("b", [template(0)])[0].created


def test_removal_and_deletion(banks: TemplateBanks, template: Any) -> None:
    infos = banks.add("heart", [template(0), template(1)])
    banks.remove("heart", infos[0].id)
    assert [t.id for t in banks.get("heart").templates] == [infos[1].id]
    with pytest.raises(UnknownTemplate, match="has no template"):
        banks.remove("heart", infos[0].id)
    banks.remove("heart", infos[1].id)
    assert banks.get("heart").info().classes == {}
    banks.delete("heart")
    for call in (banks.get, banks.delete, lambda name: banks.remove(name, infos[0].id)):
        with pytest.raises(UnknownBank, match="no template bank 'heart'"):
            call("heart")
    banks.add("heart", [template(0)])
    assert banks.get("heart").version == 5


def test_changes_of_another_process_are_seen_at_the_next_get(tmp_path: Path, template: Any) -> None:
    mine, theirs = (TemplateBanks(FolderStore(tmp_path)) for _ in range(2))
    mine.add("b", [template(0)])
    assert theirs.get("b").version == 1
    held = theirs.get("b").templates[0]
    mine.add("b", [template(1)])
    assert [t.id for t in theirs.get("b").templates] == [template(0).id, template(1).id]
    assert theirs.get("b").templates[0] is held  # what is known is not read again
    mine.delete("b")
    with pytest.raises(UnknownBank):
        theirs.get("b")
    assert theirs.list() == []


def test_two_adders_at_once_lose_nothing(tmp_path: Path, template: Any) -> None:
    def add(start: int) -> None:
        mine = TemplateBanks(FolderStore(tmp_path))
        for i in range(start, start + 6):
            mine.add("b", [template(i)])

    threads = [threading.Thread(target=add, args=(start,)) for start in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert TemplateBanks(FolderStore(tmp_path)).get("b").info().templates == 12


def test_a_damaged_template_is_ignored_and_repaired_by_adding_it_again(
    tmp_path: Path, template: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = TemplateBanks(FolderStore(tmp_path))
    first.add("b", [template(0), template(1)])
    whole = first.get("b")
    path = tmp_path / "b" / "blobs" / f"{blob_digest(template(0).to_blob())}.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    banks = TemplateBanks(FolderStore(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [t.id for t in banks.get("b").templates] == [template(1).id]
    assert "ignored" in caplog.text
    incomplete = banks.get("b")
    assert (incomplete.version, incomplete.digest != whole.digest) == (whole.version, True)
    assert banks.add("b", [template(0)])[0].created
    assert banks.get("b").digest == whole.digest
    assert {t.id for t in banks.get("b").templates} == {template(0).id, template(1).id}


def test_refresh_encodes_what_other_weights_encoded(banks: TemplateBanks, template: Any) -> None:
    banks.add("a", [template(i, model="old") for i in range(18)])
    banks.add("b", [template(0, model="new")])
    seen: list[tuple[int, int]] = []

    def encode(stale: list[Template]) -> list[Template | VessaError]:
        fresh: list[Template | VessaError] = [
            replace(t, whole=View(-t.whole.feature, {}), model="new") for t in stale
        ]
        if len(stale) < 16:
            fresh[0] = InvalidImage("no")
        return fresh

    assert banks.refresh(encode, "new", lambda done, total: seen.append((done, total))) == 18
    assert seen == [(16, 18), (18, 18)]
    models = [t.model for t in banks.get("a").templates]
    assert (models.count("new"), models.count("old")) == (17, 1)
    assert np.array_equal(banks.get("a").templates[0].whole.feature, -template(0).whole.feature)
    assert len(banks.get("a").retrieve(template(0).whole.feature, 1, exclude_group=None, top=99)) == 17
    assert banks.get("b").version == 1


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "a" * 65, "a\n", "ä", "a b", "-a"]
)
def test_names_that_could_be_paths_are_refused(name: str, banks: TemplateBanks, template: Any) -> None:
    for call in (check_name, banks.get, banks.delete, lambda name: banks.add(name, [template()])):
        with pytest.raises(InvalidRequest, match="A bank name is"):
            call(name)


def test_the_digest_names_contents_and_the_version_only_counts(tmp_path: Path, template: Any) -> None:
    banks = TemplateBanks(FolderStore(tmp_path))
    index = tmp_path / "b" / "index.json"
    banks.add("b", [template(0)])
    backup, first = index.read_bytes(), banks.get("b")
    banks.add("b", [template(1)])
    lost = banks.get("b")
    index.write_bytes(backup)  # a failover or a restored backup: the change is lost
    banks.add("b", [template(2)])
    now = banks.get("b")
    assert now.version == lost.version
    assert [t.id for t in now.templates] == [template(0).id, template(2).id]
    assert len({first.digest, lost.digest, now.digest}) == 3
    banks.remove("b", template(2).id)
    assert banks.get("b").digest == first.digest
    banks.share("b", True)
    assert banks.get("b").digest == first.digest  # what labels depend on did not change
    assert banks.get("b").info().digest == first.digest


def test_a_damaged_bank_is_set_aside_and_can_be_deleted(
    tmp_path: Path, template: Any, caplog: pytest.LogCaptureFixture
) -> None:
    banks = TemplateBanks(FolderStore(tmp_path))
    for name in ("a", "b", "c"):
        banks.add(name, [template(0, model="old")])
    (tmp_path / "b" / "index.json").write_text('{"version": 1, "ex')
    assert [info.name for info in banks.list()] == ["a", "c"]
    assert banks.refresh(lambda stale: [replace(t, model="new") for t in stale], "new") == 2
    assert list(banks.damaged) == ["b"]
    assert caplog.text.count("Bank 'b' is set aside") == 1
    with pytest.raises(DamagedBank, match="Bank 'b'"):
        banks.add("b", [template(1)])
    banks.delete("b")
    assert banks.damaged == {}
    banks.add("b", [template(1)])
    assert len(banks.list()) == 3


def test_a_key_has_a_quota_over_all_its_banks(tmp_path: Path, template: Any) -> None:
    banks = TemplateBanks(FolderStore(tmp_path))
    banks.add("theirs", [template(9)], owner="other")
    banks.add("a", [template(0), template(1)], owner="me", quota=Quota(banks=1, templates=2))
    with pytest.raises(TooLarge, match="would own 2 banks, at most 1"):
        banks.add("b", [template(2)], owner="me", quota=Quota(banks=1))
    with pytest.raises(TooLarge, match="would own 3 templates, at most 2"):
        banks.add("a", [template(2)], owner="me", quota=Quota(templates=2))
    with pytest.raises(TooLarge, match="bytes of templates, at most 100"):
        banks.add("a", [template(2)], owner="me", quota=Quota(nbytes=100))
    assert not banks.add("a", [template(0)], owner="me", quota=Quota(templates=2))[0].created
    assert banks.get("a").info().templates == 2
