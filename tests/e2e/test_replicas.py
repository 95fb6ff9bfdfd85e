"""Run two annotators behind nginx with one Redis: changes apply at once, and a kill loses nothing."""

from __future__ import annotations

import gzip
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
import scale

from vessa.errors import NotReady, TooLarge

SIZE = 48


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, nano_weights: Path) -> Iterator[Any]:
    with scale.Cluster(tmp_path_factory.mktemp("cluster"), str(nano_weights), [None, None]) as one:
        yield one


def test_a_template_added_through_one_is_used_by_the_other_in_the_next_request(cluster: Any) -> None:
    with cluster.client(0) as one, cluster.client(1) as other:
        assert scale.seen_at_once(one, other, SIZE)
        found = one.segment([scale.example(504, SIZE)[0]], bank="fresh")[0].templates["square"][0].id
        other.delete_template("fresh", found)
        after = one.segment([scale.example(504, SIZE)[0]], bank="fresh")[0]
        assert after.templates["square"][0].id != found
        assert after.bank_version == 6


def test_writers_through_both_lose_and_double_nothing(cluster: Any) -> None:
    def write(job: int) -> None:
        with cluster.client(job % 2, attempts=10) as client:
            for i in range(4):
                scale.add(client, "written", 10 * (job // 2) + i, SIZE)

    with ThreadPoolExecutor(4) as pool:  # each template is sent through both at once
        list(pool.map(write, range(4)))
    infos = []
    for replica in range(2):
        with cluster.client(replica) as client:
            infos.append((client.bank("written"), {t.id for t in client.templates("written")}))
    assert infos[0] == infos[1]
    assert infos[0][0].templates == infos[0][0].version == len(infos[0][1]) == 8


def test_both_answer_alike_behind_one_address(cluster: Any) -> None:
    with cluster.client() as front, cluster.client(0) as one, cluster.client(1) as other:
        scale.add(front, "alike", 0, SIZE)
        images = [scale.example(100 + i, SIZE)[0] for i in range(6)]
        first, second = (client.segment(images, bank="alike") for client in (one, other))
        for a, b in zip(first, second, strict=True):
            assert np.array_equal(a.labels, b.labels)
            assert a.model == b.model
        before = [_segmented(cluster, replica) for replica in range(2)]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda image: front.segment([image], bank="alike"), images))
        after = [_segmented(cluster, replica) for replica in range(2)]
        assert sum(after) - sum(before) == 6
        assert all(now > then for then, now in zip(before, after, strict=True))


def _segmented(cluster: Any, replica: int) -> float:
    url = f"http://127.0.0.1:{cluster.ports[replica]}/metrics"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {scale.KEY}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith("vessa_requests_total") and 'route="/segment"' in line
    )


def test_sessions_of_browsers_and_viewers_stay_on_one_replica(cluster: Any) -> None:
    """They are in the memory of one replica."""
    with httpx.Client(base_url=cluster.url, timeout=60, trust_env=False) as browser:
        csrf = browser.post("/session", json={"key": scale.KEY}).json()["csrf"]
        assert {browser.get(path).status_code for path in ("/session", "/banks") * 4} == {200}
        assert browser.delete("/session", headers={"X-CSRF-Token": csrf}).status_code == 204
    with cluster.client() as front:
        scale.add(front, "viewer", 0, SIZE)
    voxels = gzip.compress(nib.Nifti1Image(np.zeros((8, 8, 4), np.int16), np.eye(4)).to_bytes())  # type: ignore[no-untyped-call]
    key = {"Authorization": f"Bearer {scale.KEY}"}
    with httpx.Client(
        base_url=f"{cluster.url}/monailabel/viewer", headers=key, timeout=60, trust_env=False
    ) as viewer:
        sent = viewer.put("/datastore/", params={"image": "v"}, files={"file": ("v.nii.gz", voxels)})
        assert sent.status_code == 200, sent.text
        assert [viewer.get("/datastore/").json()["total"] for _ in range(8)] == [1] * 8


def test_a_body_too_large_for_nginx_is_refused_in_our_words(cluster: Any) -> None:
    request = urllib.request.Request(f"{cluster.url}/segment", data=b"\0" * (66 << 20))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value as answer:
        assert answer.code == 413
        assert json.load(answer)["error"]["code"] == TooLarge.code


def test_a_kill_under_load_loses_no_request(cluster: Any) -> None:
    """This test runs last: it stops one of the two replicas, and then both."""
    with cluster.client() as front:
        scale.add(front, "bench", 0, SIZE)
        images = [scale.example(200 + i, SIZE)[0] for i in range(24)]
        assert scale.lost_by_a_kill(cluster, images) == (24, 0)
        assert front.bank("bench").templates == 1
    cluster.annotators[0].kill()
    with cluster.client(attempts=1) as front, pytest.raises(NotReady, match="no annotator answers"):
        front.banks()
