"""Measure the growth of the service's memory over minutes of mixed load.

Clients segment in every format, add and remove templates, send invalid requests, run jobs, and disconnect
in the middle. The load starts with full batches alone, because the allocator keeps what the largest batch
took, and a later one would look like growth. The slope is a least-squares line through the processes' own
memory after the warm-up. Its 95 % confidence interval uses the means of ten blocks of samples, since
neighboring samples depend on each other. The last line is one JSON object. A slope whose interval lies
above `--most` MiB/h is an error.
"""

import argparse
import collections
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from processes import bound
from scipy import stats
from serving import family

from vessa.codec import MEDIA_TYPE, encode

ROOT = Path(__file__).resolve().parents[1]
SIZE = (96, 96)
_MOST = 8  # images of a request
_FULL_LOAD = 0.1  # share of the time
CLASSES = '{"1": "disk"}'
Array = np.ndarray[Any, np.dtype[np.uint8]]


def example(rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw a gray image with a bright disk, and its mask, both uint8 (H, W)."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    mask = (np.hypot(y - rng.integers(30, 66), x - rng.integers(30, 66)) < 15).astype(np.uint8)
    return np.clip(60 + 120 * mask + rng.normal(0, 12, SIZE), 0, 255).astype(np.uint8), mask


def picture(array: Array, kind: str = "PNG") -> bytes:
    """Encode an array as an image file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


class Load:
    """A client that does one thing after another, drawn at random. counts: answers by what and code."""

    def __init__(self, url: str, key: str, seed: int, counts: "collections.Counter[str]") -> None:
        self.rng, self.url, self.counts = np.random.default_rng(seed), url, counts
        self.bank, self.key = f"soak{seed}", key
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120)
        self.jobs: list[str] = []

    def run(self, until: float, full_until: float) -> None:
        """Work until a moment of time.monotonic(), at first with full batches alone."""
        self.add()
        while time.monotonic() < full_until:
            self.counts[f"batch {self.batch(_MOST)}"] += 1
        ways: list[tuple[Callable[[], Any], float]] = [
            (self.form, 5), (self.batch, 3), (self.by_id, 2), (self.add, 2), (self.remove, 2), (self.bad, 5),
            (self.leave, 3), (self.job, 0.5), (self.look, 2), (self.drop_bank, 0.2),
        ]  # fmt: skip
        weights = np.array([weight for _, weight in ways])
        while time.monotonic() < until:
            way = ways[self.rng.choice(len(ways), p=weights / weights.sum())][0]
            try:
                answer = way()
            except httpx.TransportError as error:
                self.counts[f"{way.__name__} {type(error).__name__}"] += 1
                continue
            self.counts[f"{way.__name__} {answer}"] += 1

    def form(self) -> int:
        """Segment a file, answered in one of the forms."""
        kind = str(self.rng.choice(["PNG", "JPEG", "TIFF"]))
        accept = str(self.rng.choice(["application/json", "image/png", MEDIA_TYPE]))
        files = {"image": ("i", picture(example(self.rng)[0], kind))}
        query = {"overlay": "true"} if self.rng.random() < 0.3 else {}
        data, headers = {"bank": self.bank}, {"Accept": accept}
        return self.http.post("/segment", files=files, data=data, headers=headers, params=query).status_code

    def send(self, path: str, body: bytes) -> int:
        """POST a safetensors body."""
        return self.http.post(path, content=body, headers={"Content-Type": MEDIA_TYPE}).status_code

    def batch(self, least: int = 1) -> int:
        """Segment several images at once."""
        images = np.stack([example(self.rng)[0] for _ in range(int(self.rng.integers(least, _MOST + 1)))])
        return self.send("/segment", encode({"images": images}, {"bank": self.bank}))

    def by_id(self) -> int:
        """Segment an image, then the same by its id with a box."""
        image = example(self.rng)[0]
        answer = self.http.post("/segment", files={"image": ("i", picture(image))}, data={"bank": self.bank})
        if answer.status_code != 200:
            return answer.status_code
        box = np.array([[[20, 20, 70, 70]]], np.float32)
        ids = json.dumps([answer.json()["image_id"]])
        return self.send("/segment", encode({"boxes": box}, {"bank": self.bank, "image_ids": ids}))

    def add(self) -> int:
        """Add a template."""
        image, mask = example(self.rng)
        files = {"image": ("i", picture(image)), "mask": ("m", picture(mask))}
        about = {"bank": self.bank, "group": f"p{self.rng.integers(9)}", "classes": CLASSES}
        return self.http.post("/templates", files=files, data=about).status_code

    def remove(self) -> int:
        """Remove templates until three are left."""
        kept = self.http.get("/templates", params={"bank": self.bank})
        status = kept.status_code
        for template in kept.json()[3:] if status == 200 else []:
            answer = self.http.delete(f"/templates/{template['id']}", params={"bank": self.bank})
            status = answer.status_code
        return status

    def drop_bank(self) -> int:
        """Delete the bank and begin anew."""
        self.http.delete(f"/banks/{self.bank}")
        return self.add()

    def look(self) -> int:
        """Ask for what is there."""
        path = str(
            self.rng.choice(["/info", "/metrics", "/banks", "/openapi.json", "/readyz", "/jobs", "/no"])
        )
        return self.http.get(path).status_code

    def bad(self) -> int:
        """Send what must be refused."""
        whole = picture(example(self.rng)[0])
        noise = self.rng.bytes(int(self.rng.integers(0, 4000)))
        body = encode({"images": np.zeros((1, 8, 8), np.uint8)}, {"bank": self.bank})
        data, file = {"bank": self.bank}, noise if self.rng.random() < 0.5 else whole[: len(noise)]
        choice = int(self.rng.integers(6))
        if choice == 0:
            return self.http.post("/segment", files={"image": ("i", file)}, data=data).status_code
        if choice == 1:
            return self.send("/segment", body[: int(self.rng.integers(len(body)))])
        if choice == 2:
            return self.http.post(
                "/segment", files={"image": ("i", whole)}, data=data | {"boxes": "[[]]"}
            ).status_code
        if choice == 3:
            return self.http.get(
                "/info", headers={"Authorization": f"Bearer {secrets.token_hex(8)}"}
            ).status_code
        if choice == 4:
            return self.http.post("/jobs", files={"image": ("i", file)}, data=data).status_code
        return self.http.get(f"/templates/{secrets.token_hex(32)}", params=data).status_code

    def leave(self) -> str:
        """Send part of a request, or all of it, and go."""
        images = np.stack([example(self.rng)[0] for _ in range(4)])
        body = encode({"images": images}, {"bank": self.bank})
        head = (
            f"POST /segment HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as leaver:
            leaver.sendall(
                (head + body)[: int(self.rng.choice([40, len(head) + 500, len(head) + len(body)]))]
            )
            time.sleep(0.05 * self.rng.random())
        return "left"

    def job(self) -> int:
        """Begin a job with a small NIfTI volume, and forget an older one."""
        import nibabel

        volume = np.stack([example(self.rng)[0] for _ in range(3)], axis=-1)
        image: Any = nibabel.Nifti1Image(volume, np.diag([1, 1, 5, 1]))
        answer = self.http.post(
            "/jobs", files={"image": ("i", image.to_bytes())}, data={"bank": self.bank, "axis": "axial"}
        )
        if answer.status_code == 202:
            self.jobs.append(answer.json()["id"])
        if len(self.jobs) > 2:
            self.http.delete(f"/jobs/{self.jobs.pop(0)}")
        return answer.status_code


def resident(pid: int) -> list[float]:
    """Return the memory that a process and those it has started hold of their own, MiB each.

    Pages of files, which the kernel takes back when others need the memory, do not count.
    """
    told = [Path(f"/proc/{one}/status").read_text() for one in family(pid)]
    own = [re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", text, re.MULTILINE) for text in told]
    return [sum(int(kib) for kib in parts) / 2**10 for parts in own]


def held(url: str, key: str) -> dict[str, float]:
    """Return the bytes that the service says it holds, by where, in MiB."""
    text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}, timeout=30).text
    found = re.findall(r'^vessa_bytes\{where="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {where: round(float(count) / 2**20, 1) for where, count in found}


def slope(samples: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the slope in MiB/h and its 95 % interval. samples: (s, MiB)."""
    blocks = [np.mean(part, axis=0) for part in np.array_split(np.array(samples), 10)]
    x, y = np.array(blocks).T
    fit = stats.linregress(x / 3600, y)
    half = float(stats.t.ppf(0.975, len(blocks) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def start(folder: Path, weights: str) -> tuple[subprocess.Popen[bytes], str, str]:
    """Start the service; its log is in the folder. Returns it with its address and key when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, url = secrets.token_urlsafe(24), f"http://127.0.0.1:{port}"
    settings = {
        "VESSA_API_KEY": key, "VESSA_PORT": str(port), "VESSA_STORE": f"folder:{folder / 'banks'}",
        "VESSA_WEIGHTS": weights, "VESSA_DEVICE": "cpu", "VESSA_THREADS": "1", "OMP_NUM_THREADS": "1",
        # Fill the caches of features and annotations before the slope is measured.
        "VESSA_FEATURE_CACHE_BYTES": str(64 << 20), "VESSA_ANNOTATION_BYTES": str(4 << 20),
        "XDG_CONFIG_HOME": str(folder),
        "VESSA_LOG_LEVEL": "warning",
    }  # fmt: skip
    with (folder / "log").open("w") as log:
        command = bound([sys.executable, "-m", "vessa_server", "serve"])
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return process, url, key
        except httpx.TransportError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the service did not start:\n{(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.5)


def main() -> None:
    """Load the service, sample it, print what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument(
        "--warm-up", type=float, default=0.3, help="share of the time before the slope counts"
    )
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--most", type=float, default=60.0, help="MiB/h")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        process, url, key = start(Path(place), options.weights)
        try:
            first, began = sum(resident(process.pid)), time.monotonic()
            until = began + 60 * options.minutes
            clients = [Load(url, key, seed, counts) for seed in range(options.clients)]
            pool = stack.enter_context(ThreadPoolExecutor(options.clients))
            full_until = began + _FULL_LOAD * 60 * options.minutes
            running = [pool.submit(one.run, until, full_until) for one in clients]
            samples = []
            while not all(one.done() for one in running):
                each = resident(process.pid)
                samples.append((time.monotonic() - began, sum(each)))
                if len(samples) % 60 == 0:
                    parts = " + ".join(f"{mib:.1f}" for mib in each)
                    line = f"{samples[-1][0]:6.0f} s  {samples[-1][1]:7.1f} MiB ({parts})"
                    print(f"{line}  {counts.total()} requests  {held(url, key)}", flush=True)
                time.sleep(1.0)
            for one in running:
                one.result()  # raises the error of a failed client
            ready = httpx.get(f"{url}/readyz", timeout=30).status_code == 200
        finally:
            process.terminate()
            process.wait(60)
        text = (Path(place) / "log").read_text()
    settled = [(s, mib) for s, mib in samples if s >= options.warm_up * 60 * options.minutes]
    grown, low, high = slope(settled)
    failed = sum(count for what, count in counts.items() if what.split()[-1].startswith("5"))
    lost = sum(n for what, n in counts.items() if what.endswith("Error") and not what.startswith("leave"))
    figures = {
        "minutes": options.minutes, "requests": counts.total(), "answers": dict(sorted(counts.items())),
        "server_errors": failed, "lost": lost,
        "tracebacks": text.count("Traceback"), "ready_at_the_end": ready,
        "mib_at_start": round(first, 1), "mib_after_warm_up": round(settled[0][1], 1),
        "mib_at_end": round(settled[-1][1], 1), "mib_most": round(max(mib for _, mib in samples), 1),
        "mib_per_h": round(grown, 1), "mib_per_h_95": [round(low, 1), round(high, 1)],
    }  # fmt: skip
    if text.count("Traceback"):
        print(text[-4000:], file=sys.stderr)
    print(json.dumps(figures))
    if low > options.most or failed or lost or figures["tracebacks"] or not ready:
        sys.exit("the soak found a fault: see the figures")


if __name__ == "__main__":
    main()
