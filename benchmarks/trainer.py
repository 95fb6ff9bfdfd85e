"""Measure the trainer's step, its waiting for labels, and the cost of cached labels.

Each figure compares two things measured in turn in one run, so that a busy machine slows both alike:
- step_over_upstream: our step with bf16: true over UniMatch V2's own as rewritten in `upstream_step.py`, same
  network, crop, batch and threads; step_over_upstream_float32 is ours without bfloat16.
- label_wait_share: share of the wall time of VESSA-assisted steps beside a real annotator with the shipped
  weights. The warm-up is one step more than the trainer looks ahead. Then come images without a label
  (label_wait_share_first_pass), and then labels requested again with feedback.
- redis_batch_over_step: one batch of those labels from a real Redis, unpacked, over our step.
- cached_over_raw_bytes: a cached label over the class probabilities as float32.
The last line is one JSON object.
"""

import argparse
import json
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from serving import annotator, free_port, running
from upstream_step import Sample, UpstreamStep

from vessa.client import AnnotatorClient
from vessa.datasets import Dataset, open_dataset
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_trainer.config import Config, load_config
from vessa_trainer.data.splits import read_splits, slices_of
from vessa_trainer.pseudo_labels.cache import FolderCache, RedisCache, pack
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.template_bank import seed_labeled
from vessa_trainer.pseudo_labels.types import PseudoLabel
from vessa_trainer.semi_supervised.trainer import Run
from vessa_trainer.students.networks import build_student


