"""Labels as DICOM SEG, on the grid of the DICOM images that they were made of."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom import Dataset, uid

from vessa import __version__
from vessa.errors import InvalidImage, InvalidRequest
from vessa.volumes.grid import Volume

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

# Of what highdicom copies: attributes that must be there and may be empty (type 2).
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex",
    "StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
_SERIES_NUMBER = 900  # beyond those of usual acquisitions


def dicom_seg_bytes(
    volume: Volume, labels: np.ndarray[Any, np.dtype[np.uint8]], classes: dict[int, str], source: str
) -> bytes:
    """Return a DICOM SEG file (binary segments) of labels.

    volume: read from DICOM; labels: uint8 (I, J, K) class ids; classes: id to name: in the order of their
    ids they are the segments 1, 2, ...; source: what made the labels, such as the weights' name. Errors:
    InvalidRequest for a volume that is no DICOM, InvalidImage where its header cannot be referred to.
    """
    import highdicom as hd  # takes its time, and few need it

    if not volume.headers:
        raise InvalidRequest("a DICOM SEG refers to DICOM images; labels of other files are written as NIfTI")
    numbers = np.zeros(256, np.uint8)
    for number, class_id in enumerate(sorted(classes), start=1):
        numbers[class_id] = number
    stack = numbers[labels].transpose(2, 1, 0)  # (K, rows, columns)
    if volume.frames:
        stack = stack[np.argsort(volume.frames)]
    try:
        segmentation = hd.seg.Segmentation(
            source_images=[_with_empty(header) for header in volume.headers],
            pixel_array=np.ascontiguousarray(stack),
            segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[
                _segment(number, classes[i], source) for number, i in enumerate(sorted(classes), start=1)
            ],
            series_instance_uid=hd.UID(),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            software_versions=__version__,
            device_serial_number="0",
            series_description="VESSA segmentation",
            transfer_syntax_uid=uid.ExplicitVRLittleEndian,
            omit_empty_frames=bool(stack.any()),
            manufacturer="VESSA",
            manufacturer_model_name=source[:64] or "VESSA",
        )
    except Exception:  # a header may lack any of the many attributes that are referred to
        raise InvalidImage(
            "a DICOM SEG cannot refer to this DICOM's header: most often the UIDs of study, series, instance "
            "or class are lacking; ask for NIfTI instead"
        ) from None
    segmentation.SpecificCharacterSet = "ISO_IR 192"  # classes have names in any script
    file = io.BytesIO()
    segmentation.save_as(file)
    return file.getvalue()


def _with_empty(header: Dataset) -> Dataset:
    for name in _MAY_BE_EMPTY:
        if name not in header:
            setattr(header, name, "")
    return header


def _segment(number: int, name: str, source: str) -> "SegmentDescription":
    import highdicom as hd
    from pydicom.sr.codedict import codes

    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name.replace("\\", "/")[:64],  # DICOM would take a backslash for a second value
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="VESSA",
            version=f"{__version__} {source}".strip()[:64],
            family=codes.cid7162.ArtificialIntelligence,
        ),
    )
