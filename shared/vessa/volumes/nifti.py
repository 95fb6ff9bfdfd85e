"""NIfTI files, read from bounded streams and written as bytes."""

import gzip
import io
import math
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import nibabel as nib
import numpy as np

from vessa.errors import InvalidImage
from vessa.volumes.grid import Bounds, Source, Volume, check_affine

_HEADERS: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MM = {"meter": 1000.0, "micron": 0.001}  # a file that names no unit is taken for one in mm
_MAX_OFFSET = 1 << 20  # bytes before the voxels, extensions with them


@dataclass(frozen=True)
class NiftiHeader:
    """What a NIfTI file says of its voxels. shape: (I, J, K); affine: (4, 4) float64, mm, RAS+."""

    shape: tuple[int, int, int]
    affine: np.ndarray[Any, np.dtype[np.float64]]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float


def is_nifti(head: bytes) -> bool:
    """Whether a file begins as NIfTI does, compressed or not."""
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(31).decompress(head, 352)
        except zlib.error:
            return False
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    return bool(sizes & _HEADERS.keys()) and (
        head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2")
    )


def read_nifti_header(source: Source, bounds: Bounds) -> NiftiHeader:
    """Read a header alone; InvalidImage, TooLarge."""
    with ExitStack() as stack:
        return _header(_read(_open(source, stack), 540), bounds)


def read_nifti(source: Source, bounds: Bounds) -> Volume:
    """Read a 3-D NIfTI-1 or NIfTI-2 file, gzip or plain, rescaled; InvalidImage, TooLarge."""
    with ExitStack() as stack:
        stream = _open(source, stack)
        head = _read(stream, 540)
        header = _header(head, bounds)
        size = math.prod(header.shape) * header.dtype.itemsize
        data = head + _read(stream, max(header.offset + size - len(head), 0))
    if len(data) < header.offset + size:
        raise InvalidImage("the NIfTI file is cut off: its voxels do not fill the shape that it declares")
    stored = np.frombuffer(data, header.dtype, math.prod(header.shape), header.offset)
    voxels = stored.reshape(header.shape, order="F").astype(np.float32)
    if (header.slope, header.intercept) != (1.0, 0.0):
        voxels = voxels * np.float32(header.slope) + np.float32(header.intercept)
    if not np.isfinite(voxels).all():
        raise InvalidImage("the NIfTI file holds voxels that are not finite numbers")
    return Volume(voxels, header.affine)


def nifti_bytes(
    labels: np.ndarray[Any, np.dtype[np.uint8]], affine: np.ndarray[Any, np.dtype[np.float64]]
) -> bytes:
    """Return a .nii.gz file of labels, uint8 (I, J, K) class ids, on the grid of an affine."""
    image: Any = nib.Nifti1Image(labels, affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    data: bytes = image.to_bytes()
    return gzip.compress(data, compresslevel=6, mtime=0)


def _open(source: Source, stack: ExitStack) -> IO[bytes]:
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream: Any = stack.enter_context(gzip.GzipFile(fileobj=file)) if packed else file
    return stream  # type: ignore[no-any-return]


def _read(stream: IO[bytes], count: int) -> bytes:
    """Return `count` bytes, or fewer at the end."""
    try:
        return stream.read(count)
    except (OSError, EOFError, zlib.error):
        raise InvalidImage("the NIfTI file is damaged or cut off: its gzip data cannot be read") from None


def _header(head: bytes, bounds: Bounds) -> NiftiHeader:
    sizes = [int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")]
    size = next((s for s in sizes if s in _HEADERS), 0)
    if not size or len(head) < size:
        raise InvalidImage("the file is no NIfTI: it does not begin with a NIfTI-1 or NIfTI-2 header")
    try:
        header = _HEADERS[size](head[:size], check=False)
        magic = bytes(header["magic"])[:3]
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset, affine = float(header["vox_offset"]), header.get_best_affine()
        scale = _MM.get(header.get_xyzt_units()[0], 1.0)
        slope, intercept = header.get_slope_inter()
    except Exception:  # nibabel fails in many ways on hostile headers
        raise InvalidImage("the NIfTI header is damaged: its fields contradict one another") from None
    if magic not in (b"n+1", b"n+2"):
        raise InvalidImage("the NIfTI header is of a pair of files; save it as one .nii or .nii.gz")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InvalidImage(f"the NIfTI file has {len(shape)} axes; expected 3: save one volume of it")
    bounds.check(shape, "NIfTI file")
    if dtype.kind not in "iuf":
        raise InvalidImage("the NIfTI file holds colors or complex numbers; expected one real number a voxel")
    if not size <= offset <= _MAX_OFFSET:
        raise InvalidImage(
            f"the NIfTI header puts the voxels at an offset that is not {size} to {_MAX_OFFSET}"
        )
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    affine = np.diag([scale, scale, scale, 1.0]) @ check_affine(affine, "NIfTI file")
    return NiftiHeader(shape, affine, dtype, int(offset), slope, intercept)
