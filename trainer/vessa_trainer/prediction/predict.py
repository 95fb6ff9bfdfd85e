"""Segment images, data sets and whole files by a trained run."""

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
from vessa.client import AnnotatorClient
from vessa.errors import InvalidDataset, VessaError
from vessa_trainer.data.training_data import to_stored
from vessa_trainer.prediction.delivery import open_run
from vessa_trainer.prediction.output_files import Output, find_outputs
from vessa_trainer.prediction.postprocessing import Postprocessing
from vessa_trainer.prediction.volumes import VolumeOptions

SETTINGS = "predict.json"  # beside the masks: what they were made by
_log = logging.getLogger(__name__)


def predict(
    run: Path,
    source: Path,
    out: Path,
    console: Console,
    *,
    flips: bool | None,
    axis: str,
    nifti: bool,
    postprocess: bool = True,
    vessa: AnnotatorClient | None = None,
) -> dict[str, Any]:
    """Segment a file or folder with the teacher that a run delivered, into `out`; returns the counts.

    Volumes are cut and channels chosen as in training. Masks that are there already are skipped, so that a
    stopped prediction continues; see `find_outputs` for what is read. A file that cannot be read is listed
    under "failed" and does not stop the others. A cross-validation averages its students.
    flips: average over mirrored images, None as the run chose on validation; postprocess: apply the rules
    that the run chose there; vessa: the annotator to fuse with, see `vessa_trainer.prediction.fusion`
    Raises InvalidDataset when `out` holds the images themselves, or masks made in another way; InvalidConfig
    when the run cannot be fused.
    """
    delivered = open_run(run)
    if vessa is not None:
        delivered = delivered.fused_with(vessa)
    flips = delivered.flips.used if flips is None else flips
    stored_ids = delivered.stored_ids
    named = {stored_ids[i]: name for i, name in delivered.classes.items()}
    options = VolumeOptions(
        axis, nifti, named, f"student {run.resolve().name}", delivered.geometry, delivered.by_case
    )
    outputs = find_outputs(source, options)
    _check_folder(source, out, outputs)
    folder = (source if source.is_dir() else source.parent).resolve()  # names are paths below it
    made_by = {"weights": delivered.digest(), "flips": flips, "axis": axis, "postprocess": postprocess}
    made_by |= {"fused": [one.vessa.fusion.weight for one in delivered.members if one.vessa is not None]}
    _claim(out, outputs, made_by | {"source": str(folder)})
    missing = [output for output in outputs if not (out / output.name).exists()]
    postprocessing = delivered.postprocessing if postprocess else Postprocessing({}, by_volume=False)
    failed, cautions = {}, Counter[str]()
    images: Sequence[np.ndarray] = ()
    labels: list[np.ndarray] = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("predicting", total=len(missing))
        for output in missing:
            try:
                place = None if output.place is None else output.place()
                if (read := output.images()) is not images:  # the pictures of a case come one after the other
                    images, labels = read, postprocessing.apply(delivered.labels(read, flips=flips))
                shown = labels if place is None else [labels[place]]
                data = output.encode([to_stored(one, stored_ids) for one in shown])
            except (VessaError, OSError) as error:
                failed[output.name] = str(error)
            else:
                cautions.update(output.cautions())
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
        "flips": flips,
        "students": len(delivered.members),
    }


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
