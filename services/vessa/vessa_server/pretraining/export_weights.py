"""Export a Stage-1 run or a weights directory as a weights directory for the service."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vessa.errors import InvalidRequest, InvalidWeights
from vessa_server.model.vessa import Vessa
from vessa_server.model.weights import directory
from vessa_server.pretraining import checkpoints
from vessa_server.pretraining.lora import Lora, changing, choose, is_nano

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(source: Path, out: Path, *, dtype: str | None = None, start: str | None = None) -> str:
    """Write the best weights of a run, or those of a weights directory, to `out`; return their digest.

    LoRA and the row of <SEG> are folded in: `language/` is an ordinary Qwen3-VL directory.
    dtype: of `language/`; by default float16 for nano and bfloat16 for official graphs. The other parts are
    float16 with float16 and float32 otherwise, because bfloat16 is too coarse for masks
    start: the weights that the run started from, if they were moved
    Raises InvalidWeights for a source without weights or with another start than the run's, InvalidRequest
    for an unknown dtype and for an `out` that is not a weights directory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InvalidRequest(f"unknown dtype '{dtype}'; known are {', '.join(DTYPES)}")
    if out.exists() and not (out / directory.MANIFEST).is_file():
        raise InvalidRequest(f"'{out}' is there already and no weights directory; it is left as it is")
    if (source / checkpoints.BEST).is_file():
        model, provenance = trained(source, start)
    else:
        inside = source / "weights"
        folder = directory.find(inside if inside.is_dir() else source)
        model, _ = directory.read(folder)
        provenance = directory.manifest(folder)["provenance"]
    chosen = DTYPES[dtype or ("float16" if is_nano(model) else "bfloat16")]
    if model.language is not None:
        language: Any = model.language.model
        language.to(chosen)
    return directory.write(model, out, provenance, half=chosen == torch.float16)


def trained(run: Path, start: str | None = None) -> tuple[Vessa, dict[str, Any]]:
    """Return the best model of a run on an official graph, with everything folded in, and its provenance."""
    settings = checkpoints.load_settings(run)
    begin = directory.find(start or settings["where"]["start"])
    if directory.digest(begin) != settings["start"]:
        raise InvalidWeights(
            f"the run in '{run.name}' started from weights {settings['start']}, "
            f"those in '{begin.name}' are {directory.digest(begin)}"
        )
    model, _ = directory.read(begin, fresh_projector=True, language_dtype=torch.float32)
    adapter = choose(model, Lora(**settings["config"]["lora"]))
    path = run / checkpoints.BEST
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            provenance: dict[str, Any] = json.loads(file.metadata()["provenance"])
    except (OSError, SafetensorError) as error:
        raise InvalidWeights(f"{path.name} is not a readable safetensors file: {error}") from error
    own = changing(model)
    if own.keys() != tensors.keys():
        other = sorted(own.keys() ^ tensors.keys())
        raise InvalidWeights(f"{path.name} does not fit its run: {other[:5]} ({len(other)} keys)")
    for key, value in own.items():
        value.copy_(tensors[key])
    if adapter is not None:
        adapter.fold()
    return model.eval(), provenance
