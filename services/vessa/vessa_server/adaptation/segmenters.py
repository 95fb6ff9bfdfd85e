"""Copy the segmenter for one bank, and write and read its parameters."""

import copy

import numpy as np
import torch
from numpy.typing import NDArray

from vessa.errors import InvalidWeights
from vessa_server.model.segmenter import Segmenter
from vessa_server.template_bank.adapted_weights import Adaptation


def load_segmenter(common: Segmenter, adaptation: Adaptation) -> Segmenter:
    """Return a copy of the common segmenter with a bank's own parameters.

    Raises InvalidWeights when they belong to another graph.
    """
    own = copy.deepcopy(common)
    shapes = {name: tuple(p.shape) for name, p in own.named_parameters()}
    if shapes != {name: v.shape for name, v in adaptation.tensors.items()}:
        raise InvalidWeights(
            "The bank's adapted weights do not fit this segmenter. Adapt the bank again, or forget them "
            "(vessa adapt BANK --forget)."
        )
    own.load_state_dict({k: torch.from_numpy(v).float() for k, v in adaptation.tensors.items()}, strict=False)
    return own


def parameters_of(segmenter: Segmenter) -> dict[str, NDArray[np.float16]]:
    """Return the parameters by name. Statistics of BatchNorm are not among them: training freezes them."""
    return {name: p.detach().half().cpu().numpy() for name, p in segmenter.named_parameters()}
