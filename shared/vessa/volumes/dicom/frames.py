"""Place DICOM frames in space; classic, classic multi-frame and enhanced headers alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom import Dataset

from vessa.errors import InvalidImage

_EVEN = 0.1  # of the distance between slices: how far one may lie off its place
_ROUNDED = 0.11  # mm, of positions written with one decimal
_DIRECTION = 0.02  # of direction cosines written with two decimals
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM's axes point left and back, NIfTI's right and front
_TIME = {0x00181063, 0x00181065, 0x00540010, 0x00540100, 0x00540060}  # frame time and its vectors
_ANGLE = {0x00540090, 0x00540050}  # of projections: angular view, rotation

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SlicePlane:
    """One slice in space.

    position: of its first pixel, mm, or None; rows, columns: unit directions along a row and down a column;
    spacing: (down a column, along a row) mm; thickness: mm to the next slice, where there is one slice alone.
    """

    position: Vector | None
    rows: Vector
    columns: Vector
    spacing: tuple[float, float]
    thickness: float

    @property
    def normal(self) -> Vector:
        """The direction across the slice."""
        return np.cross(self.rows, self.columns)


def frames_of(header: Dataset, count: int) -> tuple[list[SlicePlane], list[str]]:
    """Return the frames of one file in its order, and notes on what is missing.

    Where one position is stated for all frames (classic multi-frame), the others follow it along the normal
    by GridFrameOffsetVector, SpacingBetweenSlices (its sign counts) or SliceThickness.
    """
    notes: list[str] = []
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    own = header.get("PerFrameFunctionalGroupsSequence") or []
    if own and len(own) != count:
        raise InvalidImage(f"the DICOM header describes {len(own)} frames and declares {count}")
    placed = any("PlanePositionSequence" in group for group in own)
    if count == 1 or placed:
        return [_frame(header, [*own[i : i + 1], shared], notes) for i in range(count)], _once(notes)
    first = _frame(header, [*own[:1], shared], notes)
    steps = _steps(header, first, count, notes)
    frames = [
        SlicePlane(
            None if first.position is None or steps is None else first.position + steps[i] * first.normal,
            first.rows, first.columns, first.spacing, first.thickness,
        )
        for i in range(count)
    ]  # fmt: skip
    return frames, _once(notes)


def _once(notes: list[str]) -> list[str]:
    return list(dict.fromkeys(notes))


def _steps(header: Dataset, first: SlicePlane, count: int, notes: list[str]) -> list[float] | None:
    """Return each frame's distance from the first along the normal, mm; None when frames are no stack."""
    pointer = header.get("FrameIncrementPointer")
    pointers = {
        int(tag) for tag in (pointer if isinstance(pointer, Sequence) else [pointer]) if tag is not None
    }
    if pointers & (_TIME | _ANGLE) and "GridFrameOffsetVector" not in header:
        what = "time" if pointers & _TIME else "angle"
        notes.append(f"the DICOM frames differ in {what}, not in place: they are no volume in space")
        return None
    offsets = header.get("GridFrameOffsetVector")
    if offsets is not None and len(offsets) == count:
        values = [float(value) for value in offsets]
        return [value - values[0] for value in values]  # relative, or absolute as PS3.3 C.8.8.3.2 allows
    between = header.get("SpacingBetweenSlices")
    step = float(between) if between not in (None, "") else 0.0
    if step == 0:
        step = first.thickness
        if first.position is not None:
            notes.append(f"the DICOM file states no distance between its frames; {step:g} mm is assumed")
    return [i * step for i in range(count)]


def _frame(header: Dataset, groups: list[Dataset], notes: list[str]) -> SlicePlane:
    def item(sequence: str) -> Dataset:
        found = (g.get(sequence) for g in groups)
        return next((s[0] for s in found if s), header)

    detector = (header.get("DetectorInformationSequence") or [Dataset()])[0]  # nuclear medicine
    position = item("PlanePositionSequence").get("ImagePositionPatient") or detector.get(
        "ImagePositionPatient"
    )
    orientation = item("PlaneOrientationSequence").get("ImageOrientationPatient") or detector.get(
        "ImageOrientationPatient"
    )
    placed = bool(position) and bool(orientation)
    if not placed:
        notes.append("the DICOM file states no position or orientation: its place in the patient is unknown")
    directions = np.asarray(orientation if placed else [1, 0, 0, 0, 1, 0], np.float64).reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), atol=_DIRECTION):
        raise InvalidImage("the DICOM image's orientation is not two directions at a right angle")
    rows = directions[0] / np.linalg.norm(directions[0])
    columns = directions[1] - (directions[1] @ rows) * rows
    measures = item("PixelMeasuresSequence")
    return SlicePlane(
        np.asarray(position, np.float64).reshape(3) if placed else None,
        rows,
        columns / np.linalg.norm(columns),
        _spacing(header, measures, notes),
        _positive(measures, "SpacingBetweenSlices") or _positive(measures, "SliceThickness") or 1.0,
    )


