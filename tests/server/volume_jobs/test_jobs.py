"""Volumes as jobs: DICOM and NIfTI in, label volumes on the same grid out."""

import gzip
import io
import shutil
import threading
import time
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scans import dicom_multiframe, dicom_series, dicom_slice, nifti, phantom, written

from vessa.codec import image_digest
from vessa.volumes import read_volume
from vessa_server.serialization.image_files import decode_mask
from vessa_server.settings import Settings
from vessa_server.volume_jobs.slices import read_provenance, write_images, write_slice
from vessa_server.volume_jobs.store import JobStore

AFFINE = np.array([[-1.2, 0, 0.1, 3], [0, 1.5, 0, 4], [0.1, 0, 6.0, 5], [0, 0, 0, 1]], np.float32)
SHAPE = (40, 30, 5)


def settings_of(weights, folder, **more):
    key = "a-key-for-tests-0123456789"
    return Settings(api_key=key, weights=str(weights), device="cpu", store=f"folder:{folder}", **more)


def post(server, *files, bank, **fields):
    parts = [("image", (f"{i}.bin", data)) for i, data in enumerate(files)]
    return server.http.post("/jobs", files=parts, data={"bank": bank, **fields})


def wait(server, identity):
    for _ in range(600):
        info = server.http.get(f"/jobs/{identity}").json()
        if info["state"] in ("done", "failed"):
            return info
        time.sleep(0.1)
    raise AssertionError(info)


def finished(server, *files, bank, **fields):
    answer = post(server, *files, bank=bank, **fields)
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/jobs/{answer.json()['id']}"
    info = wait(server, answer.json()["id"])
    assert (info["state"], info["done"]) == ("done", info["slices"])
    return server.http.get(f"/jobs/{info['id']}/result")


def as_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def single(server, image, bank):
    """The labels of one slice through POST /segment."""
    answer = server.http.post(
        "/segment", files={"image": as_png(image)}, data={"bank": bank}, headers={"Accept": "image/png"}
    )
    return decode_mask(answer.content, image.shape, image.size)


def test_a_nifti_volume_comes_back_with_its_affine_and_each_slices_own_labels(server):
    server.seed("jobs")
    data = gzip.compress(nifti(phantom(SHAPE), AFFINE))
    answer = finished(server, data, bank="jobs")
    assert answer.headers["Content-Type"] == "application/gzip"
    back = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-6)
    volume, labels = read_volume([data]), np.asarray(back.dataobj)
    assert (labels.shape, labels.dtype) == (SHAPE, np.uint8)
    for k in (0, 3):
        np.testing.assert_array_equal(labels[:, :, k].T, single(server, volume.image(2, k), "jobs"))


def test_a_dicom_series_comes_back_as_a_dicom_seg_that_refers_to_it(server):
    server.seed("jobs")
    files = dicom_series(phantom(SHAPE))
    answer = finished(server, *map(written, reversed(files)), bank="jobs")
    seg = hd.seg.segread(io.BytesIO(answer.content))
    assert answer.headers["Content-Type"] == "application/dicom"
    assert {i[2] for i in seg.get_source_image_uids()} == {f.SOPInstanceUID for f in files}
    assert [seg.get_segment_description(n).segment_label for n in (1, 2)] == ["ventricle", "wall"]


def test_a_multiframe_dicom_may_come_back_as_nifti_along_another_axis(server):
    server.seed("jobs")
    data = written(dicom_multiframe(phantom((24, 20, 3))))
    answer = finished(server, data, bank="jobs", result="nifti", axis="axial")
    back = nib.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    np.testing.assert_allclose(back.affine, read_volume([data]).affine, atol=1e-4)


def test_one_dicom_image_is_segmented_at_once_and_as_dicom_seg(server):
    server.seed("jobs")
    file = dicom_slice(phantom((64, 48, 1))[:, :, 0].T)
    answer = server.http.post(
        "/segment",
        files={"image": written(file)},
        data={"bank": "jobs"},
        headers={"Accept": "application/dicom"},
    )
    seg = hd.seg.segread(io.BytesIO(answer.content))
    plain = server.http.post(
        "/segment", files={"image": written(file)}, data={"bank": "jobs"}, headers={"Accept": "image/png"}
    )
    labels = decode_mask(plain.content, (48, 64), 48 * 64)
    found = seg.get_pixels_by_source_instance(
        [file.SOPInstanceUID], combine_segments=True, skip_overlap_checks=True
    )
    np.testing.assert_array_equal(found[0], labels)


