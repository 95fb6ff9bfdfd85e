"""From templates and image to mask logits: the language model looks, memory attention looks, SAM draws."""

import contextlib
import itertools
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vessa_server.byte_cache import ByteCache
from vessa_server.inference.feature_cache import Attended, Seen
from vessa_server.inference.stage_timer import StageTimer
from vessa_server.model.geometry import Square, Window, to_tensor
from vessa_server.model.language.instructions import DEFAULT_INSTRUCTION
from vessa_server.model.language.prefix_cache import Held, StateReader
from vessa_server.model.prompt_encoding import MaskPrompts, hold_to_box, prompt_batch
from vessa_server.model.segmenter import ImageFeatures, PromptBatch
from vessa_server.model.vessa import Vessa, overlay
from vessa_server.template_bank.decoder_weights import Adaptation
from vessa_server.template_bank.template import Template, View
from vessa_server.types import SegmentItem

# (image, class) pairs drawn in one pass: eight images of three classes. It bounds memory, not what a request
# may hold.
_CONCURRENT_MASKS = 24
_EXCLUDED = -20.0  # mask logit of what a box prompt excludes


@dataclass
class Pass:
    """One (image, class) pair on its way through the network.

    chosen: its templates and their similarity; index: of the class among the item's classes;
    adaptation: the bank's own weights
    """

    seen: Seen
    class_id: int
    class_name: str
    chosen: list[tuple[Template, float]]
    item: SegmentItem
    index: int
    adaptation: Adaptation | None = None

    @property
    def key(self) -> Hashable:
        """What the pass depends on before any prompt, besides the image."""
        return self.class_id, self.class_name, tuple(t.id for t, _ in self.chosen)

    @property
    def views(self) -> list[View]:
        """How the templates are shown: as closely as the image is."""
        closer = self.seen.square.window is not None
        return [(t.close if closer and t.close else t.whole) for t, _ in self.chosen]


