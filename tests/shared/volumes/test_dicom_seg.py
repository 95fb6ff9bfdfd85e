"""A DICOM SEG never fails for a harmless header value, and says what its segments are."""

import io
import shutil
import subprocess

import highdicom as hd
import numpy as np
import pytest
from pydicom.sr._concepts_dict import concepts
from scans import dicom_multiframe, dicom_series, dicom_slice, phantom, written

from vessa.errors import InvalidImage
from vessa.volumes import check_dicom_seg, read_volume, write_labels
from vessa.volumes.segment_codes import all_codes, code_of


def seg_of(volume, classes=None):
    labels = (volume.voxels > 200).astype(np.uint8)
    return hd.seg.segread(
        io.BytesIO(write_labels(volume, labels, classes or {1: "liver"}, "nano", "dicom-seg"))
    )


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"PatientBirthDate": "1990/01/"}, "PatientBirthDate"),
        ({"PatientBirthDate": "00000000"}, "PatientBirthDate"),
        ({"PatientSex": "Male"}, "PatientSex"),
        ({"StudyTime": "11:11:11.111"}, "StudyTime"),
        ({"StudyDate": "2011-08-24"}, "StudyDate"),
        ({"StudyID": "x" * 40}, "StudyID"),
        ({"SliceThickness": None}, "no SliceThickness"),
        ({"FrameOfReferenceUID": None}, "no FrameOfReferenceUID"),
        ({"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.2]}, "detector's pixel spacing"),
        ({"PatientName": "Mueller Hans"}, None),
        ({"PatientID": None, "StudyID": None, "AccessionNumber": None}, None),
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou"}, None),
        ({"SpecificCharacterSet": ["", "ISO 2022 IR 149"]}, None),
    ],
)
def test_harmless_values_are_repaired_or_left_empty_with_a_note(values, note, caplog, recwarn):
    files = dicom_series(phantom())
    for file in files:
        for name, value in values.items():
            if value is None and name in file:
                delattr(file, name)
            elif value is not None:
                setattr(file, name, value)
    volume = read_volume([written(file) for file in files])
    recwarn.clear()
    seg = seg_of(volume)
    assert seg.number_of_segments == 1
    assert seg.get_volume().spatial_shape == (6, 10, 12)
    assert note is None or note in " ".join(volume.notes)
    assert not any(word in caplog.text for word in ("Mueller", "Yamada"))
    assert not any("Mueller" in str(one.message) for one in recwarn)


def test_repairs_keep_what_can_be_kept():
    file = dicom_slice(
        np.ones((6, 6)),
        StudyDate="2011-08-24",
        StudyTime="11:12:13.5",
        PatientSex="female",
        PatientName="A^B",
    )
    seg = seg_of(read_volume([written(file)]))
    assert (seg.StudyDate, seg.StudyTime, seg.PatientSex, str(seg.PatientName)) == (
        "20110824", "111213.5", "F", "A^B",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_what_a_seg_must_refer_to_is_named_before_anything_is_predicted(name):
    file = dicom_slice(np.ones((6, 6)))
    delattr(file, name)
    data = io.BytesIO()
    file.save_as(data, enforce_file_format=False)
    volume = read_volume([data.getvalue()])
    with pytest.raises(InvalidImage, match=f"by {name}, which the DICOM file lacks"):
        check_dicom_seg(volume)


def test_a_picture_without_a_place_has_a_seg_too():
    file = dicom_slice(np.ones((6, 6)), Modality="CR")
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "SliceThickness"):
        delattr(file, name)
    file.PixelSpacing = [0, 0]
    volume = read_volume([written(file)])
    assert "place in the patient is unknown" in volume.notes[0]
    assert seg_of(volume).number_of_segments == 1


def test_a_slice_without_place_and_frame_of_reference_has_a_seg():
    file = dicom_slice(np.ones((6, 6)))
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"):
        delattr(file, name)
    volume = read_volume([written(file)])
    assert "gets one made of the series' UID" in volume.notes[-1]
    assert seg_of(volume).number_of_segments == 1


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy (Debian package dicom3tools)")
def test_a_validator_finds_no_error(tmp_path):
    series = [written(file) for file in dicom_series(phantom())]
    one, several = [written(dicom_slice(np.ones((6, 6))))], [written(dicom_multiframe(phantom()))]
    for number, files in enumerate((series, one, several)):
        volume = read_volume(files)
        labels = (volume.voxels > 150).astype(np.uint8)
        classes = {1: "left kidney", 2: "polyp"}
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(write_labels(volume, labels, classes, "nano", "dicom-seg"))
        said = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True)
        assert said.stderr.startswith("Segmentation\n") or "\nSegmentation\n" in said.stderr, said.stderr
        assert "Error" not in said.stderr, said.stderr


def test_segments_carry_standard_codes_and_the_algorithm():
    volume = read_volume([written(file) for file in dicom_series(phantom())])
    seg = seg_of(volume, {1: "liver", 2: "left kidney", 3: "Lebertumor", 4: "liver tumor"})
    kinds = [seg.get_segment_description(i).segmented_property_type for i in (1, 2, 3, 4)]
    assert [(k.value, k.scheme_designator) for k in kinds] == [
        ("10200004", "SCT"), ("64033007", "SCT"), ("91723000", "SCT"), ("108369006", "SCT"),
    ]  # fmt: skip
    assert kinds[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert [seg.get_segment_description(i).segment_label for i in (1, 3)] == ["liver", "Lebertumor"]
    assert seg.ContentDescription == "Research use only. Not a medical device."
    about = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (about.AlgorithmName, about.AlgorithmVersion.split()[-1]) == ("VESSA", "nano")


def test_the_table_of_codes_is_that_of_the_standard():
    known = {code for entries in concepts["SCT"].values() for code in entries}
    assert [code for code, _ in all_codes() if code not in known] == []


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("right ventricle cavity", "Right ventricle of heart"),
        ("left ventricle myocardium", "Left Ventricle Myocardium"),
        ("Polyp", "Polyp of colon"),
        ("skin_lesion", "Lesion"),
        ("lung nodule", "Nodule"),
        ("KIDNEY", "Kidney"),
        ("structure 7", "Anatomical Structure"),
    ],
)
def test_class_names_of_the_field_have_their_codes(name, meaning):
    assert code_of(name).kind[1] == meaning
