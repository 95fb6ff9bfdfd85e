"""A series comes from a real DICOMweb archive (Orthanc), and its segmentation goes back there."""

import io

import numpy as np
import pydicom
import pytest
from orthanc import running_orthanc
from scans import dicom_series, phantom, written

from vessa.errors import InvalidRequest, Unreachable
from vessa.volumes import read_volume, write_labels
from vessa.volumes.dicomweb import Archive


@pytest.fixture
def archive(tmp_path):
    """The URL of an empty Orthanc."""
    with running_orthanc(tmp_path) as url:
        yield url


def test_a_series_is_retrieved_and_its_segmentation_stored(archive, tmp_path):
    client = Archive(archive)
    for file in dicom_series(phantom()):
        client.store(written(file))
    assert client.only_series("1.2.3") == "1.2.3.4"
    assert client.retrieve("1.2.3", "1.2.3.4", tmp_path / "series") == 6
    volume = read_volume(tmp_path / "series")
    np.testing.assert_array_equal(volume.voxels, phantom())
    data = write_labels(volume, (volume.voxels > 200).astype(np.uint8), {1: "liver"}, "nano", "dicom-seg")
    stored = client.store(data)
    assert client.only_series("1.2.3") == "1.2.3.4"  # a segmentation is no series of images
    client.retrieve("1.2.3", stored, tmp_path / "seg")
    back = pydicom.dcmread(tmp_path / "seg/000001.dcm")
    assert back.PixelData == pydicom.dcmread(io.BytesIO(data)).PixelData
    with pytest.raises(InvalidRequest, match="does not know it"):
        client.only_series("9.9")


def test_an_archive_that_does_not_answer_is_named():
    with pytest.raises(Unreachable, match="no DICOMweb archive answers at http://127.0.0.1:1/x"):
        Archive("http://127.0.0.1:1/x").only_series("1")
