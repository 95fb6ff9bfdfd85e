"""Compare two annotators behind nginx with one, each on one core with one thread, and count losses.

One, the other and both are measured in turn, so that a noisy machine slows all alike. Medians count. Load
comes as binary batches through nginx (deploy/nginx). Banks are in a Redis of this run. The last line is one
JSON object: two_over_one, images_per_s, lost (requests without a correct answer after kill -9 of a replica)
and seen_at_once (the other replica uses a new template in the next request).

`--share 0.4` measures 1, 2 and 4 replicas instead. The kernel holds each to that share of a core (control
groups, needs root), so that four replicas fit on two cores: two_over_one, four_over_one.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from processes import bound
from serving import family, free_port

from vessa.client import AnnotatorClient

ROOT = Path(__file__).resolve().parents[1]
KEY = "a-key-of-this-benchmark"
CLASSES = {1: "square"}


class Cluster:
    """Redis, some annotators and nginx in front of them; a context manager that ends what it started.

    weights: of vessa-server; cores: the core each annotator is pinned to, None for any
    """

    def __init__(self, folder: Path, weights: str, cores: Sequence[int | None]) -> None:
        self.folder, self._started = folder, list[subprocess.Popen[bytes]]()
        self.ports = [free_port() for _ in cores]
        self._redis, self._weights, self._cores = free_port(), weights, cores
        self.annotators: list[subprocess.Popen[bytes]] = []
        self.url = ""  # address of nginx

    def __enter__(self) -> "Cluster":
        try:
            redis = ["redis-server", "--port", str(self._redis), "--bind", "127.0.0.1", "--save", ""]
            self._run(redis, {})
            self._wait(self._redis)
            self.annotators = [self._annotator(i) for i in range(len(self.ports))]
            self.url = self.front(len(self.ports))
            for port in self.ports:
                self._wait(port, "/readyz")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def client(self, replica: int | None = None, **options: Any) -> AnnotatorClient:
        """Return a client of one replica, or of the address in front of all."""
        url = self.url if replica is None else f"http://127.0.0.1:{self.ports[replica]}"
        return AnnotatorClient(url, KEY, **options)

    def _annotator(self, place: int) -> "subprocess.Popen[bytes]":
        settings = {
            "VESSA_API_KEY": KEY,
            "VESSA_WEIGHTS": self._weights,
            "VESSA_STORE": f"redis://127.0.0.1:{self._redis}/0",
            "VESSA_PORT": str(self.ports[place]),
            "VESSA_DEVICE": "cpu",
            "VESSA_THREADS": "1",
            "VESSA_FEATURE_CACHE_BYTES": "0",  # every image is new
            "VESSA_LOG_LEVEL": "warning",
            "VESSA_SERVE_VIEWERS": "monailabel",
            "VESSA_AUDIT_FILE": str(self.folder / f"audit-{place}.jsonl"),
            "XDG_CONFIG_HOME": str(self.folder),
            "XDG_DATA_HOME": str(self.folder),  # place of the jobs, apart from the user's own
            "OMP_NUM_THREADS": "1",
        }
        core = self._cores[place]
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        return self._run([*pinned, sys.executable, "-m", "vessa_server", "serve"], settings)

    def front(self, replicas: int) -> str:
        """Put deploy/nginx, but for port and places in /tmp, before the first replicas; return its URL."""
        binary = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if binary is None:
            raise SystemExit("no nginx on this machine: `make nginx` installs it")
        port, folder = free_port(), self.folder / f"nginx-{replicas}"
        folder.mkdir()
        conf = (ROOT / "deploy" / "nginx" / "nginx.conf").read_text()
        conf = conf.replace("listen 8700;", f"listen 127.0.0.1:{port};").replace(
            "/tmp/nginx", f"{folder}/nginx"
        )
        (folder / "nginx.conf").write_text(conf)
        servers = [
            f"server 127.0.0.1:{port} max_fails=3 fail_timeout=2s;\n" for port in self.ports[:replicas]
        ]
        (folder / "replicas.conf").write_text("".join(servers))
        self._run([binary, "-c", str(folder / "nginx.conf"), "-g", "daemon off;"], {})
        self._wait(port)
        return f"http://127.0.0.1:{port}"

    def _run(self, command: list[str], settings: dict[str, str]) -> "subprocess.Popen[bytes]":
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                bound(command), env=os.environ | settings, stdout=log, stderr=log, cwd=self.folder
            )
        self._started.append(process)
        return process

    def _wait(self, port: int, path: str | None = None, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(process.poll() is None for process in self._started):
            if path is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        return
            else:
                with AnnotatorClient(f"http://127.0.0.1:{port}", KEY, attempts=1) as client:
                    if client.ready():
                        return
            time.sleep(0.2)
        raise SystemExit(f"nothing answers on port {port}:\n{(self.folder / 'log').read_text()[-2000:]}")


def example(seed: int, size: int) -> tuple[Any, Any]:
    """A gray image with one bright square, and its mask, both uint8 (size, size)."""
    rng = np.random.default_rng(seed)
    y, x = rng.integers(size // 8, size // 2, 2)
    mask = np.zeros((size, size), np.uint8)
    mask[y : y + size // 4, x : x + size // 4] = 1
    return rng.integers(0, 90, mask.shape, dtype=np.uint8) + mask * 120, mask


def add(client: AnnotatorClient, bank: str, seed: int, size: int) -> str:
    """Add one template and return its id."""
    image, mask = example(seed, size)
    return client.add_templates(bank, [image], [mask], CLASSES, [f"p{seed}"])[0].id


def seen_at_once(one: AnnotatorClient, other: AnnotatorClient, size: int, rounds: int = 5) -> bool:
    """Check that the other replica uses each new template in its next answer."""
    for i in range(rounds):
        added = add(one, "fresh", 500 + i, size)  # the most similar template of its own image
        answer = other.segment([example(500 + i, size)[0]], bank="fresh")[0]
        if answer.templates["square"][0].id != added or answer.bank_version != i + 1:
            return False
    return True


def throughput(clients: Sequence[AnnotatorClient], images: Sequence[Any], batch: int, threads: int) -> float:
    """Images a second of requests of `batch` images, `threads` at once for each client."""
    parts = [list(images[i : i + batch]) for i in range(0, len(images), batch)]
    pool = ThreadPoolExecutor(threads * len(clients))

    def send(job: tuple[int, list[Any]]) -> None:
        number, part = job
        for answer in clients[number % len(clients)].segment(part, bank="bench"):
            if answer.error is not None:
                raise answer.error

    with pool:
        started = time.perf_counter()
        list(pool.map(send, enumerate(parts)))
        return len(images) / (time.perf_counter() - started)


def lost_by_a_kill(cluster: Cluster, images: Sequence[Any], threads: int = 4) -> tuple[int, int]:
    """Kill -9 the second annotator amid requests through nginx; returns (requests, unanswered ones)."""
    begun = threading.Semaphore(0)

    def send(image: Any) -> bool:
        with cluster.client(attempts=1) as client:  # nginx retries, not the client
            begun.release()
            try:
                return client.segment([image], bank="bench")[0].error is None
            except Exception as error:
                print(f"lost: {error}", file=sys.stderr)
                return False

    with ThreadPoolExecutor(threads) as pool:
        answers = [pool.submit(send, image) for image in images]
        for _ in range(len(images) // 3):
            begun.acquire()
        cluster.annotators[1].kill()
        found = [answer.result() for answer in answers]
    return len(found), found.count(False)


@contextmanager
def share_of_a_core(process: int, share: float) -> Iterator[None]:
    """Hold a process, and all that it starts, to a share of a core, until it has ended."""
    period = 20_000  # microseconds, much shorter than an image
    quota = round(share * period)
    first = Path("/sys/fs/cgroup/cpu")  # version 1 has a tree for each controller, version 2 one for all
    if first.is_dir():
        group = first / f"vessa-{process}"
        limits = {"cpu.cfs_period_us": f"{period}", "cpu.cfs_quota_us": f"{quota}"}
    else:
        group = first.parent / f"vessa-{process}"
        limits = {"cpu.max": f"{quota} {period}"}
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / name).write_text(value)
        for one in family(process):
            (group / "cgroup.procs").write_text(f"{one}")
    except OSError as error:
        raise SystemExit(f"--share needs root and the kernel's cpu control group: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # a group with a live process cannot be removed
            group.rmdir()


def by_share(options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of 1, 2 and 4 replicas, each with a share of a core."""
    counts = (1, 2, 4)
    images = [example(1000 + i, options.size)[0] for i in range(max(counts) * options.images)]
    rates: dict[int, list[float]] = {count: [] for count in counts}
    with (
        ExitStack() as after,
        tempfile.TemporaryDirectory() as folder,
        Cluster(Path(folder), options.weights, [None] * max(counts)) as cluster,
    ):
        urls = {count: cluster.front(count) for count in counts[:-1]} | {counts[-1]: cluster.url}
        fronts = {n: after.enter_context(AnnotatorClient(url, KEY, timeout=300)) for n, url in urls.items()}
        for i in range(3):
            add(fronts[1], "bench", i, options.size)
        for place, annotator in enumerate(cluster.annotators):
            with cluster.client(place) as one:
                one.segment(images[:2], bank="bench")
            after.enter_context(share_of_a_core(annotator.pid, options.share))
        for i in range(options.rounds):
            for count, client in fronts.items():
                some = images[: count * options.images]
                rates[count].append(throughput([client], some, options.batch, 2 * count))
            print(f"round {i}: { ({k: round(v[-1], 2) for k, v in rates.items()}) }", file=sys.stderr)
    medians = {count: statistics.median(values) for count, values in rates.items()}
    return {
        "two_over_one": round(medians[2] / medians[1], 3),
        "four_over_one": round(medians[4] / medians[1], 3),
        "images_per_s": {str(count): round(value, 2) for count, value in medians.items()},
        "share": options.share,
    }


