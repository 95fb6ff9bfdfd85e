"""nnU-Net NIfTI: `dataset.json`, `imagesTr/<case>_0000.nii.gz`, `labelsTr/<case>.nii.gz`, `imagesTs/`."""

import json
import zlib
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from vessa.datasets.base import Case, Dataset, Slice
from vessa.errors import InvalidDataset

_CHANNEL = "_0000"


class NnUnet(Dataset):
    """Volumes as NIfTI, seen slice by slice along the last axis.

    A slice is the array at [:, :, z] transposed, so that rows run along the second axis; nothing is
    flipped (this is the order in which ITK, and so nnU-Net, sees the file), and spacing comes from
    the header as (z, y, x) mm. Intensities become uint8 by the volume's 0.5 and 99.5 percentiles. The
    first channel is used. A case is its own group unless dataset.json has {"groups": {case: group}},
    which nnU-Net ignores.
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
        self.modality = str(channels.get("0", "")) if isinstance(channels, dict) else ""
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
            header = _open(path)
            shape, zooms = header.shape, header.header.get_zooms()
            if len(shape) != 3:
                raise InvalidDataset(f"{path.name} has {len(shape)} axes; expected 3")
            group = self._groups.get(name, name)
            slices = tuple(Slice(f"{name}_{z:03d}", name, group, z) for z in range(shape[2]))
            spacing = (float(zooms[2]), float(zooms[1]), float(zooms[0]))
            cases.append(Case(name, group, slices, spacing))
        return tuple(cases)

    def cases(self) -> tuple[Case, ...]:
        """Return all cases, sorted by name."""
        return self._cases

    def image(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return the pixels, uint8 (H, W)."""
        volume = _volume(self._files[item.case])
        low, high = _percentiles(self._files[item.case])
        scaled = np.clip((volume[:, :, item.index] - low) / max(high - low, 1e-9), 0, 1) * 255
        return np.ascontiguousarray(scaled.round().astype(np.uint8).T)

    def mask(self, item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """Return the class ids, uint8 (H, W); None for a case without labels.

        Raises InvalidDataset when the labels do not lie on the image's grid.
        """
        path = self._labels.get(item.case)
        if path is None:
            return None
        self._check_grid(self._files[item.case], path)
        return np.ascontiguousarray(_volume(path)[:, :, item.index].round().astype(np.uint8).T)

    @cached_property
    def _labels(self) -> dict[str, Path]:
        folders = [self.root / name for name in ("labelsTr", "labelsTs")]
        return {p.name.split(".nii")[0]: p for folder in folders for p in sorted(folder.glob("*.nii*"))}

    @staticmethod
    def _check_grid(image: Path, labels: Path) -> None:
        """Labels of another size, or stored along other directions, would be silently misplaced."""
        one, other = _open(image), _open(labels)
        if one.shape != other.shape:
            raise InvalidDataset(f"{labels.name} has shape {other.shape}, its image {one.shape}")
        directions: Any = nib.aff2axcodes
        if directions(one.affine) != directions(other.affine):
            raise InvalidDataset(f"{labels.name} is stored in another orientation than its image")


def _open(path: Path) -> Any:
    try:
        return nib.load(path)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise InvalidDataset(f"{path} is not a readable NIfTI file") from error


@lru_cache(maxsize=4)
def _volume(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        volume = np.asarray(_open(path).dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InvalidDataset(f"{path} is damaged: its data do not fill its header's shape") from error
    if not np.isfinite(volume).all():
        raise InvalidDataset(f"{path} holds voxels that are not finite")
    return volume


@lru_cache(maxsize=64)
def _percentiles(path: Path) -> tuple[float, float]:
    low, high = np.percentile(_volume(path), [0.5, 99.5])
    return float(low), float(high)
