"""The labels of a volume, with the volume that they were made of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vessa import atomic_write
from vessa.answers.notebook import answer_html, png_of
from vessa.errors import BadResponse, InvalidRequest
from vessa.masks.overlay import overlay as draw_overlay
from vessa.volumes import Volume, read_volume, write_labels
from vessa.volumes.files import format_of
from vessa.volumes.grid import slice_of

Labels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, repr=False)
class LabeledVolume:
    """The annotator's result for a volume.

    labels: uint8 (I, J, K) with the bank's class ids, 0 is background, on the grid of `volume`
    volume: the image, read from its file
    classes: id to name
    model: digest of the annotator's weights
    notes: what was repaired in the files or is missing from them
    """

    labels: Labels
    volume: Volume
    classes: dict[int, str]
    model: str = ""
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return one line: the shape and the size of each class."""
        shape = " x ".join(map(str, self.volume.shape))
        sizes = "; ".join(f"{name}: {size:.1f} ml" for name, size in self.milliliters().items())
        return f"LabeledVolume({shape}; {sizes or 'no class'})"

    def milliliters(self) -> dict[str, float]:
        """Return class name to volume, ml."""
        voxel = abs(float(np.linalg.det(self.volume.affine[:3, :3]))) / 1000
        counts = np.bincount(self.labels.ravel(), minlength=256)
        return {name: float(counts[class_id]) * voxel for class_id, name in self.classes.items()}

    def overlay(self, index: int | None = None, axis: str = "auto") -> Labels:
        """Draw the labels over one slice; returns uint8 (H, W, 3).

        index: of the slice; None: the slice with the largest labelled area
        axis: auto, axial, coronal or sagittal
        Raises InvalidRequest for a slice outside of the volume.
        """
        cut = self.volume.axis(axis)
        count = self.volume.shape[cut]
        if index is None:
            areas = (self.labels > 0).sum(tuple(a for a in range(3) if a != cut))
            index = int(areas.argmax()) if areas.any() else count // 2
        if not 0 <= index < count:
            raise InvalidRequest(f"The volume has slices 0 to {count - 1} along this axis, got {index}.")
        labels = np.ascontiguousarray(slice_of(self.labels, cut, index))
        return draw_overlay(self.volume.image(cut, index), labels)

    def save(self, path: Path | str) -> None:
        """Write the labels on the grid of the volume.

        path: ends in .nii.gz, .seg.nrrd or .nrrd, or in .dcm for a DICOM SEG, which needs a DICOM volume
        Raises InvalidRequest for another suffix, and for a DICOM SEG of other files.
        """
        kind = format_of(Path(path).name)
        data = write_labels(self.volume, self.labels, self.classes, self.model[:16], kind)
        atomic_write.write_bytes(Path(path), data)

    def _repr_png_(self) -> bytes:
        """Show the slice with the largest labelled area in notebooks."""
        return png_of(self.overlay())

    def _repr_html_(self) -> str:
        """Show that slice and the size of each class in notebooks."""
        sizes = self.milliliters()
        rows = [(class_id, (name, f"{sizes[name]:.1f}")) for class_id, name in self.classes.items()]
        return answer_html(("class", "ml"), rows, self._repr_png_(), " ".join(self.notes))


def labels_of(data: bytes, shape: tuple[int, int, int]) -> Labels:
    """Return the labels of a NIfTI file, uint8 (I, J, K). Raises BadResponse for another shape."""
    voxels = read_volume([data]).voxels
    if voxels.shape != shape:
        raise BadResponse(f"The annotator returned labels of the shape {voxels.shape} for a volume {shape}.")
    labels: Labels = np.rint(voxels).astype(np.uint8)
    return labels
