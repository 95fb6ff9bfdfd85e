"""The protocol between the service and a loaded annotator, in this process or in one of its own."""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from vessa.schemas import AdaptationInfo
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.types import Item, ModelInfo


class Worker(Protocol):
    """A loaded annotator.

    Only the batch thread calls `compute` and `release_memory`. All other methods may be called from any
    thread at any time.
    """

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""

    def compute(self, items: list[Item]) -> list[Any]:
        """Return one result or VessaError for each item, in order; kinds of items may be mixed."""

    def release_memory(self, everything: bool) -> None:
        """Return free memory to the device; everything: drop cached images and templates too."""

    def holds(self, image_id: str) -> bool:
        """Whether the features of an image are cached, so that a request needs no pixels."""

    def held_images(self) -> frozenset[str]:
        """Return the ids of all images with cached features."""

    def stage_seconds(self) -> Mapping[str, float]:
        """Return the time spent in each stage of inference since the start, s."""

    def bytes_held(self) -> Mapping[str, int]:
        """Return the bytes in use, by where they are held."""

    def adapt(self, bank: str, seconds: float, images: np.ndarray | None = None) -> AdaptationInfo:
        """Start to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs.

        images: unlabeled gray squares, uint8 (M, S, S)
        """

    def adaptation(self, bank: str) -> AdaptationInfo:
        """Return the state of a bank's adaptation; UnknownBank."""

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""

    def check(self) -> None:
        """Raise NotReady or LanguageUnavailable while the worker cannot compute."""

    def close(self, seconds: float) -> None:
        """End everything that runs, within about `seconds`."""


def load(settings: Settings, banks: TemplateBanks) -> Worker:
    """Load the annotator that the settings describe into this process."""
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    # Imported here for two reasons: torch reads OMP_NUM_THREADS once, when it is imported, and a service
    # whose worker is another process never needs torch.
    from vessa_server.inference.annotator import load_annotator
    from vessa_server.model.language.remote import VllmAddress

    budget, without = settings.caches.feature_cache_bytes, frozenset[str](settings.without)
    vllm = None
    if settings.language_model.language == "vllm":
        vllm = VllmAddress(
            settings.language_model.vllm_url,
            settings.language_model.vllm_key.get_secret_value(),
            settings.language_model.vllm_timeout_s,
        )
    return load_annotator(settings.weights, settings.device, banks, budget, without, vllm)
