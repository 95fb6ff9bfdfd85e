"""Time one image in the bare annotator: new, seen before, with 3 and with 13 classes.

Kinds are measured in turn in one run without HTTP, so that a noisy machine slows all of them alike;
medians are taken. Each stage's floating-point operations are counted, and compared with what the same
machine reaches in a plain convolution and a plain matrix product. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vessa.codec import image_digest
from vessa_server.inference.annotator import Annotator, load_annotator
from vessa_server.observability.stage_timer import STAGES, StageTimer
from vessa_server.pretraining.data.synthetic import HEART, phantom_study
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem, TemplateItem

FEW, MANY = 3, 13
CONVOLUTIONAL = {"encode"}  # stages compared with a convolution, the others with a matrix product


def seconds(annotator: Annotator, items: list[SegmentItem]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    results = annotator.segment(items)
    elapsed = time.perf_counter() - started
    faults = [r for r in results if isinstance(r, Exception)]
    if faults:
        raise faults[0]
    return elapsed


def disks(seed: int, count: int, side: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` disks of different brightness in the middle of an image: image and mask, uint8 (S, S).

    seed: of the patient, who moves the disks a little
    """
    layout, rng = np.random.default_rng(7), np.random.default_rng([8, seed])
    image, mask = np.full((side, side), 60.0), np.zeros((side, side), np.uint8)
    y, x = np.mgrid[:side, :side]
    for class_id in range(1, MANY + 1):
        center = side / 2 + side / 4 * layout.uniform(-1, 1, 2) + rng.normal(0, 2, 2)
        radius, level = side * layout.uniform(0.03, 0.06), layout.uniform(100, 250)
        inside = np.hypot(y - center[0], x - center[1]) < radius
        image[inside] = level
        mask[inside] = class_id if class_id <= count else 0
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8), mask


class Bench:
    """An annotator with a bank of its own."""

    def __init__(self, weights: str, device: str, folder: Path, templates: list[TemplateItem]) -> None:
        banks = TemplateBanks(FolderStore(folder))
        self.annotator = load_annotator(weights, device, banks, 1 << 30)
        found = self.annotator.encode_templates(templates)
        banks.add("bench", [t for t in found if not isinstance(t, Exception)])
        self.timed = self.annotator._timer

    def counted(self, item: SegmentItem) -> dict[str, int]:
        """Return the floating-point operations of each stage for a new image."""
        operations = dict.fromkeys(STAGES, 0)

        class Counter(StageTimer):
            @contextlib.contextmanager
            def stage(self, name: str) -> Iterator[None]:
                with FlopCounterMode(display=False) as counter:
                    yield
                operations[name] += counter.get_total_flops()

        timer = Counter()
        for part in (
            self.annotator._pipeline,
            self.annotator._pipeline.encoder,
            self.annotator._pipeline.predictor,
        ):
            part._timer = timer
        try:
            seconds(self.annotator, [item])
        finally:
            for part in (
                self.annotator._pipeline,
                self.annotator._pipeline.encoder,
                self.annotator._pipeline.predictor,
            ):
                part._timer = self.timed
        return operations


def peaks(device: str) -> dict[str, float]:
    """Return the operations per second of a plain convolution and a plain matrix product, float32."""

    def rate(call: Callable[[], object], operations: float) -> float:
        best = float("inf")
        for _ in range(12):
            started = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return operations / best

    with torch.inference_mode():
        layer = nn.Conv2d(128, 128, 3, padding=1).to(device, memory_format=torch.channels_last)
        maps = torch.rand(1, 128, 64, 64, device=device).contiguous(memory_format=torch.channels_last)
        matrix = torch.rand(1024, 1024, device=device)
        return {
            "convolution": rate(lambda: layer(maps), 2 * 9 * 128 * 128 * 64 * 64),
            "product": rate(lambda: matrix @ matrix, 2 * 1024**3),
        }


def hearts(count: int) -> tuple[list[TemplateItem], list[SegmentItem]]:
    """Return three templates and `count` query images of phantom hearts."""
    rng = np.random.default_rng(0)
    study = phantom_study("heart", rng, protocol="cine MR", patients=2, slices=count, size=256)
    slices = list(zip(study.images, study.masks, study.groups, strict=True))
    templates = [
        TemplateItem(i, m, HEART, "t") for i, m, g in slices if g == "000" and len(np.unique(m)) == 4
    ]
    return templates[:3], [SegmentItem(image_digest(i), i, "bench") for i, _, g in slices if g == "001"]


def organs(classes: int, count: int) -> tuple[list[TemplateItem], list[SegmentItem]]:
    """Return three templates and `count` query images of `classes` disks."""
    names = {c: f"organ {c}" for c in range(1, classes + 1)}
    templates = [TemplateItem(*disks(seed, classes), names, f"t{seed}") for seed in range(3)]
    images = [disks(100 + seed, classes)[0] for seed in range(count)]
    return templates, [SegmentItem(image_digest(i), i, "bench") for i in images]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:

        def bench(templates: list[TemplateItem]) -> Bench:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            return Bench(options.weights, options.device, Path(folder), templates)

        templates, items = hearts(options.images)
        heart = bench(templates)
        few_templates, few_items = organs(FEW, options.images // 2)
        many_templates, many_items = organs(MANY, options.images // 2)
        few, many = bench(few_templates), bench(many_templates)
        for one, first in ((heart, items[0]), (few, few_items[0]), (many, many_items[0])):
            seconds(one.annotator, [first])  # warm-up
        before = dict(heart.timed.seconds)
        fresh, seen = [], []
        times: dict[int, list[float]] = {FEW: [], MANY: []}
        for index, item in enumerate(items[1:-1]):
            fresh.append(seconds(heart.annotator, [item]))
            seen.append(seconds(heart.annotator, [item]))
            if index % 2 == 0 and index // 2 + 1 < len(few_items):
                times[FEW].append(seconds(few.annotator, [few_items[index // 2 + 1]]))
                times[MANY].append(seconds(many.annotator, [many_items[index // 2 + 1]]))
        spent = {k: (v - before[k]) / len(fresh) for k, v in heart.timed.seconds.items()}
        operations = heart.counted(items[-1])
        rates = peaks(options.device)
        batched = bench(templates)
        throughput = options.batch / seconds(batched.annotator, items[: options.batch])
    ideal = {
        stage: count / rates["convolution" if stage in CONVOLUTIONAL else "product"]
        for stage, count in operations.items()
    }
    stages = {
        stage: {
            "ms": round(1000 * spent[stage], 2),
            "gflop": round(operations[stage] / 1e9, 3),
            "share_of_peak": round(ideal[stage] / spent[stage], 3) if spent[stage] else None,
        }
        for stage in STAGES
    }
    figures = {
        "ms_per_image": round(1000 * statistics.median(fresh), 1),
        "ms_per_seen_image": round(1000 * statistics.median(seen), 1),
        "cached_over_uncached": round(statistics.median(seen) / statistics.median(fresh), 3),
        "thirteen_over_three": round(statistics.median(times[MANY]) / statistics.median(times[FEW]), 3),
        "share_of_peak": round(sum(ideal.values()) / sum(spent.values()), 3),
        "stages": stages,
        "gflop_per_s": {k: round(v / 1e9, 1) for k, v in rates.items()},
        "throughput_per_s": round(throughput, 2),
        "classes": len(HEART),
        "threads": torch.get_num_threads(),
    }
    print(
        f"new image {figures['ms_per_image']} ms, seen image {figures['ms_per_seen_image']} ms",
        file=sys.stderr,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
