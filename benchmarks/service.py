"""Measure the service against the bare model: cost of HTTP, gain of batches, behavior under overload.

One run uses the same weights and images for the bare annotator in a loop, the service, the service with
batches of one, and LitServe around the same annotator (`litserve_peer.py`). Each server is a process of its
own with one computing thread, which leaves a core to the clients. Servers take turns in rounds, and the
median over the rounds counts. The last line is one JSON object.

    http_over_bare              images/s in binary batches through HTTP over those of the loop
    batched_over_single         16 clients with one image each: our batches over batches of one
    over_litserve               the same clients: our service over LitServe with batching
    prompts_only_over_full      the same clients: requests/s with points on cached images over requests/s
                                with new images; ..._alone: one client, by its waiting time
    p99_overload_over_capacity  p99 of answered requests at three times the capacity over p99 with as many
                                clients as the service admits
    refused_without_retry_after, lost      counts of the requests under overload
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

os.environ["OMP_NUM_THREADS"] = (
    "1"  # read by torch and OpenBLAS when they are imported, here and in the servers
)

import httpx
import numpy as np
from serving import Served, annotator, answers, free_port, paused, running

from vessa.client import AnnotatorClient, AsyncAnnotatorClient
from vessa.client.types import Annotation, Prompts
from vessa.codec import image_digest
from vessa.errors import QueueFull, VessaError
from vessa.masks.geometry import box_and_point
from vessa_server.pretraining.data.synthetic import HEART, phantom_study

ROOT = Path(__file__).resolve().parents[1]
BANK = "bench"
MAX_BATCH, WAIT_S = 8, 0.005
POINTINGS = 4  # requests with points on each image
TURNS = 3  # of the compared servers in each round; short, since a shared machine drifts
Image = np.ndarray[Any, np.dtype[np.uint8]]


class Images:
    """Phantom slices without end: each is one of a study, with noise of its own, so that none is held."""

    def __init__(self, size: int) -> None:
        self._rng = np.random.default_rng(1)
        study = phantom_study(
            "heart", np.random.default_rng(0), protocol="cine MR", patients=2, slices=24, size=size
        )
        rows = list(zip(study.images, study.masks, study.groups, strict=True))
        self.templates = [(i, m) for i, m, g in rows if g == "000" and len(np.unique(m)) == 4][:3]
        self._plain = [i for i, _, g in rows if g == "001"]

    def take(self, count: int) -> list[Image]:
        """Return images that nobody has seen."""
        return [self._fresh(self._plain[i % len(self._plain)]) for i in range(count)]

    def _fresh(self, image: Image) -> Image:
        noise = self._rng.integers(-2, 3, image.shape)
        return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)


@dataclass
class Load:
    """Outcomes of requests. seconds: times of the answered ones."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    without_retry_after: int = 0
    lost: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.seconds + other.seconds,
            self.refused + other.refused,
            self.without_retry_after + other.without_retry_after,
            self.lost + other.lost,
        )

    @property
    def p99(self) -> float:
        """The time that one in a hundred exceeds, s."""
        return float(np.percentile(self.seconds, 99))


@contextlib.contextmanager
def annotating(folder: Path, name: str, options: argparse.Namespace, batch: int) -> Iterator[Served]:
    """Run the service with batches of at most `batch`; yields its address and its key."""
    settings = {
        "VESSA_WEIGHTS": options.weights,
        "VESSA_THREADS": "1",
        "VESSA_MAX_BATCH": str(batch),
        "VESSA_BATCH_WAIT_S": str(WAIT_S),
        "VESSA_MAX_REQUESTS": str(options.clients),
    }
    with annotator(folder, name, **settings) as place:
        yield place


