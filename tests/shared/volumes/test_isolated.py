"""Child processes that read files are shared among owners."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from scans import nifti

from vessa.volumes import Bounds, isolated


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.local]:
    """The owner of each thread's calls, "other" unless a test sets its name."""
    local = threading.local()
    monkeypatch.setattr(isolated, "_owner", lambda: getattr(local, "name", "other"))
    yield local
    assert isolated._held.total() == 0


def test_slow_files_of_one_owner_leave_a_place_to_others(owner: threading.local) -> None:
    volume = nifti(np.zeros((4, 4, 2), np.int16), np.eye(4))
    read = threading.Event()

    def third() -> None:
        owner.name = "greedy"
        isolated.read_volume([volume], Bounds())
        read.set()

    thread = threading.Thread(target=third)
    with contextlib.ExitStack() as slow:
        owner.name = "greedy"
        for _ in range(isolated._SHARE):
            slow.enter_context(isolated._place())
        thread.start()
        owner.name = "other"
        assert isolated.read_volume([volume], Bounds()).shape == (4, 4, 2)
        assert not read.is_set()
    thread.join(60)
    assert read.is_set()
