"""Test the correct behavior for defects that users of other trainers reported.

Each test makes its small data set anew. Students are tiny and train a few steps.
"""

import json
import multiprocessing
import resource
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from vessa.datasets import open_dataset
from vessa.errors import InvalidConfig, InvalidDataset
from vessa_trainer.config import DataConfig
from vessa_trainer.data.splits import plan_splits
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.data.verification import verify_data
from vessa_trainer.experiments.run_lock import locked
from vessa_trainer.prediction.predict import predict
from vessa_trainer.semi_supervised.divergence import Diverged
from vessa_trainer.semi_supervised.trainer import Interrupted
from vessa_trainer.students.inference import load_best

RESUME = "vessa-trainer fit --out here --resume"


def split(folder, name):
    return (folder / "splits" / f"{name}.txt").read_text().split()


def masks_of(folder, groups):
    return [path for group in groups for path in sorted((folder / "masks").glob(f"{group}_*.png"))]


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def write(path, pixels):
    Image.fromarray(pixels).save(path)


def warnings_of(folder):
    return " ".join(f.message for f in verify_data(folder, []).findings)


def set_no_masks(folder):
    for path in masks_of(folder, split(folder, "val")):
        path.unlink()


def set_empty_list(folder):
    (folder / "splits" / "val.txt").write_text("")


def set_background(folder):
    for path in masks_of(folder, split(folder, "val")):
        write(path, np.zeros_like(read(path)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (set_no_masks, "none of the 1 patients has a mask"),
        (set_empty_list, "the split is empty"),
        (set_background, "their masks show no class"),
    ],
    ids=["no masks", "empty list", "background"],
)
def test_without_a_validation_score_the_last_teacher_is_kept(hearts, train, tmp_path, caplog, change, why):
    change(hearts)
    summary = train()
    assert summary["best_step"] == summary["steps"] == 2
    assert summary["selected_by"] == "none: no validation patient can be scored"
    assert summary["val"]["mean"]["dice"] is None
    assert summary["test"]["mean"]["dice"] is not None
    said = f"no validation patient can be scored: {why}"
    assert said in caplog.text
    assert said in warnings_of(hearts)
    assert "no validation patient can be scored" in (tmp_path / "run" / "report.html").read_text()


def test_without_split_files_the_parts_are_drawn_among_annotated_patients(hearts, train, tmp_path):
    shutil.rmtree(hearts / "splits")
    for path in masks_of(hearts, ["heart004", "heart005"]):
        path.unlink()
    summary = train("semi.method=unimatch_v2")
    drawn = {part: split(tmp_path / "run", part) for part in ("labeled", "unlabeled", "val", "test")}
    assert sorted(drawn["unlabeled"]) == ["heart004", "heart005"]
    others = {g for part in ("labeled", "val", "test") for g in drawn[part]}
    assert others == {f"heart00{i}" for i in range(4)}
    assert summary["groups"] == {part: len(groups) for part, groups in drawn.items()}
    assert "drawn among 4 annotated groups" in summary["split_sources"]["labeled"]
    for path in masks_of(hearts, ["heart000", "heart001"]):
        path.unlink()
    with pytest.raises(InvalidDataset, match="2 of the 6 groups .* too few for 1 labeled, 1 validation"):
        train(f"out={tmp_path / 'other'}")


def test_images_of_one_patient_may_differ_in_size(hearts, train):
    for path in (hearts / "images").glob("*_02.png"):
        for folder in ("images", "masks"):
            with Image.open(hearts / folder / path.name) as image:
                image.resize((48, 32), Image.Resampling.NEAREST).save(hearts / folder / path.name)
    summary = train()
    counts = summary["test"]["counts"].values()
    assert sum(c["scored"] + c["both_empty"] for c in counts) == 9  # images times classes


@pytest.mark.parametrize("part", ["labeled_1", "val", "test"])
def test_a_mask_of_another_size_is_named_before_the_first_step(hearts, train, tmp_path, part):
    path = masks_of(hearts, split(hearts, part)[:1])[1]
    write(path, read(path)[:20])
    with pytest.raises(InvalidDataset, match=rf"image of {path.stem} has 32 x 32 px, its mask 20 x 32 px"):
        train()
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: .* not finite .*; optim.lr 1e\+06 is") as caught:
        train("optim.lr=1e6", "steps=60", "eval_every=5", "checkpoint_every=5", "optim.weight_decay=1")
    assert "another --out" in caught.value.message
    assert not (tmp_path / "run" / "summary.json").exists()
    for path in (tmp_path / "run").glob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(path).values() if t.is_floating_point())


