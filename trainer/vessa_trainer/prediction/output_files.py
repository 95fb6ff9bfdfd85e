"""What `vessa-trainer predict` reads and writes: each output file, its images and its format."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from vessa.datasets import Case, Dataset, NnUnet, Slice, Ssl4mis, open_dataset
from vessa.errors import InvalidDataset, VessaError
from vessa.images import read_image
from vessa.volumes import Volume, is_volume, read_volume, write_labels
from vessa.volumes.grid import slice_of

_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Output:
    """One file to write. name: in the output folder; images: reads its slices, uint8 (H, W[, 3]).

    encode: makes the file's bytes of their class ids, uint8 (H, W) each; inputs: the files it is made of.
    """

    name: str
    images: Callable[[], Sequence[np.ndarray]]
    encode: Callable[[list[np.ndarray]], bytes]
    inputs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class VolumeOptions:
    """How volumes are cut (see `Volume.axis`) and written; nifti: also for DICOM; source: of the labels."""

    axis: str
    nifti: bool
    classes: dict[int, str]
    source: str


def find_outputs(source: Path, options: VolumeOptions) -> list[Output]:
    """List what a source turns into, by name. Raises InvalidDataset when it holds nothing that can be read.

    source: a picture, a NIfTI or DICOM file, a folder with the files of a DICOM series, a data set of any
    layout, or a folder of pictures and NIfTI files
    """
    if source.is_file():
        found = [_volume(source, options) if is_volume(source) else _picture(source)]
    else:
        found = _in_data_set(source, options) or _in_folder(source, options)
    twice = [name for name, count in Counter(o.name for o in found).items() if count > 1]
    if twice:
        raise InvalidDataset(
            f"{source} holds several images called {Path(twice[0]).stem}: each needs its own name"
        )
    return found


def _in_data_set(folder: Path, options: VolumeOptions) -> list[Output]:
    try:
        dataset = open_dataset(folder)
    except InvalidDataset:
        return []
    if isinstance(dataset, NnUnet):
        # cut as in training, along the last axis
        return [
            _nifti(dataset.volume_path(case), f"{case.name}.nii.gz", options, axis=2)
            for case in dataset.cases()
        ]
    if isinstance(dataset, Ssl4mis):
        return [_hdf5(dataset, case) for case in dataset.cases()]
    return [_slice(dataset, item) for item in dataset.slices()]


def _in_folder(folder: Path, options: VolumeOptions) -> list[Output]:
    if is_volume(folder):
        return [_volume(folder, options)]
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [_picture(p) for p in files if p.suffix.lower() in _PICTURES]
    found += [_volume(p, options) for p in files if p.name.endswith((".nii", ".nii.gz"))]
    if not found:
        raise InvalidDataset(
            f"{folder} is no data set and holds no PNG, JPEG or TIFF images, NIfTI files or DICOM series"
        )
    return found


def _picture(path: Path) -> Output:
    return Output(f"{path.stem}.png", lambda: [read_image(path)], _png, (path,))


def _slice(dataset: Dataset, item: Slice) -> Output:
    return Output(f"{item.name}.png", lambda: [dataset.image(item)], _png, (dataset.root / "images" / "_",))


def _png(labels: list[np.ndarray]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(labels[0]).save(data, "PNG")
    return data.getvalue()


def _hdf5(dataset: Ssl4mis, case: Case) -> Output:
    """A case as `label` (D, H, W), as in SSL4MIS's volumes."""

    def encode(labels: list[np.ndarray]) -> bytes:
        data = io.BytesIO()
        with h5py.File(data, "w") as file:
            file.create_dataset("label", data=np.stack(labels), compression="gzip")
        return data.getvalue()

    folders = tuple(dataset.root / name / "_" for name in (".", "data", "data/slices"))
    return Output(f"{case.name}.h5", lambda: [dataset.image(s) for s in case.slices], encode, folders)


def _volume(path: Path, options: VolumeOptions) -> Output:
    name = path.resolve().name
    if name.endswith((".nii", ".nii.gz")):
        return _nifti(path, f"{name.split('.nii')[0]}.nii.gz", options, axis=None)
    stem = name if path.is_dir() else path.stem
    inside = (path / "_",) if path.is_dir() else (path,)
    if options.nifti:
        return _nifti(path, f"{stem}.nii.gz", options, axis=None, inputs=inside)
    return _nifti(path, f"{stem}.dcm", options, axis=None, kind="dicom-seg", inputs=inside)


def _nifti(
    path: Path,
    name: str,
    options: VolumeOptions,
    *,
    axis: int | None,
    kind: str = "nifti",
    inputs: tuple[Path, ...] = (),
) -> Output:
    def images() -> list[np.ndarray]:
        volume, along = _read(path), _along(axis, path, options)
        return [volume.image(along, i) for i in range(volume.shape[along])]

    def encode(labels: list[np.ndarray]) -> bytes:
        volume, along = _read(path), _along(axis, path, options)
        whole = np.zeros(volume.shape, np.uint8)
        for index, one in enumerate(labels):
            slice_of(whole, along, index)[...] = one
        return write_labels(volume, whole, options.classes, options.source, kind)

    return Output(name, images, encode, inputs or (path,))


def _along(axis: int | None, path: Path, options: VolumeOptions) -> int:
    return _read(path).axis(options.axis) if axis is None else axis


@lru_cache(maxsize=1)
def _read(path: Path) -> Volume:
    try:
        return read_volume(path)
    except VessaError as error:
        raise type(error)(f"{path}: {error}") from error
