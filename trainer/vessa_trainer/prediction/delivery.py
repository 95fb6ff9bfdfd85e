"""Open what a run delivers: its students, and how validation chose to use them."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from vessa.client import AnnotatorClient
from vessa.errors import InvalidWeights
from vessa_trainer.config import Config, load_config
from vessa_trainer.data.geometry import Geometry
from vessa_trainer.prediction.flips import FlipChoice
from vessa_trainer.prediction.fusion import Fusion, VessaLabels, fuse
from vessa_trainer.prediction.postprocessing import Postprocessing
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_volume

FOLDS = "folds.json"  # in the folder of a cross-validation, written when all folds are trained
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One student. channels: of its input; vessa: the labels that it is fused with, None for none."""

    folder: Path
    model: nn.Module
    config: Config
    channels: int
    vessa: VessaLabels | None = None

    def probabilities(self, images: Sequence[np.ndarray], *, flips: bool) -> list[Tensor]:
        """Predict class probabilities (C, H, W) of the slices of one volume, each at its own size."""
        found = predict_volume(self.model, images, self.config, self.channels, flips=flips)
        if self.vessa is None or not found:
            return found
        labels = self.vessa.of(images)
        return [fuse(*pair, self.vessa.fusion.weight) for pair in zip(found, labels, strict=True)]


@dataclass(frozen=True)
class DeliveredRun:
    """A run's students, whose probabilities are averaged. A cross-validation has one for each fold.

    classes: id to name; geometry: of the training images, None for a run of an earlier version
    flips, postprocessing: chosen on validation
    """

    run: Path
    members: tuple[Member, ...]
    classes: dict[int, str]
    geometry: Geometry | None
    flips: FlipChoice
    postprocessing: Postprocessing

    def probabilities(self, images: Sequence[np.ndarray], *, flips: bool) -> list[Tensor]:
        """Predict class probabilities (C, H, W) of the slices of one volume, each at its own size."""
        each = [one.probabilities(images, flips=flips) for one in self.members]
        return [sum(slices[1:], slices[0]) / len(each) for slices in zip(*each, strict=True)]

    def labels(self, images: Sequence[np.ndarray], *, flips: bool) -> list[np.ndarray]:
        """Predict class ids uint8 (H, W) of the slices of one volume, without post-processing."""
        return [p.argmax(0).byte().numpy() for p in self.probabilities(images, flips=flips)]

    def fused_with(self, client: AnnotatorClient) -> "DeliveredRun":
        """Return the run with each student fused with the annotator's labels; see `prediction.fusion`.

        Raises InvalidConfig for a student that chose no weight, or whose bank the annotator does not hold.
        """
        members, names = [], [self.classes[i] for i in sorted(self.classes)]
        for one in self.members:
            fusion = Fusion.read(one.folder)
            if fusion.after < fusion.before:
                _log.warning(
                    "on validation the student of %s alone was better (Dice %.3f) than fused (%.3f)",
                    one.folder,
                    fusion.before,
                    fusion.after,
                )
            members.append(replace(one, vessa=VessaLabels(client, fusion, names)))
        return replace(self, members=tuple(members))

    @property
    def by_case(self) -> bool:
        """Whether a slice is predicted from the other slices of its case, too."""
        return any(
            one.config.student.window or one.config.student.neighbors or one.vessa is not None
            for one in self.members
        )

    @property
    def stored_ids(self) -> tuple[int, ...]:
        """The ids that masks hold on disk, background first."""
        return tuple(range(max(self.classes) + 1)) if self.geometry is None else self.geometry.stored_ids

    def digest(self) -> str:
        """Return a SHA-256 of all students' weights."""
        found = hashlib.sha256()
        for folder in member_folders(self.run):
            with (folder / checkpoint.BEST).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()


def member_folders(run: Path) -> list[Path]:
    """Return the folders of a run's students: those of its folds, else the run's own.

    Raises InvalidWeights for a cross-validation of which some folds are not trained yet.
    """
    if (run / FOLDS).is_file():
        names: list[str] = json.loads((run / FOLDS).read_text(encoding="utf-8"))["folds"]
        return [run / name for name in names]
    if (run / "fold-0").is_dir() and not (run / checkpoint.BEST).is_file():
        raise InvalidWeights(
            f"{run} is a cross-validation of which not all folds are trained. Resume it, or use one fold: "
            f"{run / 'fold-0'}"
        )
    return [run]


def open_run(run: Path) -> DeliveredRun:
    """Open a finished run, or a cross-validation. Raises InvalidWeights, InvalidConfig."""
    members, classes = [], []
    folders = member_folders(run)
    for folder in folders:
        config = load_config(folder / "config.yaml")
        model, channels, known = load_best(folder, config)
        members.append(Member(folder, model, config, channels))
        classes.append(known)
    if any(known != classes[0] for known in classes):
        raise InvalidWeights(f"the folds of {run} know different classes. Train them again")
    geometry = read_geometry(folders[0])
    return DeliveredRun(
        run, tuple(members), classes[0], geometry, FlipChoice.read(run), Postprocessing.read(run)
    )


def read_geometry(run: Path) -> Geometry | None:
    """Return the geometry of a run's training; None for a run of an earlier version."""
    _, metadata = checkpoint.read(run / checkpoint.BEST)
    if "geometry" not in metadata:
        _log.warning("the run does not record how its images were cut: volumes are cut as --axis says")
        return None
    return Geometry.from_dict(metadata["geometry"])