def test_class_ids_with_gaps_are_mapped_inside_and_back(hearts, train, tmp_path):
    stored = np.array([0, 7, 100, 200], np.uint8)
    meta = json.loads((hearts / "meta.json").read_text())
    meta["classes"] = {str(stored[int(i)]): name for i, name in meta["classes"].items()}
    (hearts / "meta.json").write_text(json.dumps(meta))
    for path in (hearts / "masks").iterdir():
        write(path, stored[read(path)])
    train("steps=6", "optim.lr=0.01")
    model, _, classes = load_best(tmp_path / "run", open_config(tmp_path / "run"))
    assert list(classes) == [1, 2, 3]
    assert model.head.out_channels == 4
    segment(tmp_path / "run", hearts, tmp_path / "out")
    found = {int(v) for path in (tmp_path / "out").glob("*.png") for v in np.unique(read(path))}
    assert found <= set(stored.tolist())
    assert found - {0}


def open_config(run):
    from vessa_trainer.config import load_config

    return load_config(run / "config.yaml")


def test_two_classes_of_one_name_are_refused(hearts, train):
    meta = json.loads((hearts / "meta.json").read_text())
    meta["classes"]["2"] = meta["classes"]["1"]
    (hearts / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InvalidDataset, match="gives several class ids the name 'right ventricle cavity'"):
        train()
    assert verify_data(hearts, []).errors == 1


def nnunet(folder, hearts, *, channels=("MR",), affine=None, turn=None, parts=("Tr",) * 6):
    """Write the phantoms as nnU-Net volumes; turn: of each array before it is written."""
    affine = np.diag([1.5, 1.5, 8.0, 1.0]) if affine is None else affine
    turn = turn or (lambda a: a)
    names = sorted({p.name.split("_")[0] for p in (hearts / "images").iterdir()})
    for name, part in zip(names, parts, strict=True):
        stacks = {
            kind: np.stack([read(p).T for p in sorted((hearts / kind).glob(f"{name}_*.png"))], -1)
            for kind in ("images", "masks")
        }
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
        for number in range(len(channels)):
            image = stacks["images"].astype(np.int16) * (channels[number] != "noise")
            path = folder / f"images{part}" / f"{name}_{number:04d}.nii.gz"
            nib.save(nib.Nifti1Image(turn(image), affine), path)
        nib.save(nib.Nifti1Image(turn(stacks["masks"]), affine), folder / f"labels{part}" / f"{name}.nii.gz")
    description = {"channel_names": {str(i): c for i, c in enumerate(channels)}, "file_ending": ".nii.gz"}
    description["labels"] = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    (folder / "dataset.json").write_text(json.dumps(description))
    shutil.copytree(hearts / "splits", folder / "splits")
    return folder


def segment(run, source, out):
    result = predict(run, source, out, Console(quiet=True), flips=False, axis="auto", nifti=False)
    return result, {p.name: np.asarray(nib.load(p).dataobj) for p in sorted(out.glob("*.nii.gz"))}


def test_of_several_channels_one_is_chosen_and_followed(hearts, train, tmp_path):
    folder = nnunet(tmp_path / "four", hearts, channels=("noise", "T1", "T2"))
    assert "3 channels (noise, T1, T2): a run learns from one" in warnings_of(folder)
    with pytest.raises(InvalidDataset, match=r"3 channels \(noise, T1, T2\).*--set data.channel=T2"):
        train(data=folder)
    train("data.channel=T1", data=folder)
    result, masks = segment(tmp_path / "run", folder / "imagesTr", tmp_path / "masks")
    assert result["masks"] == 6
    assert list(masks) == [f"heart00{i}.nii.gz" for i in range(6)]


