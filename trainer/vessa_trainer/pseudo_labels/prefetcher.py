"""Prefetch the annotator's labels in a background thread, off the training step's path.

The thread takes names in the sampler's order, reads the cache, requests the rest in batches and stores the
answers. With a cleaner, a label is available once all slices of its volume have one. The step takes the
available labels and waits for the others, or goes on without them (`max_wait_s`). First labels go before
labels requested again with prompts. Until the new label arrives the old one stays in use, except in an exact
feed: there a step waits for the new one, so that its label depends on no clock.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np

from vessa.client import Prompts
from vessa.datasets import Dataset, Slice
from vessa.errors import Unreachable, VessaError
from vessa.schemas import BankInfo
from vessa_trainer.config import AnnotatorConfig
from vessa_trainer.outages import ANNOTATOR, Incidents
from vessa_trainer.pseudo_labels.cache import LabelCache
from vessa_trainer.pseudo_labels.cleaning import VolumeCleaner
from vessa_trainer.pseudo_labels.fetcher import LabelFetcher, LabelQuery
from vessa_trainer.pseudo_labels.quality import Calibration, EchoCheck, PooledDice
from vessa_trainer.pseudo_labels.types import LabelBatch, LabelService, PseudoLabel
from vessa_trainer.pseudo_labels.view_average import ViewAverage

_log = logging.getLogger(__name__)
_ELSEWHERE_PAUSE = 0.05  # seconds until the cache is asked again for what another process is asking for
COUNTS = (  # of `stats`: what may be summed over several feeds
    "requests",
    "images",
    "cache_hits",
    "cache_failures",
    "failed_items",
    "refreshed",
    "interruptions",
    "wait_seconds",
    "taken",
    "late",
)
_FIRST_PAUSE, _MAX_PAUSE = 0.5, 10.0  # seconds between tries while the annotator is away


class AnnotationFeed:
    """VESSA's labels of a data set's slices.

    Use it from one thread: its own background thread talks to the annotator, and all that both
    touch is guarded by one condition.
    """

    def __init__(
        self,
        client: LabelService,
        dataset: Dataset,
        bank: BankInfo,
        cache: LabelCache,
        config: AnnotatorConfig,
        *,
        kept: int = 8192,
        seed: int = 0,
        exact: bool = False,
        learned: Collection[str] | None = None,
        incidents: Incidents | None = None,
        cleaner: VolumeCleaner | None = None,
    ) -> None:
        """Start the background thread.

        bank: the seeded bank
        kept: labels held in memory
        seed: of template_choice "sample"
        exact: steps wait for labels requested again
        learned: groups whose labels `stats` judges, None for all
        incidents: log of the annotator's absences
        cleaner: cleans the labels of whole volumes; None delivers them as they come
        Raises VessaError when the annotator does not answer.
        """

        def fetcher_of(images: Dataset) -> LabelFetcher:
            return LabelFetcher(client, images, bank, cache, config, seed)

        self._source: LabelFetcher | ViewAverage
        if config.views:
            views = ViewAverage(dataset, fetcher_of)
            self._source, self._fetcher = views, views.plain
        else:
            self._source = self._fetcher = fetcher_of(dataset)
        self.class_ids = self._fetcher.class_ids  # the K classes of prompts, in this order
        self._dataset, self._cache, self._config, self._kept = dataset, cache, config, kept
        self._slices = {s.name: s for s in dataset.slices()}
        self._quality, self._echo = PooledDice(self.class_ids), EchoCheck(self.class_ids)
        self._calibration = Calibration()
        self._refreshed = self._interruptions = 0
        self._wait_seconds = 0.0
        self._taken = self._late = 0
        self._short_since: float | None = None  # when steps began to go without some label
        self._changed = threading.Condition()
        self._first: OrderedDict[str, None] = OrderedDict()  # names without a label, in sampler order
        self._again: OrderedDict[str, None] = OrderedDict()  # names with a label and newer prompts
        self._flying: set[str] = set()
        self._cleaner = cleaner
        self._raw: OrderedDict[str, PseudoLabel] = OrderedDict()  # as they came
        self._labels: dict[str, PseudoLabel] = {}  # of the volumes that are complete, cleaned
        self._prompts: dict[str, Prompts] = {}
        self._answers: dict[str, Prompts | None] = {}  # prompts of each label in `_labels`
        self._came_with: dict[str, Prompts | None] = {}  # prompts of each label in `_raw`
        self._exact, self._incidents = exact, incidents
        self._learned = None if learned is None else frozenset(learned)
        self._arrived = time.monotonic()
        self._away: VessaError | None = None
        self._broken: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="annotation-feed", daemon=True)
        self._thread.start()

    def prefetch(self, names: Sequence[str]) -> None:
        """Request labels that are neither here nor on their way; returns at once."""
        with self._changed:
            for name in self._with_volumes(names):
                if name not in self._raw and name not in self._flying and name not in self._first:
                    self._first[name] = None
                    self._again.pop(name, None)
            self._changed.notify_all()

    def volume_of(self, name: str) -> tuple[str, ...]:
        """Return the names of the slices whose labels one label depends on; without a cleaner its own."""
        return (name,) if self._cleaner is None else self._cleaner.volume_of(name)

    def _with_volumes(self, names: Sequence[str]) -> list[str]:
        return list(dict.fromkeys(other for name in names for other in self.volume_of(name)))

    def get(self, names: Sequence[str], *, newest: bool = False) -> list[PseudoLabel]:
        """Return labels, waiting for those on their way; `newest`: also for those asked again.

        Raises Unreachable when no label came for `patience_s` seconds, or at once the error that
        waiting does not cure.
        """
        with self._changed:
            self._wait(names, None, exact=newest or self._exact)
            return [self._labels[name] for name in names]

    def take(self, names: Sequence[str]) -> LabelBatch:
        """Return the labels of a training step, None for those that are late, and the time waited.

        Waits for them `max_wait_s` seconds at most, and like `get` where that is None. Raises what `get`
        raises: Unreachable also when steps went without labels for `patience_s` seconds while none came.
        """
        with self._changed:
            started = time.monotonic()
            self._wait(names, self._config.max_wait_s, exact=self._exact)
            waited = time.monotonic() - started
            self._wait_seconds += waited
            labels = [self._labels.get(name) for name in names]
            late = labels.count(None)
            if late and not self._late:
                _log.warning("labels come late: steps go on without them, as annotator.max_wait_s says")
            self._taken += len(labels)
            self._late += late
            return LabelBatch(labels, waited)

    def _wait(self, names: Sequence[str], limit: float | None, *, exact: bool) -> None:
        """Wait until the labels are here, for `limit` seconds if given. Called with the condition held."""
        started = time.monotonic()
        while True:
            if self._broken is not None:  # also when all labels are here: nothing new would ever come
                raise self._broken
            if not (missing := [n for n in names if self._lacks(n, exact)]):
                self._short_since = None
                break
            self._urge(missing)
            now = time.monotonic()
            if self._short_since is None or limit is None:
                self._short_since = started
            waited = now - max(self._short_since, self._arrived)
            if waited > self._config.patience_s:
                why = self._away.message if self._away else "the annotator does not answer"
                raise Unreachable(f"waited {waited:.0f} s for labels of {len(missing)} images: {why}")
            pause = min(1.0, self._config.patience_s / 4)
            if limit is not None:
                if now - started >= limit:
                    break
                pause = min(pause, limit - (now - started))
            self._changed.wait(timeout=pause)
        for name in self._with_volumes(names):
            if name in self._raw:
                self._raw.move_to_end(name)

    def _lacks(self, name: str, exact: bool) -> bool:
        """Tell whether a label is still to come; `exact`: or a newer one of its volume."""
        if name not in self._labels:
            return True
        return exact and any(
            self._answers[other] is not self._prompts.get(other) for other in self.volume_of(name)
        )

    def _missing(self, name: str) -> bool:
        """Tell whether a slice has no label, or one that newer prompts replace."""
        return name not in self._raw or self._came_with[name] is not self._prompts.get(name)

    def _urge(self, names: Sequence[str]) -> None:
        """Put the missing labels of some volumes in front of all others."""
        for name in reversed(self._with_volumes(names)):
            if name not in self._flying and self._missing(name):
                self._again.pop(name, None)
                self._first[name] = None
                self._first.move_to_end(name, last=False)
        self._changed.notify_all()

    def refresh(self, names: Sequence[str], prompts: Sequence[Prompts]) -> None:
        """Request labels again with prompts; of two sets of prompts on their way only the newer is sent."""
        with self._changed:
            for name, prompt in zip(names, prompts, strict=True):
                self._prompts[name] = prompt
                if name not in self._first:
                    self._again[name] = None
            self._changed.notify_all()

    @property
    def annotator_changes(self) -> list[str]:
        """Changes of the annotator since the start, which `annotator.allow_change` allowed."""
        return list(self._fetcher.annotator_changes)

    def stats(self) -> dict[str, float]:
        """Return counts since the start, and the quality of the labels where the truth is known.

        wait_seconds: time the training step waited
        taken, late: labels that steps asked for, and those of them that had not come
        Of learned groups alone: refreshed, labels that came again with prompts; label_dice, Dice of the
        newest labels with existing masks (never learned from); echo_before, echo_after, Dice of the replaced
        and of the new labels with the prompts that the new ones answer; label_ece, expected calibration
        error of their confidence where label or mask shows a structure.
        removed_share: share of foreground pixels that cleaning removed
        """
        with self._changed:
            counts: dict[str, float] = {
                "requests": self._source.requests,
                "images": self._source.images,
                "cache_hits": self._source.cache_hits,
                "cache_failures": self._cache.failures,
                "failed_items": self._source.failed_items,
                "refreshed": self._refreshed,
                "interruptions": self._interruptions,
                "wait_seconds": self._wait_seconds,
                "taken": self._taken,
                "late": self._late,
            }
            worth = {
                "label_dice": self._quality.value(),
                "label_ece": self._calibration.value(),
                "echo_before": self._echo.before.value(),
                "echo_after": self._echo.after.value(),
                "removed_share": self._cleaner.removed_share() if self._cleaner is not None else None,
            }
            return counts | {k: round(v, 4) for k, v in worth.items() if v is not None}

    def reliability(self) -> list[dict[str, float]]:
        """Return the reliability curve of the newest labels, see `quality.Calibration`."""
        with self._changed:
            return self._calibration.curve()

    def close(self) -> None:
        """Stop the background thread; a request in flight is left to end by itself."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while (batch := self._next_batch()) is not None:
            try:
                result = self._source.fetch(batch)
                for wanted, label in result.labels:
                    self._keep(wanted, label)
                self._deliver([wanted.item.name for wanted, _ in result.labels])
            except BaseException as error:  # the training thread raises it
                with self._changed:
                    self._broken = error
                    self._changed.notify_all()
                return
            if result.elsewhere:
                self._look_again(result.elsewhere, pause=0.0 if result.labels else _ELSEWHERE_PAUSE)
            if result.reason is None:
                if result.asked:
                    self._back()
                    pause = _FIRST_PAUSE
                continue
            self._postpone(result.late, result.reason, min(result.reason.retry_after or pause, _MAX_PAUSE))
            pause = min(2 * pause, _MAX_PAUSE)

    def _next_batch(self) -> list[LabelQuery] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._first or self._again or self._closed)
            if self._closed:
                return None
            source = self._first or self._again
            names = [source.popitem(last=False)[0] for _ in range(min(len(source), self._config.batch))]
            self._flying.update(names)
            return [LabelQuery(self._slices[n], self._prompts.get(n)) for n in names]

    def _look_again(self, elsewhere: Sequence[LabelQuery], pause: float) -> None:
        """Put names that another process is asking for behind the others of their queue."""
        with self._changed:
            for wanted in elsewhere:
                self._flying.discard(wanted.item.name)
                queue = self._again if wanted.item.name in self._raw else self._first
                queue[wanted.item.name] = None
            self._changed.wait_for(lambda: self._closed, timeout=pause)

    def _postpone(self, late: Sequence[LabelQuery], error: VessaError, pause: float) -> None:
        """Put names back in front of their queue and wait."""
        with self._changed:
            if self._away is None:
                self._interruptions += 1
                if self._incidents is not None:
                    self._incidents.away(ANNOTATOR, error.message)
                _log.warning("waiting for the annotator: %s", error.message)
            self._away = error
            for wanted in reversed(late):
                name = wanted.item.name
                queue = self._again if name in self._raw else self._first
                queue[name] = None
                queue.move_to_end(name, last=False)
                self._flying.discard(name)
            self._changed.wait_for(lambda: self._closed, timeout=pause)

    def _back(self) -> None:
        with self._changed:
            if self._away is not None:
                if self._incidents is not None:
                    self._incidents.back(ANNOTATOR)
                _log.warning("the annotator answers again")
            self._away = None

    def _keep(self, wanted: LabelQuery, label: PseudoLabel) -> None:
        """Store a label as it came, and request it again where newer prompts came meanwhile."""
        name = wanted.item.name
        with self._changed:
            old = self._raw.get(name)
            if self._judged(wanted.item) and wanted.prompts is not None and old is not None:
                self._refreshed += 1
                self._echo.add(name, wanted.prompts, old.labels, label.labels)
            self._raw[name], self._came_with[name] = label, wanted.prompts
            self._raw.move_to_end(name)
            self._flying.discard(name)
            if self._prompts.get(name) is not wanted.prompts:
                self._again[name] = None
            self._arrived = time.monotonic()

    def _deliver(self, names: Sequence[str]) -> None:
        """Make the labels of complete volumes available, cleaned; the background thread calls it."""
        for volume in dict.fromkeys(self.volume_of(name) for name in names):
            if any(name not in self._raw for name in volume):
                continue  # this thread alone changes `_raw`
            labels = {name: self._raw[name] for name in volume}
            if self._cleaner is not None:
                labels = self._cleaner.clean(labels)
            truths = {name: self._truth(self._slices[name]) for name in volume}
            with self._changed:
                for name, label in labels.items():
                    truth = truths[name]
                    if truth is not None and truth.shape == label.labels.shape:
                        self._quality.add(name, label.labels, truth)
                        self._calibration.add(name, label.labels, label.confidence, truth)
                    self._labels[name], self._answers[name] = label, self._came_with[name]
        with self._changed:
            self._forget_oldest()
            self._changed.notify_all()

    def _forget_oldest(self) -> None:
        """Drop the volumes used longest ago until at most `kept` labels are held."""
        while len(self._raw) > self._kept:
            for name in self.volume_of(next(iter(self._raw))):
                for held in (self._raw, self._came_with, self._labels, self._answers):
                    held.pop(name, None)

    def _judged(self, item: Slice) -> bool:
        return self._learned is None or item.group in self._learned

    def _truth(self, item: Slice) -> np.ndarray | None:
        """Read the mask that a label is judged by; None for a group that is not learned from."""
        if not self._judged(item):
            return None
        try:
            return self._dataset.mask(item)
        except VessaError:  # no step needs this mask, and `vessa-trainer verify` names it
            return None
