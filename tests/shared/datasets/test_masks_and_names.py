"""Masks are read by one rule, ids are checked before any cast, and names of the field's own data sets
work."""

import json
import re
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from vessa.datasets import open_dataset, verify
from vessa.errors import InvalidDataset, VessaError
from vessa.masks.files import class_ids, decode_mask

IDS = np.tile(np.array([[0, 1, 2, 3]], np.uint8), (8, 2))
RNG = np.random.default_rng(0)
CLASSES = {"0": "background", "1": "wall", "2": "cavity", "3": "clot"}


def gray_png(ids, depth):
    """A gray PNG of 2 or 4 bits a pixel, which Pillow cannot write."""
    per = 8 // depth
    rows = b""
    for row in ids:
        packed = np.zeros(len(row) // per, np.uint8)
        for k in range(per):
            packed |= (row[k::per] << (8 - depth * (k + 1))).astype(np.uint8)
        rows += b"\0" + packed.tobytes()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def pictures(root, masks=None, *, image="images/p{i}_0.png", mask="masks/p{i}_0.png", **meta):
    """A folder of four images; masks: one array, or the bytes of one file, for all of them."""
    (root / "meta.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "meta.json").write_text(json.dumps({"classes": CLASSES} | meta))
    for i in range(4):
        for pattern, content in ((image, RNG.integers(0, 255, IDS.shape, dtype=np.uint8)), (mask, masks)):
            path = root / pattern.format(i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content is not None:
                Image.fromarray(content).save(path)
    return root


def values_of(dataset):
    return {int(v) for item in dataset.slices() for v in np.unique(dataset.mask(item))}


def test_ids_come_back_as_stored_at_every_depth(tmp_path):
    palette = Image.fromarray(IDS, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png")
    files = {
        "2": gray_png(IDS, 2), "4": gray_png(IDS, 4), "8": None, "palette": (tmp_path / "p.png").read_bytes(),
    }  # fmt: skip
    for name, data in files.items():
        dataset = open_dataset(pictures(tmp_path / name, IDS if data is None else data))
        assert values_of(dataset) == {0, 1, 2, 3}
        assert verify(dataset) == []
    bits = open_dataset(pictures(tmp_path / "1", IDS > 1, classes={"1": "lesion"}))
    assert values_of(bits) == {0, 1}


def test_masks_of_0_and_255_show_the_only_class(tmp_path):
    for name, key in (("a", "1"), ("b", "255")):
        dataset = open_dataset(pictures(tmp_path / name, (IDS > 1) * np.uint8(255), classes={key: "lesion"}))
        assert dataset.classes == {1: "lesion"}
        assert values_of(dataset) == {0, 1}
    both = open_dataset(pictures(tmp_path / "c", (IDS > 1) * np.uint8(255)))
    with pytest.raises(InvalidDataset, match=r"p0_0.png holds the values \[255\]"):
        both.mask(both.slices()[0])


def test_values_of_a_mask_can_be_mapped(tmp_path):
    stored = np.array([0, 50, 200, 255], np.uint8)[IDS]
    meta = {"classes": {"1": "lesion"}, "values": {"1-99": "background", "200": "lesion", "255": "ignore"}}
    dataset = open_dataset(pictures(tmp_path / "a", stored, **meta))
    assert values_of(dataset) == {0, 1, 255}
    assert verify(dataset) == []
    lossy = {"classes": {"1": "polyp"}, "values": {"0-127": "background", "128-255": "polyp"}}
    jpeg = open_dataset(
        pictures(
            tmp_path / "b", (IDS > 1) * np.uint8(255), image="images/p{i}.jpg", mask="masks/p{i}.jpg", **lossy
        )
    )
    assert values_of(jpeg) == {0, 1}
    with pytest.raises(InvalidDataset, match="must map a stored value or first-last to a class name"):
        open_dataset(pictures(tmp_path / "c", stored, values={"x": "lesion"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 257], r"\[257\]"),
        ([-1, 2], r"\[-1\]"),
        ([0.4, 1.5], r"fractional values \[0.4, 1.5\].*nearest neighbor"),
    ],
)
def test_ids_are_checked_before_they_are_cast(values, message):
    with pytest.raises(VessaError, match=message):
        class_ids(np.array(values), {1: "a", 2: "b"})


def test_a_mask_over_http_and_in_a_folder_is_the_same(tmp_path):
    data = gray_png(IDS, 2)
    dataset = open_dataset(pictures(tmp_path, data))
    np.testing.assert_array_equal(dataset.mask(dataset.slices()[0]), class_ids(decode_mask(data, 10_000), {}))


def test_suffixes_of_any_case_and_kind_are_found(tmp_path):
    root = pictures(tmp_path, IDS)
    (root / "images/p0_0.png").rename(root / "images/p0_0.PNG")
    (root / "masks/p1_0.png").rename(root / "masks/p1_0.PNG")
    Image.open(root / "images/p2_0.png").save(root / "images/p2_0.JPG", "JPEG")
    (root / "images/p2_0.png").unlink()
    dataset = open_dataset(root)
    assert len(dataset.slices()) == 4
    assert verify(dataset) == []
    Image.open(root / "images/p1_0.png").save(root / "images/p1_0.jpg")
    with pytest.raises(InvalidDataset, match="two images are called 'p1_0'"):
        open_dataset(root).cases()


def test_what_takes_no_part_is_a_finding(tmp_path):
    root = pictures(tmp_path, IDS)
    (root / "masks/p0_0.png").rename(root / "masks/p0_0_mask.png")
    (root / "images/readme.docx").write_bytes(b"x")
    found = [(f.kind, f.where) for f in verify(open_dataset(root)) if f.kind != "absent_class"]
    assert ("orphan_mask", "p0_0_mask.png") in found
    assert ("left_out", "readme.docx") in found


def test_names_that_make_one_patient_of_all_are_a_finding(tmp_path):
    root = pictures(tmp_path, IDS, image="images/ISIC_{i}.jpg", mask="masks/ISIC_{i}_segmentation.png")
    dataset = open_dataset(root)
    assert dataset.listing.pattern == "images/{patient}_{slice}.jpg, masks/{same name}_segmentation.png"
    assert values_of(dataset) == {0, 1, 2, 3}
    assert [f.kind for f in verify(dataset)] == ["one_group"]


def test_patterns_and_a_csv_tell_image_mask_and_patient(tmp_path):
    isic = {"image": "in/{patient}.jpg", "mask": "truth/{patient}_segmentation.png"}
    first = open_dataset(
        pictures(
            tmp_path / "isic",
            IDS,
            image="in/ISIC_{i}.JPG",
            mask="truth/ISIC_{i}_segmentation.png",
            files=isic,
        )
    )
    assert first.groups() == ("ISIC_0", "ISIC_1", "ISIC_2", "ISIC_3")
    busi = {"image": "{kind}/{kind} ({patient}).png", "mask": "{kind}/{kind} ({patient})_mask.png"}
    second = open_dataset(
        pictures(
            tmp_path / "busi",
            IDS,
            image="benign/benign ({i}).png",
            mask="benign/benign ({i})_mask.png",
            files=busi,
        )
    )
    assert second.groups() == ("0", "1", "2", "3")
    third = pictures(tmp_path / "csv", IDS, image="a/x{i}.png", mask="b/y{i}.png")
    masks = ["", *(f"b/y{i}.png" for i in range(1, 4))]
    rows = [f"a/x{i}.png,{masks[i]},P{i // 2},{i}" for i in range(4)]
    (third / "files.csv").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(["image,mask,patient,slice", *rows]).encode()
    )
    dataset = open_dataset(third)
    assert [(c.name, len(c.slices)) for c in dataset.cases()] == [("P0", 2), ("P1", 2)]
    assert dataset.mask(dataset.cases()[0].slices[0]) is None
    assert values_of_annotated(dataset) == {0, 1, 2, 3}
    (third / "files.csv").write_text("image,mask,patient\n../secret.png,,P\n")
    with pytest.raises(InvalidDataset, match="line 2 of files.csv names '../secret.png'"):
        open_dataset(third)


def values_of_annotated(dataset):
    return {int(v) for s in dataset.slices() if (m := dataset.mask(s)) is not None for v in np.unique(m)}


def test_a_description_with_a_byte_order_mark_is_read_and_other_encodings_are_named(tmp_path):
    root = pictures(tmp_path, IDS)
    (root / "meta.json").write_bytes(b"\xef\xbb\xbf" + (root / "meta.json").read_bytes())
    (root / "splits").mkdir()
    (root / "splits/train.txt").write_bytes(b"\xef\xbb\xbfp0\r\np1\r\n")
    assert open_dataset(root).split("train") == ("p0", "p1")
    (root / "meta.json").write_bytes('{"classes": {"1": "Herzhöhle"}}'.encode("latin-1"))
    with pytest.raises(InvalidDataset, match="not in UTF-8"):
        open_dataset(root)


def nnunet(root, labels, ids, dtype=np.int16, shift=0.0, suffix=".nii.gz", **meta):
    affine, moved = np.diag([1, 1, 5, 1.0]), np.diag([1, 1, 5, 1.0])
    moved[:3, 3] = shift
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    for case in range(2):
        image = RNG.integers(0, 200, (12, 12, 3)).astype(np.int16)
        truth = np.zeros((12, 12, 3), dtype)
        truth[2:5, 2:5], truth[7:10, 7:10] = ids
        nib.save(nib.Nifti1Image(image, affine), root / f"imagesTr/c{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(truth, moved), root / f"labelsTr/c{case}.nii.gz")
    for path in [*root.glob("*/*.nii.gz")]:
        path.rename(str(path).replace(".nii.gz", suffix))
    (root / "dataset.json").write_text(json.dumps({"labels": labels} | meta))
    return root


AB = {"background": 0, "a": 1, "b": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": (257, 256)}, r"c0.nii.gz holds the values \[256, 257\]"),
        ({"ids": (-1, 2)}, r"\[-1\]"),
        ({"ids": (0.4, 1.5), "dtype": np.float32}, "fractional"),
        ({"ids": (1, 2), "shift": 50.0}, "lies elsewhere than its image: corners are up to 86.6 mm apart"),
    ],
)
def test_nnunet_labels_that_would_be_misread_are_findings(options, message, tmp_path):
    findings = verify(open_dataset(nnunet(tmp_path / "d", AB, **options)))
    assert findings[0].kind == "unreadable"
    assert re.search(message, findings[0].message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "LV": 205, "RV": 420}, r"got \[420\]"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, "whole, core are regions"),
    ],
)
def test_nnunet_classes_that_have_no_id_are_named(labels, message, tmp_path):
    with pytest.raises(InvalidDataset, match=message):
        open_dataset(nnunet(tmp_path / "d", labels, (1, 2)))


def test_nnunets_ignore_is_no_class_and_its_pixels_are_marked(tmp_path):
    dataset = open_dataset(nnunet(tmp_path / "d", {"background": 0, "a": 1, "ignore": 2}, (1, 2)))
    assert dataset.classes == {1: "a"}
    assert values_of(dataset) == {0, 1, 255}
    assert verify(dataset) == []


def test_nnunet_files_of_upper_case_suffix_and_rounded_floats_are_read(tmp_path):
    upper = open_dataset(nnunet(tmp_path / "u", AB, (1, 2), suffix=".NII.GZ"))
    assert values_of(upper) == {0, 1, 2}
    rounded = open_dataset(nnunet(tmp_path / "r", AB, (0.9999, 2.0001), dtype=np.float32))
    assert values_of(rounded) == {0, 1, 2}