def test_several_frames_are_a_job_and_a_png_has_no_dicom_seg(server):
    server.seed("jobs")
    for image, accept, message in (
        (written(dicom_multiframe(phantom())), "application/json", "POST /jobs"),
        (as_png(np.zeros((9, 9), np.uint8)), "application/dicom", "refers to a DICOM image"),
    ):
        answer = server.http.post(
            "/segment", files={"image": image}, data={"bank": "jobs"}, headers={"Accept": accept}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_image")
        assert message in answer.text


@pytest.mark.parametrize(
    ("files", "fields", "code"),
    [
        ([b"hello"], {}, "invalid_image"),
        ([], {}, "unsupported_media"),
        ([gzip.compress(nifti(phantom(), AFFINE))], {"axis": "up"}, "invalid_request"),
        ([gzip.compress(nifti(phantom(), AFFINE))], {"result": "dicom-seg"}, "invalid_request"),
        ([gzip.compress(nifti(phantom(), AFFINE))], {"bank": "nowhere"}, "unknown_bank"),
        ([gzip.compress(nifti(phantom(), AFFINE))], {"classes": '["tail"]'}, "unknown_class"),
    ],
)
def test_what_cannot_become_a_job_is_refused_at_once(server, files, fields, code):
    server.seed("jobs")
    answer = post(server, *files, **{"bank": "jobs", **fields})
    assert answer.json()["error"]["code"] == code


def test_a_job_is_its_keys_own_and_can_be_cancelled(server, key_of):
    server.seed("jobs")
    server.http.put("/banks/jobs/share")
    one, other = (server.as_key(key_of("annotate", name)) for name in ("ann", "bob"))
    info = post(one, gzip.compress(nifti(phantom((40, 30, 200)), AFFINE)), bank="jobs").json()
    assert one.http.get(f"/jobs/{info['id']}/result").json()["error"]["code"] == "job_unfinished"
    for ask in (other.http.get, other.http.delete):
        assert ask(f"/jobs/{info['id']}").json()["error"]["code"] == "unknown_job"
    assert other.http.get("/jobs").json() == []
    assert info["id"] in [job["id"] for job in server.http.get("/jobs").json()]
    assert one.http.delete(f"/jobs/{info['id']}").status_code == 204
    assert one.http.get(f"/jobs/{info['id']}").status_code == 404


def test_a_job_tells_what_made_each_of_its_slices(server, key_of):
    server.seed("jobs")
    data = nifti(phantom(SHAPE), AFFINE)
    job = post(server, data, bank="jobs", group="p0").json()["id"]
    assert wait(server, job)["state"] == "done"
    made = server.http.get(f"/jobs/{job}/provenance").json()
    assert len(made) == SHAPE[2]
    volume, bank = read_volume([data]), server.http.get("/banks/jobs").json()
    assert [one["image_id"] for one in made] == [image_digest(volume.image(2, k)) for k in range(SHAPE[2])]
    assert {(one["bank_version"], one["group"]) for one in made} == {(bank["version"], "p0")}
    alone = server.http.post(
        "/segment", files={"image": as_png(volume.image(2, 3))}, data={"bank": "jobs", "group": "p0"}
    ).json()
    assert made[3]["templates"] == alone["templates"]
    assert (made[3]["model"], made[3]["labels_version"]) == (alone["model"], alone["labels_version"])
    other = server.as_key(key_of("annotate", "other"))
    assert other.http.get(f"/jobs/{job}/provenance").status_code == 404


def test_jobs_are_bounded_in_number(server_of, nano_weights, tmp_path):
    server = server_of(settings_of(nano_weights, tmp_path, max_jobs=1, job_age_s=1e-3))
    server.seed("jobs")
    data = gzip.compress(nifti(phantom((40, 30, 3)), AFFINE))
    first = post(server, data, bank="jobs").json()
    wait(server, first["id"])
    server.settings.jobs.job_age_s = 1e9
    refused = post(server, data, bank="jobs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert refused.headers["Retry-After"]
    server.settings.jobs.job_age_s = 1e-3  # every finished job is too old at once
    second = post(server, data, bank="jobs")
    assert second.status_code == 202
    assert [job["id"] for job in server.http.get("/jobs").json()] == [second.json()["id"]]


def test_a_job_goes_on_from_its_finished_slices_after_a_restart(server_of, nano_weights, tmp_path):
    settings = settings_of(nano_weights, tmp_path)
    first = server_of(settings)
    first.seed("jobs")
    data = gzip.compress(nifti(phantom(SHAPE), AFFINE))
    whole = finished(first, data, bank="jobs").content
    first.http.__exit__(None, None, None)
    # What a kill leaves: a running job, its input, and three slices; the labels of one are cut off.
    store, job = run_again(tmp_path / ".jobs", data)
    folder = store.path(job)
    (folder / "result").unlink()
    for k, made in enumerate(read_provenance(folder)[:3]):
        write_slice(folder, k, np.full((30, 40), 2, np.uint8), made, 0.1)
    (folder / "00002.png").write_bytes((folder / "00002.png").read_bytes()[:40])
    shutil.copytree(folder, folder.parent / ".cut-off-upload")
    second = server_of(settings)
    assert wait(second, job.id)["state"] == "done"
    answer = second.http.get(f"/jobs/{job.id}/result")
    labels, before = (
        np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(d)).dataobj) for d in (answer.content, whole)
    )
    assert (labels[:, :, :2] == 2).all()
    np.testing.assert_array_equal(labels[:, :, 2:], before[:, :, 2:])
    left = [*(f"{k:05d}.made" for k in range(5)), "job.json", "result"]
    for _ in range(100):  # the inputs are removed after the outcome is stored
        if sorted(p.name for p in folder.iterdir()) == left:
            break
        time.sleep(0.1)
    assert sorted(p.name for p in folder.iterdir()) == left
    assert not (folder.parent / ".cut-off-upload").exists()
    modes = {p.stat().st_mode & 0o777 for p in (folder, *folder.iterdir())}
    assert modes == {0o700, 0o600}


