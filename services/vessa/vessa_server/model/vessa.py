"""Combine retriever, language model, projector and segmenter in one module."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vessa_server.model.language.prefix_cache import InProcess, StateReader
from vessa_server.model.language.vlm import LanguageModel
from vessa_server.model.presets import Preset
from vessa_server.model.retriever import Retriever
from vessa_server.model.segmenter import ImageFeatures, PromptBatch, Segmenter

GREEN = (0.0, 1.0, 0.0)


class Vessa(nn.Module):
    """The annotator's network. New weights are random; `weights.directory.read` loads trained ones.

    language: the language model in this process; reader: source of its states, which may be a service
    provenance: origin of the weights, from `vessa.json`; its "data" lists the training sets of Stage 1
    """

    def __init__(
        self, preset: Preset, language: LanguageModel | None = None, service: StateReader | None = None
    ) -> None:
        super().__init__()
        self.preset = preset
        self.provenance: dict[str, Any] = {}
        self.retriever = Retriever(preset.retriever)
        self.segmenter = Segmenter(preset.segmenter)
        if language is None and service is None and preset.language is not None:
            language = LanguageModel.nano(preset.language)
        self.language = language
        self.reader: StateReader | None = service
        if language is not None:
            self.reader = InProcess(language)
        self.projector: nn.Module | None = None
        if self.reader is not None:
            hidden = self.reader.hidden_size
            self.projector = nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, preset.segmenter.dim)
            )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def with_segmenter(self, segmenter: Segmenter) -> "Vessa":
        """Return a model with another segmenter that shares all other parts with this one."""
        other = copy.copy(self)
        other._modules = {**self._modules, "segmenter": segmenter}
        return other

    def see(
        self, overlays: Tensor, targets: Tensor, class_names: list[str], instructions: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Return the prompt vectors h_seg (N, C) and the text loss; needs a language model."""
        if self.language is None or self.projector is None:
            raise ValueError("there is no language model in this process; pass h_seg None to `draw` instead")
        states, text_loss = self.language(overlays, targets, class_names, instructions)
        return self.projector(states), text_loss

    def draw(
        self,
        features: ImageFeatures,
        memories: Tensor | None,
        h_seg: Tensor | None,
        prompts: PromptBatch | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict one mask for each of N (target, class) pairs; see `Segmenter.attend` and `decode`."""
        embedding = self.segmenter.attend(features, memories, rows)
        details = features.details if rows is None else features[rows].details
        return self.segmenter.decode(embedding, details, h_seg, prompts or PromptBatch())


def overlay(images: Tensor, masks: Tensor, opacity: float = 0.4) -> Tensor:
    """Lay a green mask over images.

    images: (N, 3, H, W) float in [0, 1]; masks: (N, 1, H, W) float, 1 inside
    """
    green = images.new_tensor(GREEN).view(1, 3, 1, 1)
    return images * (1 - opacity * masks) + green * (opacity * masks)
