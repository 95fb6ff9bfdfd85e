"""Run the README's code as a reader would: top to bottom, in one folder, against a live service.

Tags in README.md. Every fenced block in bash, sh, console or python needs one HTML comment (invisible
when rendered) on the line above its fence:

    <!-- run -->                    run it; it must end with status 0
    <!-- run: TEXT -->              and its output must contain TEXT
    <!-- run slow -->               as `run`, but only in `make test-all` (with or without `: TEXT`)
    <!-- skip: why -->              not run, for example because it is `make test` itself

The environment of a block:
- The working folder is one temporary folder for all blocks, with links to the repository's examples/,
  services/, shared/, trainer/ and benchmarks/. Later blocks read what earlier blocks wrote. A skipped block
  writes nothing.
- `vessa`, `vessa-server`, `vessa-trainer` and `python` are those of the environment that runs the tests.
- A nano annotator is running. The README writes its address as 127.0.0.1:8700, which is replaced by the
  address of a free port.
- HOME is a new folder. The service wrote its key to ~/.config/vessa/api-key, where the client finds it and
  curl can read it.
- bash blocks run with `set -euo pipefail`. In `console` blocks the lines that begin with `$ ` are run.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from processes import bound

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ADDRESS = "127.0.0.1:8700"
SHELLS = {"bash", "sh", "console"}
TAG = re.compile(r"<!-- (?:(?P<run>run)(?P<slow> slow)?(?:: (?P<expect>.+?))?|skip: (?P<why>.+?)) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block. line: line of its fence, from 1; expect: text that its output must contain."""

    line: int
    language: str
    code: str
    run: bool
    slow: bool
    expect: str | None


def code_blocks(text: str) -> list[Block]:
    """Return the fenced shell and Python blocks. Raises ValueError for a missing or wrong tag."""
    blocks, lines = [], text.splitlines()
    fence: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = number
            continue
        language = lines[fence][3:].strip()
        if language in SHELLS | {"python"}:
            above = lines[fence - 1].strip() if fence else ""
            tag = TAG.fullmatch(above)
            if tag is None:
                raise ValueError(
                    f"line {fence + 1}: a {language} block needs <!-- run --> or <!-- skip: why --> "
                    f"on the line above it, found {above!r}"
                )
            code = "\n".join(lines[fence + 1 : number]) + "\n"
            blocks.append(
                Block(fence + 1, language, code, bool(tag["run"]), bool(tag["slow"]), tag["expect"])
            )
        fence = None
    return blocks


def command(block: Block, address: str) -> list[str]:
    """Return the command that runs a block, with the address of the service inserted."""
    code = block.code.replace(ADDRESS, address)
    if block.language == "python":
        return [sys.executable, "-c", code]
    if block.language == "console":
        code = "\n".join(line[2:] for line in code.splitlines() if line.startswith("$ "))
    return ["bash", "-euo", "pipefail", "-c", code]


def readme_blocks() -> list[Block]:
    """Return the README's blocks, or none without a README (test_readme_is_tagged then fails)."""
    return code_blocks(README.read_text(encoding="utf-8")) if README.is_file() else []


def parameters() -> list[object]:
    """Return one pytest parameter for each block to run, named by its line."""
    return [
        pytest.param(block, id=f"line{block.line}", marks=[pytest.mark.slow] if block.slow else [])
        for block in readme_blocks()
        if block.run
    ]


@dataclass(frozen=True)
class Reader:
    """The reader of the README: folder, environment, address of the service."""

    folder: Path
    environment: dict[str, str]
    address: str


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Yield a reader with a folder, a home, and a ready nano annotator."""
    folder, home = tmp_path_factory.mktemp("readme"), tmp_path_factory.mktemp("home")
    for name in ("examples", "services", "shared", "trainer", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("VESSA_", "XDG_", "COV_"))
    }
    environment |= {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]),
        "OMP_NUM_THREADS": "2",
    }
    log = home / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            bound(["vessa-server", "serve"]),
            cwd=home,
            env=environment | {"VESSA_HOST": "127.0.0.1", "VESSA_PORT": str(port), "VESSA_WEIGHTS": "nano"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/readyz", log)
        yield Reader(folder, environment | {"VESSA_URL": f"http://127.0.0.1:{port}"}, f"127.0.0.1:{port}")
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 180.0) -> None:
    """Poll the readiness probe; fail with the end of the server's log when it dies or stays silent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the annotator did not become ready\n{log.read_text(errors='replace')[-4000:]}")


def test_readme_is_tagged() -> None:
    assert any(block.run for block in readme_blocks())


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("block", parameters())
def test_readme_block(block: Block, reader: Reader) -> None:
    done = subprocess.run(
        command(block, reader.address),
        cwd=reader.folder,
        env=reader.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200 if block.slow else 600,
    )
    assert done.returncode == 0, f"README.md line {block.line}:\n{done.stdout[-4000:]}"
    if block.expect is not None:
        assert block.expect in done.stdout


def test_readme_segments_a_patient_outside_its_bank(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    (phantoms,) = re.findall(r"^vessa-server (phantoms .+)$", text, re.MULTILINE)
    (split,) = re.findall(r"^vessa seed \S+ .*--split (\S+)$", text, re.MULTILINE)
    shown = re.findall(r"^vessa segment (\S+)/images/(\S+)_\d+\.png", text, re.MULTILINE)
    server = Path(sys.executable).parent / "vessa-server"
    subprocess.run([server, *phantoms.split()], cwd=tmp_path, check=True, capture_output=True)
    assert shown
    for folder, patient in shown:
        assert (tmp_path / folder / "images" / f"{patient}_01.png").is_file()
        assert patient not in (tmp_path / folder / split).read_text().split()


EXAMPLE = """
<!-- run: 8701 -->
```bash
echo http://127.0.0.1:8700
```
<!-- skip: it is this test -->
```sh
make test
```
<!-- run slow -->
```console
$ false
nothing
```
```yaml
not: code
```
"""


def test_blocks_are_read_with_their_tags() -> None:
    shell, skipped, console = code_blocks(EXAMPLE)
    assert (shell.line, shell.run, shell.slow, shell.expect) == (3, True, False, "8701")
    assert not skipped.run
    assert (console.run, console.slow, console.expect) == (True, True, None)


def test_blocks_run_with_the_address_put_in() -> None:
    shell, _, console = code_blocks(EXAMPLE)
    done = subprocess.run(command(shell, "127.0.0.1:8701"), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "http://127.0.0.1:8701\n")
    assert subprocess.run(command(console, "127.0.0.1:8701")).returncode == 1


@pytest.mark.parametrize("tag", ["", "text", "<!-- skip -->", "<!-- Run -->", "<!-- run fast -->"])
def test_untagged_block_is_named_by_its_line(tag: str) -> None:
    with pytest.raises(ValueError, match="line 2: a python block"):
        code_blocks(f"{tag}\n```python\npass\n```\n")