def test_slices_are_counted_along_the_axis_that_is_asked_for(server):
    server.seed("jobs")
    long = nifti(np.zeros((3000, 4, 4), np.float32), np.eye(4))
    answer = post(server, long, bank="jobs", axis="sagittal")
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert "3000 slices along this axis, more than 2048" in answer.text


def run_again(folder: Path, data: bytes):
    """Make the only finished job of a folder a running one again; returns the store and the job."""
    store = JobStore(folder)
    (job,) = store.all()
    (store.path(job) / "00000.input").write_bytes(data)
    images = write_images(store.path(job), read_volume([data]), job.axis)
    return store, store.change(job, state="running", ended=0.0, result="", images=images)


def job_done_before(first):
    """Let a server end a job, and then itself; returns the job's id and its volume."""
    first.seed("jobs")
    data = gzip.compress(nifti(phantom(SHAPE), AFFINE))
    identity = post(first, data, bank="jobs").json()["id"]
    wait(first, identity)
    first.http.__exit__(None, None, None)
    return identity, data


def test_a_job_whose_banks_classes_were_changed_fails_and_mixes_nothing(server_of, nano_weights, tmp_path):
    settings = settings_of(nano_weights, tmp_path)
    identity, data = job_done_before(server_of(settings))
    store, job = run_again(tmp_path / ".jobs", data)
    store.change(job, classes={k: f"not {name}" if k == 1 else name for k, name in job.classes.items()})
    second = server_of(settings)
    info = wait(second, identity)
    assert info["state"] == "failed"
    assert second.http.get(f"/jobs/{identity}/result").json()["error"]["code"] in (
        "class_conflict",
        "unknown_class",
    )


def test_a_job_whose_files_are_gone_fails_and_holds_nobody_up(server_of, nano_weights, tmp_path):
    settings = settings_of(nano_weights, tmp_path)
    identity, data = job_done_before(server_of(settings))  # its input is deleted with that
    store = JobStore(tmp_path / ".jobs")
    store.change(store.all()[0], state="running")
    second = server_of(settings)
    info = wait(second, identity)
    assert (info["state"], "missing" in info["error"]) == ("failed", True)
    assert wait(second, post(second, data, bank="jobs").json()["id"])["state"] == "done"


def test_a_damaged_job_file_is_skipped_and_the_others_run(server_of, nano_weights, tmp_path):
    server = server_of(settings_of(nano_weights, tmp_path))
    server.seed("jobs")
    data = gzip.compress(nifti(phantom(SHAPE), AFFINE))
    damaged = post(server, data, bank="jobs").json()["id"]
    wait(server, damaged)
    file = tmp_path / ".jobs" / damaged / "job.json"
    for content in (file.read_bytes().replace(b"done", b"gone"), b'{"job": "{}"', b"[1]", b""):
        file.write_bytes(content)
        assert wait(server, post(server, data, bank="jobs").json()["id"])["state"] == "done"
        assert server.http.get(f"/jobs/{damaged}").status_code == 404
    assert damaged in server.app.state.jobs.store.damaged
    assert server.http.delete(f"/jobs/{damaged}").status_code == 204  # an admin may delete it
    assert not file.exists()


