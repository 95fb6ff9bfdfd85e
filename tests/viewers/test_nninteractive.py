"""The client of nnInteractive (3D Slicer, MITK and napari use it) against our service."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vessa.masks.overlay import overlay
from vessa.metrics import dice

pytestmark = [
    pytest.mark.viewer,
    # The client's libraries, not ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
remote = pytest.importorskip(
    "nnInteractive.inference.remote.remote_session", reason="no nninteractive-client"
)


@pytest.fixture
def connect(viewers: Any, heart: str) -> Any:
    """Connect a client to a class of the bank and give it the volume of a phantom."""
    opened = []

    def make(image: np.ndarray, address: str = "") -> Any:
        url = f"{viewers.url}/nninteractive/{heart}{address}"
        session = remote.nnInteractiveRemoteInferenceSession(url, viewers.api_key)
        opened.append(session)
        session.set_do_autozoom(True)
        session.set_image(image[None].astype(np.float32), {"spacing": [8.0, 1.5, 1.5]})
        session.set_target_buffer(np.zeros(image.shape, np.uint8))
        return session

    yield make
    for session in opened:
        session.close()


def test_a_click_segments_a_structure_through_the_volume(connect: Any, phantoms: Any) -> None:
    phantom = phantoms[-1]
    session = connect(phantom.image)
    class_id, place = largest(phantom.labels)
    session.add_point_interaction(place, True)
    drawn = session.target_buffer
    assert drawn[place] == 1
    assert agreement(drawn, phantom.labels == class_id) > 0.5
    assert drawn.any((1, 2)).sum() > 1
    keep_picture(phantom.image, drawn)
    before = drawn.copy()
    session.add_point_interaction((place[0], 2, 2), False)
    assert session.undo()
    np.testing.assert_array_equal(session.target_buffer, before)
    session.reset_interactions()
    assert not session.undo()
    assert not session.target_buffer.any()


def keep_picture(image: np.ndarray, drawn: np.ndarray) -> None:
    """Keep the client's buffer over its image, slice beside slice, in the folder of VESSA_SCREENSHOTS."""
    folder = os.environ.get("VESSA_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        slices = [overlay(gray, labels) for gray, labels in zip(image, drawn.astype(np.uint8), strict=True)]
        rows = [np.concatenate(slices[start : start + 3], axis=1) for start in (0, 3)]
        Image.fromarray(np.concatenate(rows)).save(Path(folder) / "nninteractive.png")


def test_without_autozoom_the_mask_stays_in_its_slice(connect: Any, phantoms: Any) -> None:
    session = connect(phantoms[-1].image)
    session.set_do_autozoom(False)
    _, place = largest(phantoms[-1].labels)
    session.add_point_interaction(place, True)
    assert np.flatnonzero(session.target_buffer.any((1, 2))).tolist() == [place[0]]


def test_boxes_scribbles_and_lassos_draw_the_class_of_the_address(connect: Any, phantoms: Any) -> None:
    phantom = phantoms[-1]
    class_id, place = largest(phantom.labels)
    session = connect(phantom.image, "/" + phantom.classes[class_id].replace(" ", "%20"))
    session.set_do_autozoom(False)
    truth = phantom.labels[place[0]] == class_id
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    (top, bottom), (left, right) = (rows[[0, -1]] + [0, 1]).tolist(), (columns[[0, -1]] + [0, 1]).tolist()
    slices = [place[0], place[0] + 1]
    bounds = [slices, [top, bottom], [left, right]]
    scribble, lasso = np.zeros((2, *phantom.image.shape), np.uint8)
    scribble[place[0], place[1], place[2] - 1 : place[2] + 2] = 1
    lasso[place[0]] = truth

    def drawn(draw: Any) -> float:
        draw()
        score = agreement(session.target_buffer[place[0]], truth)
        session.reset_interactions()
        return score

    assert drawn(lambda: session.add_bbox_interaction(bounds, True)) > 0.5
    assert drawn(lambda: session.add_lasso_interaction(lasso, True)) > 0.5
    assert drawn(lambda: session.add_scribble_interaction(scribble, True)) > 0.5
    crop = lasso[place[0] : place[0] + 1, top:bottom, left:right]
    assert drawn(lambda: session.add_lasso_interaction(crop, True, interaction_bbox=bounds)) > 0.5


def test_an_initial_label_is_kept_where_nothing_is_drawn(connect: Any, phantoms: Any) -> None:
    phantom = phantoms[-1]
    session = connect(phantom.image)
    class_id, place = largest(phantom.labels)
    label = (phantom.labels == class_id).astype(np.uint8)
    session.add_initial_seg_interaction(label)
    session.add_point_interaction(place, True)
    others = np.arange(len(label)) != place[0]
    labelled = others & label.any((1, 2))
    np.testing.assert_array_equal(session.target_buffer[labelled], label[labelled])
    assert agreement(session.target_buffer[place[0]], label[place[0]]) > 0.5


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the refused client leaves its socket open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_leases_end_and_places_run_out_as_the_client_expects(viewers: Any, heart: str) -> None:
    url = f"{viewers.url}/nninteractive/{heart}"
    open_client = remote.nnInteractiveRemoteInferenceSession
    sessions: list[Any] = []

    def fill() -> None:
        for _ in range(5):  # other tests' sessions of the same key count, too
            sessions.append(open_client(url, viewers.api_key))

    with pytest.raises(remote.ServerAtCapacityError, match="4 viewer sessions, its limit"):
        fill()
    assert sessions[0].ping()
    assert sessions[0].heartbeat() > 60
    assert sessions[0].lease_status()["remaining_seconds"] > 60
    token = sessions[0]._lease_token
    sessions[0].close()
    sessions[1]._http.headers["X-Lease-Token"] = token
    with pytest.raises(remote.SessionExpiredError, match="Connect again"):
        sessions[1].reset_interactions()
    for session in sessions[1:]:
        session.close()
    gc.collect()


def agreement(found: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks."""
    return dice(found.astype(bool), truth.astype(bool)) or 0.0


def largest(labels: np.ndarray) -> tuple[int, tuple[int, int, int]]:
    """The class with the most pixels in the middle slice, and a place well inside of it."""
    from scipy import ndimage

    middle = labels[len(labels) // 2]
    class_id = int(np.bincount(middle[middle > 0]).argmax())
    depth = ndimage.distance_transform_edt(middle == class_id)
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return class_id, (len(labels) // 2, int(row), int(column))