def test_predict_cuts_volumes_as_in_training_and_names_masks_by_case(hearts, train, tmp_path):
    # Isotropic voxels and few slices along the first axis: "auto" would take that one.
    folder = nnunet(tmp_path / "iso", hearts, affine=np.eye(4), turn=lambda a: np.repeat(a, 16, 2)[8:24])
    train("steps=4", "optim.lr=0.01", data=folder)
    _, whole = segment(tmp_path / "run", folder, tmp_path / "set")
    _, plain = segment(tmp_path / "run", folder / "imagesTr", tmp_path / "plain")
    assert list(whole) == list(plain) == [f"heart00{i}.nii.gz" for i in range(6)]
    assert all(np.array_equal(whole[name], plain[name]) for name in whole)
    turned = tmp_path / "turned"
    turned.mkdir()
    for path in (folder / "imagesTr").iterdir():
        image = nib.load(path)
        nib.save(nib.as_closest_canonical(image).slicer[::-1], turned / path.name)
    _, back = segment(tmp_path / "run", turned, tmp_path / "back")
    assert all(np.array_equal(whole[name], back[name][::-1]) for name in whole)


def test_names_that_hide_patients_are_warned_of(hearts):
    assert "patient of its own" not in warnings_of(hearts)
    for folder in ("images", "masks"):
        for path in list((hearts / folder).iterdir()):
            path.rename(path.with_name(path.name.replace("_0", "_slice0")))
    shutil.rmtree(hearts / "splits")
    assert "every image is a patient of its own" in warnings_of(hearts)
    for folder in ("images", "masks"):
        for number, path in enumerate(sorted((hearts / folder).iterdir())):
            path.rename(path.with_name(f"ISIC_{number:07d}.png"))
    assert "all 18 images are of one patient, 'ISIC'" in warnings_of(hearts)


def test_lists_of_ones_own_in_ssl4mis_form_are_read(write_hdf5, train, tmp_path):
    own = write_hdf5(
        tmp_path / "own",
        lambda group: group.replace("heart", "lesion"),
        lambda mask: (mask > 0).astype(np.uint8),
    )
    names = [f"lesion00{i}" for i in range(6)]
    (own / "train_slices.list").write_text("".join(f"{n}_slice_1\n" for n in names[:4]))
    (own / "val.list").write_text(f"{names[4]}\n")
    (own / "test.list").write_text(f"{names[5]}\n")
    plan = plan_splits(open_training_data(DataConfig(root=str(own))), DataConfig())
    assert plan.splits.test == ("lesion005",)
    assert plan.splits.val == ("lesion004",)
    assert set(plan.splits.labeled + plan.splits.unlabeled) == set(names[:4])
    train(data=own)
    assert load_best(tmp_path / "run", open_config(tmp_path / "run"))[0].head.out_channels == 2


def test_figures_of_changed_data_are_not_passed_off_as_new(hearts, train):
    summary = train()
    assert train() == summary
    path = masks_of(hearts, split(hearts, "labeled_1"))[0]
    write(path, np.array([0, 3, 2, 1], np.uint8)[read(path)])
    with pytest.raises(InvalidConfig, match=r"data have changed .*masks of 1 patients \(heart\d+\)"):
        train()
    with (hearts / "splits" / "labeled_1.txt").open("a") as file:
        file.write(next(g for g in split(hearts, "train") if g not in split(hearts, "labeled_1")) + "\n")
    with pytest.raises(InvalidConfig, match=r"data have changed .*labeled patients \+heart"):
        train()


def hold(folder, ready, go):
    with locked(folder):
        ready.set()
        go.wait(60)


def test_one_folder_takes_one_run_at_a_time(train, tmp_path):
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready, go))
    other.start()
    assert ready.wait(60)
    with pytest.raises(InvalidConfig, match=rf"is in use by another run \(process {other.pid} on"):
        train()
    other.kill()  # the kernel releases the lock
    other.join(60)
    assert train()["steps"] == 2


