"""Read the test files of pydicom, nibabel, Pillow and highdicom, and compare them with a reference reader.

    python tests/files/run.py [--cache FOLDER]

The source distributions come from the package index by pip, at the installed versions, into the cache.
Reference readers are pydicom (DICOM), nibabel (NIfTI) and Pillow (PNG, JPEG, TIFF). A file counts as
readable when the reference reads it as one image: one picture, one volume of three axes. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_color_lut, apply_modality_lut

from vessa.errors import VessaError
from vessa.file_kinds import HEAD, kind_of
from vessa.images import read_image
from vessa.intensities import to_bytes
from vessa.volumes import read_volume

PACKAGES = ("pydicom", "nibabel", "pillow", "highdicom")
PICTURES = ("PNG", "JPEG", "TIFF")
CODE = {".py", ".c", ".h", ".md", ".rst", ".txt", ".toml", ".cfg", ".yml", ".yaml", ".ipynb", ".json", ".css"}
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
SHOWN = 40  # refused files listed


def fetch(cache: Path) -> list[Path]:
    """Download and unpack the source distributions that the cache lacks; returns their folders."""
    folders = []
    for package in PACKAGES:
        name = f"{package}-{version(package)}"
        folder = cache / name
        if not folder.is_dir():
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary",
                ":all:",
            ]
            subprocess.run([*command, "--dest", str(cache), name.replace("-", "==", 1)], check=True)
            archive = next(p for p in cache.glob("*.tar.gz") if p.name.lower().startswith(name.lower()))
            with tarfile.open(archive) as packed:
                packed.extractall(cache / f".{name}", filter="data")
            (cache / f".{name}").rename(folder)
        folders.append(folder)
    return folders


def dicom_reference(path: Path) -> np.ndarray[Any, Any] | None:
    """Return values (frames, rows, columns[, 3]) as pydicom decodes them; None for no image."""
    data = pydicom.dcmread(path, force=True)
    if data.get("Modality") == "SEG" or "TotalPixelMatrixRows" in data:
        return None
    meta = data.file_meta
    if "TransferSyntaxUID" not in meta:
        implicit, little = data.original_encoding
        big = pydicom.uid.ExplicitVRBigEndian
        meta.TransferSyntaxUID = (
            pydicom.uid.ImplicitVRLittleEndian
            if implicit
            else pydicom.uid.ExplicitVRLittleEndian
            if little
            else big
        )
    pixels = data.pixel_array
    if data.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, data)
        pixels = pixels >> 8 if pixels.dtype == np.uint16 else pixels
    elif data.get("SamplesPerPixel", 1) == 3:
        pixels = pixels >> (data.BitsStored - 8) if data.BitsStored > 8 else pixels
    elif "PerFrameFunctionalGroupsSequence" not in data:
        pixels = apply_modality_lut(pixels, data)
    frames = int(data.get("NumberOfFrames") or 1)
    return pixels.reshape(frames, data.Rows, data.Columns, -1)


def check_dicom(path: Path) -> bool | None:
    """Return whether our voxels are pydicom's, slice by slice; None when pydicom reads no image."""
    reference = dicom_reference(path)
    if reference is None:
        return None
    volume = read_volume(path)
    ours = np.moveaxis(volume.voxels, 2, 0).swapaxes(1, 2)
    ours = ours.reshape(*ours.shape[:3], -1)
    order = list(volume.frames) or [0]
    expected = reference[order][..., : ours.shape[3]].astype(np.float64)
    rescaled = "PerFrameFunctionalGroupsSequence" in pydicom.dcmread(
        path, force=True, stop_before_pixels=True
    )
    if rescaled and not volume.color:  # values of each frame have their own slope, which pydicom leaves out
        return bool(
            all(
                np.allclose(np.corrcoef(a.ravel(), b.ravel())[0, 1], 1, atol=1e-6) or a.std() == b.std() == 0
                for a, b in zip(ours.astype(np.float64), expected, strict=True)
            )
        )
    return bool(np.allclose(ours, expected, rtol=1e-5, atol=1e-4))


def check_nifti(path: Path) -> bool | None:
    """Return whether our voxels are nibabel's; None for what nibabel reads as no single real volume."""
    image = nib.load(path)
    if image.get_data_dtype().kind not in "iuf":
        return None
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or path.suffix in (".hdr", ".img"):
        return None
    expected = np.asarray(image.dataobj, np.float64).reshape(shape)
    volume = read_volume(path)
    known = np.isfinite(expected)
    ours = volume.voxels.reshape(expected.shape)
    same = np.allclose(ours[known], expected[known], rtol=1e-5, atol=1e-4)
    return bool(same and np.allclose(volume.spacing, np.linalg.norm(image.affine[:3, :3], axis=0), rtol=0.01))


