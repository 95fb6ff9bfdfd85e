"""Record how a run's images were cut and scaled, so that prediction follows it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import nibabel as nib
import numpy as np

from vessa.datasets import Case, Dataset, NnUnet, Ssl4mis
from vessa.volumes.grid import Bounds
from vessa.volumes.nifti import read_nifti_header
from vessa_trainer.data.training_data import TrainingData

NNUNET_AXIS = 2  # along which nnU-Net data sets are cut, see `vessa.datasets.NnUnet`
_RULES = {
    "volume": "uint8 by the volume's window, else by its 0.5 and 99.5 percentiles",
    "case": "uint8 by the smallest and largest value of the case",
    "stored": "8-bit values as stored",
}


@dataclass(frozen=True)
class Geometry:
    """The way in which training images were read from their files.

    layout: class of the data set
    axis: array axis along which volumes were cut, None for pictures
    orientations: of the training volumes, such as "LPS"
    intensities: how values became uint8
    spacing: smallest and largest pixel spacing in the slices, mm, None where unknown
    stored_ids: the ids that predicted masks hold, background first
    channel: number of the channel that was read
    """

    layout: str
    axis: int | None
    orientations: tuple[str, ...]
    intensities: str
    spacing: tuple[float, float] | None
    stored_ids: tuple[int, ...]
    channel: int = 0

    @property
    def volumes(self) -> bool:
        """Tell whether a case is a volume whose slices lie on each other, also when it is predicted."""
        return self.layout in (NnUnet.__name__, Ssl4mis.__name__)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint's metadata."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Geometry":
        """Read what `to_dict` returned."""
        spacing = data["spacing"]
        return cls(
            data["layout"],
            data["axis"],
            tuple(data["orientations"]),
            data["intensities"],
            None if spacing is None else (spacing[0], spacing[1]),
            tuple(data["stored_ids"]),
            data["channel"],
        )


def orientation_of(affine: np.ndarray) -> str:
    """Return the directions of a volume's axes, such as "LPS"."""
    codes: Any = nib.orientations.aff2axcodes(affine)
    return "".join(code or "?" for code in codes)


def turned(array: np.ndarray, affine: np.ndarray, orientation: str) -> np.ndarray:
    """Turn a volume (I, J, K) so that its axes run along an orientation; nothing is resampled."""
    return _turn(array, _orientation(affine), _target(orientation))


def turned_back(array: np.ndarray, affine: np.ndarray, orientation: str) -> np.ndarray:
    """Undo `turned`: return the array in the order of the volume with this affine."""
    return _turn(array, _target(orientation), _orientation(affine))


def turned_spacing(
    spacing: tuple[float, float, float], affine: np.ndarray, orientation: str
) -> tuple[float, float, float]:
    """Return the spacing along the axes of a volume that `turned` has turned."""
    transform: Any = nib.orientations.ornt_transform(_orientation(affine), _target(orientation))
    found = [0.0, 0.0, 0.0]
    for own, (axis, _) in zip(spacing, transform, strict=True):
        found[int(axis)] = own
    return found[0], found[1], found[2]


def _orientation(affine: np.ndarray) -> Any:
    return nib.orientations.io_orientation(affine)


def _target(orientation: str) -> Any:
    return nib.orientations.axcodes2ornt(tuple(orientation))


def _turn(array: np.ndarray, start: Any, end: Any) -> np.ndarray:
    transform: Any = nib.orientations.ornt_transform(start, end)
    found: np.ndarray = nib.orientations.apply_orientation(array, transform)
    return found


def geometry_of(dataset: Dataset, cases: Sequence[Case]) -> Geometry:
    """Record the geometry of the cases that a run learns from."""
    source = dataset.source if isinstance(dataset, TrainingData) else dataset
    stored_ids = dataset.stored_ids if isinstance(dataset, TrainingData) else (0, *sorted(dataset.classes))
    spacings = [s for case in cases if case.spacing is not None for s in case.spacing[1:]]
    orientations: set[str] = set()
    if isinstance(source, NnUnet):
        orientations = {
            orientation_of(read_nifti_header(source.volume_path(case), Bounds()).affine) for case in cases
        }
    rule = "volume" if isinstance(source, NnUnet) else "case" if isinstance(source, Ssl4mis) else "stored"
    return Geometry(
        layout=type(source).__name__,
        axis=NNUNET_AXIS if isinstance(source, NnUnet) else None,
        orientations=tuple(sorted(orientations)),
        intensities=_RULES[rule],
        spacing=(min(spacings), max(spacings)) if spacings else None,
        stored_ids=stored_ids,
        channel=source.channel if isinstance(source, NnUnet) else 0,
    )
