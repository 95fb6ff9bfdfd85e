"""A series comes from a real DICOMweb archive (Orthanc), and its segmentation goes back there."""

import io
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scans import dicom_series, phantom, written

from vessa.errors import InvalidRequest, Unreachable
from vessa.volumes import read_volume, write_labels
from vessa.volumes.dicomweb import Archive

ORTHANC = shutil.which("Orthanc", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture
def archive(tmp_path):
    """The URL of an empty Orthanc."""
    if ORTHANC is None or not PLUGIN.exists():
        pytest.skip("needs Debian's packages orthanc and orthanc-dicomweb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "StorageDirectory": str(tmp_path), "IndexDirectory": str(tmp_path), "HttpPort": port,
        "DicomServerEnabled": False, "RemoteAccessAllowed": False, "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }  # fmt: skip
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    process = subprocess.Popen(
        [ORTHANC, str(tmp_path / "orthanc.json")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait()


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
