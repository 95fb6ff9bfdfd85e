"""Data sets behind one interface, whatever their layout on disk."""

from pathlib import Path

from vessa.datasets.base import Case, Dataset, Slice
from vessa.datasets.png_folder import PngFolder
from vessa.errors import InvalidDataset

__all__ = ["Case", "Dataset", "PngFolder", "Slice", "open_dataset"]


def open_dataset(path: str | Path) -> Dataset:
    """Open the data set in a folder by the layout found there. Raises InvalidDataset."""
    root = Path(path)
    if (root / "meta.json").is_file() and (root / "images").is_dir():
        return PngFolder(root)
    raise InvalidDataset(
        f"{root} has none of the known layouts: PNG folders (images/, masks/, meta.json), SSL4MIS HDF5, "
        "nnU-Net NIfTI (dataset.json, imagesTr/) or BiomedParse (train/, train_mask/)"
    )