def check_picture(path: Path) -> bool | None:
    """Return whether our pixels are Pillow's; None for what Pillow reads as several images or not at all."""
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            return None
        image.seek(0)
        upright = image.format != "TIFF" or image.getexif().get(0x0112, 1) == 1
        if image.mode in EIGHT_BITS:
            gray = image.mode in ("1", "L", "LA")
            expected = np.asarray(image.convert("L" if gray else "RGB"))
        else:
            expected = to_bytes(np.nan_to_num(np.asarray(image, np.float64)))
            if (
                image.format == "TIFF" and image.tag_v2.get(262, 1) == 0
            ):  # Pillow ignores that low values are white
                expected = 255 - expected
        alpha = np.asarray(image)[..., 3] if image.mode == "RGBA" else None
        bits = image.tag_v2.get(258, (8,)) if image.format == "TIFF" else (8,)
        signed = image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 2
        reduced = image.mode in EIGHT_BITS and (
            max(bits) > 8 or signed
        )  # deeper pixels, cut to 8 bits by Pillow
        lossy = image.format != "PNG" and image.info.get("compression", "jpeg") in ("jpeg", "tiff_jpeg")
    ours = read_image(path)
    if not upright:
        return bool(sorted(ours.shape[:2]) == sorted(expected.shape[:2]))
    if ours.ndim < expected.ndim:
        expected = expected[..., 0]
    elif ours.ndim > expected.ndim:
        expected = np.repeat(expected[..., None], 3, -1)
    if reduced:
        if signed and max(bits) == 8:
            expected = (expected.astype(int) + 128) % 256
        if alpha is not None:  # where a pixel is nearly transparent, 8 bits leave little of its color
            return bool(np.corrcoef(ours[alpha > 64].ravel(), expected[alpha > 64].ravel())[0, 1] > 0.99)
        scaled = to_bytes(expected.astype(np.float64)).astype(int)
        return bool(np.abs(ours.astype(int) - scaled).mean() < 2)
    apart = np.abs(ours.astype(int) - expected.astype(int))
    return bool(apart.mean() < 2 if lossy else apart.max() <= 1)


CHECKS = {"DICOM": check_dicom, "NIfTI": check_nifti} | dict.fromkeys(PICTURES, check_picture)


def kind_at(path: Path) -> str:
    """Return the kind of a file among those that are compared, "" for others."""
    with path.open("rb") as file:
        kind = kind_of(file.read(HEAD))
    return "DICOM" if kind == "DICOM without preamble" else kind if kind in CHECKS else ""


def compare(path: Path, kind: str, counts: Counter[str]) -> str | None:
    """Count what became of one file; returns a line about what is to be looked at."""
    try:
        read = read_volume if kind in ("DICOM", "NIfTI") else read_image
        read(path)
        refused = None
    except VessaError as error:
        refused = error.message
    except Exception as error:
        counts["internal_errors"] += 1
        return f"internal error: {path.name}: {type(error).__name__}: {error}"
    try:
        right = CHECKS[kind](path) if refused is None else _reference_reads(path, kind)
    except Exception:  # the reference fails in many ways on files that are damaged on purpose
        counts["refused_by_name" if refused else "only_ours"] += 1
        return None
    if right is None:
        counts["refused_by_name" if refused else "only_ours"] += 1
        return None
    counts["readable"] += 1
    if refused is not None:
        counts["refused_by_name"] += 1
        return f"refused: {path.name}: {refused}"
    counts["accepted"] += 1
    if not right:
        counts["wrong"] += 1
        return f"wrong: {path.name}"
    return None


def _reference_reads(path: Path, kind: str) -> bool | None:
    """Return True when the reference reads a file that we refuse as one image, else None."""
    if kind == "DICOM":
        return None if dicom_reference(path) is None else True
    if kind == "NIfTI":
        image = nib.load(path)
        shape = image.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        real = image.get_data_dtype().kind in "iuf" and np.isfinite(image.affine).all()
        np.asarray(image.dataobj)
        return True if real and len(shape) in (2, 3) and path.suffix not in (".hdr", ".img") else None
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            return None
        image.load()
    return True


def main() -> int:
    """Run the comparison; the exit code is 1 where a limit is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("build/test-files"))
    cache = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    try:
        folders = fetch(cache)
    except (subprocess.CalledProcessError, OSError, StopIteration):
        print("skipped: the source distributions cannot be fetched; is there a package index?")
        return 0
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in CHECKS}
    lines = []
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() not in CODE):
            kind = kind_at(path)
            if kind and (line := compare(path, kind, counts[kind])) is not None:
                lines.append(line)
    print("\n".join(sorted(lines, key=lambda line: line.startswith("refused"))[:SHOWN]))
    keys = ("readable", "accepted", "refused_by_name", "wrong", "internal_errors")
    total = {key: sum(count[key] for count in counts.values()) for key in keys}
    result = {
        **total,
        "accepted_share": round(total["accepted"] / max(1, total["readable"]), 3),
        "by_kind": {kind: {key: count[key] for key in keys} for kind, count in counts.items()},
    }
    print(json.dumps(result))
    return int(bool(total["wrong"] or total["internal_errors"] or result["accepted_share"] < 0.9))


if __name__ == "__main__":
    sys.exit(main())
