"""Write synthetic patients as a data set in the PNG folder layout (`vessa-server phantoms`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from vessa_server.pretraining.data.synthetic import CLASSES, PROTOCOLS, phantom_study


def write_phantoms(folder: Path, *, patients: int, slices: int, size: int, seed: int) -> dict[str, Any]:
    """Write `folder/heart` and `folder/abdomen`; two protocols each, alternating over patients.

    Splits: a tenth of the patients for validation, a quarter for test, the rest for training, one
    and three of them labeled. Returns the counts.
    """
    written: dict[str, Any] = {}
    for kind_index, kind in enumerate(CLASSES):
        root = Path(folder) / kind
        for part in ("images", "masks", "splits"):
            (root / part).mkdir(parents=True, exist_ok=True)
        names = [f"{kind}{p:03d}" for p in range(patients)]
        for index, name in enumerate(track(names, f"{kind} phantoms", transient=True)):
            rng = np.random.default_rng([seed, kind_index, index])
            protocol = PROTOCOLS[kind][index % 2]
            study = phantom_study(kind, rng, protocol=protocol, patients=1, slices=slices, size=size)
            for number, (image, mask) in enumerate(zip(study.images, study.masks, strict=True), 1):
                Image.fromarray(image).save(root / "images" / f"{name}_{number:02d}.png")
                Image.fromarray(mask).save(root / "masks" / f"{name}_{number:02d}.png")
        _write_splits(root / "splits", names, seed)
        meta = {
            "classes": {"0": "background", **{str(c): n for c, n in CLASSES[kind].items()}},
            "modality": f"synthetic {' and '.join(PROTOCOLS[kind])}",
            "groups": patients,
            "images": patients * slices,
            "licence": "Apache-2.0, synthetic: made by `vessa-server phantoms`",
        }
        (root / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        written[kind] = {"folder": str(root), "patients": patients, "images": patients * slices}
    return written


def _write_splits(folder: Path, names: list[str], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(names).tolist()
    validation, test = max(1, len(order) // 10), max(1, len(order) // 4)
    train = order[validation + test :]
    splits = {"val": order[:validation], "test": order[validation : validation + test], "train": train}
    splits |= {f"labeled_{n}": train[:n] for n in (1, 3) if n < len(train)}
    for name, groups in splits.items():
        (folder / f"{name}.txt").write_text("".join(f"{g}\n" for g in sorted(groups)))
