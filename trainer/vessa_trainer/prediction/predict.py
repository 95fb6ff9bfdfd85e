"""What a trained run is used for: class maps of images, of data sets and of whole files."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from vessa import atomic_write
from vessa.errors import InvalidDataset
from vessa_trainer.config import load_config
from vessa_trainer.prediction.output_files import Output, VolumeOptions, find_outputs
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_slice

SETTINGS = "predict.json"  # beside the masks: what they were made by


def predict(
    run: Path, source: Path, out: Path, console: Console, *, flips: bool, axis: str, nifti: bool
) -> dict[str, object]:
    """Segment a file or folder with a run's best teacher, into `out`; returns the counts.

    What is there already is skipped, so that a stopped prediction goes on; see `find_outputs` for what is
    read. Raises InvalidDataset when `out` holds the images themselves, or masks made in another way.
    """
    config = load_config(run / "config.yaml", [])
    model, channels, classes = load_best(run, config)
    name = run.resolve().name
    outputs = find_outputs(source, VolumeOptions(axis, nifti, classes, f"student {name}"))
    _check_folder(source, out, outputs)
    folder = (source if source.is_dir() else source.parent).resolve()  # names are paths below it
    _claim(out, outputs, {"weights": _digest(run), "flips": flips, "axis": axis, "source": str(folder)})
    missing = [output for output in outputs if not (out / output.name).exists()]
    for output in track(missing, "predicting", console=console, transient=True):
        images, labels = output.images(), []
        for start in range(0, len(images), config.batch_eval):
            part = images[start : start + config.batch_eval]
            probabilities = predict_slice(model, part, config, channels, flips=flips)
            labels += [p.argmax(0).byte().numpy() for p in probabilities]
        atomic_write.write_bytes(out / output.name, output.encode(labels))
    return {
        "masks": len(outputs),
        "skipped": len(outputs) - len(missing),
        "out": str(out),
        "classes": classes,
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


def _digest(run: Path) -> str:
    with (run / checkpoint.BEST).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
