"""Segment images, data sets and whole files by a trained run."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vessa import atomic_write
from vessa.errors import InvalidDataset, VessaError
from vessa_trainer.config import Config, load_config
from vessa_trainer.data.geometry import Geometry
from vessa_trainer.data.training_data import to_stored
from vessa_trainer.prediction.output_files import Output, find_outputs
from vessa_trainer.prediction.postprocessing import Postprocessing
from vessa_trainer.prediction.volumes import VolumeOptions
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_volume

SETTINGS = "predict.json"  # beside the masks: what they were made by
_log = logging.getLogger(__name__)


def predict(
    run: Path,
    source: Path,
    out: Path,
    console: Console,
    *,
    flips: bool,
    axis: str,
    nifti: bool,
    postprocess: bool = True,
) -> dict[str, Any]:
    """Segment a file or folder with the teacher that a run delivered, into `out`; returns the counts.

    Volumes are cut and channels chosen as in training. Masks that are there already are skipped, so that a
    stopped prediction continues; see `find_outputs` for what is read. A file that cannot be read is listed
    under "failed" and does not stop the others. postprocess: apply the rules that the run chose on
    validation. Raises InvalidDataset when `out` holds the images themselves, or masks made in another way.
    """
    config = load_config(run / "config.yaml", [])
    model, channels, classes = load_best(run, config)
    geometry = read_geometry(run)
    stored_ids = tuple(range(max(classes) + 1)) if geometry is None else geometry.stored_ids
    named = {stored_ids[i]: name for i, name in classes.items()}
    options = VolumeOptions(axis, nifti, named, f"student {run.resolve().name}", geometry)
    outputs = find_outputs(source, options)
    _check_folder(source, out, outputs)
    folder = (source if source.is_dir() else source.parent).resolve()  # names are paths below it
    made_by = {"weights": _digest(run), "flips": flips, "axis": axis, "postprocess": postprocess}
    _claim(out, outputs, made_by | {"source": str(folder)})
    missing = [output for output in outputs if not (out / output.name).exists()]
    postprocessing = Postprocessing.read(run) if postprocess else Postprocessing({}, by_volume=False)
    failed, cautions = {}, Counter[str]()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("predicting", total=len(missing))
        for output in missing:
            try:
                labels = _labels(output, model, config, channels, flips=flips)
                labels = postprocessing.apply(labels)
                data = output.encode([to_stored(one, stored_ids) for one in labels])
            except (VessaError, OSError) as error:
                failed[output.name] = str(error)
            else:
                cautions.update([text] if (text := output.caution()) else [])
                atomic_write.write_bytes(out / output.name, data)
            bar.advance(task)
    for text, count in cautions.items():
        _log.warning("%d of %d files: %s", count, len(missing), text)
    return {
        "masks": len(outputs) - len(failed),
        "skipped": len(outputs) - len(missing),
        "failed": failed,
        "out": str(out),
        "classes": named,
    }


def read_geometry(run: Path) -> Geometry | None:
    """Return the geometry of a run's training; None for a run of an earlier version."""
    _, metadata = checkpoint.read(run / checkpoint.BEST)
    if "geometry" not in metadata:
        _log.warning("the run does not record how its images were cut: volumes are cut as --axis says")
        return None
    return Geometry.from_dict(metadata["geometry"])


def _labels(output: Output, model: Any, config: Config, channels: int, *, flips: bool) -> list[np.ndarray]:
    predicted = predict_volume(model, output.images(), config, channels, flips=flips)
    return [p.argmax(0).byte().numpy() for p in predicted]


def _check_folder(source: Path, out: Path, outputs: Sequence[Output]) -> None:
    taken = {source.resolve()} | {path.resolve().parent for o in outputs for path in o.inputs}
    if out.resolve() in taken:
        raise InvalidDataset(f"{out} holds the images, and masks would replace them: give another folder")


def _claim(out: Path, outputs: Sequence[Output], settings: dict[str, object]) -> None:
    """Remember by what the masks of a folder are made; two kinds are never mixed in one."""
    path = out / SETTINGS
    if path.is_file():
        if json.loads(path.read_text()) != settings:
            raise InvalidDataset(f"{out} holds masks of other images, runs or options: give another folder")
        return
    strange = next((o.name for o in outputs if (out / o.name).exists()), None)
    if strange is not None:
        raise InvalidDataset(f"{out} holds a {strange} that was not predicted here: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write.write_bytes(path, json.dumps(settings).encode())


def _digest(run: Path) -> str:
    with (run / checkpoint.BEST).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
