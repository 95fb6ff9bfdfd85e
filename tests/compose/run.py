"""Run the compose stack from a clean clone: to its table, offline, and with containers killed.

`make test-compose` needs docker, root (to kill the containers' processes) and the base images. The last line
is one JSON object: times in s, image sizes in MB, mean Dice of each scenario's methods. VESSA_STEPS sets the
training steps (default 40).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "vessa-test"
RUN = "/var/lib/vessa/runs/run"
LONGEST_S = 3600.0
NO_WAY_OUT = """
import socket, sys
try:
    socket.create_connection(("1.1.1.1", 53), 3)
except OSError:
    sys.exit(0)
sys.exit(1)
"""
LINES = f"""
from pathlib import Path
print(sum(len(p.read_text().splitlines()) for p in Path("{RUN}").rglob("metrics.jsonl")))
"""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"test-compose: {text}", file=sys.stderr, flush=True)


class Stack:
    """A compose project on a clone, with a separate run name and separate volumes."""

    def __init__(self, clone: Path, *files: str) -> None:
        self.clone = clone
        self._base = ["docker", "compose", "-p", PROJECT, *(part for name in files for part in ("-f", name))]
        self._environment = os.environ | {
            "VESSA_STEPS": os.environ.get("VESSA_STEPS", "40"),
            "OMP_NUM_THREADS": "1",  # each of two; more would only wait for each other on two cores
            "VESSA_PORT": "8790",
        }

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run one compose command and return what it printed."""
        done = subprocess.run(
            [*self._base, *arguments], cwd=self.clone, env=self._environment, capture_output=True, text=True
        )
        if check and done.returncode:
            raise SystemExit(f"docker compose {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def state(self, service: str) -> dict[str, Any]:
        """Return docker's State of a container, empty while there is no container."""
        identity = self.compose("ps", "-a", "-q", service, check=False).split()
        if not identity:
            return {}
        told = subprocess.run(["docker", "inspect", identity[0]], capture_output=True, text=True)
        return json.loads(told.stdout)[0]["State"] if told.returncode == 0 else {}

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; end with the logs when it does not."""
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{what} did not happen:\n{self.compose('logs', '--tail', '40', check=False)}"
                )
            time.sleep(0.3)

    def kill(self, service: str) -> None:
        """Kill a container's process with -9, as the OOM killer does; wait until docker has restarted it."""
        self.wait(f"the start of {service}", lambda: self.state(service).get("Running", False))
        pid = int(self.state(service)["Pid"])
        say(f"kill -9 of {service}")
        os.kill(pid, signal.SIGKILL)
        self.wait(f"the next start of {service}", lambda: self._again(service, pid))

    def _again(self, service: str, pid: int) -> bool:
        state = self.state(service)
        return bool(state) and int(state["Pid"]) not in (0, pid)

    def lines(self) -> int:
        """Return the number of lines of metrics of all runs."""
        told = self.compose("exec", "-T", "trainer", "python", "-c", LINES, check=False).split()
        return int(told[-1]) if told and told[-1].isdigit() else 0

    def progress(self, what: str) -> None:
        """Wait until the trainer has made progress."""
        seen = self.lines()
        self.wait(f"progress before {what}", lambda: self.lines() != seen or self._ended())
        if self._ended():
            raise SystemExit(f"the job ended before {what}: give it more steps")

    def _ended(self) -> bool:
        return self.state("trainer").get("Status") == "exited"

    def result(self) -> dict[str, float]:
        """Wait for the end of the job, check table, report and masks, and return each method's Dice."""
        self.wait("the end of the trainer", self._ended)
        logs = self.compose("logs", "--no-log-prefix", "trainer")
        if self.state("trainer")["ExitCode"]:
            raise SystemExit(f"the trainer failed:\n{logs[-3000:]}")
        table = logs[logs.rindex("Test patients") :]
        for method in ("UniMatch V2", "VESSA-assisted", "VESSA alone"):
            assert method in table, table
        print(table, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            self.compose("cp", f"trainer:{RUN}", folder)
            run = Path(folder) / "run"
            assert (run / "report.html").stat().st_size > 10_000
            rows = [line.split("|") for line in (run / "results.md").read_text().splitlines()]
        means = {
            row[2].strip(): row[3].strip(" *") for row in rows if len(row) > 3 and row[1].strip() == "mean"
        }
        return {method: float(dice.split()[0]) for method, dice in means.items()}


def plain(stack: Stack) -> dict[str, float]:
    """Start the stack and wait for the table."""
    stack.compose("up", "-d", "--pull", "never")
    return stack.result()


def offline(stack: Stack) -> dict[str, float]:
    """Do the same without any connection to the outside."""
    stack.compose("up", "-d", "--pull", "never", "--no-build")
    for service in ("annotator", "trainer"):
        stack.compose("exec", "-T", service, "python", "-c", NO_WAY_OUT)
    return stack.result()


def killed(stack: Stack) -> dict[str, float]:
    """Do the same with each container killed once, the trainer twice, at different times."""
    up = subprocess.Popen(
        [*stack._base, "up", "-d", "--pull", "never", "--no-build"], cwd=stack.clone, env=stack._environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stack.kill("phantoms")
    assert up.wait() == 0, "`docker compose up` gave up after the kill"
    for service in ("trainer", "redis", "annotator", "trainer"):
        stack.progress(f"the kill of {service}")
        stack.kill(service)
    return stack.result()


def image_sizes() -> dict[str, int]:
    """Return the size of each image on disk, MB."""
    names = ("vessa-annotator", "vessa-trainer", "redis:7")
    told = [
        subprocess.check_output(["docker", "image", "inspect", "-f", "{{.Size}}", name]) for name in names
    ]
    return {name: int(size) // 1_000_000 for name, size in zip(names, told, strict=True)}


def main() -> None:
    """Run the scenarios and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", default="plain,offline,killed")
    options = parser.parse_args()
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        print("test-compose: skipped: no docker engine runs here")
        return
    scenarios = {"plain": plain, "offline": offline, "killed": killed}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "vessa"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        started = time.monotonic()
        Stack(clone).compose("build")
        figures["build_s"] = round(time.monotonic() - started)
        figures["image_mb"] = image_sizes()
        say(f"built in {figures['build_s']} s, {figures['image_mb']} MB")
        offline_file = clone / "tests" / "compose" / "offline.yml"
        for name in options.scenarios.split(","):
            files = (
                ("docker-compose.yml", str(offline_file)) if name == "offline" else ("docker-compose.yml",)
            )
            stack = Stack(clone, *files)
            say(f"scenario {name}")
            started = time.monotonic()
            try:
                figures[name] = {"dice": scenarios[name](stack), "s": round(time.monotonic() - started)}
            finally:
                stack.compose("down", "-v", "--timeout", "5", check=False)
            say(f"{name}: {figures[name]}")
    print(json.dumps(figures))
    dice = [figures[name]["dice"] for name in options.scenarios.split(",")]
    if any(abs(one[method] - dice[0][method]) > 0.02 for one in dice for method in one):
        raise SystemExit("the scenarios differ: a kill or the missing network changed what is learned")


if __name__ == "__main__":
    main()
