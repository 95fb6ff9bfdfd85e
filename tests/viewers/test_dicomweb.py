"""`vessa dicomweb` and `vessa watch` between a real archive (Orthanc) and a real annotator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from orthanc import running_orthanc
from scans import dicom_series, written
from typer.testing import CliRunner

from vessa.cli.main import app
from vessa.metrics import dice
from vessa.volumes.dicomweb import Archive

pytestmark = pytest.mark.viewer
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def test_a_series_of_the_archive_gets_its_segmentation(
    viewers: Any, heart: str, phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phantom = phantoms[-1]
    monkeypatch.setenv("VESSA_API_KEY", viewers.api_key)
    monkeypatch.setenv("VESSA_URL", viewers.url)
    (tmp_path / "archive").mkdir()
    with running_orthanc(tmp_path / "archive") as root, Archive(root) as archive:
        for file in dicom_series(phantom.image.transpose(2, 1, 0).astype(np.int16), orientation=AXIAL):
            archive.store(written(file))
        given = ["dicomweb", "--url", root, "--study", "1.2.3", "--bank", heart, "--json"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        stored = json.loads(result.stdout.splitlines()[-1])["stored_series"]
        archive.retrieve("1.2.3", stored, tmp_path / "seg")
    seg = pydicom.dcmread(tmp_path / "seg" / "000001.dcm")
    names = [str(segment.SegmentLabel) for segment in seg.SegmentSequence]
    assert names == list(phantom.classes.values())
    assert volume_dice(seg, phantom) > 0.5


def test_new_series_that_match_are_segmented_once(
    viewers: Any, heart: str, phantoms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VESSA_API_KEY", viewers.api_key)
    monkeypatch.setenv("VESSA_URL", viewers.url)
    (tmp_path / "archive").mkdir()
    voxels = phantoms[-1].image.transpose(2, 1, 0).astype(np.int16)
    with running_orthanc(tmp_path / "archive") as root, Archive(root) as archive:
        series = {"cine": "1.2.3.4", "scout": "1.2.3.5"}
        for name, uid in series.items():
            for file in dicom_series(voxels, orientation=AXIAL, uid=uid, SeriesDescription=name):
                archive.store(written(file))
        given = ["watch", "--url", root, "--journal", str(tmp_path / "journal"), "--bank", heart, "--once"]
        given += ["--modality", "CT", "--description", "^cine", "--since", "20200101", "--json"]

        def run(*more: str) -> dict[str, Any]:
            result = CliRunner().invoke(app, [*given, *more])
            assert result.exit_code == 0, result.output
            return dict(json.loads(result.stdout.splitlines()[-1]))

        assert run()["stored"] == 1
        assert "stored" not in run()
        assert run("--journal", str(tmp_path / "other"))["present"] == 1
        found = {one.modality: one for one in archive.series_since("20200101")}
    line = json.loads((tmp_path / "journal").read_text())
    assert (line["series"], line["stored"]) == (series["cine"], found["SEG"].uid)
    assert (tmp_path / "journal").stat().st_mode & 0o077 == 0


def volume_dice(seg: pydicom.Dataset, phantom: Any) -> float:
    """Mean Dice of the segments, each frame placed by its position."""
    frames = seg.pixel_array.reshape(-1, *phantom.image.shape[1:]) > 0
    found = {key: np.zeros(phantom.image.shape, bool) for key in phantom.classes}
    keys = list(phantom.classes)
    for frame, about in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        z = float(about.PlanePositionSequence[0].ImagePositionPatient[2])
        number = int(about.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        found[keys[number - 1]][round((z - 30.0) / 3.0)] = frame
    scores = [dice(found[key], phantom.labels == key) for key in keys]
    return float(np.mean([score for score in scores if score is not None]))
