"""Store a bank's own segmenter, trained by `adaptation.finetune`.

Kept beside the bank's templates in the store, so that every annotator on it serves the same.
"""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from vessa.codec import read_header
from vessa.errors import MalformedBody
from vessa.schemas import AdaptationFigures
from vessa_server.template_bank.index import blob_digest

_KEY = "adapted_segmenter"  # of the metadata; another key is another kind of weights


@dataclass(frozen=True, eq=False)
class Adaptation:
    """Hold weights that replace the segmenter's common ones for one bank.

    tensors: its parameters by name, float16; model: digest of the weights they were trained from, for
    which alone they hold; figures: what they were worth on templates held out
    """

    tensors: dict[str, NDArray[np.float16]]
    model: str
    figures: AdaptationFigures

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of these weights' bytes, hex."""
        return blob_digest(self.to_blob())

    def to_blob(self) -> bytes:
        """Return safetensors bytes."""
        about = {"model": self.model, "figures": self.figures.model_dump()}
        tensors = {k: np.ascontiguousarray(v) for k, v in self.tensors.items()}
        return save_tensors(tensors, {_KEY: json.dumps(about)})

    @classmethod
    def from_blob(cls, data: bytes) -> "Adaptation":
        """Read what `to_blob` wrote. Raises ValueError when it is something else."""
        try:
            header, _ = read_header(data)
            about = json.loads(header["__metadata__"][_KEY])
            return cls(load_tensors(data), about["model"], AdaptationFigures(**about["figures"]))
        except (MalformedBody, SafetensorError, KeyError, TypeError) as error:
            raise ValueError("the blob is no adapted segmenter; adapt the bank again") from error
