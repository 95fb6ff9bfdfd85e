"""The template bank of a run: its labeled slices and nothing else."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vessa.client import AnnotatorClient
from vessa.datasets import open_dataset
from vessa.errors import InvalidConfig, InvalidDataset, UnknownBank
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels.template_bank import (
    adapt_to_unlabeled,
    bank_name,
    find_bank,
    seed_groups,
    seed_labeled,
)

LABELED = "splits/labeled_1.txt"


@pytest.fixture
def own(phantoms, tmp_path):
    """A copy of the phantoms that a test may change."""
    shutil.copytree(phantoms, tmp_path / "heart")
    return open_dataset(tmp_path / "heart")


def labeled_of(dataset, tiny):
    return read_splits(dataset, tiny().data).labeled


@pytest.fixture
def bank(client, request):
    """A bank name of this test's own."""
    return "seeding-" + re.sub("[^a-z]", "-", request.node.name)[:50]


def test_the_bank_holds_the_labeled_slices_that_show_a_class(client, own, tiny, bank):
    groups = labeled_of(own, tiny)
    first = slices_of(own, groups)[0]
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(own.root / "masks" / f"{first.name}.png")
    info = seed_groups(client, own, groups, bank)
    assert info.templates == 2
    assert info.groups == list(groups)
    assert info.classes == own.classes


def test_a_labeled_slice_without_mask_is_no_template(client, own, tiny, bank):
    groups = labeled_of(own, tiny)
    (own.root / "masks" / f"{slices_of(own, groups)[0].name}.png").unlink()
    assert seed_groups(client, open_dataset(own.root), groups, bank).templates == 2


def test_seeding_twice_changes_nothing(client, dataset, tiny, bank):
    first = seed_groups(client, dataset, labeled_of(dataset, tiny), bank)
    assert seed_groups(client, dataset, labeled_of(dataset, tiny), bank) == first


def test_groups_without_any_class_are_refused(client, own, tiny, bank):
    for path in (own.root / "masks").iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    with pytest.raises(InvalidDataset, match="no mask of the 1 groups of 'heart' shows a class"):
        seed_groups(client, own, labeled_of(own, tiny), bank)
    with pytest.raises(UnknownBank):
        client.bank(bank)


def test_templates_of_other_patients_are_said(client, dataset, tiny, bank, caplog):
    splits = read_splits(dataset, tiny().data)
    seed_groups(client, dataset, splits.labeled, bank)
    assert not [r for r in caplog.records if r.name.startswith("vessa")]
    seed_groups(client, dataset, splits.unlabeled[:1], bank)
    assert "groups that are not labeled here" in caplog.text
    assert splits.labeled[0] in caplog.text


def test_each_split_has_a_bank_of_its_own(dataset):
    groups = dataset.groups()
    names = {
        bank_name(dataset, LABELED, groups[:1]),
        bank_name(dataset, LABELED, groups[1:2]),
        bank_name(dataset, LABELED, groups[:2]),
        bank_name(dataset, "splits/labeled_3.txt", groups[:2]),
    }
    assert len(names) == 4
    assert bank_name(dataset, LABELED, groups[:2]) == bank_name(dataset, LABELED, groups[1::-1])
    assert bank_name(dataset, LABELED, groups[:1]).startswith("heart-labeled_1-")


def test_other_images_or_masks_make_another_bank(dataset, own, tiny):
    """Also those of another data set of the same name: its templates must not mix with ours."""
    groups = labeled_of(own, tiny)
    name = bank_name(own, LABELED, groups)
    assert name == bank_name(dataset, LABELED, groups)
    item = slices_of(own, groups)[1]
    Image.fromarray(255 - own.image(item)).save(own.root / "images" / f"{item.name}.png")
    changed = bank_name(own, LABELED, groups)
    Image.fromarray(own.mask(item).T.copy()).save(own.root / "masks" / f"{item.name}.png")
    assert len({name, changed, bank_name(own, LABELED, groups)}) == 3


@pytest.mark.parametrize("folder", ["Herz & Gefäße", "_private", "a" * 120, "--"])
def test_the_annotator_takes_the_name_whatever_the_folder_is_called(phantoms, tmp_path, tiny, client, folder):
    (tmp_path / folder).symlink_to(phantoms)
    dataset = open_dataset(tmp_path / folder)
    dataset.name = folder  # as of a folder that is no link
    name = bank_name(dataset, LABELED, labeled_of(dataset, tiny))
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name)
    assert seed_groups(client, dataset, labeled_of(dataset, tiny), name).templates == 3


def test_a_config_may_name_its_bank(client, dataset, tiny):
    assert seed_labeled(client, dataset, tiny("annotator.bank=by-hand")).name == "by-hand"
    info = seed_labeled(client, dataset, tiny())
    assert info.name == bank_name(dataset, LABELED, labeled_of(dataset, tiny))


@pytest.fixture
def key_of(annotator):
    """Create a curator's key of the running annotator by its name: `key_of("anna")`."""

    def make(name):
        places = {"XDG_CONFIG_HOME": str(annotator.folder), "XDG_DATA_HOME": str(annotator.folder)}
        store = {"VESSA_STORE": f"folder:{annotator.folder / 'banks'}"}
        command = [sys.executable, "-m", "vessa_server", "keys", "create", name, "--role", "curate"]
        done = subprocess.run(
            command, env=os.environ | places | store, capture_output=True, text=True, check=True
        )
        return done.stdout.strip().splitlines()[-1]

    return make


def test_a_second_key_gets_a_bank_of_its_own(annotator, dataset, tiny, key_of, caplog):
    names = {}
    for person in ("anna", "bob"):
        key = key_of(person)
        config = tiny(f"annotator.api_key={key}", "data.split_seed=9")
        with AnnotatorClient(annotator.url, key) as client:
            names[person] = seed_labeled(client, dataset, config).name
            assert find_bank(client, dataset, config).name == names[person]
    assert len(set(names.values())) == 2
    assert "belongs to another key: this run fills" in caplog.text
    with (
        AnnotatorClient(annotator.url, key) as client,
        pytest.raises(InvalidConfig, match="belongs to another key. Choose another annotator.bank"),
    ):
        seed_labeled(client, dataset, tiny(f"annotator.bank={names['anna']}", f"annotator.api_key={key}"))


def test_a_bank_is_adapted_once_to_the_unlabeled_images_and_keeps_the_plain_bank_apart(
    client, own, tiny, caplog
):
    caplog.set_level("INFO")
    train = own.split("splits/train.txt")
    (own.root / "splits" / "labeled_2.txt").write_text("\n".join(train[:2]))
    plain = tiny(f"data.root={own.root}", "data.labeled=splits/labeled_2.txt")
    config = tiny(f"data.root={own.root}", "data.labeled=splits/labeled_2.txt", "annotator.adapt=0.05")
    bank = seed_labeled(client, own, config)
    assert bank.name != seed_labeled(client, own, plain).name
    assert find_bank(client, own, config).name == bank.name
    adapt_to_unlabeled(client, own, config, bank.name)
    info = client.adaptation(bank.name)
    assert info.state == "done"
    splits = read_splits(own, config.data)
    assert info.figures.images == len(slices_of(own, splits.unlabeled))
    assert "Dice of held-out templates" in caplog.text
    adapt_to_unlabeled(client, own, config, bank.name)
    assert client.adaptation(bank.name) == info  # it was not trained a second time