@pytest.mark.parametrize("name", ["00000.input", "images.npy"])
def test_a_damaged_input_fails_its_job(server_of, nano_weights, tmp_path, name):
    settings = settings_of(nano_weights, tmp_path)
    identity, data = job_done_before(server_of(settings))
    store, job = run_again(tmp_path / ".jobs", data)
    path = store.path(job) / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    info = wait(server_of(settings), identity)
    assert (info["state"], "damaged" in info["error"]) == ("failed", True)


def test_a_damaged_result_is_an_error_and_no_label(server_of, nano_weights, tmp_path):
    server = server_of(settings_of(nano_weights, tmp_path))
    server.seed("jobs")
    identity = post(server, gzip.compress(nifti(phantom(SHAPE), AFFINE)), bank="jobs").json()["id"]
    wait(server, identity)
    path = tmp_path / ".jobs" / identity / "result"
    path.write_bytes(path.read_bytes() + b"x")
    answer = server.http.get(f"/jobs/{identity}/result")
    assert (answer.status_code, "damaged" in answer.text) == (500, True)


def test_jobs_of_keys_take_turns(server, key_of):
    server.seed("jobs")
    server.http.put("/banks/jobs/share")
    busy, other = (server.as_key(key_of("annotate", name)) for name in ("ann", "bob"))
    long = gzip.compress(nifti(phantom((40, 30, 400)), AFFINE))
    first = [post(busy, long, bank="jobs").json()["id"] for _ in range(2)]
    small = post(other, gzip.compress(nifti(phantom((40, 30, 1)), AFFINE)), bank="jobs").json()
    assert wait(other, small["id"])["state"] == "done"
    assert {busy.http.get(f"/jobs/{job}").json()["state"] for job in first} <= {"queued", "running"}
    for job in first:
        busy.http.delete(f"/jobs/{job}")


def test_a_key_holds_a_share_of_the_disk(server_of, nano_weights, tmp_path):
    server = server_of(settings_of(nano_weights, tmp_path, max_jobs_bytes=40_000, job_share=0.5))
    server.seed("jobs")
    data = nifti(phantom((40, 30, 8)), AFFINE)  # with its slices more than half of the bytes
    refused = post(server, data, bank="jobs")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert "of 20000 bytes" in refused.text
    assert post(server, gzip.compress(nifti(phantom((40, 30, 2)), AFFINE)), bank="jobs").status_code == 202


def test_jobs_of_a_revoked_key_stop(server, key_of):
    server.seed("jobs")
    server.http.put("/banks/jobs/share")
    key = server.as_key(key_of("annotate", "leaver"))
    job = post(key, gzip.compress(nifti(phantom((40, 30, 400)), AFFINE)), bank="jobs").json()["id"]
    server.app.state.access.keys.remove("leaver")
    info = wait(server, job)
    assert (info["state"], "revoked" in info["error"]) == ("failed", True)
    assert info["done"] < 400


def test_a_jump_of_the_clock_deletes_no_result(server_of, nano_weights, tmp_path, monkeypatch):
    server = server_of(settings_of(nano_weights, tmp_path, job_age_s=3600))
    server.seed("jobs")
    data = gzip.compress(nifti(phantom((40, 30, 1)), AFFINE))
    first = post(server, data, bank="jobs").json()["id"]
    wait(server, first)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 30 * 86400)
    wait(server, post(server, data, bank="jobs").json()["id"])
    assert server.http.get(f"/jobs/{first}/result").status_code == 200


def test_a_failing_turn_does_not_end_the_thread(server_of, nano_weights, tmp_path, monkeypatch):
    server = server_of(settings_of(nano_weights, tmp_path))
    server.seed("jobs")
    jobs, failed = server.app.state.jobs, threading.Event()
    whole = jobs.store.all

    def fail_once():
        if threading.current_thread().name == "vessa-jobs" and not failed.is_set():
            failed.set()
            raise RuntimeError("a fault of the service")
        return whole()

    monkeypatch.setattr(jobs.store, "all", fail_once)
    data = gzip.compress(nifti(phantom((40, 30, 1)), AFFINE))
    identity = post(server, data, bank="jobs").json()["id"]
    assert failed.wait(20)
    assert wait(server, identity)["state"] == "done"
    assert server.http.get("/readyz").status_code == 200
    monkeypatch.setattr(type(jobs._runner), "alive", False)
    answer = server.http.get("/readyz")
    assert (answer.status_code, "volume jobs has died" in answer.text) == (503, True)


def test_an_upload_that_fails_leaves_nothing(server_of, nano_weights, tmp_path):
    server = server_of(settings_of(nano_weights, tmp_path))
    server.seed("jobs")
    assert post(server, b"no volume", bank="jobs").status_code == 422
    assert [p.name for p in (tmp_path / ".jobs").iterdir() if p.name != "worker.lock"] == []
