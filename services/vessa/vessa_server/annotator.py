"""The paper's inference in one file: retrieve -> prompt -> segment -> fuse.

Everything here runs on the device thread. Pixels and masks come in and go out as numpy arrays;
only this module and those below it know torch.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vessa.codec import image_digest
from vessa.errors import InvalidImage, NoTemplate, UnknownClass, UnknownImage, VessaError
from vessa.schemas import TemplateUse
from vessa_server.bank import Bank, Template, TemplateBanks, sample_template, template_id
from vessa_server.features import Attended, FeatureCache, Seen
from vessa_server.model import checkpoint
from vessa_server.model.geometry import Square, to_tensor
from vessa_server.model.instructions import DEFAULT_INSTRUCTION
from vessa_server.model.prompts import MaskPrompts, prompt_batch
from vessa_server.model.segmenter import ImageFeatures, PromptBatch
from vessa_server.model.vessa import Vessa, overlay

_Result = TypeVar("_Result")

LABELS_VERSION = "2"  # of pre- and post-processing: raise it when the same weights would answer differently
STAGES = ("encode", "retrieve", "language", "attend", "draw", "fuse")
_CONCURRENT_MASKS = 12  # (image, class) pairs decoded in one pass; bounds memory, not what a request may hold


@dataclass(frozen=True)
class TemplateItem:
    """An annotated image. image: uint8 (H, W[, 3]); mask: uint8 (H, W) class ids; classes: id to name."""

    image: np.ndarray
    mask: np.ndarray
    classes: dict[int, str]
    group: str


@dataclass(frozen=True)
class SegmentItem:
    """One query image, or the id of one seen before, with its prompts in native px (see `vessa.codec`)."""

    image_id: str
    image: np.ndarray | None
    bank: str
    classes: tuple[str, ...] = ()
    group: str | None = None
    boxes: np.ndarray | None = None
    points: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    mask_logits: np.ndarray | None = None
    mask_present: np.ndarray | None = None
    template_choice: str = "top1"
    seed: int = 0
    probabilities: bool = False


@dataclass(frozen=True)
class SegmentResult:
    """labels, confidence: uint8 (H, W); probabilities: float16 (K + 1, H, W) or None, background first."""

    image_id: str
    labels: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray | None
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    scores: dict[str, float]
    templates: dict[str, list[TemplateUse]]
    bank_version: int


@dataclass
class _Pass:
    """One (image, class) pair on its way through the network."""

    seen: Seen
    class_id: int
    class_name: str
    chosen: list[tuple[Template, float]]
    item: SegmentItem
    index: int  # of the class among the item's classes

    @property
    def key(self) -> Hashable:
        """What the pass depends on before any prompt, besides the image."""
        return self.class_id, self.class_name, tuple(t.id for t, _ in self.chosen)


class Annotator:
    """Encodes templates and segments query images on one device. Not thread-safe: one thread calls it.

    without: parts left out, "language" or "memory", as in the paper's ablations (Table 4);
    stage_seconds: time spent in each stage since the start
    """

    def __init__(
        self,
        model: Vessa,
        banks: TemplateBanks,
        feature_cache_bytes: int,
        model_digest: str,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.model, self.banks = model, banks
        self.model_digest = model_digest
        self.preset = model.preset.name
        self._size = model.preset.segmenter.image_size
        self._held = FeatureCache(feature_cache_bytes)
        self._overlays: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self.leave_out(without)

    def leave_out(self, parts: frozenset[str]) -> None:
        """From now on do without some parts. Raises ValueError for an unknown one."""
        if unknown := parts - {"language", "memory"}:
            raise ValueError(f"only language and memory can be left out, got {sorted(unknown)}")
        self.without = parts
        self._held.forget_attended()

    @property
    def device(self) -> str:
        """Name of the device the weights are on."""
        return str(self.model.device)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Add the time of a stage; on CUDA it ends when its kernels have."""
        started = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        self.stage_seconds[name] += time.perf_counter() - started

    def holds(self, image_id: str) -> bool:
        """Whether a request by this id needs no pixels."""
        return image_id in self._held

    @torch.inference_mode()
    def encode_templates(self, items: list[TemplateItem]) -> list[Template | VessaError]:
        """Compute each template's feature and, per class it shows, its memory."""
        return [_or_error(self._encode_template, item) for item in items]

    def _encode_template(self, item: TemplateItem) -> Template:
        seen = self._look([(image_digest(item.image), item.image)])[0]
        present = {c: n for c, n in item.classes.items() if (item.mask == c).any()}
        if not present:
            raise InvalidImage("the mask is empty: a template must show at least one of its classes")
        masks = torch.cat([self._mask_square(item.mask, c) for c in present])
        features = seen.features[[0] * len(present)]
        tokens = self.model.segmenter.encode_memory(features, masks).half().cpu().numpy()
        return Template(
            id=template_id(item.image, item.mask, present, item.group),
            group=item.group,
            classes=present,
            image=item.image,
            mask=item.mask,
            feature=seen.vector,
            memories=dict(zip(present, tokens, strict=True)),
            model=self.model_digest,
        )

    def _mask_square(self, mask: np.ndarray, class_id: int) -> Tensor:
        binary = torch.from_numpy((mask == class_id).astype(np.float32))[None, None].to(self.model.device)
        return (Square(*mask.shape).enter(binary, self._size) > 0.5).float()

    @torch.inference_mode()
    def segment(self, items: list[SegmentItem]) -> list[SegmentResult | VessaError]:
        """Segment query images; one item's error does not touch the others."""
        banks = {name: _or_error(self.banks.get, name) for name in {i.bank for i in items}}
        # Taken before new images come in, which may push them out of the cache.
        looked = {i.image_id: seen for i in items if (seen := self._held.get(i.image_id)) is not None}
        fresh = {i.image_id: i.image for i in items if i.image is not None and i.image_id not in looked}
        with self._stage("encode"):
            looked |= zip(fresh, self._look([(k, v) for k, v in fresh.items()]), strict=True)
        plans: list[list[_Pass] | VessaError] = []
        with self._stage("retrieve"):
            for item in items:
                plans.append(_or_error(self._plan, item, banks[item.bank], looked.get(item.image_id)))
        flat = [p for plan in plans if not isinstance(plan, VessaError) for p in plan]
        outputs: list[tuple[Tensor, float]] = []
        for start in range(0, len(flat), _CONCURRENT_MASKS):
            outputs += self._draw(flat[start : start + _CONCURRENT_MASKS])
        results: list[SegmentResult | VessaError] = []
        position = 0
        for item, plan in zip(items, plans, strict=True):
            if isinstance(plan, VessaError):
                results.append(plan)
                continue
            bank = banks[item.bank]
            assert isinstance(bank, Bank)
            with self._stage("fuse"):
                results.append(self._fuse(item, bank, plan, outputs[position : position + len(plan)]))
            position += len(plan)
        return results

    def _look(self, images: list[tuple[str, np.ndarray]]) -> list[Seen]:
        """Encode images once, and keep what was seen while the budget lasts."""
        if not images:
            return []
        squares = [Square(*image.shape[:2]) for _, image in images]
        pixels = torch.cat(
            [
                s.enter(to_tensor(i).to(self.model.device), self._size)
                for s, (_, i) in zip(squares, images, strict=True)
            ]
        )
        features = self.model.segmenter.encode_images(pixels)
        vectors = self.model.retriever(pixels).float().cpu().numpy()
        seen = [
            Seen(square, pixels[i : i + 1].clone(), _own(features[i : i + 1]), vectors[i])
            for i, square in enumerate(squares)
        ]
        for (image_id, _), one in zip(images, seen, strict=True):
            self._held.put(image_id, one)
        return seen

    def _plan(self, item: SegmentItem, bank: Bank | VessaError, seen: Seen | None) -> list[_Pass]:
        """Find each class's templates (Eq. 1 when sampling)."""
        if isinstance(bank, VessaError):
            raise bank
        if seen is None:
            raise UnknownImage(f"the service no longer holds {item.image_id}; send the image's pixels again")
        ids = {name: class_id for class_id, name in bank.classes.items()}
        names = item.classes or tuple(bank.classes[c] for c in sorted(bank.classes))
        rng = np.random.default_rng(item.seed)
        passes = []
        for index, name in enumerate(names):
            if name not in ids:
                raise UnknownClass(f"bank '{bank.name}' has no class '{name}'; it has {sorted(ids)}")
            everything = item.template_choice == "random"
            top = len(bank.templates) if everything else 3
            matches = bank.retrieve(seen.vector, ids[name], exclude_group=item.group, top=top)
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
            passes.append(_Pass(seen, ids[name], name, matches, item, index))
        return passes

    def _draw(self, passes: list[_Pass]) -> list[tuple[Tensor, float]]:
        """Draw the mask of each pass: logits (1, 1, h, w) on the square, and the predicted IoU."""
        missing = {(p.item.image_id, p.key): p for p in passes if p.key not in p.seen.attended}
        self._attend(list(missing.values()))
        with self._stage("draw"):
            states = [p.seen.attended[p.key] for p in passes]
            embedding = torch.cat([s.embedding for s in states])
            spoken = [s.h_seg for s in states if s.h_seg is not None]
            h_seg = torch.cat(spoken) if spoken else None
            features = _join([p.seen.features for p in passes])
            logits, iou, _ = self.model.segmenter.decode(embedding, features, h_seg, self._prompts(passes))
        for p in passes:
            if p.item.image_id in self._held:
                self._held.put(p.item.image_id, p.seen)
        return list(zip(logits.float().split(1), iou.tolist(), strict=True))

    def _attend(self, passes: list[_Pass]) -> None:
        """Let the language model and the memory see what no earlier request on the image has shown them."""
        for count in {len(p.chosen) for p in passes}:  # top-3 of a small bank may hold fewer templates
            some = [p for p in passes if len(p.chosen) == count]
            with self._stage("language"):
                h_seg = self._look_with_language(some)
            with self._stage("attend"):
                memories = None if "memory" in self.without else self._memories(some)
                embedding = self.model.segmenter.attend(_join([p.seen.features for p in some]), memories)
            for row, p in enumerate(some):
                spoken = None if h_seg is None else h_seg[row : row + 1].clone()
                p.seen.attended[p.key] = Attended(embedding[row : row + 1].clone(), spoken)

    def _memories(self, passes: list[_Pass]) -> Tensor:
        """Stack the memories of the chosen templates, (N, T, M, C)."""
        each = [
            torch.stack([torch.from_numpy(t.memories[p.class_id]).float() for t, _ in p.chosen])
            for p in passes
        ]
        return torch.stack(each).to(self.model.device)

    def _look_with_language(self, passes: list[_Pass]) -> Tensor | None:
        if self.model.language is None or "language" in self.without:
            return None
        overlays = torch.cat([self._overlay(p.chosen[0][0], p.class_id) for p in passes])
        targets = torch.cat([p.seen.pixels for p in passes])
        names = [p.class_name for p in passes]
        return self.model.see(overlays, targets, names, [DEFAULT_INSTRUCTION] * len(passes))[0]

    def _overlay(self, template: Template, class_id: int) -> Tensor:
        """Template with its class in green, (1, 3, S, S), as the language model sees it."""
        key = (template.id, class_id)
        if key not in self._overlays:
            square = Square(*template.mask.shape)
            pixels = square.enter(to_tensor(template.image).to(self.model.device), self._size)
            self._overlays[key] = overlay(pixels, self._mask_square(template.mask, class_id))
            if len(self._overlays) > 256:
                self._overlays.popitem(last=False)
        self._overlays.move_to_end(key)
        return self._overlays[key]

    def _prompts(self, passes: list[_Pass]) -> PromptBatch:
        squares = [p.seen.square for p in passes]
        side = 4 * self.model.segmenter.side
        return prompt_batch([_prompts_of(p) for p in passes], squares, self._size, side, self.model.device)

    def _fuse(
        self, item: SegmentItem, bank: Bank, plan: list[_Pass], outputs: list[tuple[Tensor, float]]
    ) -> SegmentResult:
        """Fuse the classes' logits by softmax over [0, z1..zK] on the image's own grid."""
        logits = torch.cat([logits for logits, _ in outputs], dim=1)
        logits = plan[0].seen.square.leave(logits)[0]  # (K, H, W)
        probability = torch.cat([torch.zeros_like(logits[:1]), logits]).softmax(0)
        confidence, winner = probability.max(0)
        ids = torch.tensor([0] + [p.class_id for p in plan], dtype=torch.uint8)
        return SegmentResult(
            image_id=item.image_id,
            labels=ids[winner.cpu()].numpy(),
            confidence=(confidence * 255).round().byte().cpu().numpy(),
            probabilities=probability.half().cpu().numpy() if item.probabilities else None,
            class_ids=tuple(p.class_id for p in plan),
            class_names=tuple(p.class_name for p in plan),
            scores={p.class_name: round(score, 4) for p, (_, score) in zip(plan, outputs, strict=True)},
            templates={
                p.class_name: [
                    TemplateUse(id=t.id, group=t.group, similarity=round(s, 4)) for t, s in p.chosen
                ]
                for p in plan
            },
            bank_version=bank.version,
        )


