"""Run the compose stack from a clean clone: to its table, offline, with containers killed, with its profiles.

`make test-compose` needs docker, root (to kill the containers' processes) and the base images. Images are
pinned by digest. On a machine that has only a local image of the same name, it is used, with a message.
The last line is one JSON object: times in s, image sizes in MB, mean Dice of each scenario's methods, answers
of the profiles. VESSA_STEPS sets the training steps (default 40).
"""

import argparse
import json
import os
import re
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
# What the trainer's container must not reach: the annotator's Redis keys, its password, the admin's key.
INTRUDER = """
import json, os, pathlib, urllib.error, urllib.request
import redis
password = pathlib.Path("/var/lib/vessa/redis/password").read_text()
trainer = redis.Redis("redis", username="trainer", password=password)
trainer.set("vessa:label:intruder", "x", px=1000)
opened = []
for name, call in {
    "keys": lambda: trainer.hgetall("vessa:keys"),
    "a key": lambda: trainer.hset("vessa:keys", "evil", "x"),
    "banks": lambda: trainer.smembers("vessa:banks"),
    "flush": lambda: trainer.flushall(),
    "no user": lambda: redis.Redis("redis").ping(),
}.items():
    try:
        call()
        opened.append(name)
    except redis.RedisError:
        pass
key = pathlib.Path("/var/lib/vessa/config/vessa/api-key").read_text().strip()
for method, path in (("DELETE", "/groups/p1"), ("GET", "/banks")):
    request = urllib.request.Request("http://annotator:8700" + path, method=method)
    request.add_header("Authorization", "Bearer " + key)
    try:
        status = urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        status = error.code
    if (status == 200) != (method == "GET"):
        opened.append(f"{method} {path}: {status}")
print(json.dumps(opened))
"""
# What a viewer sends: a session, a volume as a packed array (Blosc2), and a click.
VIEWER = """
import json, pathlib
import httpx, numpy
from vessa.client import AnnotatorClient
from vessa.volumes.packed_array import pack
key = pathlib.Path("/var/lib/vessa/config/vessa/api-key").read_text().strip()
image = numpy.random.default_rng(0).integers(0, 60, (64, 64), numpy.uint8)
mask = numpy.zeros((64, 64), numpy.uint8)
mask[20:44, 20:44] = 1
image[mask > 0] += 150
with AnnotatorClient("http://annotator:8700", key) as client:
    client.add_templates("viewer", [image], [mask], {1: "square"}, ["p"])
    base = "http://annotator:8700/nninteractive/viewer/square"
    with httpx.Client(headers={"Authorization": "Bearer " + key}, timeout=120, trust_env=False) as http:
        token = http.post(base + "/claim").raise_for_status().json()["lease_token"]
        lease = {"X-Lease-Token": token, "X-Meta": "{}"}
        volume = pack(numpy.stack([image, image])[None].astype("float32"))
        http.post(base + "/set_image", content=volume, headers=lease).raise_for_status()
        click = {"coordinates": [1, 32, 32], "include_interaction": True}
        answer = http.post(base + "/add_point_interaction", json=click, headers=lease).raise_for_status()
    client.delete_bank("viewer")
print(json.loads(answer.headers["X-Meta"])["bbox"] is not None)
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

    def __init__(self, clone: Path, *files: str, **settings: str) -> None:
        self.clone = clone
        self.base = ["docker", "compose", "-p", PROJECT, *(part for name in files for part in ("-f", name))]
        self.environment = (
            os.environ
            | {
                "VESSA_STEPS": os.environ.get("VESSA_STEPS", "40"),
                "OMP_NUM_THREADS": "1",  # each of two; more would only wait for each other on two cores
                "VESSA_PORT": "8790",
                "VESSA_GATEWAY_PORT": "8791",
                "VESSA_TLS_PORT": "8792",
                "GRAFANA_PORT": "8793",
                "VESSA_SERVE_VIEWERS": "nninteractive,monailabel,labelstudio",
            }
            | settings
        )

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run one compose command and return what it printed."""
        done = subprocess.run(
            [*self.base, *arguments], cwd=self.clone, env=self.environment, capture_output=True, text=True
        )
        if check and done.returncode:
            raise SystemExit(f"docker compose {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def inspect(self, service: str) -> dict[str, Any]:
        """Return docker's description of a container, empty while there is no container."""
        identity = self.compose("ps", "-a", "-q", service, check=False).split()
        if not identity:
            return {}
        told = subprocess.run(["docker", "inspect", identity[0]], capture_output=True, text=True)
        return json.loads(told.stdout)[0] if told.returncode == 0 else {}

    def state(self, service: str) -> dict[str, Any]:
        """Return docker's State of a container, empty while there is no container."""
        return self.inspect(service).get("State", {})

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


def check_confined(stack: Stack, services: tuple[str, ...]) -> None:
    """Check each running service: no root, no capabilities, limits, and a read-only root file system."""
    for service in services:
        container = stack.inspect(service)
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["Memory"] > 0, service
        assert host["PidsLimit"] > 0, service
        status = Path(f"/proc/{container['State']['Pid']}/status").read_text()
        found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert found["Uid"].split()[0] != "0", f"{service} runs as root"
        assert int(found["CapEff"], 16) == 0, f"{service} has capabilities {found['CapEff']}"
        assert found["NoNewPrivs"].strip() == "1", service
    say(f"confined: {', '.join(services)}")


def check_trainer_is_kept_out(stack: Stack) -> None:
    """Check in the trainer's container that the annotator's Redis keys and admin routes are closed to it."""
    opened = json.loads(stack.compose("exec", "-T", "trainer", "python", "-c", INTRUDER).splitlines()[-1])
    assert not opened, f"the trainer reaches {opened}"


def check_viewer(stack: Stack) -> None:
    """Check by a real request that the annotator's image serves a viewer's protocol."""
    told = stack.compose("exec", "-T", "trainer", "python", "-c", VIEWER).split()
    assert told[-1] == "True", f"a click of a viewer changed nothing: {told}"
    say("a viewer's click was answered")


def plain(stack: Stack) -> dict[str, float]:
    """Start the stack, check its users, limits and viewers, and wait for the table."""
    stack.compose("up", "-d", "--pull", "never")
    check_confined(stack, ("redis", "annotator", "trainer"))
    check_trainer_is_kept_out(stack)
    check_viewer(stack)
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
        [*stack.base, "up", "-d", "--pull", "never", "--no-build"], cwd=stack.clone, env=stack.environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stack.kill("phantoms")
    assert up.wait() == 0, "`docker compose up` gave up after the kill"
    for service in ("trainer", "redis", "annotator", "trainer"):
        stack.progress(f"the kill of {service}")
        stack.kill(service)
    return stack.result()


def profiles(stack: Stack) -> dict[str, str]:
    """Start the profiles scale, tls and monitoring; return what each of their services answered.

    A service whose image this machine lacks is not started, and said so.
    """
    answers: dict[str, str] = {}
    wanted = {"gateway": "scale", "gateway-tls": "tls", "prometheus": "monitoring", "grafana": "monitoring"}
    images = json.loads(stack.compose("--profile", "*", "config", "--format", "json"))["services"]
    for service in wanted:
        if not has_image(images[service]["image"]):
            answers[service] = f"skipped: no image {images[service]['image']} on this machine"
    started = [service for service in wanted if service not in answers]
    if not started:
        return answers
    options = [part for profile in set(wanted.values()) for part in ("--profile", profile)]
    stack.compose(*options, "up", "-d", "--pull", "never", "--no-build", *started)
    check_confined(stack, tuple(started))
    addresses = {
        "gateway": "http://127.0.0.1:8791/readyz",
        "gateway-tls": "https://127.0.0.1:8792/readyz",
        "prometheus": "http://prometheus:9090/api/v1/query?query=up%7Bjob%3D%22annotator%22%7D",
        "grafana": "http://127.0.0.1:8793/api/health",
    }
    for service in started:
        stack.wait(f"an answer of {service}", lambda s=service: _answer(stack, s, addresses[s]) is not None)
        answers[service] = str(_answer(stack, service, addresses[service]))
    return answers


def _answer(stack: Stack, service: str, address: str) -> str | None:
    """Return what a service of a profile answers, None while it is not the expected answer."""
    fetch = (
        "import ssl, sys, urllib.request; context = ssl._create_unverified_context(); "
        "print(urllib.request.urlopen(sys.argv[1], timeout=20, "
        "context=context if sys.argv[1].startswith('https') else None).read().decode())"
    )
    # Prometheus publishes no port: only containers of the internal network reach it.
    place = ["exec", "-T", "annotator", "python"] if service == "prometheus" else []
    if place:
        text = stack.compose(*place, "-c", fetch, address, check=False)
    else:
        done = subprocess.run([sys.executable, "-c", fetch, address], capture_output=True, text=True)
        text = done.stdout
    if service == "prometheus":
        return "up" if re.search(r'"value":\[[0-9.]+,"1"\]', text) else None
    words = {"grafana": '"database"'}.get(service, '"ready"')
    return "ok" if words in text else None


def has_image(name: str) -> bool:
    """Return whether an image is on this machine."""
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode == 0


def local_images(clone: Path) -> dict[str, str]:
    """Return local images of the same name for the pinned ones that are missing here, by variable."""
    found = re.findall(r"\$\{(\w+_IMAGE):-([^}]+)\}", (clone / "docker-compose.yml").read_text())
    found += re.findall(r"^ARG (PYTHON_IMAGE)=(\S+)", (clone / "Dockerfile.vessa").read_text(), re.MULTILINE)
    short = {name: image.split("@")[0] for name, image in found if not has_image(image)}
    return {name: image for name, image in sorted(short.items()) if has_image(image)}


def certificate(folder: Path) -> None:
    """Write a self-signed certificate for the profile `tls`, readable for its container."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    folder.chmod(0o755)
    (folder / "tls.key").chmod(0o644)


def image_sizes(redis: str) -> dict[str, int]:
    """Return the size of each image on disk, MB."""
    names = ("vessa-annotator", "vessa-trainer", redis)
    told = [
        subprocess.check_output(["docker", "image", "inspect", "-f", "{{.Size}}", name]) for name in names
    ]
    return {name: int(size) // 1_000_000 for name, size in zip(names, told, strict=True)}


def main() -> None:
    """Run the scenarios and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", default="plain,offline,killed,profiles")
    chosen = parser.parse_args().scenarios.split(",")
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        print("test-compose: skipped: no docker engine runs here")
        return
    scenarios = {"plain": plain, "offline": offline, "killed": killed, "profiles": profiles}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone, tls = Path(folder) / "vessa", Path(folder) / "tls"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        tls.mkdir()
        certificate(tls)
        settings = local_images(clone)
        for name, image in settings.items():
            say(f"{name}: the pinned image is not on this machine; the local image {image} is used")
        figures["local_images"] = dict(settings)
        settings["VESSA_TLS_DIR"] = str(tls)
        started = time.monotonic()
        Stack(clone, **settings).compose("build")
        figures["build_s"] = round(time.monotonic() - started)
        figures["image_mb"] = image_sizes(settings.get("REDIS_IMAGE", "redis:7"))
        say(f"built in {figures['build_s']} s, {figures['image_mb']} MB")
        offline_file = clone / "tests" / "compose" / "offline.yml"
        for name in chosen:
            files = ("docker-compose.yml", *((str(offline_file),) if name == "offline" else ()))
            stack = Stack(clone, *files, **settings)
            say(f"scenario {name}")
            started = time.monotonic()
            try:
                figures[name] = {"result": scenarios[name](stack), "s": round(time.monotonic() - started)}
            finally:
                stack.compose("--profile", "*", "down", "-v", "--timeout", "5", check=False)
            say(f"{name}: {figures[name]}")
    print(json.dumps(figures))
    dice = [figures[name]["result"] for name in chosen if name != "profiles"]
    if any(abs(one[method] - dice[0][method]) > 0.02 for one in dice for method in one):
        raise SystemExit("the scenarios differ: a kill or the missing network changed what is learned")


if __name__ == "__main__":
    main()
