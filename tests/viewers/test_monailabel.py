"""The client class of 3D Slicer's extension MONAILabel, unmodified, against our service."""

from __future__ import annotations

import gc
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from vessa.metrics import dice

pytestmark = pytest.mark.viewer
AFFINE = np.array([[-1.5, 0.0, 0.0, 90.0], [0.0, -1.5, 0.0, 80.0], [0.0, 0.0, 8.0, -20.0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="session")
def client_class(load_module: Any) -> Any:
    """MONAILabelClient of the file that `make test-viewers` takes from MONAI Label's wheel."""
    return load_module("VESSA_MONAILABEL_CLIENT", "client of MONAI Label").MONAILabelClient


@pytest.fixture
def client(client_class: Any, viewers: Any, heart: str, tmp_path: Path) -> Any:
    """A client that signed in as the extension does: any name, a key as the password."""
    client = client_class(f"{viewers.url}/monailabel/{heart}", tmpdir=str(tmp_path), client_id="tests")
    assert client.auth_enabled()
    client.update_auth(client.auth_token("anyone", viewers.api_key))
    assert client.auth_valid_token()
    return client


def write(path: Path, stack: np.ndarray) -> str:
    """Write voxels (K, J, I) as a compressed NIfTI file."""
    image = nib.Nifti1Image(stack.T, AFFINE)  # type: ignore[no-untyped-call]
    path.write_bytes(gzip.compress(image.to_bytes()))
    return str(path)


def read(path: str, like: str) -> np.ndarray:
    """Read labels (K, J, I) by ITK, as 3D Slicer does; their grid must be the image's."""
    labels, image = SimpleITK.ReadImage(path), SimpleITK.ReadImage(like)
    assert labels.GetSize() == image.GetSize()
    np.testing.assert_allclose(labels.GetDirection(), image.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(labels.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(labels.GetSpacing(), image.GetSpacing(), atol=1e-5)
    return np.asarray(SimpleITK.GetArrayFromImage(labels))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the client leaves files and sockets open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_slicers_client_segments_corrects_and_saves(
    client: Any, phantoms: Any, heart: str, viewers: Any, tmp_path: Path
) -> None:
    phantom = phantoms[-1]
    path = write(tmp_path / "scan.nii.gz", phantom.image)
    info = client.info()
    assert info["labels"] == list(phantom.classes.values())
    session = client.create_session(path)["session_id"]
    assert client.get_session(session)
    result, params = client.infer(heart, "scan", {"result_extension": ".nrrd"}, session_id=session)
    labels = read(result, path)
    assert set(params["label_names"].values()) == {int(v) for v in np.unique(labels) if v}
    scores = [dice(labels == key, phantom.labels == key) for key in phantom.classes]
    assert np.mean([score for score in scores if score is not None]) > 0.5
    k = 3
    class_id = int(np.bincount(phantom.labels[k][phantom.labels[k] > 0]).argmax())
    truth = phantom.labels == class_id
    rows, columns = np.nonzero(truth[k])
    middle = len(rows) // 2
    click = {
        "label": phantom.classes[class_id],
        "foreground": [[int(columns[middle]), int(rows[middle]), k]],
        "background": [[2, 2, k]],
        "slice": k,
    }
    result, _ = client.infer(f"{heart}-slice", "scan", click, session_id=session)
    drawn = read(result, path) > 0
    assert np.flatnonzero(drawn.any((1, 2))).tolist() == [k]
    roi = [int(v) for v in (columns.max(), columns.min(), rows.min(), rows.max(), k, k)]
    box = {"label": phantom.classes[class_id], "foreground": [], "background": [], "roi": roi}
    result, _ = client.infer(f"{heart}-volume", "scan", box, session_id=session)
    assert (dice(read(result, path)[k] > 0, truth[k]) or 0.0) > 0.5
    client.upload_image(path, "scan")
    assert client.next_sample("vessa", {})["id"] == "scan"
    mask = write(tmp_path / "label.nii.gz", phantom.labels)
    names = [{"name": name, "idx": key} for key, name in phantom.classes.items()]
    assert client.save_label("scan", mask, params={"label_info": names})["templates"]
    assert "scan" in client.datastore()["objects"]
    assert client.info()["datastore"] == {"total": 1, "completed": 1}
    assert client.next_sample("vessa", {}) == {}
    client.remove_session(session)
    assert client.get_session(session) == {}
    gc.collect()  # what the client left open is closed here, where its warnings are ignored
