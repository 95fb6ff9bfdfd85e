"""Teacher-to-VESSA feedback (paper section 3.2): what the teacher knows becomes prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vessa.client import Prompts
from vessa.datasets import Slice
from vessa_trainer.config import Config
from vessa_trainer.pseudo_labels.teacher_prompts import prompts_from
from vessa_trainer.students import checkpoint

if TYPE_CHECKING:
    from vessa_trainer.semi_supervised.trainer import Run


class FeedbackRounds:
    """Sends the source's predictions on the plain images of the coming steps, every so many steps.

    The prompts of a round are kept in files until it is over: a run that is taken up in the middle of a
    round goes on with the very prompts that it had.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        """Plan rounds from `feedback.start` on. folder: for the prompts."""
        self.config, self.folder = config, folder
        self.first = int(config.feedback.start * config.steps)
        self.sent = 0
        self._round = -1

    def due(self, step: int) -> bool:
        """Whether a round begins before this step; after a resume without its file also in its middle."""
        return step >= self.first and self._number(step) != self._round

    def _number(self, step: int) -> int:
        return (step - self.first) // self.config.feedback.every

    def _begin(self, number: int) -> int:
        return self.first + number * self.config.feedback.every

    def _parts(self, number: int) -> list[Path]:
        return sorted(self.folder.glob(f"{number:06d}-*.safetensors"))

    def send_if_due(self, run: "Run") -> None:
        """Predict the images of the coming round and ask the annotator to look again.

        Of several processes each predicts a share, and asks for the images of its own steps.
        """
        if not self.due(run.step) or run.unlabeled is None or run.unlabeled_order is None or run.feed is None:
            return
        self._round = self._number(run.step)
        end = min(self._begin(self._round + 1), self.config.steps)
        coming = run.unlabeled_order.ahead(run.step, end - run.step)
        items = [run.unlabeled.slices[r] for r in dict.fromkeys(r for batch in coming for r in batch)]
        share = items[run.processes.rank :: run.processes.count]
        path = self.folder / f"{self._round:06d}-{run.processes.rank:04d}.safetensors"
        _write(path, [s.name for s in share], predicted_prompts(run, share))
        run.processes.wait()
        self.sent += self._send(run)
        run.student.train()

    def _send(self, run: "Run") -> int:
        """Ask with the prompts of the round under way, as far as this process's steps need them."""
        assert run.feed is not None
        names: list[str] = []
        prompts: list[Prompts] = []
        for path in self._parts(self._round):  # mapped from the file, so that memory stays small
            more = _read(path)
            names += more[0]
            prompts += more[1]
        end = min(self._begin(self._round + 1), self.config.steps)
        by_name = dict(zip(names, prompts, strict=True))
        needed = [n for n in dict.fromkeys(run.names_ahead(end - run.step)) if n in by_name]
        run.feed.refresh(needed, [by_name[n] for n in needed])
        return len(needed)

    def take_up(self, run: "Run") -> None:
        """Ask again for the labels of the round that a run was stopped in; it begins later ones anew."""
        for path in self.folder.glob("*-*.safetensors"):
            if self._begin(int(path.stem.split("-")[0])) >= run.step:
                path.unlink(missing_ok=True)
        if run.step > self.first and self._parts(self._number(run.step)):
            self._round = self._number(run.step)
            self._send(run)

    def forget_older(self, step: int) -> None:
        """Delete rounds that a run taken up at this step has no use for."""
        for path in self.folder.glob("*-*.safetensors"):
            if int(path.stem.split("-")[0]) < self._number(step):
                path.unlink(missing_ok=True)


def predicted_prompts(run: "Run", items: Sequence[Slice]) -> list[Prompts]:
    """Prompts for some slices from what the source of feedback predicts on them."""
    from vessa_trainer.students.inference import predict_slice

    assert run.feed is not None
    config = run.config
    model = run.teacher if config.feedback.source == "teacher" else run.student
    prompts = []
    for start in range(0, len(items), config.batch_eval):
        images = [run.dataset.image(s) for s in items[start : start + config.batch_eval]]
        predicted = predict_slice(model, images, config, run.channels)
        prompts += [prompts_from(p, run.feed.class_ids, config.feedback) for p in predicted]
    return prompts


def _write(path: Path, names: Sequence[str], prompts: Sequence[Prompts]) -> None:
    tensors = {
        f"{index}.{kind}": torch.from_numpy(value)
        for index, one in enumerate(prompts)
        for kind, value in vars(one).items()
        if value is not None
    }
    checkpoint.write(path, tensors, {"names": list(names)})


def _read(path: Path) -> tuple[list[str], list[Prompts]]:
    tensors, metadata = checkpoint.read(path)
    fields: list[dict[str, np.ndarray]] = [{} for _ in metadata["names"]]
    for key, value in tensors.items():
        index, kind = key.split(".")
        fields[int(index)][kind] = value.numpy()
    return metadata["names"], [Prompts(**one) for one in fields]
