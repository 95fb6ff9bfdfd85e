"""The annotator: runs the steps of the paper's inference for templates, features and query images.

One thread of the worker process calls it. Pixels and masks come in and go out as numpy arrays; torch is known
only in this folder and the ones below it.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vessa.errors import UnknownImage, VessaError
from vessa.schemas import AdaptationInfo
from vessa_server.adaptation import AdaptationRunner, load_segmenter
from vessa_server.byte_cache import ByteCache
from vessa_server.inference.image_views import CachedImage
from vessa_server.inference.pipeline import Pipeline, or_error
from vessa_server.inference.query import Query
from vessa_server.malloc import keep_freed_memory
from vessa_server.model.geometry import Square
from vessa_server.model.language.remote import VllmAddress
from vessa_server.model.vessa import Vessa
from vessa_server.model.weights import directory
from vessa_server.observability.stage_timer import StageTimer
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.retrieval import Bank
from vessa_server.template_bank.template import Template
from vessa_server.types import (
    DescribeItem,
    Item,
    Method,
    ModelInfo,
    SegmentItem,
    SegmentResult,
    TemplateItem,
    public_id,
)

_ADAPTED = 4  # banks' own segmenters that stay loaded; one of nano takes 17 MB


class Annotator:
    """Encodes templates and segments query images on one device; a `Worker` in this process.

    Only one thread at a time may call `compute` and what it calls; `Worker` says which methods any thread may
    call.

    feature_cache_bytes: budget for cached image views, template memories and language prefixes
    model_digest: of the weights; without: parts left out, "language" or "memory", as in Tables 4 and 5
    """

    def __init__(
        self,
        model: Vessa,
        banks: TemplateBanks,
        feature_cache_bytes: int,
        model_digest: str,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.banks, self.model_digest = model, banks, model_digest
        device = model.device
        self._timer = StageTimer(
            (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
        )
        self._cache = ByteCache(feature_cache_bytes)
        self._pipeline = Pipeline(model, self._timer, self._cache)
        self._adapted: OrderedDict[str, Pipeline] = OrderedDict()
        self.adaptations = AdaptationRunner(banks, model, model_digest)
        self.leave_out(without)

    def leave_out(self, parts: frozenset[str]) -> None:
        """Leave out parts from now on. Raises ValueError for an unknown one."""
        if unknown := parts - {"language", "memory"}:
            raise ValueError(f"only language and memory can be left out, got {sorted(unknown)}")
        self._pipeline.leave_out(parts)
        self._adapted.clear()  # they are made again without the parts
        for key, cached in self._cache:
            if isinstance(cached, CachedImage):
                for view in cached.views.values():
                    view.drop_conditioned()
                self._cache.put(key, cached)

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        data = self.model.provenance.get("data")
        return ModelInfo(
            self.model_digest,
            self.model.preset.name,
            str(self.model.device),
            self.model.reader is not None,
            None if data is None else tuple(entry["name"] for entry in data),
        )

    def compute(self, items: list[Item]) -> list[Any]:
        """Return one result or VessaError for each item, in order; kinds of items may be mixed."""
        methods: dict[Method, Callable[[list[Any]], Sequence[Any]]] = {
            "encode_templates": self.encode_templates,
            "describe": self.describe,
            "segment": self.segment,
        }
        results: list[Any] = [None] * len(items)
        for name, method in methods.items():
            rows = [row for row, item in enumerate(items) if item.method == name]
            answers = method([items[row] for row in rows]) if rows else []
            for row, answer in zip(rows, answers, strict=True):
                results[row] = answer
        return results

    @torch.inference_mode()
    def encode_templates(self, items: list[TemplateItem]) -> list[Template | VessaError]:
        """Compute each template's feature and the memory of each class that it shows."""
        return [or_error(self._pipeline.template_encoder.encode, i, self.model_digest) for i in items]

    @torch.inference_mode()
    def describe(self, items: list[DescribeItem]) -> list[np.ndarray]:
        """Return each image's retrieval feature: (D,) float32 of unit norm."""
        images = self._images(items)
        self._encode(images, None, [key for key, cached in images.items() if not cached.views])
        return [next(iter(images[i.image_id].views.values())).vector for i in items]

    @torch.inference_mode()
    def segment(self, items: list[SegmentItem]) -> list[SegmentResult | VessaError]:
        """Segment query images; an error of one item does not affect the others."""
        banks = {name: or_error(self.banks.get, name) for name in {i.bank for i in items}}
        images = self._images(items)
        results: list[SegmentResult | VessaError | None] = [None] * len(items)
        rows: dict[str | None, list[int]] = {}
        for row, item in enumerate(items):
            bank = banks[item.bank]
            if isinstance(bank, VessaError):
                results[row] = bank
            elif item.image_id not in images:
                results[row] = UnknownImage(
                    f"Image {public_id(item.image_id)} is no longer cached. Send the image's pixels again."
                )
            else:
                digest = None if bank.adaptation is None else bank.adaptation.digest
                rows.setdefault(digest, []).append(row)
        for some in rows.values():
            found = or_error(self._segment, [items[row] for row in some], banks, images)
            answers = [found] * len(some) if isinstance(found, VessaError) else found
            for row, answer in zip(some, answers, strict=True):
                results[row] = answer
        return [result for result in results if result is not None]

    def _segment(
        self,
        items: Sequence[SegmentItem],
        banks: Mapping[str, Bank | VessaError],
        images: Mapping[str, CachedImage],
    ) -> list[SegmentResult | VessaError]:
        """Segment items whose banks have one segmenter. Raises InvalidWeights when it cannot be loaded."""
        named = [(item, bank) for item in items if isinstance(bank := banks[item.bank], Bank)]
        adaptation = named[0][1].adaptation
        digest = None if adaptation is None else adaptation.digest
        ids = list(dict.fromkeys(item.image_id for item in items))
        self._encode(images, adaptation, [i for i in ids if digest not in images[i].views])
        queries = [Query(item, bank, images[item.image_id].views[digest]) for item, bank in named]
        results = self._pipeline_of(adaptation).segment(queries)
        for image_id in ids:
            if image_id in self._cache:
                self._cache.put(image_id, images[image_id])  # its size has grown
        return results

    def _images(self, items: Sequence[SegmentItem | DescribeItem]) -> dict[str, CachedImage]:
        """Return the images of items by id, cached ones with their views; unknown ones are left out."""
        # Cached views are taken first: new images may push them out of the cache.
        images: dict[str, CachedImage] = {}
        for item in items:
            cached = images.get(item.image_id) or self._cache.get(item.image_id)
            if cached is None and item.image is not None:
                cached = CachedImage(item.image)
            if cached is not None:
                images[item.image_id] = cached
        return images

    def _encode(
        self, images: Mapping[str, CachedImage], adaptation: Adaptation | None, ids: Sequence[str]
    ) -> None:
        """Encode whole images by one segmenter, and cache their views while the budget lasts."""
        pixels = [images[key].image for key in ids]
        squares = [Square(*image.shape[:2]) for image in pixels]
        views = self._pipeline_of(adaptation).encoder.encode(pixels, squares)
        for key, view in zip(ids, views, strict=True):
            images[key].add(None if adaptation is None else adaptation.digest, view)
            self._cache.put(key, images[key])

    def _pipeline_of(self, adaptation: Adaptation | None) -> Pipeline:
        """Return the pipeline of the common segmenter, or of a bank's own; the latest ones stay loaded."""
        if adaptation is None:
            return self._pipeline
        found = self._adapted.get(adaptation.digest)
        if found is None:
            segmenter = load_segmenter(self.model.segmenter, adaptation)
            model = self.model.with_segmenter(segmenter)
            found = Pipeline(model, self._timer, self._cache, adaptation.digest)
            found.leave_out(self._pipeline.predictor.without)
            if len(self._adapted) >= _ADAPTED:
                self._adapted.popitem(last=False)
            self._adapted[adaptation.digest] = found
        self._adapted.move_to_end(adaptation.digest)
        return found

    def release_memory(self, everything: bool) -> None:
        """Return free memory to the device; everything: drop cached images and templates too."""
        if everything:
            self._cache.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def holds(self, image_id: str) -> bool:
        """Whether the features of an image are cached, so that a request needs no pixels."""
        return image_id in self._cache

    def held_images(self) -> frozenset[str]:
        """Return the ids of all images with cached features."""
        return frozenset(key for key, _ in self._cache if isinstance(key, str))

    def stage_seconds(self) -> dict[str, float]:
        """Return the time spent in each stage of inference since the start, s."""
        return self._timer.seconds

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of the caches and, on CUDA, of the device's memory."""
        held = {"features": self._cache.nbytes}
        if self.model.device.type == "cuda":
            held["device_allocated"] = torch.cuda.memory_allocated(self.model.device)
            held["device_reserved"] = torch.cuda.memory_reserved(self.model.device)
        return held

    def adapt(self, bank: str, seconds: float, images: np.ndarray | None = None) -> AdaptationInfo:
        """Start to adapt to a bank; see `AdaptationRunner.start`."""
        return self.adaptations.start(bank, seconds, images)

    def adaptation(self, bank: str) -> AdaptationInfo:
        """Return the state of a bank's adaptation; UnknownBank."""
        return self.adaptations.info(bank)

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""
        self.adaptations.forget(bank)

    def check(self) -> None:
        """Raise LanguageUnavailable while the language model cannot be reached."""
        if self.model.reader is not None:
            self.model.reader.check()

    def close(self, seconds: float) -> None:
        """Stop a running adaptation within `seconds`, and close the language model's connections."""
        self.adaptations.stop(seconds)
        if self.model.reader is not None:
            self.model.reader.close()


def load_annotator(
    weights: str,
    device: str,
    banks: TemplateBanks,
    feature_cache_bytes: int,
    without: frozenset[str] = frozenset(),
    vllm: VllmAddress | None = None,
) -> Annotator:
    """Read weights and make an annotator on `device`. Raises InvalidWeights.

    weights: a directory, or the name of shipped weights; device: "auto" takes the first CUDA device, else the
    CPU; vllm: the server of the language model, None to run it in this process
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    model, digest = directory.read(weights, device, vllm=vllm)
    return Annotator(model, banks, feature_cache_bytes, digest, without)