def _positive(source: Dataset, name: str) -> float | None:
    value = source.get(name)
    return abs(float(value)) or None if value not in (None, "") else None


def _spacing(header: Dataset, measures: Dataset, notes: list[str]) -> tuple[float, float]:
    stated = (
        measures.get("PixelSpacing")
        or header.get("ImagerPixelSpacing")
        or header.get("NominalScannedPixelSpacing")
    )
    down, along = (float(n) for n in stated) if stated else (0.0, 0.0)
    if down > 0 and along > 0 and np.isfinite([down, along]).all():
        if not measures.get("PixelSpacing"):
            notes.append("the DICOM file has no PixelSpacing; the detector's pixel spacing is used")
        return down, along
    ratio = header.get("PixelAspectRatio")
    vertical, horizontal = (float(n) for n in ratio) if ratio else (1.0, 1.0)
    notes.append("the DICOM file has no usable PixelSpacing: sizes in mm are unknown, and 1 is written")
    return (vertical / horizontal, 1.0) if vertical > 0 and horizontal > 0 else (1.0, 1.0)


def order_of(frames: list[SlicePlane], files: int) -> list[int]:
    """Return the frames' places, sorted along their normal; InvalidImage when they make no even stack.

    files: how many they come from; the frames of one file may have no position, and stay as they are
    """
    if len(frames) == 1 or (files == 1 and all(frame.position is None for frame in frames)):
        return list(range(len(frames)))
    first = frames[0]
    directions = [(*f.rows, *f.columns) for f in frames]
    spacings = np.array([f.spacing for f in frames])
    if not np.allclose(directions, directions[0], atol=_DIRECTION) or not np.allclose(
        spacings, spacings[0], rtol=0.01, atol=0
    ):
        raise InvalidImage("the DICOM slices differ in orientation or pixel spacing: they are no one volume")
    heights = np.array([frame.position @ first.normal for frame in frames if frame.position is not None])
    if len(heights) < len(frames):
        raise InvalidImage("a DICOM slice has no position: only a multi-frame file may go without")
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    usual = float(np.median(steps))
    if steps.min() <= max(1e-5, 0.02 * usual):
        raise InvalidImage(
            f"{int((steps <= max(1e-5, 0.02 * usual)).sum()) + 1} of {len(frames)} DICOM slices lie "
            "in one place: "
            "images of several kinds or times are mixed. Give one of them alone"
        )
    if (wide := steps > 1.5 * usual).any():
        raise InvalidImage(
            f"DICOM slices are missing: {int(wide.sum())} of {len(steps)} gaps are wider than the usual "
            f"{usual:.3g} mm, the first after slice {int(np.argmax(wide)) + 1} of {len(frames)}"
        )
    if abs(steps - usual).max() > _tolerance(usual):
        raise InvalidImage(f"DICOM slices lie {steps.min():.3g} to {steps.max():.3g} mm apart, not evenly")
    return [int(i) for i in order]


def _tolerance(step: float) -> float:
    """Return how far a slice may lie off its place, mm."""
    return max(_EVEN * step, min(_ROUNDED, 0.25 * step))


def affine_of(frames: list[SlicePlane]) -> tuple[Vector, list[str]]:
    """Return the (4, 4) matrix from (column, row, slice) to mm, RAS+, of slices in order; and notes.

    Slices may be shifted against one another evenly, as under a tilted gantry. Without positions the first
    voxel is the origin and slices follow one another by their thickness.
    """
    first, last, notes = frames[0], frames[-1], []
    step = first.normal * first.thickness
    if len(frames) > 1 and first.position is not None and last.position is not None:
        step = (last.position - first.position) / (len(frames) - 1)
        length = float(np.linalg.norm(step))
        off = [
            np.linalg.norm(f.position - first.position - i * step)
            for i, f in enumerate(frames)
            if f.position is not None
        ]
        if max(off) > _tolerance(length):
            raise InvalidImage("the DICOM slices do not lie on one line: they are no one volume")
        along = float(step @ first.normal)
        if np.linalg.norm(step - along * first.normal) * (len(frames) - 1) <= min(_ROUNDED, length):
            step = along * first.normal  # rounded positions, not a tilted gantry
        else:
            tilt = float(np.degrees(np.arccos(np.clip(abs(along) / length, 0, 1))))
            notes.append(
                f"the slices are shifted by {tilt:.3g} degrees (tilted gantry): a NIfTI or NRRD of "
                "the labels is "
                "sheared, which ITK readers (3D Slicer, ITK-SNAP) refuse; DICOM SEG is read by all"
            )
    affine = np.eye(4)
    affine[:3, 0] = first.rows * first.spacing[1]
    affine[:3, 1] = first.columns * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = 0 if first.position is None else first.position
    return _TO_RAS @ affine, notes
