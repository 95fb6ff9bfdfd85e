"""nnU-Net NIfTI: `dataset.json`, `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz`, `imagesTs/`."""

import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.errors import InvalidDataset, VessaError
from vessa.volumes import Bounds, Volume
from vessa.volumes.grid import slice_of
from vessa.volumes.nifti import NiftiHeader, read_nifti, read_nifti_header

_CHANNEL = "_0000"
_BOUNDS = Bounds()


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
            meta = json.loads((self.root / "dataset.json").read_text())
            labels = meta["labels"]
            numbered = {int(v): str(k) for k, v in labels.items()} if "background" in labels else labels
            self.classes = {int(c): str(n) for c, n in numbered.items() if int(c) != 0}
            self._groups: dict[str, str] = dict(meta.get("groups", {}))
            channels = meta.get("channel_names", meta.get("modality", {}))
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
            raise InvalidDataset(f"{self.root} holds no imagesTr/<case>{_CHANNEL}.nii.gz")

    @cached_property
    def _files(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in ("imagesTr", "imagesTs"):
            for path in sorted((self.root / folder).glob(f"*{_CHANNEL}.nii*")):
                name = path.name.split(".nii")[0].removesuffix(_CHANNEL)
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
        return first.with_name(first.name.replace(f"{_CHANNEL}.nii", f"_{self.channel:04d}.nii"))

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
        return np.ascontiguousarray(ids.round().astype(np.uint8))

    @cached_property
    def _labels(self) -> dict[str, Path]:
        folders = [self.root / name for name in ("labelsTr", "labelsTs")]
        return {p.name.split(".nii")[0]: p for folder in folders for p in sorted(folder.glob("*.nii*"))}

    @staticmethod
    def _check_grid(image: Path, labels: Path) -> None:
        """Labels of another size, or stored along other directions, would be silently misplaced."""
        one, other = _header(image), _header(labels)
        if one.shape != other.shape:
            raise InvalidDataset(f"{labels.name} has shape {other.shape}, its image {one.shape}")
        directions: Any = nib.aff2axcodes
        if directions(one.affine) != directions(other.affine):
            raise InvalidDataset(f"{labels.name} is stored in another orientation than its image")


def _header(path: Path) -> NiftiHeader:
    try:
        return read_nifti_header(path, _BOUNDS)
    except (OSError, VessaError) as error:
        raise InvalidDataset(f"{path} is not a readable NIfTI file: {error}") from error


@lru_cache(maxsize=4)
def _volume(path: Path) -> Volume:
    try:
        return read_nifti(path, _BOUNDS)
    except (OSError, VessaError) as error:
        raise InvalidDataset(f"{path} is not a readable NIfTI file: {error}") from error
