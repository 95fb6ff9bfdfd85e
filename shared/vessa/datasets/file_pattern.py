"""Tell image, mask and patient by the names of files, so that nobody has to rename ten thousand files.

Three ways, the first that is there counts: `files.csv` with the columns image, mask, patient and slice;
`files` of meta.json, patterns such as {"image": "images/{patient}_{slice}.jpg", "mask":
"masks/{patient}_{slice}_mask.png"}; else `images/` and `masks/` with the names that `recognize` knows.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vessa.errors import InvalidDataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
CSV = "files.csv"
_NAME = re.compile(r"(?P<group>.+?)(?P<frame>_frame\w+?)?_(?P<index>\d+)")
_FIELD = re.compile(r"\{(\w+)\}")
_MASK_ENDINGS = ("", "_segmentation", "_mask", "_seg", "_label", "_gt")
_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """One image. mask: None where there is none; group: its patient; case: its volume; index: in the case."""

    name: str
    image: Path
    mask: Path | None
    group: str
    case: str
    index: int


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    pattern: how they were told apart, for people; orphans: masks of no image; others: files that are no
    images.
    """

    entries: tuple[Entry, ...]
    pattern: str
    orphans: tuple[Path, ...] = ()
    others: tuple[Path, ...] = field(default=())


def list_files(root: Path, meta: Mapping[str, Any]) -> Listing:
    """List the images and masks of a folder; InvalidDataset for names that contradict one another."""
    if (root / CSV).is_file():
        found = _from_csv(root)
    elif "files" in meta:
        found = _from_pattern(root, meta["files"])
    else:
        found = recognize(root)
    names: dict[str, Path] = {}
    for entry in found.entries:
        if entry.name in names:
            raise InvalidDataset(
                f"two images are called '{entry.name}': {names[entry.name].name} and "
                f"{entry.image.name}. Rename one"
            )
        names[entry.name] = entry.image
    return found


def recognize(root: Path) -> Listing:
    """List `images/` with `masks/`: a mask has its image's name, or that with _segmentation, _mask or alike.

    `patient001_frame01_05.png` is slice 5 of the case `patient001_frame01` of the patient `patient001`; a
    name without a number is its own patient.
    """
    images, others = _pictures(root / "images")
    masks, other_masks = _pictures(root / "masks")
    stems = {path.stem for path in images}
    by_stem = {path.stem: path for path in masks}
    ending = max(_MASK_ENDINGS, key=lambda end: sum(f"{stem}{end}" in by_stem for stem in stems))
    entries = []
    for path in images:
        match = _NAME.fullmatch(path.stem)
        group = match["group"] if match else path.stem
        case = group + (match["frame"] or "") if match else path.stem
        mask = by_stem.pop(f"{path.stem}{ending}", None)
        entries.append(Entry(path.stem, path, mask, group, case, int(match["index"]) if match else 0))
    kinds = " or ".join(sorted({path.suffix.lower() for path in images})) or ".png"
    pattern = f"images/{{patient}}_{{slice}}{kinds}, masks/{{same name}}{ending}.png"
    return Listing(tuple(entries), pattern, tuple(by_stem.values()), (*others, *other_masks))


def _pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the pictures of a folder and its other files, by name; suffixes of any case."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file()] if folder.is_dir() else []
    files = [p for p in files if not p.name.startswith(".") and p.name != "Thumbs.db"]
    pictures = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    return pictures, [p for p in files if p not in set(pictures)]


def _from_csv(root: Path) -> Listing:
    try:
        with (root / CSV).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidDataset(f"{CSV} is not a readable CSV file in UTF-8") from error
    missing = {"image", "patient"} - set(rows[0] if rows else ())
    if missing:
        raise InvalidDataset(
            f"{CSV} lacks the columns {sorted(missing)}; expected image, mask, patient and, for "
            "volumes, slice"
        )
    entries = []
    for line, row in enumerate(rows, start=2):
        image, mask = _inside(root, row["image"], line), row.get("mask") or ""
        index, patient = row.get("slice") or "0", (row["patient"] or "").strip()
        if not index.isdigit() or not patient:
            raise InvalidDataset(f"line {line} of {CSV} needs a patient, and a whole number as slice")
        case = (row.get("case") or patient).strip()
        where = _inside(root, mask, line) if mask else None
        entries.append(Entry(_flat(image, root), image, where, patient, case, int(index)))
    return Listing(tuple(entries), f"{CSV}: {', '.join(rows[0])}")


def _inside(root: Path, name: str | None, line: int) -> Path:
    path = root / (name or "")
    if not name or not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
        raise InvalidDataset(f"line {line} of {CSV} names '{name}', which is no file in {root.name}")
    return path


def _flat(path: Path, root: Path) -> str:
    """Return a file's path in the folder as one name."""
    return "__".join(path.relative_to(root).with_suffix("").parts)


def _from_pattern(root: Path, stated: Any) -> Listing:
    example = '{"image": "images/{patient}_{slice}.png", "mask": "masks/{patient}_{slice}.png"}'
    if not isinstance(stated, dict) or not isinstance(stated.get("image"), str) or "mask" not in stated:
        raise InvalidDataset(f"`files` of meta.json must hold two patterns such as {example}")
    image, mask = str(stated["image"]), str(stated["mask"])
    if "{patient}" not in image or set(_FIELD.findall(mask)) - set(_FIELD.findall(image)):
        raise InvalidDataset(
            f"`files.image` of meta.json must hold {{patient}} and every field of `files.mask`, "
            f"such as {example}"
        )
    parts, seen = [], set[str]()
    for place, text in enumerate(_FIELD.split(image)):
        if place % 2 == 0:
            parts.append(re.escape(text))
        else:
            kind = "[0-9]+" if text == "slice" else "[^/]+?"
            parts.append(f"(?P={text})" if text in seen else f"(?P<{text}>{kind})")
            seen.add(text)
    wanted = re.compile("".join(parts), re.IGNORECASE)
    files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    folded = {name.casefold(): path for name, path in files.items()}
    masks, entries, images = set(), [], set()
    for name, path in files.items():
        match = wanted.fullmatch(name)
        if match is None:
            continue
        fields = match.groupdict()
        where = folded.get(mask.format(**fields).casefold())
        masks |= {where} if where is not None else set()
        images.add(path)
        case = "_".join(value for key, value in fields.items() if key != "slice")
        index = int(fields.get("slice") or 0)
        entries.append(Entry(_flat(path, root), path, where, fields["patient"], case, index))
    # A mask's name often fits the image's pattern too: x_mask.png is no image of the patient x_mask.
    entries = [e for e in entries if e.image not in masks]
    rest = {p for p in files.values() if p.suffix.lower() in IMAGE_SUFFIXES} - images - masks
    return Listing(tuple(entries), f"{image}, {mask}", (), tuple(sorted(rest)))
