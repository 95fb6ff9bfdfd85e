"""Some steps in float64, in as many processes as torchrun started: `exact_steps.py DATA OUT METHOD...`.

Each method has a folder in OUT.

In float64 what rounding makes of a few steps is far below what a wrong term would make.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from vessa.datasets import open_dataset
from vessa_trainer.config import load_config
from vessa_trainer.pseudo_labels.types import LabelBatch, PseudoLabel
from vessa_trainer.semi_supervised import trainer
from vessa_trainer.semi_supervised.distributed import join
from vessa_trainer.students.checkpoint import module_state, write

STEPS = 4


class Truth:
    """Labels each image by its truth; notes who is asked for."""

    def __init__(self, dataset):
        self.dataset, self.asked = dataset, []
        self.by_name = {s.name: s for s in dataset.slices()}

    def take(self, names):
        self.asked.append(list(names))
        masks = [self.dataset.mask(self.by_name[n]) for n in names]
        return LabelBatch([PseudoLabel(m, (200 - 50 * (m > 0)).astype("uint8")) for m in masks])

    def prefetch(self, names):
        """All is here."""

    def stats(self):
        return {"wait_seconds": 0.0}


def in_double(value):
    if isinstance(value, tuple):
        return tuple(in_double(v) for v in value)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def use_double():
    """Let batches be drawn in float64."""
    drawn_labeled, drawn_unlabeled = trainer.labeled_batch, trainer.unlabeled_views

    def unlabeled(*given):
        views = drawn_unlabeled(*given)
        return replace(views, **{k: in_double(v) for k, v in vars(views).items()})

    trainer.labeled_batch = lambda *given: in_double(drawn_labeled(*given))
    trainer.unlabeled_views = unlabeled


def take_steps(data, out, method, processes):
    keys = [
        f"data.root={data}",
        f"out={out}",
        "student.size=32",
        "student.crop=32",
        "student.widths=[4,8,16]",
    ]
    keys += ["semi.conf_threshold=0.3", "views.cutmix_p=1", "batch_labeled=4", "batch_unlabeled=8", "steps=8"]
    keys += ["data.labeled_groups=2", "semi.vessa_threshold=0.7", f"semi.method={method}"]
    dataset = open_dataset(data)
    feed = None if method == "unimatch_v2" else Truth(dataset)
    run = trainer.Run(load_config(None, [*keys, "feedback.prompts=[boxes]"]), dataset, feed, "", processes)
    run.feedback = None
    run.student.double()
    run.teacher.double()
    figures = [{k: v for k, v in run._step().items() if k != "wait_seconds"} for _ in range(STEPS)]
    asked = [] if feed is None else feed.asked
    out.mkdir(parents=True, exist_ok=True)
    (out / f"asked-{processes.rank}.json").write_text(json.dumps(asked))
    if processes.first:
        tensors = module_state(run.student, "student") | module_state(run.teacher, "teacher")
        write(out / "weights.safetensors", tensors, {"figures": figures})
    processes.wait()


def main(data, out, *methods):
    torch.set_num_threads(1)
    use_double()
    processes = join("cpu")
    for method in methods:
        take_steps(data, Path(out) / method, method, processes)


if __name__ == "__main__":
    main(*sys.argv[1:])
