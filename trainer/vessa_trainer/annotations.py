"""The exchange of labels with the annotator, off the training step's path.

A background thread takes names in the sampler's order, looks in the cache, asks the annotator for
the rest in batches, and keeps what came. The step takes labels that are there, and waits only for
those that are not. Prompts from the teacher go the same way; a newer label replaces the older when
it comes.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.progress import Progress

from vessa.client import Annotation, AnnotatorClient, Prompts
from vessa.codec import image_digest
from vessa.datasets import Dataset, Slice
from vessa.errors import (
    DeadlineExceeded,
    NotReady,
    QueueFull,
    StoreUnavailable,
    UnknownImage,
    Unreachable,
    VessaError,
)
from vessa.schemas import BankInfo
from vessa_trainer.config import AnnotatorConfig
from vessa_trainer.label_cache import LabelCache, label_key
from vessa_trainer.step import PseudoLabel

_log = logging.getLogger(__name__)
_PASSING = (Unreachable, QueueFull, NotReady, StoreUnavailable, DeadlineExceeded)
_MAX_PAUSE = 10.0  # seconds between tries while the annotator is away
_SEED_BATCH = 16


@dataclass
class _Counts:
    requests: int = 0
    images: int = 0
    cache_hits: int = 0
    refreshed: int = 0
    failed_items: int = 0
    interruptions: int = 0
    wait_seconds: float = 0.0


@dataclass
class _Wanted:
    """A label on its way. prompts None asks for the first, prompt-free one."""

    item: Slice
    prompts: Prompts | None = None


@dataclass
class _State:
    queue: deque[_Wanted] = field(default_factory=deque)
    pending: set[str] = field(default_factory=set)
    labels: "OrderedDict[str, PseudoLabel]" = field(default_factory=OrderedDict)
    prompts: dict[str, Prompts] = field(default_factory=dict)
    away: VessaError | None = None
    broken: BaseException | None = None
    closed: bool = False


class AnnotationFeed:
    """VESSA's labels of a data set's slices. Methods may be called from the training thread only."""

    def __init__(
        self,
        client: AnnotatorClient,
        dataset: Dataset,
        bank: BankInfo,
        cache: LabelCache,
        config: AnnotatorConfig,
        *,
        kept: int = 8192,
        seed: int = 0,
    ) -> None:
        """Start the background thread.

        bank: the seeded bank; kept: labels held in memory. Raises VessaError when the annotator
        does not answer.
        """
        info = client.info()
        self._client, self._dataset, self._bank, self._cache, self._config = (
            client,
            dataset,
            bank,
            cache,
            config,
        )
        self._model, self._labels_version = info.model, info.labels_version
        self._classes = [bank.classes[c] for c in sorted(bank.classes)]
        self._slices = {s.name: s for s in dataset.slices()}
        self._kept, self._seed = kept, seed
        self._counts, self._state = _Counts(), _State()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="annotation-feed", daemon=True)
        self._thread.start()

    def prefetch(self, names: Sequence[str]) -> None:
        """Ask for labels that are neither here nor on their way; returns at once."""
        with self._changed:
            for name in names:
                if name not in self._state.labels and name not in self._state.pending:
                    self._state.pending.add(name)
                    self._state.queue.append(_Wanted(self._slices[name], self._state.prompts.get(name)))
            self._changed.notify_all()

    def get(self, names: Sequence[str]) -> list[PseudoLabel]:
        """Return labels, waiting for those on their way.

        Raises Unreachable when none came for `patience_s` and the annotator does not answer.
        """
        self.prefetch(names)
        started = time.monotonic()
        with self._changed:
            while missing := [n for n in names if n not in self._state.labels]:
                if self._state.broken is not None:
                    raise self._state.broken
                waited = time.monotonic() - started
                if waited > self._config.patience_s:
                    why = self._state.away or Unreachable("the annotator does not answer")
                    raise Unreachable(
                        f"waited {waited:.0f} s for labels of {len(missing)} images: {why.message}"
                    )
                self._changed.wait(timeout=1.0)
            self._counts.wait_seconds += time.monotonic() - started
            labels = []
            for name in names:
                self._state.labels.move_to_end(name)
                labels.append(self._state.labels[name])
            return labels

    def refresh(self, names: Sequence[str], prompts: Sequence[Prompts]) -> None:
        """Ask again with prompts; until the new labels come the old ones stay in use."""
        with self._changed:
            for name, prompt in zip(names, prompts, strict=True):
                self._state.prompts[name] = prompt
                self._state.queue.append(_Wanted(self._slices[name], prompt))
            self._changed.notify_all()

    def stats(self) -> dict[str, float]:
        """Counts since the start; wait_seconds is the training step's own waiting."""
        return dict(vars(self._counts))

    def close(self) -> None:
        """Stop the background thread."""
        with self._changed:
            self._state.closed = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        pause = 0.5
        while (batch := self._next_batch()) is not None:
            try:
                self._fetch(batch)
                self._state.away, pause = None, 0.5
            except _PASSING as error:
                self._wait_out(error, batch, error.retry_after or pause)
                pause = min(2 * pause, _MAX_PAUSE)
            except BaseException as error:
                with self._changed:
                    self._state.broken = error
                    self._changed.notify_all()
                return

    def _next_batch(self) -> list[_Wanted] | None:
        with self._changed:
            while not self._state.queue and not self._state.closed:
                self._changed.wait()
            if self._state.closed:
                return None
            first = self._state.queue.popleft()
            batch = [first]
            while self._state.queue and len(batch) < self._config.batch:
                if (self._state.queue[0].prompts is None) != (first.prompts is None):
                    break
                batch.append(self._state.queue.popleft())
            return batch

    def _wait_out(self, error: VessaError, batch: list[_Wanted], pause: float) -> None:
        with self._changed:
            if self._state.away is None:
                self._counts.interruptions += 1
                _log.warning("waiting for the annotator: %s", error.message)
            self._state.away = error
            self._state.queue.extendleft(reversed(batch))
            self._changed.wait(timeout=min(pause, _MAX_PAUSE))

    def _fetch(self, batch: list[_Wanted]) -> None:
        images = [self._dataset.image(w.item) for w in batch]
        keys = [self._key(i, w, self._bank.version) for i, w in zip(images, batch, strict=True)]
        found = self._cache.get(keys)
        missing = [i for i, label in enumerate(found) if label is None]
        self._counts.cache_hits += len(batch) - len(missing)
        fresh: dict[str, PseudoLabel] = {}
        if missing:
            answers = self._ask([batch[i] for i in missing], [images[i] for i in missing])
            for i, answer in zip(missing, answers, strict=True):
                label = self._label(batch[i], images[i], answer)
                found[i] = label
                if answer.error is None:
                    fresh[self._key(images[i], batch[i], answer.bank_version)] = label
            self._cache.put(fresh)
        with self._changed:
            for wanted, kept in zip(batch, found, strict=True):
                assert kept is not None
                self._keep(wanted, kept)
            self._changed.notify_all()

    def _keep(self, wanted: _Wanted, label: PseudoLabel) -> None:
        state, name = self._state, wanted.item.name
        state.pending.discard(name)
        if wanted.prompts is not None and name in state.labels:
            self._counts.refreshed += 1
        state.labels[name] = label
        state.labels.move_to_end(name)
        while len(state.labels) > self._kept:
            state.labels.popitem(last=False)

    def _ask(self, batch: list[_Wanted], images: list[np.ndarray]) -> list[Annotation]:
        """Ask the annotator; images it has seen go by their id alone."""
        options: dict[str, Any] = {
            "bank": self._bank.name,
            "classes": self._classes,
            "groups": [w.item.group for w in batch],
            "prompts": [w.prompts for w in batch],
            "template_choice": self._config.template_choice,
            "seed": self._seed,
        }
        self._counts.requests += 1
        self._counts.images += len(batch)
        if batch[0].prompts is None:
            return self._client.segment(images, **options)
        ids = [image_digest(i) for i in images]
        try:
            answers = self._client.segment(image_ids=ids, **options)
        except UnknownImage:
            return self._client.segment(images, **options)
        again = [i for i, a in enumerate(answers) if isinstance(a.error, UnknownImage)]
        if again:
            options["groups"] = [batch[i].item.group for i in again]
            options["prompts"] = [batch[i].prompts for i in again]
            for i, answer in zip(
                again, self._client.segment([images[i] for i in again], **options), strict=True
            ):
                answers[i] = answer
        return answers

    def _label(self, wanted: _Wanted, image: np.ndarray, answer: Annotation) -> PseudoLabel:
        """Turn an answer into a label; a failed item teaches nothing, and is counted and said."""
        if answer.error is not None or answer.labels is None or answer.confidence is None:
            if isinstance(answer.error, _PASSING):
                raise answer.error
            self._counts.failed_items += 1
            _log.warning("no label for %s: %s", wanted.item.name, answer.error)
            empty = np.zeros(image.shape[:2], np.uint8)
            return PseudoLabel(empty, empty)
        return PseudoLabel(answer.labels, answer.confidence)

    def _key(self, image: np.ndarray, wanted: _Wanted, bank_version: int) -> str:
        return label_key(
            image_digest(image),
            bank=self._bank.name,
            bank_version=bank_version,
            classes=self._classes,
            group=wanted.item.group,
            prompts=wanted.prompts,
            model=self._model,
            labels_version=self._labels_version,
            template_choice=self._config.template_choice,
            seed=self._seed,
        )


def seed_bank(client: AnnotatorClient, dataset: Dataset, groups: Sequence[str], bank: str) -> BankInfo:
    """Put every labeled slice that shows a class into a template bank; what is there already stays.

    Raises VessaError when the annotator refuses a template or does not answer.
    """
    wanted = set(groups)
    shown = []
    for item in dataset.slices():
        if item.group in wanted:
            mask = dataset.mask(item)
            if mask is not None and mask.any():
                shown.append((item, mask))
    with Progress(transient=True) as bar:
        task = bar.add_task(f"seeding bank {bank}", total=len(shown))
        for start in range(0, len(shown), _SEED_BATCH):
            part = shown[start : start + _SEED_BATCH]
            client.add_templates(
                bank,
                [dataset.image(item) for item, _ in part],
                [mask for _, mask in part],
                dataset.classes,
                [item.group for item, _ in part],
            )
            bar.advance(task, len(part))
    return client.bank(bank)
