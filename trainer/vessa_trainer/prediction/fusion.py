"""Fuse a student's probabilities with the annotator's labels, by a weight that validation chose."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vessa import atomic_write
from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig, UnknownBank
from vessa_trainer.pseudo_labels.cleaning import clean_labels
from vessa_trainer.pseudo_labels.types import PseudoLabel
from vessa_trainer.pseudo_labels.view_average import label_by_views

FILE = "fusion.json"
WEIGHTS = (0.3, 0.5, 0.7)  # of the annotator, tried on validation
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fusion:
    """How a run's predictions are fused with the annotator's labels.

    weight: of the annotator; before, after: mean validation Dice of the student alone and fused
    bank, bank_digest, model, labels_version: of the annotator that the weight was chosen with
    template_choice, seed: of its requests; views: whether labels are averaged over views of an image
    single: class ids of which cleaning keeps the largest component; None: labels are not cleaned
    """

    weight: float
    before: float
    after: float
    bank: str
    bank_digest: str
    model: str
    labels_version: str
    template_choice: str
    seed: int
    views: bool
    single: list[int] | None

    def write(self, run: Path) -> None:
        """Write the choice into a run's folder."""
        atomic_write.write_text(run / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> "Fusion":
        """Read a run's choice. Raises InvalidConfig for a run that chose none."""
        path = run / FILE
        if not path.is_file():
            raise InvalidConfig(
                f"{run} has no {FILE}: it was trained without an annotator, without validation masks, or by "
                "an earlier version. Predict without --with-vessa, or train with --method vessa"
            )
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def fuse(probability: Tensor, label: PseudoLabel, weight: float) -> Tensor:
    """Average class probabilities (C, H, W) with those of a label.

    Where the annotator knows nothing (confidence 0) the student decides alone.
    weight: of the annotator, in [0, 1]
    """
    theirs = torch.from_numpy(label.probabilities(range(len(probability))))
    share = weight * torch.from_numpy(label.confidence > 0)
    return (1 - share) * probability + share * theirs


class VessaLabels:
    """Request the annotator's labels of new images as a run's training did."""

    def __init__(self, client: AnnotatorClient, fusion: Fusion, classes: Sequence[str]) -> None:
        """Check the annotator. classes: names, in the order of the class ids.

        Logs a warning where it is not the one that the weight was chosen with. Raises InvalidConfig when it
        does not hold the run's bank.
        """
        self._client, self._classes, self.fusion = client, list(classes), fusion
        try:
            bank = client.bank(fusion.bank)
        except UnknownBank as error:
            raise InvalidConfig(
                f"the annotator at {client.url} holds no bank '{fusion.bank}' for this key. Start the "
                "annotator that the run was trained with, or fill the bank with `vessa seed`"
            ) from error
        info = client.info()
        pairs = {
            "model": (fusion.model, info.model),
            "labels_version": (fusion.labels_version, info.labels_version),
            "bank digest": (fusion.bank_digest, bank.digest),
        }
        changes = [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]
        if changes:
            _log.warning(
                "the weight %s was chosen with another annotator (%s)", fusion.weight, "; ".join(changes)
            )

    def of(self, images: Sequence[np.ndarray]) -> list[PseudoLabel]:
        """Return the labels of the slices of one volume. Raises VessaError where one of them fails."""
        if self.fusion.views:
            labels = label_by_views(images, range(len(self._classes) + 1), self._request)
        else:
            labels = self._request(images)
        return labels if self.fusion.single is None else clean_labels(labels, self.fusion.single)[0]

    def _request(self, images: Sequence[np.ndarray]) -> list[PseudoLabel]:
        answers = self._client.segment(
            images=list(images),
            bank=self.fusion.bank,
            classes=self._classes,
            template_choice=self.fusion.template_choice,  # type: ignore[arg-type]
            seed=self.fusion.seed,
        )
        labels = []
        for answer in answers:
            if answer.error is not None:
                raise answer.error
            assert answer.labels is not None
            assert answer.confidence is not None
            labels.append(PseudoLabel(answer.labels, answer.confidence))
        return labels
