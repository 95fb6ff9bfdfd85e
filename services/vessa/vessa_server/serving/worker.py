"""What the service asks of a loaded annotator, whether it computes in this process or in one of its own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vessa.errors import VessaError
from vessa.schemas import AdaptationInfo
from vessa_server.adaptation.runner import Adapting
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.template import Template

if TYPE_CHECKING:
    # The annotator brings torch, which a service whose device is another process never needs.
    from vessa_server.inference.annotator import Annotator
    from vessa_server.types import DescribeItem, SegmentItem, TemplateItem


@dataclass(frozen=True)
class About:
    """What has been loaded.

    model: digest of the weights; device: name of what they are on; language: whether there is a language
    model; trained_on: names of what Stage 1 saw, None where the weights do not say
    """

    model: str
    preset: str
    device: str
    language: bool
    trained_on: tuple[str, ...] | None


class Device(Protocol):
    """An annotator at work.

    One thread calls segment, describe, encode_templates and release_memory: they compute. The rest may be
    asked from any thread at any time.
    """

    @property
    def about(self) -> About:
        """What has been loaded."""

    def segment(self, items: "list[SegmentItem]") -> list[Any]:
        """Return a SegmentResult or VessaError for each image."""

    def describe(self, items: "list[DescribeItem]") -> list[Any]:
        """Return the feature (D,) of each image."""

    def encode_templates(self, items: "list[TemplateItem]") -> list[Template | VessaError]:
        """Return each example as a template, or why it is none."""

    def release_memory(self, everything: bool) -> None:
        """Give free memory back; everything: forget what is kept of images and templates, too."""

    def holds(self, image_id: str) -> bool:
        """Whether a request by this id needs no pixels."""

    def seconds(self) -> Mapping[str, float]:
        """Return the time spent in each stage of inference so far, s."""

    def bytes_held(self) -> Mapping[str, int]:
        """Return the bytes that are held, by where."""

    def adapt(self, bank: str, seconds: float) -> AdaptationInfo:
        """Begin to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs."""

    def adaptation(self, bank: str) -> AdaptationInfo:
        """Return how an adaptation goes, or went; UnknownBank."""

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""

    def check(self) -> None:
        """Raise NotReady or LanguageUnavailable while nothing can be computed."""

    def close(self, seconds: float) -> None:
        """End all that runs, within about `seconds`."""


class LocalDevice:
    """An annotator in this process."""

    def __init__(self, annotator: "Annotator", banks: TemplateBanks) -> None:
        self.annotator = annotator
        self.segment, self.describe = annotator.segment, annotator.describe
        self.encode_templates, self.release_memory = annotator.encode_templates, annotator.release_memory
        self.holds, self.bytes_held = annotator.holds, annotator.bytes_held
        self._adapting = Adapting(banks, annotator)
        self.adapt, self.adaptation = self._adapting.start, self._adapting.info
        self.forget_adaptation = self._adapting.forget

    @property
    def about(self) -> About:
        """What has been loaded."""
        annotator = self.annotator
        data = annotator.model.provenance.get("data")
        return About(
            annotator.model_digest,
            annotator.preset,
            annotator.device,
            annotator.model.reader is not None,
            None if data is None else tuple(entry["name"] for entry in data),
        )

    def seconds(self) -> Mapping[str, float]:
        """Return the time spent in each stage of inference so far, s."""
        return self.annotator.clock.seconds

    def check(self) -> None:
        """Raise LanguageUnavailable while the language model cannot be asked."""
        if self.annotator.model.reader is not None:
            self.annotator.model.reader.check()

    def close(self, seconds: float) -> None:
        """Give up adapting, and what the language model holds."""
        self._adapting.stop(seconds)
        if self.annotator.model.reader is not None:
            self.annotator.model.reader.close()


def load(settings: Settings, banks: TemplateBanks) -> LocalDevice:
    """Load the annotator that the settings describe into this process; torch is imported here."""
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)  # torch reads it once, when it is imported
    from vessa_server.inference.annotator import load_annotator

    budget, without = settings.caches.feature_cache_bytes, frozenset[str](settings.without)
    vllm = None
    if settings.language_model.language == "vllm":
        from vessa_server.model.language.remote_vlm import VllmAddress

        remote = settings.language_model
        vllm = VllmAddress(remote.vllm_url, remote.vllm_key.get_secret_value(), remote.vllm_timeout_s)
    annotator = load_annotator(settings.weights, settings.device, banks, budget, without, vllm)
    return LocalDevice(annotator, banks)
