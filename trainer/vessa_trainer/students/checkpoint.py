"""Write and read checkpoints atomically, with a checksum and everything that an exact resume needs."""

import errno
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vessa import atomic_write
from vessa.errors import InvalidWeights

LAST, BEST = "last.safetensors", "best.safetensors"
_CHECKSUM = "sha256"  # metadata key
_log = logging.getLogger(__name__)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors, JSON metadata and a checksum atomically: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    texts = {k: json.dumps(v) for k, v in metadata.items()}
    texts[_CHECKSUM] = _checksum(stored, texts)
    with atomic_write.replacing(path) as fresh:
        try:
            save_file(stored, fresh, texts)
        except SafetensorError as error:
            raise _as_os_error(error, path) from error


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """Return the operating system's error that safetensors wraps into its text, such as a full disk."""
    code = re.search(r"os error (\d+)|code: (\d+)", str(error))
    number = int(code[1] or code[2]) if code else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` wrote. Raises InvalidWeights when the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
            texts = dict(file.metadata() or {})
        stated = texts.pop(_CHECKSUM, None)
        if stated is None:
            _log.warning("%s has no checksum: an older version wrote it", path)
        elif stated != _checksum(tensors, texts):
            raise InvalidWeights(
                f"{path} is damaged: its contents differ from its checksum. "
                "Restore it from a backup, or delete the run and start it again."
            )
        return tensors, {k: json.loads(v) for k, v in texts.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidWeights(f"{path} is missing or no readable checkpoint") from error


def _checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of tensors, and of metadata."""
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def module_state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """State of a module under a prefix."""
    return {f"{prefix}.{k}": v for k, v in module.state_dict().items()}


def load_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Load a module's state strictly. Raises InvalidWeights when it does not fit."""
    state = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise InvalidWeights(
            f"the checkpoint's {prefix} does not fit this config: {str(error)[:300]}"
        ) from error


def start_from(module: nn.Module, run: Path) -> None:
    """Give a new student the weights of a run's best teacher.

    The last layer stays as it is where the run knew another number of classes. Raises InvalidWeights when
    the run has no best teacher or another network.
    """
    tensors, _ = read(run / BEST)
    for key, value in module.state_dict().items():
        name = f"teacher.{key}"
        if key.startswith("head.") and name in tensors and tensors[name].shape != value.shape:
            tensors[name] = value
    load_module(module, tensors, "teacher")


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's per-parameter state."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{k}": v for i, values in state.items() for k, v in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` flattened."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:
                # fused AdamW reads memory in its own order: moments lie as their parameter lies
                values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
