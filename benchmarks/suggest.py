"""Compare banks of three suggested patients with random banks, by VESSA alone.

Every bank holds patients of `splits/train.txt` and annotates every `--every`-th slice of the test patients.
The mean Dice over classes and volumes of those slices is compared. Templates are encoded once. Results are
stored in `--out`, so that a stopped run resumes. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vessa.codec import image_digest
from vessa.datasets import Case, Dataset, open_dataset
from vessa.report.cases import score_labels
from vessa_server.active_learning import POWER, suggest
from vessa_server.inference.annotator import Annotator, load_annotator
from vessa_server.model.geometry import Square, to_tensor
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.template import Template
from vessa_server.types import SegmentItem, TemplateItem

BATCH = 8
POWERS = (1.0, 2.0, 4.0, 8.0, 32.0)


class Bench:
    """The annotator, its templates by patient, and what it scores with a bank."""

    def __init__(self, dataset: Dataset, annotator: Annotator, every: int, kept: Path) -> None:
        self.dataset, self.annotator, self.every, self.kept = dataset, annotator, every, kept
        self.templates: dict[str, list[Template]] = {}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
        self.of = [dataset.name, annotator.model_digest, every]  # key of comparable results
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        same = [line for line in lines if line["of"] == self.of]
        self.known = {(tuple(line["patients"]), line["on"]): line["dice"] for line in same}

    @torch.inference_mode()
    def features(self, patients: Sequence[str]) -> tuple[np.ndarray, list[str], list[np.ndarray]]:
        """Return features (N, D), groups and images of all slices of some patients."""
        slices = [s for s in self.dataset.slices() if s.group in set(patients)]
        images = [self.dataset.image(s) for s in slices]
        model = self.annotator.model
        size = model.preset.segmenter.image_size
        found = [model.retriever(Square(*i.shape[:2]).enter(to_tensor(i), size))[0].numpy() for i in images]
        return np.stack(found), [s.group for s in slices], images

    def dice(self, patients: Sequence[str], on: str) -> float:
        """Return the mean Dice in [0, 1] on a split, by a bank of all annotated slices of some patients."""
        key = (tuple(sorted(patients)), on)
        if key not in self.known:
            self.seed(patients)
            split = set(self.dataset.split(f"{on}.txt"))
            cases = [self.thinned(c) for c in self.dataset.cases() if c.group in split]
            scores = score_labels(self.dataset, cases, {c.name: self.labels(c) for c in cases})
            self.known[key] = float(scores.mean["dice"] or 0.0)
            with self.kept.open("a") as file:
                line = {"of": self.of, "patients": key[0], "on": on, "dice": self.known[key]}
                file.write(json.dumps(line) + "\n")
            print(f"{on} {', '.join(key[0])}: {self.known[key]:.4f}", file=sys.stderr, flush=True)
        return self.known[key]

    def thinned(self, case: Case) -> Case:
        """Return every n-th slice of a case, from the middle of each n."""
        return replace(case, slices=case.slices[self.every // 2 :: self.every])

    def seed(self, patients: Sequence[str]) -> None:
        """Make the bank "suggest" hold these patients' annotated slices and nothing else."""
        if "suggest" in self.annotator.banks.store.names():
            self.annotator.banks.delete("suggest")
        for patient in patients:
            self.annotator.banks.add("suggest", self.encoded(patient))

    def encoded(self, patient: str) -> list[Template]:
        """Encode a patient's annotated slices, once."""
        if patient not in self.templates:
            slices = [s for s in self.dataset.slices() if s.group == patient]
            masks = [self.dataset.mask(s) for s in slices]
            items = [
                TemplateItem(self.dataset.image(s), m, dict(self.dataset.classes), patient)
                for s, m in zip(slices, masks, strict=True)
                if m is not None and m.any()
            ]
            answers = [a for i in items for a in self.annotator.encode_templates([i])]
            self.templates[patient] = [a for a in answers if isinstance(a, Template)]
        return self.templates[patient]

    def labels(self, case: Case) -> list[np.ndarray]:
        """Annotate a case's slices."""
        images = [self.dataset.image(s) for s in case.slices]
        return [labels for labels, _ in self.annotate(images, case.group)]

    def annotate(self, images: Sequence[np.ndarray], group: str | None) -> list[tuple[np.ndarray, float]]:
        """Return labels and the mean confidence in [0, 1] of each image."""
        found = []
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            items = [SegmentItem(image_digest(i), i, "suggest", group=group) for i in part]
            for answer in self.annotator.segment(items):
                if isinstance(answer, Exception):
                    raise answer
                found.append((answer.labels, float(answer.confidence.mean()) / 255))
        return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="acdc, with splits/train.txt, val.txt and test.txt")
    parser.add_argument("--weights", default="nano")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--patients", type=int, default=3)
    parser.add_argument("--every", type=int, default=2, help="every n-th slice is scored; 1 for all")
    parser.add_argument("--tune", action="store_true", help="score every power on val.txt, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/suggest/measured.jsonl"))
    options = parser.parse_args()
    dataset = open_dataset(options.data)
    train = dataset.split("train.txt")
    with tempfile.TemporaryDirectory() as folder:
        banks = TemplateBanks(FolderStore(folder))
        annotator = load_annotator(options.weights, "cpu", banks, 1 << 30)
        bench = Bench(dataset, annotator, options.every, options.out)
        features, groups, images = bench.features(train)
        if options.tune:
            figures: dict[str, object] = {}
            for power in POWERS:
                picks = suggest(features, options.patients, groups=groups, power=power)
                figures[str(power)] = round(bench.dice([p.group for p in picks], "val"), 4)
            print(json.dumps(figures))
            return
        picked = [p.group for p in suggest(features, options.patients, groups=groups)]
        suggested = bench.dice(picked, "test")
        first = dataset.split("labeled_1.txt")[0]
        bench.seed([first])
        others = [i for i, group in enumerate(groups) if group != first]
        sure = np.array([c for _, c in bench.annotate([images[i] for i in others], None)], np.float32)
        templates = np.stack([t.whole.feature for t in bench.encoded(first)])
        more = suggest(
            features[others],
            options.patients - 1,
            covered=templates,
            groups=[groups[i] for i in others],
            confidence=sure,
        )
        grown = [first, *(p.group for p in more)]
        from_one = bench.dice(grown, "test")
        rng = np.random.default_rng(0)
        draws = [
            sorted(rng.choice(sorted(train), options.patients, replace=False)) for _ in range(options.draws)
        ]
        drawn = [bench.dice([str(p) for p in draw], "test") for draw in draws]
    mean = statistics.mean(drawn)
    print(
        json.dumps(
            {
                "suggested": round(suggested, 4),
                "suggested_from_one": round(from_one, 4),
                "random_mean": round(mean, 4),
                "random_std": round(statistics.stdev(drawn), 4),
                "random_best": round(max(drawn), 4),
                "random_worst": round(min(drawn), 4),
                "suggested_over_random": round(suggested / mean, 4),
                "from_one_over_random": round(from_one / mean, 4),
                "beaten": sum(suggested > d for d in drawn),
                "draws": len(drawn),
                "patients": picked,
                "patients_from_one": grown,
                "power": POWER,
                "every": options.every,
                "model": annotator.model_digest,
            }
        )
    )


if __name__ == "__main__":
    main()