@contextlib.contextmanager
def litserve(folder: Path, options: argparse.Namespace) -> Iterator[Served]:
    """Run LitServe on the same bank and weights; yields its address, without a key."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "benchmarks/litserve_peer.py", str(port), str(folder / "banks")]
    command += [options.weights, str(MAX_BATCH), str(WAIT_S)]
    with running(command, folder / "litserve.log", lambda: answers(f"{url}/health")) as process:
        yield Served(url, "", process)


def bare_loop(folder: Path, options: argparse.Namespace) -> Callable[[list[Image]], float]:
    """Load the annotator into this process; returns what times a loop of batches over images."""
    from vessa_server.inference.annotator import load_annotator
    from vessa_server.template_bank.bank import TemplateBanks
    from vessa_server.template_bank.folder_store import FolderStore
    from vessa_server.types import SegmentItem

    bare = load_annotator(options.weights, "cpu", TemplateBanks(FolderStore(folder / "banks")), 1 << 29)

    def seconds(images: list[Image]) -> float:
        items = [SegmentItem(image_digest(image), image, BANK) for image in images]
        started = time.perf_counter()
        for start in range(0, len(items), MAX_BATCH):
            for result in bare.segment(items[start : start + MAX_BATCH]):
                if isinstance(result, Exception):
                    raise result
        return time.perf_counter() - started

    return seconds


def through_http(client: AnnotatorClient, images: list[Image]) -> tuple[float, list[Annotation]]:
    """Time a call of the client that fails for no image."""
    started = time.perf_counter()
    answers = client.segment(images, bank=BANK)
    seconds = time.perf_counter() - started
    check(answers)
    return seconds, answers


def check(answers: list[Annotation]) -> None:
    """Raise the first error among answers."""
    for answer in answers:
        if answer.error is not None:
            raise answer.error


Send = Callable[[Image], Awaitable[None]]
_T = TypeVar("_T")


async def crowd(send: Callable[[_T], Awaitable[None]], images: list[_T], clients: int) -> float:
    """Return the seconds that `clients` at once take for all images, each sending one after another."""

    async def one(own: list[_T]) -> None:
        for image in own:
            await send(image)

    started = time.perf_counter()
    await asyncio.gather(*(one(images[i::clients]) for i in range(clients)))
    return time.perf_counter() - started


def ours(client: AsyncAnnotatorClient) -> Send:
    """Send one image to the service."""

    async def send(image: Image) -> None:
        check(await client.segment([image], bank=BANK))

    return send


def theirs(http: httpx.AsyncClient) -> Send:
    """Send one image to LitServe and read its answer."""

    async def send(image: Image) -> None:
        body = {"image": base64.b64encode(image).decode(), "shape": image.shape, "bank": BANK}
        response = await http.post("/predict", json=body)
        answer = response.raise_for_status().json()
        for name in ("labels", "confidence"):
            np.frombuffer(base64.b64decode(answer[name]), np.uint8).reshape(answer["shape"])

    return send


async def concurrent(
    batched: Served, single: Served, peer: Served, images: Images, options: argparse.Namespace
) -> list[tuple[float, float, float]]:
    """Time the crowd at the service, at the one with batches of one, and at LitServe, in turn."""
    async with (
        AsyncAnnotatorClient(*batched, timeout=600) as first,
        AsyncAnnotatorClient(*single, timeout=600) as second,
        httpx.AsyncClient(base_url=peer.url, timeout=600) as third,
    ):
        senders = [ours(first), ours(second), theirs(third)]
        for send in senders:
            await crowd(send, images.take(options.clients), options.clients)  # warm-up
        rounds = []
        for turn in range(TURNS * options.rounds):
            some = images.take(2 * options.clients)
            times = [0.0, 0.0, 0.0]
            for place in range(3):
                which = (place + turn) % 3  # no server is always first
                with paused(*(s.process for i, s in enumerate((batched, single, peer)) if i != which)):
                    times[which] = await crowd(senders[which], some, options.clients)
            rounds.append((times[0], times[1], times[2]))
        return rounds


def points_on(answer: Annotation) -> Prompts:
    """Return a point in each class of an answer."""
    assert answer.labels is not None
    points = np.full((len(HEART), 1, 2), -1, np.float32)
    given = np.full((len(HEART), 1), -1, np.int8)
    for row, class_id in enumerate(answer.classes):
        if (answer.labels == class_id).any():
            points[row, 0], given[row, 0] = box_and_point(answer.labels == class_id)[1], 1
    return Prompts(points=points, point_labels=given)


def prompted(client: AnnotatorClient, images: Images, rounds: int) -> list[tuple[float, float]]:
    """Time a request with a new image and one with points on it, for one image after another."""
    pairs = []
    for image in images.take(rounds + 1):
        full, answers = through_http(client, [image])
        prompts = [points_on(answers[0])]
        started = time.perf_counter()
        check(client.segment(bank=BANK, image_ids=[answers[0].image_id], prompts=prompts))
        pairs.append((full, time.perf_counter() - started))
    return pairs[1:]  # the first was the warm-up


async def prompted_crowd(
    place: Served, images: Images, options: argparse.Namespace
) -> list[tuple[float, float]]:
    """Time the crowd with new images, then with points on the same ones."""
    async with AsyncAnnotatorClient(*place, timeout=600) as client:
        pairs = []
        for _ in range(options.rounds + 1):
            seen: dict[str, Annotation] = {}

            async def full(image: Image, seen: dict[str, Annotation] = seen) -> None:
                (answer,) = await client.segment([image], bank=BANK)
                check([answer])
                seen[answer.image_id] = answer

            some = images.take(options.clients * options.each)
            seconds = await crowd(full, some, options.clients)
            points = {image_id: [points_on(answer)] for image_id, answer in seen.items()}

            async def again(image_id: str, points: dict[str, list[Prompts]] = points) -> None:
                check(await client.segment(bank=BANK, image_ids=[image_id], prompts=points[image_id]))

            # several times, because the start and end of a short round dominate it
            pairs.append((seconds, await crowd(again, POINTINGS * list(points), options.clients) / POINTINGS))
        return pairs[1:]  # the first was the warm-up


async def attempt(client: AsyncAnnotatorClient, image: Image, load: Load) -> None:
    """Send one image once, and note what becomes of it."""
    started = time.perf_counter()
    try:
        check(await client.segment([image], bank=BANK))
        load.seconds.append(time.perf_counter() - started)
    except QueueFull as error:
        load.refused += 1
        load.without_retry_after += error.retry_after is None
    except VessaError as error:
        print(f"lost: {error}", file=sys.stderr)
        load.lost += 1


async def overload(place: Served, images: Images, options: argparse.Namespace) -> tuple[Load, Load]:
    """Load the service with as many clients as it admits, then with three times the rate that it bore."""
    calm, crowded = Load(), Load()
    async with AsyncAnnotatorClient(*place, timeout=600, attempts=1) as client:
        count = options.clients * options.each
        for _ in range(options.overload_rounds):
            some, own = images.take(count), Load()

            async def send(image: Image, load: Load = own) -> None:
                await attempt(client, image, load)

            seconds = await crowd(send, some, options.clients)
            calm += own
            pause, tasks = seconds / (3 * count), []
            due = time.perf_counter()
            for image in images.take(3 * count):
                tasks.append(asyncio.create_task(attempt(client, image, crowded)))
                due += pause
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await asyncio.gather(*tasks)
    return calm, crowded


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run everything, return the figures."""
    images = Images(options.size)
    with contextlib.ExitStack() as servers:
        batched = servers.enter_context(annotating(folder, "batched", options, MAX_BATCH))
        with AnnotatorClient(*batched, timeout=600) as client:
            pictures, masks = zip(*images.templates, strict=True)
            client.add_templates(BANK, list(pictures), list(masks), HEART, ["template"] * len(pictures))
            loop = bare_loop(folder, options)
            loop(images.take(MAX_BATCH))
            through_http(client, images.take(MAX_BATCH))
            pairs = []
            for _ in range(options.rounds):
                some = images.take(options.batch)
                pairs.append((loop(some), through_http(client, some)[0]))
            say("bare and HTTP", pairs)
            full = prompted(client, images, 4 * options.rounds)
            say("full and prompts alone", full)
            crowded_prompts = asyncio.run(prompted_crowd(batched, images, options))
            say("clients with new images, with points on them", crowded_prompts)
    # A fresh server, as the others are: full caches cost a few per cent.
    with contextlib.ExitStack() as servers:
        batched = servers.enter_context(annotating(folder, "crowded", options, MAX_BATCH))
        single = servers.enter_context(annotating(folder, "single", options, 1))
        peer = servers.enter_context(litserve(folder, options))
        crowds = asyncio.run(concurrent(batched, single, peer, images, options))
        say("batches, batches of one, LitServe", crowds)
        with paused(single.process, peer.process):
            calm, crowded = asyncio.run(overload(batched, images, options))
    return {
        "http_over_bare": median(bare / http for bare, http in pairs),
        "batched_over_single": median(one / ours for ours, one, _ in crowds),
        "over_litserve": median(peer / ours for ours, _, peer in crowds),
        "prompts_only_over_full": median(whole / alone for whole, alone in crowded_prompts),
        "prompts_only_over_full_alone": median(whole / alone for whole, alone in full),
        "p99_overload_over_capacity": round(crowded.p99 / calm.p99, 3),
        "refused_without_retry_after": crowded.without_retry_after + calm.without_retry_after,
        "lost": crowded.lost + calm.lost,
        "refused": crowded.refused,
        "answered": len(crowded.seconds),
        "bare_images_per_s": median(options.batch / bare for bare, _ in pairs),
        "p99_capacity_s": round(calm.p99, 3),
        "full_ms": median(1000 * whole for whole, _ in full),
        "prompts_only_ms": median(1000 * alone for _, alone in full),
        "threads": 1,
        "clients": options.clients,
        "max_batch": MAX_BATCH,
    }


def median(values: Iterator[float]) -> float:
    """Return the median, rounded."""
    return round(statistics.median(values), 3)


def say(what: str, rows: list[Any]) -> None:
    """Print each round's seconds."""
    for row in rows:
        print(f"{what}: {'  '.join(f'{value:.3f} s' for value in row)}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--size", type=int, default=256, help="px, side of the images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--overload-rounds", type=int, default=3)
    parser.add_argument(
        "--batch", type=int, default=64, help="images of a round through HTTP and in the loop"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--each", type=int, default=6, help="images that each client sends in a round")
    parser.add_argument("--quick", action="store_true", help="as little as shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.rounds = options.overload_rounds = options.each = 1
        options.batch, options.clients, options.size = 4, 4, 96
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
