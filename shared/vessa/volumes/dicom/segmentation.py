"""Write labels as DICOM SEG, on the grid of the DICOM images that they were made of."""

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom import Dataset, uid

from vessa import __version__
from vessa.errors import InvalidImage, InvalidRequest
from vessa.volumes.dicom.header import REQUIRED
from vessa.volumes.grid import Volume
from vessa.volumes.segment_codes import code_of

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

SERIES_DESCRIPTION = "VESSA segmentation"
_SERIES_NUMBER = 900  # beyond those of usual acquisitions
_INSTEAD = "Ask for NIfTI or NRRD instead"


def check_dicom_seg(volume: Volume) -> None:
    """Raise the error that `dicom_seg_bytes` would raise for the labels of a volume, before there are any."""
    dicom_seg_bytes(volume, np.zeros(volume.shape, np.uint8), {1: "class"}, "")


def dicom_seg_bytes(
    volume: Volume, labels: np.ndarray[Any, np.dtype[np.uint8]], classes: dict[int, str], source: str
) -> bytes:
    """Return a DICOM SEG file (binary segments) of labels.

    volume: read from DICOM; labels: uint8 (I, J, K) class ids; classes: id to name: in the order of their
    ids they are the segments 1, 2, ...; source: what made the labels, such as the weights' name. Raises
    InvalidRequest for a volume that is no DICOM, InvalidImage that names the attribute its header lacks.
    """
    import highdicom as hd  # takes its time, and few need it

    if not volume.headers:
        raise InvalidRequest("a DICOM SEG refers to DICOM images; labels of other files are written as NIfTI")
    _check_headers(volume)
    numbers = np.zeros(256, np.uint8)
    for number, class_id in enumerate(sorted(classes), start=1):
        numbers[class_id] = number
    stack = numbers[labels].transpose(2, 1, 0)  # (K, rows, columns)
    if volume.frames:
        stack = stack[np.argsort(volume.frames)]
    sources = [_as_enhanced(header) for header in volume.headers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a patient's name, which they quote
            segmentation = hd.seg.Segmentation(
                source_images=sources,
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
                series_description=SERIES_DESCRIPTION,
                content_description="Research use only. Not a medical device.",
                transfer_syntax_uid=uid.ExplicitVRLittleEndian,
                omit_empty_frames=bool(stack.any()),
                manufacturer="VESSA",
                manufacturer_model_name=source[:64] or "VESSA",
            )
            _refer_to(segmentation, volume.headers[0].SOPClassUID)
            file = io.BytesIO()
            segmentation.save_as(file)
    except Exception:  # a header may lack any of the many attributes that are referred to
        raise InvalidImage(
            "a DICOM SEG cannot refer to this DICOM's header, of the class "
            f"{_class_name(volume.headers[0])}. " + _INSTEAD
        ) from None
    return file.getvalue()


def _as_enhanced(header: Dataset) -> Dataset:
    """Return a header of several frames under a class of which highdicom reads functional groups."""
    if "SharedFunctionalGroupsSequence" not in header:
        return header
    enhanced = Dataset()
    enhanced.update(header)
    enhanced.SOPClassUID = uid.EnhancedCTImageStorage
    return enhanced


def _refer_to(segmentation: Dataset, sop_class: uid.UID) -> None:
    """Name the images' real class wherever the segmentation refers to them."""

    def correct(dataset: Dataset, element: Any) -> None:
        if element.keyword == "ReferencedSOPClassUID" and element.value == uid.EnhancedCTImageStorage:
            element.value = sop_class

    segmentation.walk(correct)


def _class_name(header: Dataset) -> str:
    known = uid.UID(str(header.get("SOPClassUID", "")))
    return known.name if known.name != str(known) else "unknown"


def _check_headers(volume: Volume) -> None:
    for header in volume.headers:
        missing = [name for name in REQUIRED if name not in header]
        if missing:
            raise InvalidImage(
                f"a DICOM SEG refers to its image by {', '.join(missing)}, which the DICOM file "
                "lacks or states "
                f"wrongly. {_INSTEAD}"
            )
    first = volume.headers[0]
    has_place = "ImagePositionPatient" in first or "PerFrameFunctionalGroupsSequence" in first
    if volume.shape[2] > 1 and not has_place:
        raise InvalidImage(
            "a DICOM SEG of several frames needs ImagePositionPatient and ImageOrientationPatient, which the "
            f"DICOM file lacks: its frames have no place in space. {_INSTEAD}"
        )


def _segment(number: int, name: str, source: str) -> "SegmentDescription":
    import highdicom as hd
    from pydicom.sr.codedict import codes

    def concept(pair: tuple[str, str]) -> hd.sr.CodedConcept:
        return hd.sr.CodedConcept(value=pair[0], scheme_designator="SCT", meaning=pair[1])

    code = code_of(name)
    description = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name.replace("\\", "/")[:64],  # DICOM would take a backslash for a second value
        segmented_property_category=concept(code.category),
        segmented_property_type=concept(code.kind),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="VESSA",
            version=f"{__version__} {source}".strip()[:64],
            family=codes.cid7162.ArtificialIntelligence,
        ),
    )
    if code.side is not None:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [
            concept(code.side)
        ]
    return description
