"""docs/how-to/own-data.md is run as a reader would run it, by the machinery of tests/test_readme.py."""

import subprocess

import pytest
from tests.test_readme import ROOT, code_blocks, command
from tests.test_readme import reader as reader  # the fixture

PAGE = ROOT / "docs" / "how-to" / "own-data.md"


@pytest.mark.parametrize(
    "block",
    [b for b in code_blocks(PAGE.read_text(encoding="utf-8")) if b.run],
    ids=lambda b: f"line{b.line}",
)
def test_block(block, reader):
    done = subprocess.run(
        command(block, reader.address),
        cwd=reader.folder,
        env=reader.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{PAGE.name} line {block.line}:\n{done.stdout[-4000:]}"
    assert block.expect is None or block.expect in done.stdout
