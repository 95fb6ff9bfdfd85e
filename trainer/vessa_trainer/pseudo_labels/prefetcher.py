"""The exchange of labels with the annotator, off the training step's path.

A background thread takes names in the sampler's order, looks in the cache, asks the annotator for
the rest in batches, and keeps what came. The step takes labels that are there, and waits only for
those that are not, or goes on without them (`max_wait_s`). First labels go before those that are
asked again with prompts; until the new label comes, the old one stays in use, except in an exact feed,
where a step waits for the new one: which label it learns from then depends on no clock.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np

from vessa.client import AnnotatorClient, Prompts
from vessa.datasets import Dataset, Slice
from vessa.errors import Unreachable, VessaError
from vessa.schemas import BankInfo
from vessa_trainer.config import AnnotatorConfig
from vessa_trainer.outages import ANNOTATOR, Incidents
from vessa_trainer.pseudo_labels.cache import LabelCache
from vessa_trainer.pseudo_labels.fetcher import LabelFetcher, Wanted
from vessa_trainer.pseudo_labels.quality import EchoCheck, PooledDice
from vessa_trainer.pseudo_labels.types import PseudoLabel

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
        client: AnnotatorClient,
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
    ) -> None:
        """Start the background thread.

        bank: the seeded bank; kept: labels held in memory; seed: of template_choice "sample"; exact: steps
        wait for labels asked again; learned: groups whose labels `stats` judges, None for all; incidents:
        where it is noted that the annotator was away. Raises VessaError when the annotator does not answer.
        """
        self._fetcher = LabelFetcher(client, dataset, bank, cache, config, seed)
        self.class_ids = self._fetcher.class_ids  # the K classes of prompts, in this order
        self._dataset, self._cache, self._config, self._kept = dataset, cache, config, kept
        self._slices = {s.name: s for s in dataset.slices()}
        self._quality, self._echo = PooledDice(self.class_ids), EchoCheck(self.class_ids)
        self._refreshed = self._interruptions = 0
        self._wait_seconds = 0.0
        self._taken = self._late = 0
        self._short_since: float | None = None  # when steps began to go without some label
        self._changed = threading.Condition()
        self._first: OrderedDict[str, None] = OrderedDict()  # names without a label, in sampler order
        self._again: OrderedDict[str, None] = OrderedDict()  # names with a label and newer prompts
        self._flying: set[str] = set()
        self._labels: OrderedDict[str, PseudoLabel] = OrderedDict()
        self._prompts: dict[str, Prompts] = {}
        self._answers: dict[str, Prompts | None] = {}  # what each label was asked with
        self._exact, self._incidents = exact, incidents
        self._learned = None if learned is None else frozenset(learned)
        self._arrived = time.monotonic()
        self._away: VessaError | None = None
        self._broken: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="annotation-feed", daemon=True)
        self._thread.start()

    def prefetch(self, names: Sequence[str]) -> None:
        """Ask for labels that are neither here nor on their way; returns at once."""
        with self._changed:
            for name in names:
                if name not in self._labels and name not in self._flying and name not in self._first:
                    self._first[name] = None
                    self._again.pop(name, None)
            self._changed.notify_all()

    def get(self, names: Sequence[str], *, newest: bool = False) -> list[PseudoLabel]:
        """Return labels, waiting for those on their way; `newest`: also for those asked again.

        Raises Unreachable when no label came for `patience_s` seconds, or at once the error that
        waiting does not cure.
        """
        with self._changed:
            self._wait(names, None, exact=newest or self._exact)
            return [self._labels[name] for name in names]

    def take(self, names: Sequence[str]) -> list[PseudoLabel | None]:
        """Return the labels of a training step, None for those that are late.

        Waits for them `max_wait_s` seconds at most, and like `get` where that is None. Raises what `get`
        raises: Unreachable also when steps went without labels for `patience_s` seconds while none came.
        """
        with self._changed:
            started = time.monotonic()
            self._wait(names, self._config.max_wait_s, exact=self._exact)
            self._wait_seconds += time.monotonic() - started
            labels = [self._labels.get(name) for name in names]
            late = labels.count(None)
            if late and not self._late:
                _log.warning("labels come late: steps go on without them, as annotator.max_wait_s says")
            self._taken += len(labels)
            self._late += late
            return labels

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
        for name in names:
            if name in self._labels:
                self._labels.move_to_end(name)

    def _lacks(self, name: str, exact: bool) -> bool:
        """Whether a label is still to come; `exact`: or a newer one."""
        if name not in self._labels:
            return True
        return exact and self._answers[name] is not self._prompts.get(name)

    def _urge(self, names: Sequence[str]) -> None:
        """Put names that somebody waits for before all others."""
        for name in reversed(names):
            if name not in self._flying:
                self._again.pop(name, None)
                self._first[name] = None
                self._first.move_to_end(name, last=False)
        self._changed.notify_all()

    def refresh(self, names: Sequence[str], prompts: Sequence[Prompts]) -> None:
        """Ask again with prompts; of two sets of prompts on their way only the newer is sent."""
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
        """Counts since the start, and what the labels are worth, where that is known.

        wait_seconds: the training step's own waiting; taken: labels that steps asked for; late: those of them
        that had not come. Of the groups that are learned from alone: refreshed, labels that came again with
        prompts; label_dice, of the newest labels with masks that exist (never learned from); echo_before,
        echo_after, Dice of the replaced and of the new labels with the prompts that the new ones answer.
        """
        with self._changed:
            counts: dict[str, float] = {
                "requests": self._fetcher.requests,
                "images": self._fetcher.images,
                "cache_hits": self._fetcher.cache_hits,
                "cache_failures": self._cache.failures,
                "failed_items": self._fetcher.failed_items,
                "refreshed": self._refreshed,
                "interruptions": self._interruptions,
                "wait_seconds": self._wait_seconds,
                "taken": self._taken,
                "late": self._late,
            }
            worth = {
                "label_dice": self._quality.value(),
                "echo_before": self._echo.before.value(),
                "echo_after": self._echo.after.value(),
            }
            return counts | {k: round(v, 4) for k, v in worth.items() if v is not None}

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
                result = self._fetcher.fetch(batch)
                for wanted, label in result.labels:
                    self._keep(wanted, label)
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

    def _next_batch(self) -> list[Wanted] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._first or self._again or self._closed)
            if self._closed:
                return None
            source = self._first or self._again
            names = [source.popitem(last=False)[0] for _ in range(min(len(source), self._config.batch))]
            self._flying.update(names)
            return [Wanted(self._slices[n], self._prompts.get(n)) for n in names]

    def _look_again(self, elsewhere: Sequence[Wanted], pause: float) -> None:
        """Put names that another process is asking for behind the others of their queue."""
        with self._changed:
            for wanted in elsewhere:
                self._flying.discard(wanted.item.name)
                queue = self._again if wanted.item.name in self._labels else self._first
                queue[wanted.item.name] = None
            self._changed.wait_for(lambda: self._closed, timeout=pause)

    def _postpone(self, late: Sequence[Wanted], error: VessaError, pause: float) -> None:
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
                queue = self._again if name in self._labels else self._first
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

    def _keep(self, wanted: Wanted, label: PseudoLabel) -> None:
        name = wanted.item.name
        truth = self._truth(wanted.item)
        with self._changed:
            old = self._labels.get(name)
            learned = self._learned is None or wanted.item.group in self._learned
            if learned and wanted.prompts is not None and old is not None:
                self._refreshed += 1
                self._echo.add(name, wanted.prompts, old.labels, label.labels)
            if learned and truth is not None and truth.shape == label.labels.shape:
                self._quality.add(name, label.labels, truth)
            self._labels[name], self._answers[name] = label, wanted.prompts
            self._labels.move_to_end(name)
            self._flying.discard(name)
            if self._prompts.get(name) is not wanted.prompts:  # newer ones came meanwhile
                self._again[name] = None
            while len(self._labels) > self._kept:
                del self._answers[self._labels.popitem(last=False)[0]]
            self._arrived = time.monotonic()
            self._changed.notify_all()

    def _truth(self, item: Slice) -> np.ndarray | None:
        try:
            return self._dataset.mask(item)
        except VessaError:  # nobody needs this mask: `vessa-trainer verify` names it
            return None
