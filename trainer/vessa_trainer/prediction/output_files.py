"""Find what `vessa-trainer predict` reads and writes: each output file, its images and its format."""

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from vessa.datasets import Case, Dataset, NnUnet, Slice, Ssl4mis, open_dataset
from vessa.errors import InvalidDataset, VessaError
from vessa.images import read_image
from vessa.volumes import is_volume
from vessa_trainer.prediction.volumes import CutVolume, VolumeOptions

_PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_NIFTI = (".nii", ".nii.gz")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")  # as nnU-Net names its images


@dataclass(frozen=True)
class Output:
    """One file to write.

    name: in the output folder
    images: reads its slices, uint8 (H, W[, 3])
    encode: makes the file's bytes of their class ids, uint8 (H, W) each
    inputs: the files it is made of
    cautions: says what was repaired in the file, and what differs from training
    is_volume: whether the images are the slices of one volume
    place: place of the one image among `images` that the file shows; None where it shows all
    """

    name: str
    images: Callable[[], Sequence[np.ndarray]]
    encode: Callable[[list[np.ndarray]], bytes]
    inputs: tuple[Path, ...] = ()
    cautions: Callable[[], Sequence[str]] = tuple
    is_volume: bool = False
    place: Callable[[], int] | None = None


def find_outputs(source: Path, options: VolumeOptions) -> list[Output]:
    """List what a source turns into, by name. Raises InvalidDataset when it holds nothing that can be read.

    source: a picture, a NIfTI or DICOM file, a folder with the files of a DICOM series, a data set of any
    layout, or a folder of pictures and NIfTI files
    """
    if source.is_file():
        found = [_volume(source, options) if is_volume(source) else _picture(source, options)]
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
        # File by file, so that one damaged file does not hide the others.
        parts = [folder / name for name in ("imagesTr", "imagesTs") if (folder / name).is_dir()]
        return [output for part in parts for output in _nifti_files(part, options)]
    if isinstance(dataset, Ssl4mis):
        return [_hdf5(dataset, case) for case in dataset.cases()]
    if options.whole_cases:
        return [_of_case(dataset, case, item) for case in dataset.cases() for item in case.slices]
    return [_slice(dataset, item) for item in dataset.slices()]


def _in_folder(folder: Path, options: VolumeOptions) -> list[Output]:
    if is_volume(folder):
        return [_volume(folder, options)]
    files = _files(folder) if folder.is_dir() else []
    found = [_picture(p, options) for p in files if p.suffix.lower() in _PICTURES]
    found += _nifti_files(folder, options) if folder.is_dir() else []
    if not found:
        raise InvalidDataset(
            f"{folder} is no data set and holds no PNG, JPEG or TIFF images, NIfTI files or DICOM series"
        )
    return found


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder by name, without hidden ones such as macOS's ._ files."""
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def _nifti_files(folder: Path, options: VolumeOptions) -> list[Output]:
    """List the NIfTI files of a folder; of nnU-Net's files of several channels those of the run's channel."""
    files = [p for p in _files(folder) if p.name.lower().endswith(_NIFTI)]
    cases = {p: match for p in files if (match := _CHANNEL.fullmatch(_stem(p)))}
    channels = {match["channel"] for match in cases.values()}
    if not _by_channel(options) or len(cases) < len(files):
        return [_volume(p, options) for p in files]
    wanted = f"{options.geometry.channel:04d}" if options.geometry is not None else "0000"
    if wanted not in channels:
        raise InvalidDataset(
            f"{folder} holds the channels {', '.join(sorted(channels))}; the run was trained on channel "
            f"{wanted}"
        )
    return [_volume(p, options) for p, match in cases.items() if match["channel"] == wanted]


def _by_channel(options: VolumeOptions) -> bool:
    """Whether files are named as in nnU-Net: so they are where the run was trained on such files."""
    return options.geometry is not None and options.geometry.layout == NnUnet.__name__


def _stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _picture(path: Path, options: VolumeOptions) -> Output:
    def cautions() -> Sequence[str]:
        if not options.whole_cases:
            return ()
        return (
            "pictures outside of a data set are predicted one by one, and the run learned from whole cases. "
            "Give a data set (images/ with meta.json) to predict the pictures of a patient together",
        )

    return Output(f"{path.stem}.png", lambda: [read_image(path)], _png, (path,), cautions)


def _slice(dataset: Dataset, item: Slice) -> Output:
    return Output(f"{item.name}.png", lambda: [dataset.image(item)], _png, (dataset.root / "images" / "_",))


def _of_case(dataset: Dataset, case: Case, item: Slice) -> Output:
    """One picture of a case, whose pictures are predicted together."""

    def images() -> Sequence[np.ndarray]:
        return _read_case(dataset, case).images

    def place() -> int:
        read = _read_case(dataset, case)
        if item.name in read.faults:
            raise read.faults[item.name]
        return read.names.index(item.name)

    folder = (dataset.root / "images" / "_",)
    return Output(f"{item.name}.png", images, _png, folder, place=place)


@dataclass(frozen=True)
class PictureCase:
    """The pictures of a case that can be read, with their names, and the errors of the others by name."""

    names: list[str]
    images: list[np.ndarray]
    faults: dict[str, Exception]


@lru_cache(maxsize=1)
def _read_case(dataset: Dataset, case: Case) -> PictureCase:
    read = PictureCase([], [], {})
    for item in case.slices:
        try:
            read.images.append(dataset.image(item))
            read.names.append(item.name)
        except (VessaError, OSError) as error:
            read.faults[item.name] = error
    return read


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
    return Output(
        f"{case.name}.h5", lambda: [dataset.image(s) for s in case.slices], encode, folders, is_volume=True
    )


def _volume(path: Path, options: VolumeOptions) -> Output:
    """A volume as labels on its grid; nnU-Net's channel number is no part of the case's name."""
    name = path.resolve().name
    cut = CutVolume(path, options)
    if name.lower().endswith(_NIFTI):
        match = _CHANNEL.fullmatch(_stem(path)) if _by_channel(options) else None
        return _labels_of(cut, f"{match['case'] if match else _stem(path)}.nii.gz", "nifti", (path,))
    stem = name if path.is_dir() else path.stem
    inside = (path / "_",) if path.is_dir() else (path,)
    if options.nifti:
        return _labels_of(cut, f"{stem}.nii.gz", "nifti", inside)
    return _labels_of(cut, f"{stem}.dcm", "dicom-seg", inside)


def _labels_of(cut: CutVolume, name: str, kind: str, inputs: tuple[Path, ...]) -> Output:
    images, encode = partial(cut.images, kind), partial(cut.encode, kind=kind)
    return Output(name, images, encode, inputs, cut.cautions, is_volume=True)
