"""Set the effort of the proving ground, count its inputs, and bound a process's memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis

EFFORT = int(os.environ.get("PROVING_EFFORT", "1"))  # `make proving` raises it
MEGABYTE = 1 << 20

tried: Counter[str] = Counter()  # inputs, by what they were given to; printed when the tests end
results: Counter[str] = Counter()  # tests by outcome


def settings(examples: int) -> hypothesis.settings:
    """Return Hypothesis's settings: the same few examples in each run of CI, more and others with EFFORT."""
    return hypothesis.settings(
        max_examples=examples * EFFORT,
        derandomize=EFFORT == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def _memory(pid: int | str, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def resident(pid: int | str = "self") -> int:
    """Return the bytes of memory of a process."""
    return _memory(pid, "VmRSS")


@contextlib.contextmanager
def grows_at_most(limit: int, pid: int | str = "self") -> Iterator[None]:
    """Fail when a process's memory grows by more than `limit` bytes at any moment of the block.

    The kernel keeps the peak, so that no moment is missed. Without Linux's /proc nothing is measured.
    """
    if not Path("/proc/self/clear_refs").exists():
        yield
        return
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is forgotten: proc(5)
    before = resident(pid)
    yield
    grown = _memory(pid, "VmHWM") - before
    assert grown <= limit, (
        f"{grown / MEGABYTE:.0f} MiB more at the peak, at most {limit / MEGABYTE:.0f} expected"
    )
