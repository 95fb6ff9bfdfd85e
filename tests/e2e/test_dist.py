"""Build the distributions and run the README's commands with them, outside the checkout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheels_run_the_readme_outside_the_checkout(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "dist.py"), "--out", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (
        len(list((tmp_path / "dist").glob("*.whl"))) == len(list((tmp_path / "dist").glob("*.tar.gz"))) == 3
    )
