"""Cut volumes into the slices that a student knows, and put its masks back on their grid."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from vessa.errors import InvalidDataset, VessaError
from vessa.volumes import Volume, check_dicom_seg, read_volume, write_labels
from vessa.volumes.grid import slice_of
from vessa_trainer.data.geometry import Geometry, orientation_of, turned, turned_back, turned_spacing

_NEAR = 1.5  # factor between the spacing of an image and that of training, from which on it is said


@dataclass(frozen=True)
class VolumeOptions:
    """How volumes are cut and written.

    axis: see `Volume.axis`; auto follows the run's training
    nifti: write NIfTI for DICOM, too
    classes: names of the ids in the masks
    source: what made the labels, for files that say so
    geometry: of the run's training, None for a run that did not record it
    whole_cases: whether a slice is predicted from those of its case: by a region of interest, neighbors as
        channels or labels cleaned by volume
    """

    axis: str
    nifti: bool
    classes: dict[int, str]
    source: str
    geometry: Geometry | None
    whole_cases: bool = False


@dataclass(frozen=True)
class CutVolume:
    """A volume cut as in training. path: a file, or the folder of a DICOM series."""

    path: Path
    options: VolumeOptions

    def images(self, kind: str) -> list[np.ndarray]:
        """Return the slices, uint8 (H, W) each.

        kind: of the labels to come. Raises InvalidDataset for a DICOM that no DICOM SEG can refer to, before
        anything is predicted.
        """
        if kind == "dicom-seg":
            try:
                check_dicom_seg(_read(self.path))
            except VessaError as error:
                raise InvalidDataset(f"{self.path.name}: {error}") from error
        view, along = self._view, self._along
        return [view.image(along, i) for i in range(view.shape[along])]

    def encode(self, labels: Sequence[np.ndarray], kind: str) -> bytes:
        """Return the labels of all slices as a file on the grid of the volume. kind: see `write_labels`."""
        volume = _read(self.path)
        whole = np.zeros(self._view.shape, np.uint8)
        for index, one in enumerate(labels):
            slice_of(whole, self._along, index)[...] = one
        if self._turns_to is not None:
            whole = np.ascontiguousarray(turned_back(whole, volume.affine, self._turns_to))
        return write_labels(volume, whole, self.options.classes, self.options.source, kind)

    def cautions(self) -> list[str]:
        """Return what was repaired or guessed in the file, and what differs from training."""
        return [*_read(self.path).notes, *([text] if (text := self._difference()) else [])]

    def _difference(self) -> str | None:
        """Return what differs from training and cannot be followed, None where nothing does."""
        geometry = self.options.geometry
        if geometry is None:
            return None
        if geometry.axis is None:
            return (
                f"the run was trained on pictures ({geometry.layout}): volumes are cut along the axis that "
                "--axis "
                "says, and their values become uint8 by the volume's percentiles instead of "
                f"{geometry.intensities}"
            )
        if geometry.spacing is None:
            return None
        low, high = geometry.spacing
        spacing = np.delete(self._spacing, self._along)
        if spacing.min() < low / _NEAR or spacing.max() > high * _NEAR:
            return (
                f"its pixels are {spacing.min():.2g} to {spacing.max():.2g} mm apart, those of training "
                f"{low:.2g} to {high:.2g} mm: structures look larger or smaller than what the run learned"
            )
        return None

    @cached_property
    def _turns_to(self) -> str | None:
        """The orientation to turn the volume to; None where it is cut as it is stored."""
        geometry = self.options.geometry
        if self.options.axis != "auto" or geometry is None or not geometry.orientations:
            return None
        own = orientation_of(_read(self.path).affine)
        return None if own in geometry.orientations else geometry.orientations[0]

    @property
    def _view(self) -> Volume:
        volume = _read(self.path)
        if self._turns_to is None:
            return volume
        voxels = turned(volume.voxels, volume.affine, self._turns_to)
        return replace(volume, voxels=np.ascontiguousarray(voxels))

    @cached_property
    def _along(self) -> int:
        geometry = self.options.geometry
        if self.options.axis == "auto" and geometry is not None and geometry.axis is not None:
            return geometry.axis
        return _read(self.path).axis(self.options.axis)

    @property
    def _spacing(self) -> tuple[float, float, float]:
        volume = _read(self.path)
        if self._turns_to is None:
            return volume.spacing
        return turned_spacing(volume.spacing, volume.affine, self._turns_to)


@lru_cache(maxsize=1)
def _read(path: Path) -> Volume:
    try:
        return read_volume(path)
    except VessaError as error:
        raise InvalidDataset(f"{path.name}: {error}") from error
