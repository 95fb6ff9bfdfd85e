"""The paper's inference in one file: retrieve -> prompt -> segment -> fuse.

Where the preset says so it is done twice: on the whole image, then closer (see `closer`).

Everything here runs in one thread of the device process. Pixels and masks come in and go out as numpy arrays;
only this module and those below it know torch.
"""

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vessa.errors import InvalidImage, NoTemplate, UnknownClass, UnknownImage, VessaError
from vessa.mask_geometry import box_of
from vessa.schemas import AdaptationInfo, TemplateUse
from vessa_server.adaptation.runner import AdaptationRunner
from vessa_server.byte_cache import ByteCache
from vessa_server.inference.feature_cache import Seen
from vessa_server.inference.malloc import keep_freed_memory
from vessa_server.inference.mask_predictor import Drawing, Pass, mask_square
from vessa_server.inference.stage_timer import StageTimer
from vessa_server.inference.zoom import NOTHING, find, prompted_box, union, window_around
from vessa_server.model.geometry import Square, Window, to_tensor
from vessa_server.model.language.remote_vlm import VllmAddress
from vessa_server.model.segmenter import ImageFeatures
from vessa_server.model.vessa import Vessa
from vessa_server.model.weights import directory
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.retrieval import Bank, sample_template
from vessa_server.template_bank.template import Template, View, template_id
from vessa_server.types import DescribeItem, Item, Method, ModelInfo, SegmentItem, SegmentResult, TemplateItem

_Result = TypeVar("_Result")


@dataclass
class _Start:
    """An item on its way: its image as a whole, its bank, and the closer look once it was taken."""

    seen: Seen
    bank: Bank
    close: Seen | None = None

    def key(self, item: SegmentItem) -> Hashable:
        """What a first look depends on, besides the image."""
        return self.bank.name, self.bank.digest, item.group, item.template_choice, item.seed


