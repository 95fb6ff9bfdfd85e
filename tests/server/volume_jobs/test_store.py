"""Test the folder of jobs."""

from pathlib import Path

import pytest

from vessa_server.volume_jobs.store import JobStore, alone_on


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
