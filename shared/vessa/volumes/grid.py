"""A volume on its grid, seen as 2-D images along one of its axes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
from pydicom import Dataset

from vessa.errors import InvalidImage, InvalidRequest, TooLarge
from vessa.intensities import robust_range, scale_to_bytes

Axis = Literal["auto", "sagittal", "coronal", "axial"]
AXES: tuple[str, ...] = get_args(Axis)
_PLANES = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
_LONGEST = 32767  # of an axis of a NIfTI-1 file, in which labels are written

Source = Path | bytes
Allocate = Callable[[tuple[int, ...], Any], np.ndarray[Any, Any]]  # of a shape and a dtype, like numpy.empty


@dataclass(frozen=True)
class Bounds:
    """What is read at most, checked against what a header declares before anything is allocated.

    voxels: of a volume; pixels: of one of its slices along the last axis; slices: along that axis, and files
    of a series.
    """

    voxels: int = 1 << 29
    pixels: int = 64 << 20
    slices: int = 4096

    def check(self, shape: tuple[int, ...], what: str) -> None:
        """Raise TooLarge for a volume over a bound, InvalidImage for one without voxels.

        shape: (I, J, K), of whatever numbers a header holds.
        """
        if len(shape) != 3 or min(shape) < 1:
            raise InvalidImage(f"the {what} declares the shape {shape}; expected three axes of 1 or more")
        if shape[0] * shape[1] > self.pixels:
            raise TooLarge(f"the {what} has slices of {shape[0]} x {shape[1]}, more than {self.pixels} px")
        if shape[2] > self.slices:
            raise TooLarge(f"the {what} has {shape[2]} slices, more than the limit of {self.slices}")
        if max(shape) > _LONGEST:
            raise TooLarge(f"the {what} has an axis of {max(shape)}, longer than labels can have: {_LONGEST}")
        if math.prod(shape) > self.voxels:
            raise TooLarge(f"the {what} has {math.prod(shape)} voxels, more than the limit of {self.voxels}")


@dataclass(frozen=True)
class VoiTable:
    """A VOI lookup table. first: value of entry 0; shown: uint8 (N,) gray of each entry."""

    first: float
    shown: np.ndarray[Any, np.dtype[np.uint8]]

    def __eq__(self, other: object) -> bool:
        """Compare the entries."""
        if not isinstance(other, VoiTable):
            return NotImplemented
        return self.first == other.first and np.array_equal(self.shown, other.shown)

    def __hash__(self) -> int:
        """Hash the entries."""
        return hash((self.first, self.shown.tobytes()))


@dataclass(frozen=True)
class Volume:
    """One image on a grid, and how it is shown.

    voxels: float32 (I, J, K) in the file's order, rescaled, or uint8 (I, J, K, 3) RGB
    affine: (4, 4) float64 from indexes to mm, RAS+ as in NIfTI; I, J, K of DICOM are columns, rows, slices
    window: (low, high) values that its makers chose to show, None where they chose none
    inverted: high values are shown dark (MONOCHROME1)
    headers: of its DICOM files, without pixels, in the order of K; a multi-frame file has one
    frames: of a multi-frame file: the frame shown in each slice, counted from 0
    padding: (K, 2) lowest and highest value of each slice that mean "no image here", NaN where there are none
    table: lookup table that its makers chose to show, in place of the window
    measured: `robust_range` where it is known already
    nifti_header: bytes of a NIfTI file's header, whose geometry labels take over
    notes: what was repaired, left out or is missing, one sentence each
    """

    voxels: np.ndarray[Any, Any]
    affine: np.ndarray[Any, np.dtype[np.float64]]
    window: tuple[float, float] | None = None
    inverted: bool = False
    headers: tuple[Dataset, ...] = field(default=(), repr=False)
    frames: tuple[int, ...] = ()
    padding: np.ndarray[Any, np.dtype[np.float32]] | None = None
    table: VoiTable | None = None
    measured: tuple[float, float] | None = None
    nifti_header: bytes = field(default=b"", repr=False)
    notes: tuple[str, ...] = ()

    @property
    def color(self) -> bool:
        """Whether a voxel is RGB."""
        return self.voxels.ndim == 4

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I, J, K)."""
        i, j, k = self.voxels.shape[:3]
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbors along I, J and K, mm."""
        i, j, k = (float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @cached_property
    def shown(self) -> tuple[float, float]:
        """The values shown as 0 and 255: the window, else the `robust_range` without padding."""
        if self.window or self.measured:
            return self.window or self.measured or (0.0, 0.0)
        if self.padding is None:
            return robust_range(self.voxels)
        values = self.voxels[~self._padded(self.voxels, self.padding)]
        return robust_range(values if values.size else self.voxels)

    def axis(self, name: str = "auto") -> int:
        """Return the axis, 0 to 2, along which slices are cut.

        sagittal, coronal, axial: the axis closest to left-right, front-back, head-foot; auto: the images of a
        DICOM as they are; else the axis of a single slice, else the one with the largest spacing, of equal
        ones (within 1 %) that with the fewest slices, then the last.
        """
        if name == "auto":
            if self.headers:
                return 2
            if 1 in self.shape:
                return max(a for a in range(3) if self.shape[a] == 1)
            longest = max(self.spacing) * 0.99
            return min((a for a in range(3) if self.spacing[a] >= longest), key=lambda a: (self.shape[a], -a))
        if name not in AXES:
            raise InvalidRequest(f"the axis must be one of {', '.join(AXES)}, got {name[:40]!r}")
        directions: Any = nib.orientations.aff2axcodes(self.affine)  # type: ignore[no-untyped-call]
        return [_PLANES.get(code) for code in directions].index(name)

    def image(self, axis: int, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return one slice as it is shown, uint8 (H, W) or (H, W, 3).

        Rows run along the later of the other two axes.
        """
        values = slice_of(self.voxels, axis, index)
        if self.color:
            return np.ascontiguousarray(values)
        if self.table is not None:
            place = np.clip(np.rint(values - self.table.first), 0, len(self.table.shown) - 1)
            pixels = self.table.shown[place.astype(np.int64)]
        else:
            pixels = scale_to_bytes(values, *self.shown)
        if self.inverted:
            pixels = 255 - pixels
        if self.padding is not None:
            own = self.padding[index] if axis == 2 else self.padding[:, None]
            pixels[self._padded(values, own)] = 0
        return np.ascontiguousarray(pixels)

    @staticmethod
    def _padded(values: np.ndarray[Any, Any], padding: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = (values >= padding[..., 0]) & (values <= padding[..., 1])
        return found


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Return a new array whose slices along K lie together in memory."""
    return np.empty(shape, dtype, order="F")


def slice_of(array: np.ndarray[Any, Any], axis: int, index: int) -> np.ndarray[Any, Any]:
    """Return the view (H, W[, C]) of slice `index` along an axis of (I, J, K[, C]).

    Writing to it writes the volume.
    """
    selection: list[Any] = [slice(None)] * 3
    selection[axis] = index
    view: np.ndarray[Any, Any] = array[tuple(selection)].swapaxes(0, 1)
    return view


def check_affine(affine: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the affine as float64; InvalidImage when it maps no volume."""
    matrix = np.asarray(affine, np.float64)
    sizes = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all() or (sizes <= 0).any():
        raise InvalidImage(f"the {what}'s geometry is not usable: voxels must have a size along each axis")
    if abs(np.linalg.det(matrix[:3, :3] / sizes)) < 1e-3:
        raise InvalidImage(f"the {what}'s geometry is not usable: two of its axes run in one direction")
    return matrix
