"""Teacher-to-VESSA feedback (paper section 3.2): the teacher's predictions are sent back as prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import nn

from vessa.client import Prompts
from vessa.datasets import Dataset, Slice
from vessa_trainer.config import Config
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.teacher_prompts import prompts_from
from vessa_trainer.semi_supervised.distributed import ALONE, Processes
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import predict_volume


class ComingImages(Protocol):
    """The unlabeled images of a run's coming steps."""

    def items_ahead(self, steps: int) -> list[Slice]:
        """Return the images of the coming steps of all processes, each once, in their order."""
        ...

    def names_ahead(self, steps: int) -> list[str]:
        """Return the names of the images of this process's part of the coming steps, in their order."""
        ...


class FeedbackRounds:
    """Sends predictions on the plain images of the coming steps to the annotator, round by round.

    A round covers whole volumes, since a label is cleaned with its volume. The prompts of a round are stored
    in files until the round is over: a run resumed in the middle of a round uses the same prompts again.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        feed: AnnotationFeed,
        items: Sequence[Slice],
        predict: Callable[[Sequence[Slice]], list[Prompts]],
        processes: Processes = ALONE,
    ) -> None:
        """Plan rounds from `feedback.start` on.

        folder: for the prompts; items: all unlabeled images; predict: prompts of some images
        """
        self.config, self.folder, self._feed, self._predict = config, folder, feed, predict
        self._items, self._processes = {s.name: s for s in items}, processes
        self.first = int(config.feedback.start * config.steps)
        self.sent = 0
        self._round = -1

    def due(self, step: int) -> bool:
        """Tell whether a round begins before this step, or was lost in its middle by a resume."""
        return step >= self.first and self._number(step) != self._round

    def _number(self, step: int) -> int:
        return (step - self.first) // self.config.feedback.every

    def _begin(self, number: int) -> int:
        return self.first + number * self.config.feedback.every

    def _parts(self, number: int) -> list[Path]:
        return sorted(self.folder.glob(f"{number:06d}-*.safetensors"))

    def send_if_due(self, step: int, coming: ComingImages) -> bool:
        """Predict the images of the coming round and request their labels again, if a round begins.

        Of several processes each predicts a share, and requests the labels of its own steps. Returns whether
        a round began.
        """
        if not self.due(step):
            return False
        self._round = self._number(step)
        end = min(self._begin(self._round + 1), self.config.steps)
        names = self._with_volumes([s.name for s in coming.items_ahead(end - step)])
        share = [self._items[n] for n in names[self._processes.rank :: self._processes.count]]
        path = self.folder / f"{self._round:06d}-{self._processes.rank:04d}.safetensors"
        _write(path, [s.name for s in share], self._predict(share))
        self._processes.wait()
        self.sent += self._send(step, coming)
        return True

    def _with_volumes(self, names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(other for name in names for other in self._feed.volume_of(name)))

    def _send(self, step: int, coming: ComingImages) -> int:
        """Request labels with the prompts of the current round, as far as this process's steps need them."""
        names: list[str] = []
        prompts: list[Prompts] = []
        for path in self._parts(self._round):  # mapped from the file, so that memory stays small
            more = _read(path)
            names += more[0]
            prompts += more[1]
        end = min(self._begin(self._round + 1), self.config.steps)
        by_name = dict(zip(names, prompts, strict=True))
        needed = [n for n in self._with_volumes(coming.names_ahead(end - step)) if n in by_name]
        self._feed.refresh(needed, [by_name[n] for n in needed])
        return len(needed)

    def resume(self, step: int, coming: ComingImages) -> None:
        """Request the labels of the interrupted round again; later rounds begin anew."""
        for path in self.folder.glob("*-*.safetensors"):
            if self._begin(int(path.stem.split("-")[0])) >= step:
                path.unlink(missing_ok=True)
        if step > self.first and self._parts(self._number(step)):
            self._round = self._number(step)
            self._send(step, coming)

    def forget_older(self, step: int) -> None:
        """Delete the rounds that a run resumed at this step does not need."""
        for path in self.folder.glob("*-*.safetensors"):
            if int(path.stem.split("-")[0]) < self._number(step):
                path.unlink(missing_ok=True)


def predict_prompts(
    model: nn.Module,
    dataset: Dataset,
    items: Sequence[Slice],
    class_ids: list[int],
    config: Config,
    channels: int,
) -> list[Prompts]:
    """Predict some images by a student or teacher and turn the predictions into prompts.

    class_ids: the K classes of the prompts, in the order of the bank; channels: of the network's input
    """
    prompts: dict[str, Prompts] = {}
    volumes: dict[str, Sequence[Slice]] = {}
    if config.student.neighbors:
        # A slice is predicted from those beside it, whether they are in `items` or not.
        cases = {item.case for item in items}
        volumes = {case.name: case.slices for case in dataset.cases() if case.name in cases}
    else:
        for item in items:
            volumes[item.case] = [*volumes.get(item.case, ()), item]
    for volume in volumes.values():
        predicted = predict_volume(model, [dataset.image(s) for s in volume], config, channels)
        for item, probability in zip(volume, predicted, strict=True):
            prompts[item.name] = prompts_from(probability, class_ids, config.feedback)
    return [prompts[item.name] for item in items]


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
