"""Data sets behind one interface, whatever their layout on disk."""

from pathlib import Path

from vessa.datasets.base import Case, Dataset, Slice
from vessa.datasets.biomedparse import BiomedParse
from vessa.datasets.nnunet import NnUnet
from vessa.datasets.png_folder import PngFolder, is_picture_folder
from vessa.datasets.registry import COLLECTIONS, Collection, collection, recognize
from vessa.datasets.ssl4mis import Ssl4mis, slices_folder, volumes_folder
from vessa.datasets.verify import Finding, require_sound, verify
from vessa.errors import InvalidDataset

__all__ = [
    "COLLECTIONS",
    "BiomedParse",
    "Case",
    "Collection",
    "Dataset",
    "Finding",
    "NnUnet",
    "PngFolder",
    "Slice",
    "Ssl4mis",
    "collection",
    "layout_of",
    "open_dataset",
    "recognize",
    "require_sound",
    "verify",
]


def open_dataset(path: str | Path) -> Dataset:
    """Open the data set in a folder by the layout found there. Raises InvalidDataset."""
    root = Path(path)
    if not root.is_dir():
        raise InvalidDataset(f"no such folder: {root}")
    layout = layout_of(root)
    if layout is not None:
        return layout(root)
    raise InvalidDataset(
        f"{root} has none of the known layouts: PNG folders (images/, masks/, meta.json), SSL4MIS HDF5 "
        "(data/slices/*.h5, data/*.h5), nnU-Net NIfTI (dataset.json, imagesTr/) or BiomedParse (train/, "
        "train_mask/)"
    )


def layout_of(root: Path) -> type[PngFolder | NnUnet | Ssl4mis | BiomedParse] | None:
    """Return the layout found in a folder, None where it is none that is known."""
    if is_picture_folder(root):
        return PngFolder
    if (root / "dataset.json").is_file():
        return NnUnet
    if slices_folder(root) is not None or volumes_folder(root) is not None:
        return Ssl4mis
    if (root / "train").is_dir() and (root / "train_mask").is_dir():
        return BiomedParse
    return None