class Annotator:
    """Encodes templates and segments query images on one device. Not thread-safe: one thread calls it.

    without: parts left out, "language" or "memory", as in the paper's ablations (Table 4)
    """

    def __init__(
        self,
        model: Vessa,
        banks: TemplateBanks,
        feature_cache_bytes: int,
        model_digest: str,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.model, self.banks = model, banks
        self.clock = StageTimer(model.device)
        self._held = ByteCache(feature_cache_bytes)
        self._drawing = Drawing(model, self.clock, self._held)
        self.model_digest = model_digest
        self._size = model.preset.segmenter.image_size
        self._adaptations = AdaptationRunner(banks, model, model_digest, self.decoder_lock)
        self.leave_out(without)

    def leave_out(self, parts: frozenset[str]) -> None:
        """From now on do without some parts. Raises ValueError for an unknown one."""
        if unknown := parts - {"language", "memory"}:
            raise ValueError(f"only language and memory can be left out, got {sorted(unknown)}")
        self._drawing.without = parts
        for key, seen in self._held:
            if isinstance(seen, Seen):
                seen.forget_attended()
                self._held.put(key, seen)

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

    @property
    def decoder_lock(self) -> threading.Lock:
        """Held while a bank's own weights are in the mask decoder."""
        return self._drawing.decoder_lock

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

    def stage_seconds(self) -> dict[str, float]:
        """Return the time spent in each stage of inference since the start, s."""
        return self.clock.seconds

    def adapt(self, bank: str, seconds: float) -> AdaptationInfo:
        """Start to adapt to a bank, for at most `seconds`; UnknownBank, QueueFull while another one runs."""
        return self._adaptations.start(bank, seconds)

    def adaptation(self, bank: str) -> AdaptationInfo:
        """Return the state of a bank's adaptation; UnknownBank."""
        return self._adaptations.info(bank)

    def forget_adaptation(self, bank: str) -> None:
        """Serve a bank by the common weights again; UnknownBank, QueueFull while it is being adapted to."""
        self._adaptations.forget(bank)

    def check(self) -> None:
        """Raise LanguageUnavailable while the language model cannot be reached."""
        if self.model.reader is not None:
            self.model.reader.check()

    def close(self, seconds: float) -> None:
        """Stop a running adaptation, and close the language model's connections."""
        self._adaptations.stop(seconds)
        if self.model.reader is not None:
            self.model.reader.close()

    def holds(self, image_id: str) -> bool:
        """Whether a request by this id needs no pixels."""
        return image_id in self._held

    def held_images(self) -> frozenset[str]:
        """Return the ids of all images that are held."""
        return frozenset(key for key, _ in self._held if isinstance(key, str))

    def bytes_held(self) -> dict[str, int]:
        """Return the bytes of what is kept of images and templates and, on CUDA, of the device's memory."""
        held = {"features": self._held.nbytes}
        if self.model.device.type == "cuda":
            held["device_allocated"] = torch.cuda.memory_allocated(self.model.device)
            held["device_reserved"] = torch.cuda.memory_reserved(self.model.device)
        return held

    def release_memory(self, everything: bool) -> None:
        """Give the device's free memory back; everything: what is kept of images and templates, too."""
        if everything:
            self._held.clear()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def encode_templates(self, items: list[TemplateItem]) -> list[Template | VessaError]:
        """Compute each template's feature and, per class it shows, its memory."""
        return [_or_error(self._encode_template, item) for item in items]

    def _encode_template(self, item: TemplateItem) -> Template:
        present = {c: n for c, n in item.classes.items() if (item.mask == c).any()}
        if not present:
            raise InvalidImage("the mask is empty: a template must show at least one of its classes")
        square, window = Square(*item.mask.shape), None
        if self.model.preset.closer:
            window = window_around(box_of(np.isin(item.mask, list(present))), *item.mask.shape)
        return Template(
            id=template_id(item.image, item.mask, present, item.group),
            group=item.group,
            classes=present,
            image=item.image,
            mask=item.mask,
            whole=self._view(item, present, square),
            close=None if window is None else self._view(item, present, replace(square, window=window)),
            model=self.model_digest,
        )

    def _view(self, item: TemplateItem, classes: Iterable[int], square: Square) -> View:
        """Encode one square of a template: its feature and the memory of each class."""
        seen = self._encode([item.image], [square])[0]
        masks = torch.cat([mask_square(item.mask, c, square, self._size, self.model.device) for c in classes])
        features = seen.features[[0] * len(masks)]
        tokens = self.model.segmenter.encode_memory(features, masks).half().cpu().numpy()
        shown = square.window
        window = None if shown is None else (shown.top, shown.left, shown.side)
        return View(seen.vector, dict(zip(classes, tokens, strict=True)), window)

    @torch.inference_mode()
    def describe(self, items: list[DescribeItem]) -> list[np.ndarray]:
        """Return each image's feature for the retrieval: (D,) float32 of unit norm."""
        known = {i.image_id: seen for i in items if (seen := self._held.get(i.image_id)) is not None}
        known |= self._look({i.image_id: i.image for i in items if i.image_id not in known})
        return [known[i.image_id].vector for i in items]

    @torch.inference_mode()
    def segment(self, items: list[SegmentItem]) -> list[SegmentResult | VessaError]:
        """Segment query images; one item's error does not touch the others."""
        banks = {name: _or_error(self.banks.get, name) for name in {i.bank for i in items}}
        # Taken before new images come in, which may push them out of the cache.
        looked = {i.image_id: seen for i in items if (seen := self._held.get(i.image_id)) is not None}
        fresh = {i.image_id: i.image for i in items if i.image is not None and i.image_id not in looked}
        looked |= self._look(fresh)
        whole = [_or_error(self._start, i, banks[i.bank], looked.get(i.image_id)) for i in items]
        if self.model.preset.closer:
            self._first_look([(i, s) for i, s in zip(items, whole, strict=True) if isinstance(s, _Start)])
            self._look_closer([(i, s) for i, s in zip(items, whole, strict=True) if isinstance(s, _Start)])
        with self.clock.stage("retrieve"):
            plans = [
                s if isinstance(s, VessaError) else _or_error(self._plan, i, s)
                for i, s in zip(items, whole, strict=True)
            ]
        flat = [p for plan in plans if not isinstance(plan, VessaError) for p in plan]
        outputs = iter(self._drawing.draw(flat))
        results: list[SegmentResult | VessaError] = []
        for item, start, plan in zip(items, whole, plans, strict=True):
            if isinstance(start, VessaError):
                results.append(start)
                continue
            if isinstance(plan, VessaError):
                results.append(plan)
                continue
            with self.clock.stage("fuse"):
                results.append(self._fuse(item, start, plan, [next(outputs) for _ in plan]))
            if item.image_id in self._held:
                self._held.put(item.image_id, start.seen)  # it has grown
        return results

    def _encode(self, images: list[np.ndarray], squares: list[Square]) -> list[Seen]:
        """Encode one square of each image."""
        if not images:
            return []
        with self.clock.stage("encode"):
            pixels = torch.cat(
                [
                    s.enter(to_tensor(i).to(self.model.device), self._size)
                    for s, i in zip(squares, images, strict=True)
                ]
            )
            features = self.model.segmenter.encode_images(pixels)
            vectors = self.model.retriever(pixels).float().cpu().numpy()
        return [
            Seen(image, square, pixels[i : i + 1].clone(), _own(features[i : i + 1]), vectors[i])
            for i, (image, square) in enumerate(zip(images, squares, strict=True))
        ]

    def _look(self, images: dict[str, np.ndarray]) -> dict[str, Seen]:
        """Encode images once, and keep what was seen while the budget lasts."""
        seen = self._encode(list(images.values()), [Square(*i.shape[:2]) for i in images.values()])
        for image_id, one in zip(images, seen, strict=True):
            self._held.put(image_id, one)
        return dict(zip(images, seen, strict=True))

    def _start(self, item: SegmentItem, bank: Bank | VessaError, seen: Seen | None) -> _Start:
        if isinstance(bank, VessaError):
            raise bank
        if seen is None:
            raise UnknownImage(f"the service no longer holds {item.image_id}; send the image's pixels again")
        return _Start(seen, bank)

    def _first_look(self, starts: list[tuple[SegmentItem, _Start]]) -> None:
        """Find where each image shows any of its bank's classes, without prompts."""
        passes: dict[tuple[str, Hashable], list[Pass]] = {}
        for item, start in starts:
            key = start.key(item)
            if key not in start.seen.found and (item.image_id, key) not in passes:
                unprompted = SegmentItem(item.image_id, None, item.bank, group=item.group)
                unprompted = replace(unprompted, template_choice=item.template_choice, seed=item.seed)
                passes[item.image_id, key] = self._plan(unprompted, start, lenient=True)
        logits = iter(self._drawing.draw([p for some in passes.values() for p in some]))
        for item, start in starts:
            key = start.key(item)
            if (some := passes.pop((item.image_id, key), None)) is not None:
                drawn = [next(logits)[0] for _ in some]
                ids = [p.class_id for p in some]
                square = start.seen.square
                start.seen.found[key] = find(torch.cat(drawn), ids, square) if drawn else NOTHING

    def _look_closer(self, starts: list[tuple[SegmentItem, _Start]]) -> None:
        """Encode the part of each image that shows what was found or is pointed at."""
        windows: list[Window | None] = []
        closer: dict[tuple[str, Window], Seen] = {}
        missing: dict[tuple[str, Window], Seen] = {}
        for item, start in starts:
            seen, size = start.seen, start.seen.image.shape[:2]
            box, told = prompted_box(item, *size)
            if not told:
                box = union([seen.found[start.key(item)].box, box])
            windows.append(window := window_around(box, *size))
            if window is not None and window in seen.closer:
                closer[item.image_id, window] = seen.closer[window]
            elif window is not None:
                missing[item.image_id, window] = seen
        squares = [replace(seen.square, window=window) for (_, window), seen in missing.items()]
        fresh = self._encode([seen.image for seen in missing.values()], squares)
        for ((image_id, window), seen), one in zip(missing.items(), fresh, strict=True):
            closer[image_id, window] = one
            seen.keep_closer(window, one)
        for (item, start), window in zip(starts, windows, strict=True):
            if window is not None:
                start.close = closer[item.image_id, window]
                start.seen.attended.clear()  # the first look has served

    def _plan(self, item: SegmentItem, start: _Start, *, lenient: bool = False) -> list[Pass]:
        """Find each class's templates (Eq. 1 when sampling); lenient: leave out a class that has none."""
        bank, close = start.bank, start.close
        found = start.seen.found.get(start.key(item))
        layout = None if found is None else found.layout((close or start.seen).square.shown)
        ids = {name: class_id for class_id, name in bank.classes.items()}
        names = item.classes or tuple(bank.classes[c] for c in sorted(bank.classes))
        rng = np.random.default_rng(item.seed)
        passes = []
        for index, name in enumerate(names):
            if name not in ids:
                raise UnknownClass(f"bank '{bank.name}' has no class '{name}'; it has {sorted(ids)}")
            everything = item.template_choice == "random"
            matches = bank.retrieve(
                start.seen.vector,
                ids[name],
                exclude_group=item.group,
                top=len(bank.templates) if everything else 3,
                close=None if close is None else close.vector,
                layout=layout,
            )
            if not matches and lenient:
                continue
            if not matches:
                raise NoTemplate(
                    f"bank '{bank.name}' holds no template of '{name}' from a group other than the query's"
                )
            if item.template_choice == "sample":
                matches = [sample_template(matches, rng=rng)]
            elif everything:
                matches = [matches[int(rng.integers(len(matches)))]]
            elif item.template_choice == "top1":
                matches = matches[:1]
            passes.append(Pass(close or start.seen, ids[name], name, matches, item, index, bank.adaptation))
        return passes

    def _fuse(
        self, item: SegmentItem, start: _Start, plan: list[Pass], outputs: list[tuple[Tensor, float]]
    ) -> SegmentResult:
        """Fuse the classes' logits by softmax over [0, z1..zK] on the image's own grid.

        Where a closer look saw nothing is background, without a doubt.
        """
        square, size, adaptation = plan[0].seen.square, start.seen.image.shape[:2], start.bank.adaptation
        logits = square.leave(torch.cat([logits for logits, _ in outputs], dim=1))[0]  # (K, h, w)
        probability = torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)
        confidence, winner = probability.max(0)
        ids = np.array([0] + [p.class_id for p in plan], np.uint8)
        labels, confidences = np.zeros(size, np.uint8), np.full(size, 255, np.uint8)
        labels[square.seen] = ids[winner.cpu().numpy()]
        confidences[square.seen] = (confidence * 255).round().byte().cpu().numpy()
        probabilities = None
        if item.probabilities:
            probabilities = np.zeros((len(ids), *size), np.float16)
            probabilities[0] = 1
            probabilities[:, *square.seen] = probability.half().cpu().numpy()
        return SegmentResult(
            image_id=item.image_id,
            labels=labels,
            confidence=confidences,
            probabilities=probabilities,
            class_ids=tuple(p.class_id for p in plan),
            class_names=tuple(p.class_name for p in plan),
            scores={p.class_name: round(score, 4) for p, (_, score) in zip(plan, outputs, strict=True)},
            templates={
                p.class_name: [
                    TemplateUse(id=t.id, group=t.group, similarity=round(s, 4)) for t, s in p.chosen
                ]
                for p in plan
            },
            bank_version=start.bank.version,
            bank_digest=start.bank.digest,
            adaptation=None if adaptation is None else adaptation.digest,
        )


def load_annotator(
    weights: str,
    device: str,
    banks: TemplateBanks,
    feature_cache_bytes: int,
    without: frozenset[str] = frozenset(),
    vllm: VllmAddress | None = None,
) -> Annotator:
    """Read weights (a directory, or the name of shipped ones) and make an annotator on `device`.

    Raises InvalidWeights. "auto" takes the first CUDA device, else the CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    model, digest = directory.read(weights, device, vllm=vllm)
    return Annotator(model, banks, feature_cache_bytes, digest, without)


def _or_error(call: Callable[..., _Result], *arguments: object) -> _Result | VessaError:
    try:
        return call(*arguments)
    except VessaError as error:
        return error


def _own(features: ImageFeatures) -> ImageFeatures:
    """Copy, so that keeping one image does not keep its whole batch; details lie as `decode` reads them."""
    fine, finer = (
        level.clone(memory_format=torch.channels_last) for level in (features.fine, features.finer)
    )
    return ImageFeatures(features.embedding.clone(), features.position.clone(), fine, finer)