class Drawing:
    """Draws masks; what a template and the language model say of an image is kept with the image.

    held: keeps what is known of templates on the device; without: parts left out, see `Annotator`;
    decoder_lock: held while a bank's own weights are in place
    """

    def __init__(self, model: Vessa, clock: StageTimer, held: ByteCache) -> None:
        self.model, self.clock, self._held = model, clock, held
        self.without: frozenset[str] = frozenset()
        self.decoder_lock = threading.Lock()
        self._size = model.preset.segmenter.image_size

    def draw(self, passes: list[Pass]) -> list[tuple[Tensor, float]]:
        """Draw the mask of each pass: logits (1, 1, h, w) on its square, and the predicted IoU."""
        outputs: list[tuple[Tensor, float]] = []
        for adaptation, group in itertools.groupby(passes, lambda p: p.adaptation):
            some = list(group)
            with self._adapted(adaptation):
                for start in range(0, len(some), _CONCURRENT_MASKS):
                    outputs += self._draw(some[start : start + _CONCURRENT_MASKS])
        return outputs

    @contextlib.contextmanager
    def _adapted(self, adaptation: Adaptation | None) -> Iterator[None]:
        """Give the mask decoder a bank's own weights for a while."""
        if adaptation is None:
            yield
            return
        decoder = self.model.segmenter.sam.sam_mask_decoder
        with self.decoder_lock:
            common = {k: v.clone() for k, v in decoder.state_dict().items()}
            decoder.load_state_dict({k: torch.from_numpy(v) for k, v in adaptation.tensors.items()})
            try:
                yield
            finally:
                decoder.load_state_dict(common)

    def _draw(self, passes: list[Pass]) -> list[tuple[Tensor, float]]:
        missing = {(id(p.seen), p.key): p for p in passes if p.key not in p.seen.attended}
        self._attend(list(missing.values()))
        with self.clock.stage("draw"):
            states = [p.seen.attended[p.key] for p in passes]
            embedding = torch.cat([s.embedding for s in states])
            spoken = [s.h_seg for s in states if s.h_seg is not None]
            h_seg = torch.cat(spoken) if spoken else None
            details = [
                torch.cat(level) for level in zip(*(p.seen.features.details for p in passes), strict=True)
            ]
            logits, iou, _ = self.model.segmenter.decode(embedding, details, h_seg, self._prompts(passes))
        drawn = [
            one if (box := _prompts_of(p).box) is None else hold_to_box(one, box, p.seen.square, _EXCLUDED)
            for one, p in zip(logits.float().split(1), passes, strict=True)
        ]
        return list(zip(drawn, iou.tolist(), strict=True))

    def _attend(self, passes: list[Pass]) -> None:
        """Let the language model and the memory see what no earlier request on the image has shown them."""
        for count in {len(p.chosen) for p in passes}:  # top-3 of a small bank may hold fewer templates
            some = [p for p in passes if len(p.chosen) == count]
            with self.clock.stage("language"):
                h_seg = self._look_with_language(some)
            with self.clock.stage("attend"):
                memories = None if "memory" in self.without else self._memories(some)
                embedding = self.model.segmenter.attend(_join([p.seen.features for p in some]), memories)
            for row, p in enumerate(some):
                spoken = None if h_seg is None else h_seg[row : row + 1].clone()
                p.seen.attended[p.key] = Attended(embedding[row : row + 1].clone(), spoken)

    def _memories(self, passes: list[Pass]) -> Tensor:
        """Stack the memories of the chosen templates, (N, T, M, C)."""
        return torch.stack([torch.stack(self._memory(p)) for p in passes])

    def _memory(self, one: Pass) -> list[Tensor]:
        """Bring the memories (M, C) of a pass's templates to the device, unless they are there."""
        there = []
        for (template, _), view in zip(one.chosen, one.views, strict=True):
            key = ("memory", template.id, view.window, one.class_id)
            memory = self._held.get(key)
            if memory is None:
                memory = torch.from_numpy(view.memories[one.class_id]).to(self.model.device).float()
                self._held.put(key, memory)
            there.append(memory)
        return there

    def _look_with_language(self, passes: list[Pass]) -> Tensor | None:
        """Let the language model see each pass's most similar template and its target.

        Returns h_seg (N, C), None without a language model.
        """
        if self.model.reader is None or self.model.projector is None or "language" in self.without:
            return None
        if not passes:
            return torch.empty(0, self.model.segmenter.preset.dim, device=self.model.device)
        targets = {id(p.seen): p.seen.pixels for p in passes}  # one image serves all of its classes
        rows = [list(targets).index(id(p.seen)) for p in passes]
        pixels = torch.cat(list(targets.values()))
        states = self.model.reader.states_after(self._prefixes(self.model.reader, passes), pixels, rows)
        return self.model.projector(states)

    def _prefixes(self, reader: StateReader, passes: list[Pass]) -> list[Held]:
        """Return what the language model keeps of each pass's template; read what it does not hold."""
        keys = [("prefix", p.chosen[0][0].id, p.views[0].window, p.class_id, p.class_name) for p in passes]
        there = {key: prefix for key in keys if (prefix := self._held.get(key)) is not None}
        missing = {key: p for key, p in zip(keys, passes, strict=True) if key not in there}
        if missing:
            some = list(missing.values())
            overlays = torch.cat([self._overlay(p.chosen[0][0], p.views[0], p.class_id) for p in some])
            names = [p.class_name for p in some]
            read = reader.read_templates(overlays, names, [DEFAULT_INSTRUCTION] * len(some))
            for key, prefix in zip(missing, read, strict=True):
                there[key] = prefix
                self._held.put(key, prefix)
        return [there[key] for key in keys]

    def _overlay(self, template: Template, view: View, class_id: int) -> Tensor:
        """Template with its class in green, (1, 3, S, S), as the language model sees it."""
        window = None if view.window is None else Window(*view.window)
        height, width = template.mask.shape
        square = Square(height, width, window)
        pixels = square.enter(to_tensor(template.image).to(self.model.device), self._size)
        return overlay(pixels, mask_square(template.mask, class_id, square, self._size, self.model.device))

    def _prompts(self, passes: list[Pass]) -> PromptBatch:
        squares = [p.seen.square for p in passes]
        side = 4 * self.model.segmenter.side
        return prompt_batch([_prompts_of(p) for p in passes], squares, self._size, side, self.model.device)


def mask_square(mask: np.ndarray, class_id: int, square: Square, size: int, device: torch.device) -> Tensor:
    """Move one class of a mask, uint8 (H, W), onto a square: (1, 1, size, size) float, 1 inside."""
    binary = torch.from_numpy((mask == class_id).astype(np.float32))[None, None].to(device)
    return (square.enter(binary, size) > 0.5).float()


def _join(features: list[ImageFeatures]) -> ImageFeatures:
    return ImageFeatures(
        torch.cat([f.embedding for f in features]),
        torch.cat([f.position for f in features], dim=1),
        torch.cat([f.fine for f in features]),
        torch.cat([f.finer for f in features]),
    )


def _prompts_of(one: Pass) -> MaskPrompts:
    """Prompts of one class of an item."""
    item, index = one.item, one.index
    box = None if item.boxes is None or (item.boxes[index] == -1).all() else item.boxes[index]
    points = None if item.points is None else item.points[index]
    labels = None if item.point_labels is None else item.point_labels[index]
    there = item.mask_present is None or bool(item.mask_present[index])
    logits = item.mask_logits[index] if item.mask_logits is not None and there else None
    return MaskPrompts(box, points, labels, logits)
