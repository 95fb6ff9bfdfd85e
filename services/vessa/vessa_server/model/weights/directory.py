"""Read and write weights directories: written atomically, read strictly."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vessa.errors import InvalidConfig, InvalidWeights
from vessa_server.model.language.remote import LanguageService, VllmAddress
from vessa_server.model.language.vlm import LanguageModel, Probe, stored_state
from vessa_server.model.presets import Preset
from vessa_server.model.vessa import Vessa

MANIFEST = "vessa.json"
_PARTS = ("segmenter", "projector", "retriever")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(model: Vessa, folder: Path, provenance: dict[str, Any], *, half: bool = True) -> str:
    """Write a weights directory and return its digest.

    provenance: command, data, licences and figures, stored in `vessa.json`
    half: store float16, as nano ships. An existing directory is replaced as the last step.
    """
    state = None if model.language is None else Probe.state(model.language)
    with fresh_folder(folder, model.preset, provenance, language_state=state) as fresh:
        for part in _PARTS:
            module = getattr(model, part)
            if module is not None:
                save_file(stored_state(module, half), fresh / f"{part}.safetensors")
        if model.language is not None:
            model.language.write(fresh / "language", half=half)
    return digest(folder)


@contextlib.contextmanager
def fresh_folder(
    folder: Path, preset: Preset, provenance: dict[str, Any], *, language_state: list[float] | None = None
) -> Iterator[Path]:
    """Yield a new directory for weights; at the end it gets its manifest and replaces `folder`.

    language_state: state of the language model for `Probe`, which identifies a served model
    """
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    files = {
        str(p.relative_to(fresh)): _sha256(p)
        for p in sorted(fresh.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    manifest = {"format": 1, "preset": preset.to_dict(), "files": files, "provenance": provenance}
    if language_state is not None:
        manifest["language_state"] = language_state
    (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def find(weights: str | Path) -> Path:
    """Return the directory of a shipped preset's name or of a path. Raises InvalidWeights."""
    shipped = Path(str(resources.files("vessa_server"))) / "weights" / str(weights)
    for folder in (Path(weights), shipped):
        if (folder / MANIFEST).is_file():
            return folder
    raise InvalidWeights(
        f"no weights at '{weights}': expected a directory with a {MANIFEST}, "
        "or the name of shipped weights (nano)"
    )


def manifest(folder: Path) -> dict[str, Any]:
    """Read `vessa.json`. Raises InvalidWeights when it is damaged."""
    try:
        data = json.loads((folder / MANIFEST).read_text())
        if data["format"] != 1:
            raise InvalidWeights(f"vessa.json has format {data['format']}; this version reads format 1")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidWeights(f"{MANIFEST} is missing or damaged: {error}") from error
    return data


def digest(folder: Path) -> str:
    """Identify weights by the checksums of their files (16 hex digits)."""
    files = manifest(folder)["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def verify(folder: Path) -> None:
    """Compare every file with its checksum. Raises InvalidWeights naming the first that differs."""
    for name, expected in manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise InvalidWeights(f"weights are incomplete: {name} is missing")
        if _sha256(path) != expected:
            raise InvalidWeights(
                f"weights are damaged: {name} does not have the checksum that vessa.json states"
            )


def read(
    weights: str | Path,
    device: str | torch.device = "cpu",
    *,
    language_dtype: torch.dtype | None = None,
    fresh_projector: bool = False,
    vllm: VllmAddress | None = None,
) -> tuple[Vessa, str]:
    """Read weights strictly and return the model in eval mode with its digest.

    language_dtype: of the language model in memory; None keeps an official one on a GPU as it is stored
    (bfloat16) and loads others as float32
    fresh_projector: add a new projector to a language model that has not been through Stage 1
    vllm: server of the language model, which is then not loaded here
    Raises InvalidWeights; with `vllm`, also what `LanguageService.connect` does.
    """
    folder = find(weights)
    preset = Preset.from_dict(manifest(folder)["preset"])
    service = None if vllm is None else _service(folder, preset, vllm)
    verify(folder)
    fresh = preset.language is not None and not (folder / "projector.safetensors").is_file()
    if fresh and not fresh_projector:
        raise InvalidWeights(
            f"the language model in '{folder}' has not been through Stage 1: "
            "there is no projector.safetensors; build them without --qwen to use the official files alone"
        )
    language = None
    if preset.language is not None and service is None:
        stored = preset.segmenter.config is not None and torch.device(device).type == "cuda"
        dtype: torch.dtype | Literal["auto"] = language_dtype or ("auto" if stored else torch.float32)
        language = LanguageModel.read(folder / "language", preset.language.image_size, dtype)
    model = Vessa(preset, language, service)
    for part in _PARTS:
        module = getattr(model, part)
        if module is not None and not (fresh and part == "projector"):
            load_strictly(module, folder / f"{part}.safetensors")
    return model.eval().to(device), digest(folder)


def _service(folder: Path, preset: Preset, vllm: VllmAddress) -> LanguageService:
    """Connect to the vLLM that serves the language model of these weights."""
    if preset.language is None:
        raise InvalidConfig("these weights have no language model: VESSA_LANGUAGE=vllm serves nothing here")
    expected = manifest(folder).get("language_state")
    service = LanguageService(vllm, folder / "language", preset.language.image_size, expected)
    try:
        service.connect()
    except BaseException:
        service.close()
        raise
    return service


def load_strictly(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module. Raises InvalidWeights with the keys that do not fit."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidWeights(f"{path.name} is not a readable safetensors file") from error
    fit(module, state, path.name)


def fit(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load all tensors of a module. Raises InvalidWeights with the keys and shapes that do not fit.

    name: of the file that holds the tensors, for the error
    """
    own = module.state_dict()
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unknown or shapes:
        raise InvalidWeights(
            f"{name} does not fit: missing {missing[:5]}, unknown {unknown[:5]}, "
            f"wrong shape {shapes[:5]} ({len(missing)}, {len(unknown)} and {len(shapes)} keys)"
        )
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})
