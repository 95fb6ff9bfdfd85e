"""Read NIfTI files from bounded streams; write labels with the geometry of their image."""

import gzip
import io
import math
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import nibabel as nib
import numpy as np

from vessa.errors import InvalidImage
from vessa.file_kinds import gunzipped
from vessa.volumes.grid import Allocate, Bounds, Source, Volume, check_affine, empty

_HEADERS: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_UNITS = {1: ("meter", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}
_MAX_OFFSET = 1 << 20  # bytes before the voxels, extensions with them
_CHUNK = 32 << 20  # bytes of voxels decoded at once
_CLEARED = (  # fields that describe the image's values, or may name a patient
    "data_type", "db_name", "descrip", "aux_file", "intent_name", "intent_code", "intent_p1", "intent_p2",
    "intent_p3", "cal_max", "cal_min", "toffset", "slice_code", "slice_start", "slice_end", "slice_duration",
)  # fmt: skip


@dataclass(frozen=True)
class NiftiHeader:
    """What a NIfTI file states about its voxels.

    shape: (I, J, K), K is 1 for a picture of two axes; affine: (4, 4) float64, mm, RAS+, of the sform, else
    the qform, else the voxel sizes; raw: the header's bytes; notes: what was repaired or is missing.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray[Any, np.dtype[np.float64]]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    raw: bytes
    notes: tuple[str, ...]


def read_nifti_header(source: Source, bounds: Bounds) -> NiftiHeader:
    """Read a header alone; InvalidImage, TooLarge."""
    with ExitStack() as stack:
        return _header(_read(_open(source, stack), 540), bounds)


def read_nifti(source: Source, bounds: Bounds, allocate: Allocate = empty) -> Volume:
    """Read a NIfTI-1 or NIfTI-2 file of one volume, gzip or plain, rescaled.

    Voxels that are NaN or infinite become the lowest finite value, with a note. Raises InvalidImage,
    TooLarge.
    """
    with ExitStack() as stack:
        stream = _open(source, stack)
        head = _read(stream, 540)
        header = _header(head, bounds)
        rest = io.BytesIO(head[header.offset :]) if header.offset < len(head) else io.BytesIO()
        _read(stream, max(0, header.offset - len(head)))
        voxels = allocate(header.shape, np.float32)

        def take(count: int) -> bytes:
            first = rest.read(count)
            return first + _read(stream, count - len(first))

        missing = _fill(voxels, header, take)
    notes = header.notes
    if missing:
        lowest = min(float(np.min(voxels[..., k], where=np.isfinite(voxels[..., k]), initial=np.inf))
                     for k in range(voxels.shape[2]))  # fmt: skip
        if not math.isfinite(lowest):
            raise InvalidImage(
                "the NIfTI file holds no voxel that is a finite number: all are NaN or infinite"
            )
        for k in range(voxels.shape[2]):
            voxels[..., k][~np.isfinite(voxels[..., k])] = lowest
        notes = (*notes, f"{missing} voxels are NaN or infinite; they are read as background ({lowest:g})")
    return Volume(voxels, header.affine, nifti_header=header.raw, notes=notes)


def _fill(voxels: np.ndarray[Any, Any], header: NiftiHeader, take: Callable[[int], bytes]) -> int:
    """Decode slice by slice, so that memory holds the result and one chunk; returns the not finite voxels."""
    plane = header.shape[0] * header.shape[1]
    step, missing = max(1, _CHUNK // (plane * header.dtype.itemsize)), 0
    for start in range(0, header.shape[2], step):
        count = min(step, header.shape[2] - start)
        data = take(plane * count * header.dtype.itemsize)
        if len(data) < plane * count * header.dtype.itemsize:
            raise InvalidImage(
                f"the NIfTI file is cut off: {start} of {header.shape[2]} slices are whole. Copy it again"
            )
        stored = np.frombuffer(data, header.dtype).reshape((*header.shape[:2], count), order="F")
        with np.errstate(over="ignore", invalid="ignore"):
            part = stored.astype(np.float32)
            if (header.slope, header.intercept) != (1.0, 0.0):
                part = part * np.float32(header.slope) + np.float32(header.intercept)
        bad = int(part.size - np.count_nonzero(np.isfinite(part)))
        if bad and bad > part.size - np.count_nonzero(np.isfinite(stored)):
            raise InvalidImage("the NIfTI file holds numbers beyond 3.4e38; rescale it to smaller values")
        missing += bad
        voxels[..., start : start + count] = part
    return missing


def nifti_bytes(labels: np.ndarray[Any, np.dtype[np.uint8]], volume: Volume) -> bytes:
    """Return a .nii.gz file of labels, uint8 (I, J, K) class ids, on the grid of their image.

    The header of a NIfTI image is kept: qform, sform, their codes, voxel sizes and units, so that every
    reader places labels and image alike, whichever of the two forms it goes by.
    """
    if not volume.nifti_header:
        image: Any = nib.Nifti1Image(labels, volume.affine)  # type: ignore[no-untyped-call]
        image.header.set_xyzt_units("mm")
        data: bytes = image.to_bytes()
        return gzip.compress(data, compresslevel=6, mtime=0)
    header = _HEADERS[len(volume.nifti_header)](volume.nifti_header, check=False)
    flat = int(header["dim"][0]) == 2
    header.set_data_dtype(np.uint8)
    header["dim"] = 1
    header["dim"][0] = 2 if flat else 3
    header["dim"][1:4] = labels.shape
    header["scl_slope"], header["scl_inter"] = 1.0, 0.0
    for name in _CLEARED:
        if name in header:
            header[name] = header[name].dtype.type()
    start = len(volume.nifti_header) + 4
    header["vox_offset"] = start
    header["magic"] = type(header)(endianness=header.endianness)["magic"]
    data = header.binaryblock + bytes(4) + labels.tobytes("F")
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
        twice = gunzipped(head) not in (b"", head)
        why = "it is compressed twice; decompress it once" if twice else "it does not begin with its header"
        raise InvalidImage(f"the file is no NIfTI-1 or NIfTI-2 file: {why}")
    raw = head[:size]
    try:
        header = _HEADERS[size](raw, check=False)
        magic = bytes(header["magic"])[:3]
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = float(header["vox_offset"])
        slope, intercept = header.get_slope_inter()
        affine, scale, notes = _geometry(header)
    except InvalidImage:
        raise
    except Exception:  # nibabel fails in many ways on hostile headers
        raise InvalidImage("the NIfTI header is damaged: its fields contradict one another") from None
    if magic not in (b"n+1", b"n+2"):
        raise InvalidImage(
            "the NIfTI header is of a pair of files (.hdr, .img); save it as one .nii or .nii.gz"
        )
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3:
        count = math.prod(shape[3:]) if min(shape, default=0) > 0 else 0
        raise InvalidImage(
            f"the NIfTI file has {len(shape)} axes {shape}; expected 3"
            + (f": save one of its {count} volumes" if count > 1 else "")
        )
    bounds.check(shape, "NIfTI file")
    if dtype.kind not in "iuf":
        raise InvalidImage("the NIfTI file holds colors or complex numbers; expected one real number a voxel")
    if 0 <= offset < size:
        # The standard puts 4 bytes of extension flags between header and voxels. nibabel 5.4 reads the header
        # as voxels, ITK 5.4 the flags.
        notes.append(
            f"the NIfTI header puts the voxels at byte {offset:g}, inside the header. They are read from "
            f"byte {size + 4} as the standard has it; nibabel and ITK start earlier"
        )
        offset = size + 4
    if not size <= offset <= _MAX_OFFSET:
        raise InvalidImage(
            f"the NIfTI header puts the voxels at an offset that is not {size} to {_MAX_OFFSET}"
        )
    slope, intercept = 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)
    affine = np.diag([scale, scale, scale, 1.0]) @ check_affine(affine, "NIfTI file")
    return NiftiHeader(shape, affine, dtype, int(offset), slope, intercept, raw, tuple(notes))


def _geometry(header: Any) -> tuple[np.ndarray[Any, Any], float, list[str]]:
    """Return the affine in the file's unit, mm per unit, and what was repaired or is missing.

    Repaired as ITK and nibabel do it: a qfac (pixdim[0]) that is not -1 is 1, a voxel size of 0 is 1.
    """
    notes, repaired = [], header.copy()
    if repaired["pixdim"][0] not in (-1, 1):
        repaired["pixdim"][0] = 1
    sizes = repaired["pixdim"][1:4]
    if (sizes == 0).any() or not np.isfinite(sizes).all():
        axes = max(2, min(3, int(header["dim"][0])))
        if not (np.isfinite(sizes[:axes]) & (sizes[:axes] != 0)).all():
            notes.append("a voxel size in the NIfTI header is 0 or no number; it is read as 1")
        repaired["pixdim"][1:4] = np.where(np.isfinite(sizes) & (sizes != 0), sizes, 1)
    repaired["pixdim"][1:4] = np.abs(repaired["pixdim"][1:4])
    if int(repaired["sform_code"]) <= 0 and int(repaired["qform_code"]) <= 0:
        notes.append(
            "the NIfTI file has neither qform nor sform: position and orientation are unknown, and "
            "the names of "
            "its axes are a guess by storage order"
        )
    affine = repaired.get_best_affine()
    unit = int(header["xyzt_units"]) & 7
    if unit not in (0, *_UNITS):
        notes.append(f"the NIfTI header states the unknown unit {unit}; sizes are taken for mm")
    return affine, _UNITS.get(unit, ("mm", 1.0))[1], notes
