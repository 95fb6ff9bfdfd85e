"""Test the folder of jobs."""

from pathlib import Path

import pytest

from vessa_server.volume_jobs.store import Job, JobStore, alone_on


def test_of_the_services_that_share_a_folder_one_works(tmp_path: Path) -> None:
    with alone_on(tmp_path) as first, alone_on(tmp_path) as second:
        assert (first, second) == (True, False)
    with alone_on(tmp_path) as again:
        assert again


def test_a_job_is_gone_at_once_whoever_still_writes_to_it(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.json").write_text("{}")
    store = JobStore(tmp_path)
    store.remove("job")
    store.remove("job")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        (folder / "result").write_bytes(b"late")
    assert store.bytes_by_owner() == {}


def test_inputs_of_a_finished_job_that_a_kill_left_are_swept(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = Job("j", "anna", "bank", {1: "heart"}, None, 0, "nifti", (4, 4), 1, ("0" * 64,), "0" * 64, 1.0)
    with store.upload() as upload:
        for name in ("00000.input", "images.npy", "00000.png", "00000.made"):
            (upload / name).write_bytes(b"x")
        store.publish(upload, job)
    store.sweep(60)
    assert len(list(store.path(job).iterdir())) == 5  # it may still need them
    store.change(job, state="done", ended=2.0)
    store.sweep(1e12)
    assert sorted(p.name for p in store.path(job).iterdir()) == ["00000.made", "job.json"]