def test_a_file_in_place_of_the_folder_is_refused(train, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(InvalidConfig, match="is a file; a run needs a folder. Choose another --out"):
        train()


def test_a_disk_that_is_full_leaves_the_line_that_resumes(train):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(Interrupted, match=rf"cannot write to .*: File too large.*with: {RESUME}"):
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_empty_unlabeled_split_is_named(hearts, train):
    (hearts / "splits" / "train.txt").write_text(split(hearts, "labeled_1")[0] + "\n")
    with pytest.raises(InvalidDataset, match=r"unlabeled split is empty \(splits/train.txt.*supervised"):
        train("semi.method=unimatch_v2")
    assert "unlabeled split is empty" in warnings_of(hearts)


def test_a_damaged_test_image_is_found_before_the_first_step(hearts, train, tmp_path):
    path = hearts / "images" / f"{split(hearts, 'test')[0]}_02.png"
    whole = path.read_bytes()
    train()
    path.write_bytes(whole[:300])
    with pytest.raises(InvalidDataset, match=f"1 images or masks cannot be used: .*{path.name}"):
        train(f"out={tmp_path / 'other'}")
    result, _ = segment(tmp_path / "run", hearts / "images", tmp_path / "masks")
    assert result["masks"] == 17
    assert list(result["failed"]) == [path.name]


def test_no_password_reaches_a_file_of_the_run(train, tmp_path):
    train("cache.url=redis://:s3cret-word@127.0.0.1:6379/0", "annotator.api_key=key-0123456789")
    checked = 0
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"s3cret-word" not in data, path
            assert b"key-0123456789" not in data, path
            checked += 1
    assert checked > 5
    assert "redis://" in (tmp_path / "run" / "config.yaml").read_text()


def test_verify_shows_a_count_for_many_findings_of_one_cause(hearts):
    for path in (hearts / "masks").iterdir():
        write(path, read(path)[:20])
    lines = [text for _, text in verify_data(hearts, []).findings_by_kind() if "size_mismatch" in text]
    assert len(lines) == 4
    assert lines[-1].endswith("15 more; --json lists them")
    assert open_dataset(hearts).name == "hearts"


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (256, np.int16, r"holds the values \[256\]"),
        (0.5, np.float32, r"fractional values \[0.5\].*nearest neighbor"),
    ],
    ids=["beyond 255", "fractional"],
)
def test_label_values_are_checked_before_they_become_ids(hearts, train, tmp_path, value, dtype, message):
    folder = nnunet(tmp_path / "ids", hearts)
    path = folder / "labelsTr" / f"{split(hearts, 'test')[0]}.nii.gz"
    labels = np.asarray(nib.load(path).dataobj).astype(dtype)
    labels[labels == 3] = value
    nib.save(nib.Nifti1Image(labels, nib.load(path).affine), path)
    with pytest.raises(InvalidDataset, match=message):
        train(data=folder)
    assert verify_data(folder, []).errors


def test_labels_on_another_grid_than_their_image_are_named(hearts, train, tmp_path):
    folder = nnunet(tmp_path / "grid", hearts)
    path = folder / "labelsTr" / f"{split(hearts, 'val')[0]}.nii.gz"
    shifted = np.diag([1.5, 1.5, 8.0, 1.0])
    shifted[:3, 3] = (-10, 40, -24)
    nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), shifted), path)
    with pytest.raises(InvalidDataset, match=path.name):
        train(data=folder)


def test_the_ignore_label_is_neither_learned_nor_scored(hearts, train, tmp_path):
    folder = nnunet(tmp_path / "ignore", hearts)
    description = json.loads((folder / "dataset.json").read_text())
    description["labels"]["ignore"] = 4
    (folder / "dataset.json").write_text(json.dumps(description))
    for path in (folder / "labelsTr").iterdir():
        labels = np.asarray(nib.load(path).dataobj).copy()
        labels[:10] = 4
        nib.save(nib.Nifti1Image(labels, nib.load(path).affine), path)
    assert "18 masks mark pixels to ignore" in warnings_of(folder)
    summary = train(data=folder)
    assert list(summary["test"]["by_class"]) == ["RV", "MYO", "LV"]
    assert load_best(tmp_path / "run", open_config(tmp_path / "run"))[0].head.out_channels == 4


def test_masks_of_0_and_255_show_one_class(hearts, train, tmp_path):
    (hearts / "meta.json").write_text('{"classes": {"0": "background", "255": "heart"}}')
    for path in (hearts / "masks").iterdir():
        write(path, ((read(path) > 0) * 255).astype(np.uint8))
    train()
    assert load_best(tmp_path / "run", open_config(tmp_path / "run"))[0].head.out_channels == 2
