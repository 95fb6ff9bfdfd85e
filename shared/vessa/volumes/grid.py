"""A volume on its grid, seen as 2-D images along one of its axes."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
from pydicom import Dataset

from vessa.errors import InvalidImage, InvalidRequest, TooLarge
from vessa.images import robust_range, scale_to_bytes

Axis = Literal["auto", "sagittal", "coronal", "axial"]
AXES: tuple[str, ...] = get_args(Axis)
_PLANES = {"L": "sagittal", "R": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}
_LONGEST = 32767  # of an axis of a NIfTI-1 file, in which labels are written

Source = Path | bytes


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
class Volume:
    """One scalar image on a grid, and how it is shown.

    voxels: (I, J, K) float32, in the file's order, rescaled; affine: (4, 4) float64 from indexes to mm, RAS+
    as in NIfTI. A DICOM's columns, rows and slices are I, J and K. window: (low, high) that its makers chose
    to be shown, None where they chose none; inverted: high values are shown dark (MONOCHROME1). headers: of
    its DICOM files, without pixels, in the order of K; a multi-frame file is one, and `frames` holds the
    place of each slice in it.
    """

    voxels: np.ndarray[Any, np.dtype[np.float32]]
    affine: np.ndarray[Any, np.dtype[np.float64]]
    window: tuple[float, float] | None = None
    inverted: bool = False
    headers: tuple[Dataset, ...] = field(default=(), repr=False)
    frames: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(I, J, K)."""
        i, j, k = self.voxels.shape
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbors along I, J and K, mm."""
        i, j, k = (float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return i, j, k

    @cached_property
    def shown(self) -> tuple[float, float]:
        """The values shown as 0 and 255: the window, else the volume's `robust_range`."""
        return self.window or robust_range(self.voxels)

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
        """Return one slice as it is shown, uint8 (H, W); rows run along the later of the other two axes."""
        pixels = scale_to_bytes(slice_of(self.voxels, axis, index), *self.shown)
        return np.ascontiguousarray(255 - pixels if self.inverted else pixels)


def slice_of(array: np.ndarray[Any, Any], axis: int, index: int) -> np.ndarray[Any, Any]:
    """Return the view (H, W) of slice `index` along an axis of (I, J, K); writing to it writes the volume."""
    selection: list[Any] = [slice(None)] * 3
    selection[axis] = index
    view: np.ndarray[Any, Any] = array[tuple(selection)]
    return view.T


def check_affine(affine: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the affine as float64; InvalidImage when it maps no volume."""
    matrix = np.asarray(affine, np.float64)
    sizes = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all() or (sizes <= 0).any():
        raise InvalidImage(f"the {what}'s geometry is not usable: voxels must have a size along each axis")
    if abs(np.linalg.det(matrix[:3, :3] / sizes)) < 1e-3:
        raise InvalidImage(f"the {what}'s geometry is not usable: two of its axes run in one direction")
    return matrix
