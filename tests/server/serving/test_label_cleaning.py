"""Cleaning on request: images by their largest component, volumes along z besides, both with provenance."""

import gzip
import json
import time

import nibabel as nib
import numpy as np
import pytest
from scans import nifti, phantom

from vessa.masks.cleaning import NEIGHBOR_WEIGHT, VERSION, clean_volume
from vessa.volumes import read_volume
from vessa_server.serving.label_cleaning import clean_results
from vessa_server.template_bank.retrieval import Bank
from vessa_server.template_bank.template import Template, View
from vessa_server.types import SegmentResult

SHAPE = (40, 30, 5)
NAMES = {1: "organ", 2: "lesion"}


def template(mask):
    view = View(np.zeros(4, np.float32), {})
    return Template("t", "p0", NAMES, np.zeros(mask.shape, np.uint8), mask, view, "model")


def islands():
    labels = np.zeros((12, 12), np.uint8)
    labels[1:5, 1:5] = labels[9:11, 9:11] = 1
    labels[1:3, 8:11] = labels[8:10, 1:3] = 2
    return labels


def test_classes_of_one_component_in_every_template_lose_their_islands():
    mask = np.zeros((12, 12), np.uint8)
    mask[2:8, 2:8] = 1
    mask[9:11, 1:3] = mask[9:11, 8:10] = 2  # two lesions
    bank = Bank("bank", 1, (template(mask),))
    sure = np.full((12, 12), 200, np.uint8)
    result = SegmentResult("i", islands(), sure, None, (1, 2), ("organ", "lesion"), {}, {}, 1)
    failure = ValueError("of this item")
    cleaned, same = clean_results([result, failure], bank)
    assert same is failure
    assert (cleaned.labels[9:11, 9:11] == 0).all()
    assert (cleaned.confidence[9:11, 9:11] == 0).all()
    assert ((cleaned.labels == 2) == (islands() == 2)).all()
    assert cleaned.cleaning.model_dump() == {
        "version": VERSION,
        "single": ["organ"],
        "neighbor_weight": 0.0,
        "removed": {"organ": 4},
    }
    assert (result.labels == islands()).all()  # other requests share it
    assert result.cleaning is None


def test_an_answer_names_its_cleaning_and_stays_in_the_cache_with_it(server, bank, example, file_of):
    server.seed(bank, 2)

    def segment(**fields):
        return server.http.post(
            "/segment", files={"image": ("i.png", file_of(example(5)[0]))}, data={"bank": bank, **fields}
        )

    plain, cleaned = segment().json(), segment(clean="1").json()
    assert plain["cleaning"] is None
    assert set(cleaned["cleaning"]["single"]) <= {"ventricle", "wall"}
    assert plain["annotation_id"] != cleaned["annotation_id"]
    kept = server.http.get(f"/annotations/{cleaned['annotation_id']}").json()
    assert kept["cleaning"] == cleaned["cleaning"]
    tensors = server.segment({"images": example(5)[0][None]}, bank=bank, clean="1")
    assert tensors.status_code == 200
    wrong = segment(clean="yes")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (422, "invalid_request")


@pytest.fixture
def job(server):
    """Send a volume as a job and return its state at the end and its labels."""

    def run(data, **fields):
        parts = [("image", ("0.bin", data))]
        sent = server.http.post("/jobs", files=parts, data=fields)
        assert sent.status_code == 202, sent.text
        for _ in range(600):
            info = server.http.get(f"/jobs/{sent.json()['id']}").json()
            if info["state"] in ("done", "failed"):
                break
            time.sleep(0.1)
        assert info["state"] == "done", info
        result = server.http.get(f"/jobs/{info['id']}/result").content
        return info, np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(result)).dataobj)

    return run


def test_a_jobs_labels_are_cleaned_as_a_volume(server, bank, job):
    server.seed(bank, 2)
    affine = np.diag([1.2, 1.5, 6.0, 1.0])
    data = gzip.compress(nifti(phantom(SHAPE), affine))
    volume = read_volume([data])
    images = np.stack([volume.image(2, k) for k in range(SHAPE[2])])
    answer = server.segment({"images": images}, bank=bank)
    tensors = read_tensors(answer.content)
    info, labels = job(data, bank=bank, clean="1")
    plain, _ = job(data, bank=bank)
    assert plain["cleaning"] is None
    ids = {name: number for number, name in json.loads(tensors[1]["classes"]).items()}
    single = [int(ids[name]) for name in info["cleaning"]["single"]]
    expected = clean_volume(tensors[0]["labels"], tensors[0]["confidence"], single=single)
    np.testing.assert_array_equal(labels, expected.labels.transpose(2, 1, 0))
    assert info["cleaning"]["neighbor_weight"] == NEIGHBOR_WEIGHT
    made = server.http.get(f"/jobs/{info['id']}/provenance").json()
    assert [one["cleaning"] for one in made] == [info["cleaning"]] * SHAPE[2]


def read_tensors(content):
    import safetensors.numpy

    size = int.from_bytes(content[:8], "little")
    return safetensors.numpy.load(content), json.loads(content[8 : 8 + size])["__metadata__"]
