"""Measure the annotator's time for one image with three classes, new and cached.

Both kinds are measured in turn in one run of the bare annotator (no HTTP), so that a noisy machine
slows both alike. Medians count. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

from vessa.codec import image_digest
from vessa_server.inference.annotator import Annotator, load_annotator
from vessa_server.pretraining.data.synthetic import HEART, phantom_study
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem, TemplateItem


def seconds(annotator: Annotator, items: list[SegmentItem]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    results = annotator.segment(items)
    elapsed = time.perf_counter() - started
    faults = [r for r in results if isinstance(r, Exception)]
    if faults:
        raise faults[0]
    return elapsed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    study = phantom_study(
        "heart", np.random.default_rng(0), protocol="cine MR", patients=2, slices=options.images, size=256
    )
    with tempfile.TemporaryDirectory() as folder:
        banks = TemplateBanks(FolderStore(folder))
        annotator = load_annotator(options.weights, options.device, banks, 1 << 30)
        templates = [
            TemplateItem(i, m, HEART, "template")
            for i, m, g in zip(study.images, study.masks, study.groups, strict=True)
            if g == "000" and len(np.unique(m)) == 4
        ][:3]
        banks.add("bench", [t for t in annotator.encode_templates(templates) if not isinstance(t, Exception)])
        images = [i for i, g in zip(study.images, study.groups, strict=True) if g == "001"]
        items = [SegmentItem(image_digest(i), i, "bench") for i in images]
        seconds(annotator, items[:1])  # warm-up
        fresh, seen = [], []
        for item in items[1:]:
            fresh.append(seconds(annotator, [item]))
            seen.append(seconds(annotator, [item]))
        batched = seconds(
            load_annotator(options.weights, options.device, banks, 1 << 30), items[: options.batch]
        )
    figures = {
        "ms_per_image": round(1000 * statistics.median(fresh), 1),
        "ms_per_seen_image": round(1000 * statistics.median(seen), 1),
        "cached_over_uncached": round(statistics.median(seen) / statistics.median(fresh), 3),
        "throughput_per_s": round(options.batch / batched, 2),
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