def load_annotator(
    weights: str,
    device: str,
    banks: TemplateBanks,
    feature_cache_bytes: int,
    without: frozenset[str] = frozenset(),
) -> Annotator:
    """Read weights (a directory, or the name of shipped ones) and make an annotator on `device`.

    Raises InvalidWeights. "auto" takes the first CUDA device, else the CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, digest = checkpoint.read(weights, device)
    return Annotator(model, banks, feature_cache_bytes, digest, without)


def _or_error(call: Callable[..., _Result], *arguments: object) -> _Result | VessaError:
    try:
        return call(*arguments)
    except VessaError as error:
        return error


def _own(features: ImageFeatures) -> ImageFeatures:
    """Copy, so that keeping one image does not keep its whole batch alive."""
    return ImageFeatures(
        features.embedding.clone(), features.position.clone(), features.fine.clone(), features.finer.clone()
    )


def _join(features: list[ImageFeatures]) -> ImageFeatures:
    return ImageFeatures(
        torch.cat([f.embedding for f in features]),
        torch.cat([f.position for f in features], dim=1),
        torch.cat([f.fine for f in features]),
        torch.cat([f.finer for f in features]),
    )


def _prompts_of(one: _Pass) -> MaskPrompts:
    """Prompts of one class of an item."""
    item, index = one.item, one.index
    box = None if item.boxes is None or (item.boxes[index] == -1).all() else item.boxes[index]
    points = None if item.points is None else item.points[index]
    labels = None if item.point_labels is None else item.point_labels[index]
    there = item.mask_present is None or bool(item.mask_present[index])
    logits = item.mask_logits[index] if item.mask_logits is not None and there else None
    return MaskPrompts(box, points, labels, logits)