def say(text: str) -> None:
    """Tell a person what goes on."""
    print(text, file=sys.stderr, flush=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def annotating(folder: Path, weights: str, threads: int) -> Iterator[AnnotatorClient]:
    """A client of a real annotator in a process of its own."""
    settings = {"VESSA_WEIGHTS": weights, "VESSA_THREADS": str(threads)}
    with annotator(folder, **settings) as (url, key), AnnotatorClient(url, key) as client:
        yield client


@contextmanager
def redis_cache(folder: Path) -> Iterator[RedisCache]:
    """A label cache in a Redis of the benchmark's own."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise RuntimeError("no redis-server on this machine: `make redis` installs it")
    port = free_port()
    cache = RedisCache(f"redis://127.0.0.1:{port}/0", None)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with running(command, folder / "redis.log", listens):
        yield cache
        cache.close()


def config_of(options: argparse.Namespace, data: Path, out: Path, *overrides: str) -> Config:
    """The trainer's defaults with the benchmark's data, batch and threads."""
    return load_config(
        None,
        [
            f"data.root={json.dumps(str(data))}",
            f"out={json.dumps(str(out))}",
            f"student.size={options.size}",
            f"student.crop={options.size}",
            f"batch_labeled={options.batch}",
            f"batch_unlabeled={options.batch}",
            f"threads={options.threads}",
            *overrides,
        ],
    )


def upstream(config: Config, dataset: Dataset, channels: int) -> UpstreamStep:
    """The re-stated step on the same images, network, crop and batch."""
    splits = read_splits(dataset, config.data)

    def files(groups: tuple[str, ...], masks: bool) -> list[Sample]:
        return [
            Sample(
                dataset.root / "images" / f"{s.name}.png",
                dataset.root / "masks" / f"{s.name}.png" if masks else None,
            )
            for s in slices_of(dataset, groups)
        ]

    torch.manual_seed(config.seed)
    network = build_student(config.student, channels, max(dataset.classes) + 1)
    return UpstreamStep(
        network,
        files(splits.labeled, True),
        files(splits.unlabeled, False),
        size=config.student.size,
        crop=config.student.crop,
        batch=config.batch_labeled,
        scale=config.views.scale,
        lr=config.optim.lr,
        seed=config.seed,
    )


def compare_steps(options: argparse.Namespace, data: Path, out: Path) -> dict[str, Any]:
    """Median times of the re-stated step and of ours, and the median of their ratios."""
    dataset = open_dataset(data)
    runs = {
        name: Run(
            config_of(options, data, out / name, "semi.method=unimatch_v2", f"bf16={bf16}"), dataset, None, ""
        )
        for name, bf16 in (("ours", "true"), ("ours_float32", "false"))
    }
    theirs = upstream(runs["ours"].config, dataset, runs["ours"].channels)
    steps: dict[str, Callable[[], object]] = {"upstream": theirs, **{n: r._step for n, r in runs.items()}}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.warmup + options.steps):
        elapsed = {name: seconds(step) for name, step in steps.items()}
        say(f"step {turn}: " + ", ".join(f"{name} {value:.3f} s" for name, value in elapsed.items()))
        if turn >= options.warmup:
            for name, value in elapsed.items():
                taken[name].append(value)

    def ratio(name: str) -> float:
        return statistics.median(o / u for o, u in zip(taken[name], taken["upstream"], strict=True))

    return {
        "step_over_upstream": round(ratio("ours"), 3),
        "step_over_upstream_float32": round(ratio("ours_float32"), 3),
        "step_s": round(statistics.median(taken["ours"]), 3),
        "upstream_step_s": round(statistics.median(taken["upstream"]), 3),
    }


def assisted(
    options: argparse.Namespace, data: Path, folder: Path
) -> tuple[dict[str, Any], list[PseudoLabel]]:
    """VESSA-assisted steps beside a real annotator: shares of waiting, and the labels that came."""
    dataset = open_dataset(data)
    images = len(slices_of(dataset, read_splits(dataset, load_config(None).data).unlabeled))
    first_pass = -(-images // options.batch)
    warm = load_config(None).annotator.lookahead_batches + 1
    if first_pass <= warm:
        raise ValueError(f"{images} unlabeled images are {first_pass} batches; expected more than {warm}")
    total = first_pass + options.assisted_steps
    config = config_of(
        options,
        data,
        folder / "assisted",
        "semi.method=vessa",
        "bf16=true",
        f"steps={total}",
        f"feedback.start={(first_pass + options.assisted_steps // 4) / total:.4f}",
        f"feedback.every={max(1, options.assisted_steps // 4)}",
    )
    with annotating(folder, options.weights, options.threads) as client:
        bank = seed_labeled(client, dataset, config)
        feed = AnnotationFeed(client, dataset, bank, FolderCache(folder / "labels"), config.annotator)
        try:
            run = Run(config, dataset, feed, "")
            walls, waits = [], []
            for step in range(total):
                before = run.waited
                walls.append(seconds(run._step))
                waits.append(run.waited - before)
                name = "warm-up" if step < warm else "first pass" if step < first_pass else "feedback"
                say(f"{name} step {step}: {walls[-1]:.3f} s, of which waited {waits[-1]:.3f} s")
            names = [s.name for s in slices_of(dataset, run.splits.unlabeled)]
            labels, stats = feed.get(names), feed.stats()
        finally:
            feed.close()
    figures = {
        "label_wait_share": round(sum(waits[warm:]) / sum(walls[warm:]), 4),
        "label_wait_share_first_pass": round(sum(waits[warm:first_pass]) / sum(walls[warm:first_pass]), 4),
        "assisted_step_s": round(statistics.median(walls[first_pass:]), 3),
        "labels_refreshed": int(stats["refreshed"]),
    }
    return figures, labels


def cache_cost(
    options: argparse.Namespace, labels: list[PseudoLabel], classes: int, folder: Path
) -> dict[str, Any]:
    """Seconds of one batch from Redis, and bytes of a cached label over those of its float maps."""
    keyed = {secrets.token_hex(32): label for label in labels}
    raw = sum(4 * (classes + 1) * label.labels.size for label in labels)
    cached = sum(len(pack(label)) for label in labels)
    with redis_cache(folder) as cache:
        cache.put(keyed)
        keys, taken = list(keyed), []
        for start in range(0, len(keys) - options.batch + 1, options.batch):
            wanted = keys[start : start + options.batch]
            taken.append(seconds(lambda wanted=wanted: cache.get(wanted)))
            if any(label is None for label in cache.get(wanted)):
                raise RuntimeError("Redis lost a label")
    return {
        "redis_batch_s": round(statistics.median(taken), 5),
        "cached_over_raw_bytes": round(cached / raw, 4),
        "cached_bytes": round(cached / len(labels)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="PNG data folder; synthetic hearts unless given")
    parser.add_argument("--weights", default="nano", help="of the annotator")
    parser.add_argument("--patients", type=int, default=40, help="synthetic ones, six images each")
    parser.add_argument("--size", type=int, default=160, help="side of images and crops, px")
    parser.add_argument("--batch", type=int, default=8, help="labeled images a step, and as many unlabeled")
    parser.add_argument("--threads", type=int, default=1, help="of both steps, and of the annotator")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each kind")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind before those")
    parser.add_argument("--assisted-steps", type=int, default=32, help="after the first pass")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, data = Path(place), options.data
        if data is None:
            write_phantoms(
                folder / "phantoms", patients=options.patients, slices=6, size=options.size, seed=0
            )
            data = folder / "phantoms" / "heart"
        figures = compare_steps(options, data, folder)
        waiting, labels = assisted(options, data, folder)
        figures |= waiting | cache_cost(options, labels, len(open_dataset(data).classes), folder)
    figures["redis_batch_over_step"] = round(figures["redis_batch_s"] / figures["step_s"], 4)
    figures |= {"crop": options.size, "batch": options.batch, "threads": options.threads}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
