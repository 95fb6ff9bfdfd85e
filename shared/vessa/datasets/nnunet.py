"""nnU-Net NIfTI: `dataset.json`, `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz`, `imagesTs/`."""

import json
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.errors import InvalidDataset, UnknownClass, VessaError
from vessa.masks.files import IGNORE, IGNORE_NAME, LARGEST_ID, class_ids, read_classes
from vessa.volumes import Bounds, Volume
from vessa.volumes.grid import slice_of
from vessa.volumes.nifti import NiftiHeader, read_nifti, read_nifti_header

_CHANNEL = "_0000"
_BOUNDS = Bounds()
_NUMBER = re.compile(r"_(\d{4})$")  # of a channel
_ENDINGS = (".nii", ".nii.gz")
_APART = 0.5  # of the smallest voxel size: how far labels may lie from their image


class NnUnet(Dataset):
    """Volumes as NIfTI, seen slice by slice along the last axis.

    A slice is the array at [:, :, z] transposed, so that rows run along the second axis; nothing is
    flipped (this is the order in which ITK, and so nnU-Net, sees the file), and spacing comes from
    the header as (z, y, x) mm. Intensities become uint8 as everywhere (`vessa.volumes.Volume.shown`). One
    channel is read, the first unless `select_channel` chose another. A case is its own group unless
    dataset.json has {"groups": {case: group}}, which nnU-Net ignores.
    """

    def __init__(self, root: Path) -> None:
        """Open a folder. Raises InvalidDataset when dataset.json is missing or damaged."""
        super().__init__(root)
        try:
            meta = json.loads((self.root / "dataset.json").read_text(encoding="utf-8-sig"))
            self.classes, self._values = _read_labels(meta["labels"])
            self._groups: dict[str, str] = dict(meta.get("groups", {}))
            channels = meta.get("channel_names", meta.get("modality", {}))
        except VessaError as error:
            raise InvalidDataset(f"dataset.json of '{self.name}': {error.message}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidDataset(
                f'{self.root}/dataset.json must hold {{"labels": {{"background": 0, ...}}}} with an id each'
            ) from error
        names = channels if isinstance(channels, dict) else {}
        self.channels: tuple[str, ...] = tuple(
            str(names[str(i)]) for i in range(len(names)) if str(i) in names
        )
        self.channel = 0
        self.modality = self.channels[0] if self.channels else ""
        self.licence = str(meta.get("licence", meta.get("license", "")))
        if not self._files:
            ending = str(meta.get("file_ending", ".nii.gz"))
            other = "" if ending in _ENDINGS else f": files that end in {ending} are not read; convert them"
            raise InvalidDataset(f"'{self.name}' holds no imagesTr/<case>{_CHANNEL}.nii.gz{other}")

    @cached_property
    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in ("imagesTr", "imagesTs"):
            for path in _niftis(self.root / folder):
                if not _stem(path).endswith(_CHANNEL):
                    continue
                name = _stem(path).removesuffix(_CHANNEL)
                if name in found:
                    raise InvalidDataset(f"the case {name} is there twice: {found[name]} and {path}")
                found[name] = path
        return found

    @cached_property
    def _cases(self) -> tuple[Case, ...]:
        cases = []
        for name, path in sorted(self._files.items()):
            shape, zooms = _header(path).shape, np.linalg.norm(_header(path).affine[:3, :3], axis=0)
            group = self._groups.get(name, name)
            slices = tuple(Slice(f"{name}_{z:03d}", name, group, z) for z in range(shape[2]))
            spacing = (float(zooms[2]), float(zooms[1]), float(zooms[0]))
            cases.append(Case(name, group, slices, spacing))
        return tuple(cases)

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def select_channel(self, channel: str) -> None:
        """Read this channel from now on. channel: its name or its number. Raises InvalidDataset."""
        numbers = {name: i for i, name in enumerate(self.channels)}
        numbers |= {str(i): i for i in range(max(1, len(self.channels)))}
        if channel not in numbers:
            raise InvalidDataset(
                f"'{self.name}' has no channel '{channel}'; it has {', '.join(self.channels)}"
            )
        self.channel = numbers[channel]
        self.modality = self.channels[self.channel] if self.channels else ""

    def volume_path(self, case: Case) -> Path:
        """Return the file that holds a case's image in the selected channel."""
        return self._channel_file(case.name)

    def _channel_file(self, case: str) -> Path:
        first = self._files[case]
        stem = _stem(first).removesuffix(_CHANNEL)
        return first.with_name(f"{stem}_{self.channel:04d}{first.name[len(_stem(first)) :]}")

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W)."""
        return _volume(self._channel_file(item.case)).image(2, item.index)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None for a case without labels.

        Raises InvalidDataset when the labels do not lie on the image's grid.
        """
        path = self._labels.get(item.case)
        if path is None:
            return None
        self._check_grid(self._files[item.case], path)
        ids = slice_of(_volume(path).voxels, 2, item.index)
        try:
            return np.ascontiguousarray(class_ids(ids, self.classes, self._values, f"label file {path.name}"))
        except VessaError as error:
            raise InvalidDataset(error.message) from error

    @cached_property
    def _labels(self) -> dict[str, Path]:
        folders = [self.root / name for name in ("labelsTr", "labelsTs")]
        return {_stem(p): p for folder in folders for p in _niftis(folder)}

    def leftovers(self) -> tuple[tuple[str, str], ...]:
        """Return (file name, why) of labels without an image, and of unused files.

        Unused are files that are no NIfTI, and images of channels that dataset.json does not name.
        """
        orphans = [(p.name, "orphan_mask") for case, p in self._labels.items() if case not in self._files]
        folders = [self.root / name for name in ("imagesTr", "imagesTs", "labelsTr", "labelsTs")]
        present = [p for f in folders if f.is_dir() for p in sorted(f.iterdir()) if p.is_file()]
        others = [p for p in present if not p.name.startswith(".") and not p.name.lower().endswith(_ENDINGS)]
        unnamed = [
            path
            for folder in folders[:2]
            for path in _niftis(folder)
            if (match := _NUMBER.search(_stem(path))) and int(match[1]) >= max(1, len(self.channels))
        ]
        return (*orphans, *((p.name, "left_out") for p in (*others, *unnamed)))

    @staticmethod
    def _check_grid(image: Path, labels: Path) -> None:
        """Labels of another size, or stored along other directions, would be silently misplaced."""
        one, other = _header(image), _header(labels)
        if one.shape != other.shape:
            raise InvalidDataset(f"{labels.name} has shape {other.shape}, its image {one.shape}")
        directions: Any = nib.aff2axcodes
        if directions(one.affine) != directions(other.affine):
            raise InvalidDataset(f"{labels.name} is stored in another orientation than its image")
        corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)], np.float64)
        corners[:, :3] *= np.array(one.shape) - 1
        apart = float(np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1).max())
        if apart > _APART * float(np.linalg.norm(one.affine[:3, :3], axis=0).min()):
            raise InvalidDataset(
                f"{labels.name} lies elsewhere than its image: corners are up to {apart:.1f} mm "
                "apart. Resample it "
                "onto the image, or correct the header that is wrong"
            )


