"""Where DICOM frames lie and how they are shown; classic and enhanced (functional groups) headers alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import Dataset

from vessa.errors import InvalidImage

_EVEN = 0.1  # of the distance between slices: how far one may lie off its place
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes point left and back, NIfTI's right and front

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Frame:
    """One slice. position: of its first pixel, mm, or None.

    rows, columns: directions along a row and down a column; spacing: (down a column, along a row) mm;
    thickness: to the next slice, where there is one slice alone.
    """

    position: Vector | None
    rows: Vector
    columns: Vector
    spacing: tuple[float, float]
    thickness: float
    slope: float
    intercept: float
    window: tuple[float, float] | None

    @property
    def normal(self) -> Vector:
        """The direction across the slice."""
        return np.cross(self.rows, self.columns)


def frames_of(header: Dataset, count: int) -> list[Frame]:
    """Return the frames of one file, in its order."""
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != count:
        raise InvalidImage(f"the DICOM header describes {len(own)} frames and declares {count}")
    if count > 1 and not own:
        header = _without_position(header)  # it would be that of the first frame only
    return [_frame(header, [own[i], shared] if own else [shared]) for i in range(count)]


def _without_position(header: Dataset) -> Dataset:
    plain = Dataset()
    plain.update({e.tag: e for e in header if e.keyword not in ("ImagePositionPatient", "PixelData")})
    return plain


def _frame(header: Dataset, groups: list[Dataset]) -> Frame:
    def item(sequence: str) -> Dataset:
        found = (g.get(sequence) for g in groups)
        return next((s[0] for s in found if s), header)

    position = item("PlanePositionSequence").get("ImagePositionPatient")
    orientation = item("PlaneOrientationSequence").get("ImageOrientationPatient")
    measures, values = item("PixelMeasuresSequence"), item("PixelValueTransformationSequence")
    placed = position is not None and orientation is not None
    directions = np.asarray(orientation if placed else [1, 0, 0, 0, 1, 0], np.float64).reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        raise InvalidImage("the DICOM image's orientation is not two directions at a right angle")
    down, along = (
        float(n) for n in measures.get("PixelSpacing") or header.get("ImagerPixelSpacing") or (1, 1)
    )
    thickness = measures.get("SpacingBetweenSlices") or measures.get("SliceThickness") or 1
    return Frame(
        np.asarray(position, np.float64).reshape(3) if placed else None,
        directions[0],
        directions[1],
        (down, along),
        abs(float(thickness)),
        float(values.get("RescaleSlope", 1) or 1),
        float(values.get("RescaleIntercept", 0) or 0),
        _window(item("FrameVOILUTSequence")),
    )


def _window(source: Dataset) -> tuple[float, float] | None:
    """Return the (low, high) values of the first window (PS3.3 C.11.2.1.2); SIGMOID is shown as if LINEAR."""
    centers, widths = source.get("WindowCenter"), source.get("WindowWidth")
    if centers is None or widths is None or centers == "" or widths == "":
        return None
    center, width = (float(v[0] if isinstance(v, Sequence) else v) for v in (centers, widths))
    if source.get("VOILUTFunction", "LINEAR") == "LINEAR_EXACT":
        return (center - width / 2, center + width / 2) if width > 0 else None
    return (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2) if width > 1 else None


def order_of(frames: list[Frame], files: int) -> list[int]:
    """Return the frames' places, sorted along their normal; InvalidImage when they make no even stack.

    files: how many they come from; the frames of one file may have no position, and stay as they are
    """
    if len(frames) == 1 or (files == 1 and all(frame.position is None for frame in frames)):
        return list(range(len(frames)))
    first = frames[0]
    alike = [(*f.rows, *f.columns, *f.spacing) for f in frames]
    if not np.allclose(alike, alike[0], atol=1e-3):
        raise InvalidImage("the DICOM slices differ in orientation or pixel spacing: they are no one volume")
    heights = np.array([frame.position @ first.normal for frame in frames if frame.position is not None])
    if len(heights) < len(frames):
        raise InvalidImage("a DICOM slice has no position: only a multi-frame file may go without")
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    usual = float(np.median(steps))
    if steps.min() < 1e-3:
        raise InvalidImage("two DICOM slices lie in one place: images of several kinds or times are mixed")
    if (wide := steps > 1.5 * usual).any():
        raise InvalidImage(
            f"DICOM slices are missing: {int(wide.sum())} of {len(steps)} gaps are wider than the usual "
            f"{usual:.3g} mm, the first after slice {int(np.argmax(wide)) + 1} of {len(frames)}"
        )
    if abs(steps - usual).max() > _EVEN * usual:
        raise InvalidImage(f"DICOM slices lie {steps.min():.3g} to {steps.max():.3g} mm apart, not evenly")
    return [int(i) for i in order]


def affine_of(frames: list[Frame]) -> Vector:
    """Return the (4, 4) matrix from (column, row, slice) to mm, RAS+, of slices in order.

    Slices may be shifted against one another evenly, as under a tilted gantry. Without positions the first
    voxel is the origin and slices follow one another by their thickness.
    """
    first, last = frames[0], frames[-1]
    step = first.normal * first.thickness
    if len(frames) > 1 and first.position is not None and last.position is not None:
        step = (last.position - first.position) / (len(frames) - 1)
        off = [
            np.linalg.norm(f.position - first.position - i * step)
            for i, f in enumerate(frames)
            if f.position is not None
        ]
        if max(off) > _EVEN * np.linalg.norm(step):
            raise InvalidImage("the DICOM slices do not lie on one line: they are no one volume")
    affine = np.eye(4)
    affine[:3, 0] = first.rows * first.spacing[1]
    affine[:3, 1] = first.columns * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = 0 if first.position is None else first.position
    return _TO_RAS @ affine
