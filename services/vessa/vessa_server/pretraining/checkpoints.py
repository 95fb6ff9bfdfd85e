"""Save and load the state of a Stage-1 run, so that it resumes exactly after a kill.

run.json            settings at the start; a run is resumed only with the same settings
checkpoint.json     step, random generators, names and SHA-256 of its state files; replaced last
state-*.safetensors model, average and optimizer; one file, or one per process when they are sharded
metrics.jsonl       truncated on resume to the length at the checkpoint
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from vessa import atomic_write
from vessa.errors import InvalidRequest, InvalidWeights
from vessa_server.pretraining.distributed import Processes, local

SETTINGS, CHECKPOINT, METRICS, BEST = "run.json", "checkpoint.json", "metrics.jsonl", "best.safetensors"


def hold_to_settings(out: Path, settings: dict[str, Any], *, write: bool) -> None:
    """Write the settings of a new run; refuse to resume a run with other settings.

    settings: plain data; values under "where", such as folders, may change between starts
    Raises InvalidRequest naming each setting that differs.
    """
    path = out / SETTINGS
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before, now = flatten(load_settings(out)), flatten(settings)
        names = [n for n in sorted(before | now) if not n.startswith("where.")]
        changed = [n for n in names if before.get(n) != now.get(n)]
        if changed:
            what = "; ".join(f"{n} was {before.get(n)} and is now {now.get(n)}" for n in changed[:5])
            raise InvalidRequest(
                f"the run in '{out.name}' was started with other settings: {what} ({len(changed)} in all); "
                "give the same ones to resume it, or another --out to start anew"
            )
    elif (out / METRICS).exists():
        raise InvalidRequest(f"'{out.name}' holds a run of another version of this program: no {SETTINGS}")
    elif write:
        atomic_write.write_text(path, json.dumps(settings, indent=1) + "\n")


def load_settings(out: Path) -> dict[str, Any]:
    """Read the settings of a run. Raises InvalidWeights when there are none."""
    try:
        settings: dict[str, Any] = json.loads((out / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise InvalidWeights(f"'{out.name}' is no Stage-1 run: {error}") from error
    return settings


def flatten(data: Any, name: str = "") -> dict[str, Any]:
    """Name every leaf of plain data by its path: {"a": [{"b": 1}]} to {"a.0.b": 1}."""
    if isinstance(data, Mapping):
        items = [(str(k), v) for k, v in data.items()]
    elif isinstance(data, list):
        items = [(str(i), v) for i, v in enumerate(data)]
    else:
        return {name: data}
    return {k: v for key, value in items for k, v in flatten(value, f"{name}.{key}" if name else key).items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_write.replacing(path) as fresh:
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, fresh, metadata)


def save_checkpoint(
    out: Path, tensors: dict[str, Tensor], facts: dict[str, Any], processes: Processes
) -> None:
    """Write a checkpoint atomically: `checkpoint.json` only names complete state files.

    tensors: of this process; facts: plain data, with the step under "step"
    """
    sharded = sorted(k for k, v in tensors.items() if isinstance(v, DTensor))
    count = processes.count if sharded else 1
    names = [f"state-{facts['step']:08d}-{rank + 1}-of-{count}.safetensors" for rank in range(count)]
    if processes.rank < count:
        save_tensors(out / names[processes.rank], {k: local(v) for k, v in tensors.items()})
    processes.wait()
    if processes.first:
        metrics = out / METRICS
        size = metrics.stat().st_size if metrics.is_file() else 0
        digests = {name: _sha256(out / name) for name in names}
        whole = {**facts, "sharded": sharded, "states": names, "sha256": digests, "metrics_bytes": size}
        atomic_write.write_text(out / CHECKPOINT, json.dumps(whole))
        for path in out.glob("state-*.safetensors"):
            if path.name not in names:
                path.unlink()
        atomic_write.remove_leftovers(out)  # all processes have written; other files are of a killed run


def load_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read the checkpoint of a run with unsharded tensors; None when there is no checkpoint.

    Raises InvalidWeights when a file is missing or damaged.
    """
    if not (out / CHECKPOINT).is_file():
        return None
    tensors: dict[str, list[Tensor]] = {}
    try:
        facts = json.loads((out / CHECKPOINT).read_text())
        for name in facts["states"]:
            if not (out / name).is_file():
                raise InvalidWeights(f"the checkpoint in '{out.name}' is incomplete: {name} is missing")
            # A run of an older version has no checksums.
            if "sha256" in facts and _sha256(out / name) != facts["sha256"][name]:
                raise InvalidWeights(
                    f"the checkpoint in '{out.name}' is damaged: {name} differs from its checksum. "
                    "Restore it from a backup, or start again with another --out."
                )
            with safe_open(out / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    tensors.setdefault(key, []).append(file.get_tensor(key))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InvalidWeights(f"the checkpoint in '{out.name}' is damaged: {CHECKPOINT} or a state") from error
    sharded = set(facts["sharded"])
    return {k: torch.cat(v) if k in sharded else v[0] for k, v in tensors.items()}, facts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut_metrics(out: Path, size: int) -> None:
    """Remove the log lines after the checkpoint; those steps are repeated."""
    path = out / METRICS
    if path.is_file():
        os.truncate(path, size)
