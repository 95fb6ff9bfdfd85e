"""Stop a run whose loss or weights are no longer finite, before anything of it is written."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from vessa.errors import ClientError
from vessa_trainer.config import Config

SavedStep = Callable[[], int | None]  # returns the step of the last checkpoint, None where there is none


class Diverged(ClientError):
    """The loss or the weights are no longer finite numbers; nothing was saved since the last checkpoint."""

    code = "diverged"


def require_finite_loss(figures: Mapping[str, float], config: Config, step: int, saved: SavedStep) -> None:
    """Raise Diverged when a loss of this step is not finite."""
    parts = [key for key, value in figures.items() if key.startswith("loss") and not math.isfinite(value)]
    if parts:
        raise _diverged(f"the loss is not finite ({', '.join(parts)})", config, step, saved)


def require_finite_weights(
    models: Mapping[str, nn.Module], config: Config, step: int, saved: SavedStep
) -> None:
    """Raise Diverged when a weight or a statistic of a model is not finite. models: by their names."""
    for name, model in models.items():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise _diverged(f"the {name}'s weights are not finite ({key})", config, step, saved)


def _diverged(what: str, config: Config, step: int, saved: SavedStep) -> Diverged:
    cause = f"optim.lr {config.optim.lr:g} is probably too high"
    if config.bf16:
        cause += ", or bf16 does not suit these data"
    last = saved()
    kept = "no checkpoint was saved" if last is None else f"the checkpoint of step {last} is kept"
    return Diverged(
        f"step {step}: {what}; {cause}. Training stopped, {kept}. Start again with a lower optim.lr and "
        "another --out"
    )
