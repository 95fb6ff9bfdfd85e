"""Keep of a DICOM header what a DICOM SEG refers to, with harmless faults repaired.

Headers in the wild break the rules of DICOM in ways that matter to nobody but a strict writer: dates with
dashes, an empty first character set, no slice thickness. The kept header is clean; everything else is
dropped.
"""

import re
import zlib
from collections.abc import Iterable, Sequence

from pydicom import Dataset, uid
from pydicom.valuerep import DSfloat

from vessa.volumes.dicom.frames import SlicePlane

REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_TEXTS = {  # attributes that must be there and may be empty, with the longest value that DICOM allows
    "PatientID": 64, "StudyID": 16, "AccessionNumber": 16, "PatientName": 64, "ReferringPhysicianName": 64,
}  # fmt: skip
_DATES = ("PatientBirthDate", "StudyDate")
_SEXES = {"M": "M", "F": "F", "O": "O", "MALE": "M", "FEMALE": "F", "OTHER": "O", "": ""}
_NUMBERS = ("Rows", "Columns")


def kept_header(header: Dataset, frames: Sequence[SlicePlane]) -> tuple[Dataset, list[str]]:
    """Return a clean header of one file, and notes on what was repaired.

    header: as read; frames: of this file, whose geometry replaces the header's. Identifiers that are missing
    stay missing; `dicom_seg` names them.
    """
    kept, repaired = Dataset(), []
    kept.SpecificCharacterSet = "ISO_IR 192"
    for name in (*REQUIRED, "FrameOfReferenceUID"):
        value = str(header.get(name) or "").strip("\0 ")
        if uid.UID(value).is_valid:
            setattr(kept, name, uid.UID(value))
    kept.Modality = re.sub(r"[^A-Z0-9_ ]", "", str(header.get("Modality") or "OT").upper())[:16]
    for name in _NUMBERS:
        setattr(kept, name, int(header[name].value))
    for name in _TEXTS:
        text = _text(header, name)
        kept_text = "".join(c for c in text if c.isprintable() and c != "\\")[: _TEXTS[name]]
        setattr(kept, name, kept_text)
        repaired += [name] if kept_text != text else []
    for name in (*_DATES, "StudyTime", "PatientSex"):
        text = _text(header, name)
        value = _sex(text) if name == "PatientSex" else _time(text) if name == "StudyTime" else _date(text)
        setattr(kept, name, value)
        repaired += [name] if value != text else []
    _place(kept, header, frames)
    notes = (
        [f"DICOM attributes repaired or left empty in a DICOM SEG: {', '.join(repaired)}"] if repaired else []
    )
    if "FrameOfReferenceUID" not in kept and "SeriesInstanceUID" in kept:
        # one for all files of the series, and the same one the next time
        digest = zlib.crc32(kept.SeriesInstanceUID.encode())
        kept.FrameOfReferenceUID = uid.generate_uid(entropy_srcs=[str(digest), kept.SeriesInstanceUID])
        notes.append(
            "the DICOM file has no FrameOfReferenceUID; a DICOM SEG gets one made of the series' UID"
        )
    if "SliceThickness" not in header and "SharedFunctionalGroupsSequence" not in header and len(frames) == 1:
        notes.append(
            "the DICOM file has no SliceThickness; in a DICOM SEG the distance of the slices, or 1 mm, is"
        )
    return kept, notes


def _text(header: Dataset, name: str) -> str:
    """Return a value as Unicode; "" where its bytes do not fit the stated character set."""
    try:
        value = header.get(name)
        if name in ("PatientName", "ReferringPhysicianName") and value is not None:
            value = value.decode() if hasattr(value, "decode") else value
        return "" if value is None else str(value).strip("\0 ")
    except (UnicodeError, LookupError, ValueError, TypeError):
        return ""


def _date(text: str) -> str:
    match = re.fullmatch(r"(\d{4})[-/.: ]?(\d{2})[-/.: ]?(\d{2})", text)
    if match is None or not (1 <= int(match[2]) <= 12 and 1 <= int(match[3]) <= 31 and int(match[1]) > 0):
        return ""
    return "".join(match.groups())


def _time(text: str) -> str:
    match = re.fullmatch(r"(\d{2}):?(\d{2})?:?(\d{2})?(\.\d{1,6})?\d*", text)
    if match is None or int(match[1]) > 23 or int(match[2] or 0) > 59 or int(match[3] or 0) > 60:
        return ""
    return "".join(group or "" for group in match.groups()) if match[3] else (match[1] + (match[2] or ""))


def _sex(text: str) -> str:
    return _SEXES.get(text.upper(), "")


def _place(kept: Dataset, header: Dataset, frames: Sequence[SlicePlane]) -> None:
    """State the geometry of the frames: at the top for one frame, in functional groups for several."""
    multi_frame = "NumberOfFrames" in header and (
        len(frames) > 1 or "SharedFunctionalGroupsSequence" in header
    )
    first = frames[0]
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing = _decimals(first.spacing)
    measures.SliceThickness = _decimals([first.thickness])[0]
    if first.position is not None:
        orientation.ImageOrientationPatient = _decimals([*first.rows, *first.columns])
    if not multi_frame:
        kept.update(measures)
        kept.update(orientation)
        if first.position is not None:
            kept.ImagePositionPatient = _decimals(first.position)
        return
    kept.NumberOfFrames = len(frames)
    if first.position is None:
        return
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    kept.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for frame in frames:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = _decimals(frame.position if frame.position is not None else (0, 0, 0))
        group.PlanePositionSequence = [place]
        groups.append(group)
    kept.PerFrameFunctionalGroupsSequence = groups


def _decimals(values: Iterable[float]) -> list[DSfloat]:
    return [DSfloat(float(value), auto_format=True) for value in values]
