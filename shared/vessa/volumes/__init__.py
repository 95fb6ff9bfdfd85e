"""Medical images with their geometry: NIfTI and DICOM in, label volumes on the same grid out."""

from vessa.volumes.dicom.segmentation import check_dicom_seg
from vessa.volumes.files import is_volume, read_volume, write_labels
from vessa.volumes.grid import AXES, Axis, Bounds, Source, Volume

__all__ = [
    "AXES",
    "Axis",
    "Bounds",
    "Source",
    "Volume",
    "check_dicom_seg",
    "is_volume",
    "read_volume",
    "write_labels",
]
