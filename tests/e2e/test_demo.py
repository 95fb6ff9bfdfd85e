"""Run the demo as `make demo` does, on less data and for fewer steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_ends_with_a_table_and_a_report_and_can_be_called_again(tmp_path: Path, port: int) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VESSA_")}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "VESSA_DEMO_PORT": str(port),
        "VESSA_DEMO_STEPS": "6",
        "VESSA_THREADS": "1",
    }

    def run(*command: str) -> str:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        return ended.stdout

    folder = tmp_path / "demo"
    size = ("--patients", "6", "--slices", "2", "--size", "64")
    run("python", "examples/knees.py", str(folder / "knees"), *size)
    first = last(run("bash", "examples/demo.sh", str(folder)))
    assert first["steps"] == 6
    assert Path(first["report"]).is_file()
    assert "VESSA alone" in (folder / "compare" / "results.md").read_text()
    for method in ("unimatch_v2", "vessa"):
        assert (folder / "compare" / f"{method}-0" / "summary.json").is_file()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0  # the demo's annotator ended with it

    started = time.monotonic()
    assert last(run("bash", "examples/demo.sh", str(folder))) == first
    assert time.monotonic() - started < 200


def last(stdout: str) -> dict[str, Any]:
    return json.loads(stdout.splitlines()[-1])