def by_core(options: argparse.Namespace) -> dict[str, Any]:
    """Two replicas, each on a core: images a second, news seen, and what a kill -9 loses."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("bench-scale needs two cores")
    images = [example(1000 + i, options.size)[0] for i in range(2 * options.images)]
    rates: dict[str, list[float]] = {"first": [], "second": [], "both": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(Path(folder), options.weights, cores) as cluster,
        cluster.client(0) as one,
        cluster.client(1) as other,
        cluster.client(timeout=300) as front,
    ):
        seen = seen_at_once(one, other, options.size)
        for i in range(3):
            add(front, "bench", i, options.size)
        for client in (one, other):
            client.segment(images[:2], bank="bench")
        half = images[: options.images]
        for i in range(options.rounds):
            rates["first"].append(throughput([one], half, options.batch, 2))
            rates["second"].append(throughput([other], half, options.batch, 2))
            rates["both"].append(throughput([front], images, options.batch, 4))
            print(f"round {i}: { ({k: round(v[-1], 2) for k, v in rates.items()}) }", file=sys.stderr)
        requests, lost = lost_by_a_kill(cluster, images[:48])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    single = (medians["first"] + medians["second"]) / 2
    return {
        "two_over_one": round(medians["both"] / single, 3),
        "images_per_s": {name: round(value, 2) for name, value in medians.items()},
        "requests_at_kill": requests,
        "lost": lost,
        "seen_at_once": seen,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="of a round, for each replica")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--share", type=float, help="of a core, for each of 1, 2 and 4 replicas")
    options = parser.parse_args()
    print(json.dumps(by_core(options) if options.share is None else by_share(options)))


if __name__ == "__main__":
    main()
