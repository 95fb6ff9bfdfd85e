"""What a trained run is used for: class maps of images, of data sets and of whole files."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from vessa.datasets import Case, Dataset
from vessa.errors import InvalidConfig, InvalidDataset
from vessa_trainer import checkpoint
from vessa_trainer.config import Config, load_config
from vessa_trainer.data.prepared import Frame
from vessa_trainer.outputs import Output, VolumeOptions, find_outputs
from vessa_trainer.student import build_student, logits_of

SETTINGS = "predict.json"  # beside the masks: what they were made by


def load_best(run: Path, config: Config) -> tuple[nn.Module, int, dict[int, str]]:
    """Return a finished run's best teacher, its channels and its classes."""
    tensors, metadata = checkpoint.read(run / checkpoint.BEST)
    classes = {int(c): n for c, n in metadata["classes"].items()}
    # its weights are in the checkpoint: neither the hub nor a local file is needed
    student = replace(config.student, pretrained=False, weights=None, init=None)
    model = build_student(student, metadata["channels"], max(classes) + 1)
    checkpoint.load_module(model, tensors, "teacher")
    return model.eval().to(open_device(config.device)), metadata["channels"], classes


def open_device(name: str) -> torch.device:
    """Return a device that tensors can be put on. Raises InvalidConfig."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InvalidConfig(
            f"device '{name}' cannot be used here: {why}; expected cpu or cuda[:N]"
        ) from error


@torch.no_grad()
def predict_slice(
    model: nn.Module, images: Sequence[np.ndarray], config: Config, channels: int, *, flips: bool = False
) -> list[Tensor]:
    """Class probabilities (C, H, W) of images uint8 (H, W[, 3]), each at its own size.

    flips: average over the image and its three mirror images, at four times the work
    """
    model.eval()
    size, device = config.student.size, next(model.parameters()).device
    frames = [Frame(i.shape[0], i.shape[1], size) for i in images]
    batch = torch.stack(
        [
            f.enter(_channels(image, channels), "bilinear") / 255
            for f, image in zip(frames, images, strict=True)
        ]
    ).to(device)
    padding = -size % config.student.multiple
    views: list[list[int]] = [[], [-1], [-2], [-2, -1]] if flips else [[]]
    total = torch.zeros(())
    for turned in views:
        padded = nn.functional.pad(batch.flip(turned), (0, padding, 0, padding))
        probability = logits_of(model, padded, bf16=config.bf16).softmax(1)[..., :size, :size]
        total = total + probability.flip(turned).cpu() / len(views)
    return [f.leave(p) for f, p in zip(frames, total, strict=True)]


def _channels(image: np.ndarray, channels: int) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float()
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if channels == 1:
        return pixels.mean(0, keepdim=True)
    return pixels.expand(channels, -1, -1)


def predict_labels(
    model: nn.Module, dataset: Dataset, cases: Sequence[Case], config: Config, channels: int
) -> dict[str, list[np.ndarray]]:
    """Class ids uint8 (H, W) of every slice of some cases, each at its own size, by the case's name."""
    labels: dict[str, list[np.ndarray]] = {}
    for case in cases:
        found = labels[case.name] = []
        for start in range(0, len(case.slices), config.batch_eval):
            images = [dataset.image(s) for s in case.slices[start : start + config.batch_eval]]
            found += [p.argmax(0).byte().numpy() for p in predict_slice(model, images, config, channels)]
    return labels


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
        _write(out / output.name, output.encode(labels))
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
    _write(path, json.dumps(settings).encode())


def _digest(run: Path) -> str:
    with (run / checkpoint.BEST).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