def _read_labels(labels: dict[str, Any]) -> tuple[dict[int, str], dict[int, int]]:
    """Return the classes by id, and stored value -> id; nnU-Net's `ignore` is no class. UnknownClass."""
    named = labels if "background" in labels or not all(str(k).isdigit() for k in labels) else None
    pairs = named.items() if named is not None else ((name, key) for key, name in labels.items())
    regions = [str(name) for name, value in pairs if isinstance(value, list)]
    if regions:
        raise UnknownClass(
            f"the labels {', '.join(regions)} are regions (lists of ids), which overlap. Give each "
            "structure one id"
        )
    pairs = named.items() if named is not None else ((name, key) for key, name in labels.items())
    ids = {int(value): str(name) for name, value in pairs}
    ignored = [value for value, name in ids.items() if name.lower() == IGNORE_NAME]
    classes = read_classes({value: name for value, name in ids.items() if value not in ignored})
    values = {value: value for value in range(LARGEST_ID + 1)} | dict.fromkeys(ignored, IGNORE)
    return classes, values


def _niftis(folder: Path) -> list[Path]:
    """Return the NIfTI files of a folder by name, whatever the case of their suffix, without hidden ones."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in files if p.name.lower().endswith(_ENDINGS) and not p.name.startswith(".")]


def _stem(path: Path) -> str:
    return path.name[: path.name.lower().rindex(".nii")]


def _header(path: Path) -> NiftiHeader:
    try:
        return read_nifti_header(path, _BOUNDS)
    except (OSError, VessaError) as error:
        raise InvalidDataset(f"{path.name}: {error}") from error


@lru_cache(maxsize=4)
def _volume(path: Path) -> Volume:
    try:
        return read_nifti(path, _BOUNDS)
    except (OSError, VessaError) as error:
        raise InvalidDataset(f"{path.name}: {error}") from error
