"""Fetch a batch of labels: cached ones from the cache, the others from the annotator."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vessa.client import Annotation, Prompts
from vessa.codec import image_digest
from vessa.datasets import Dataset, Slice
from vessa.errors import (
    Retryable,
    ServiceError,
    UnknownImage,
    VessaError,
)
from vessa.schemas import BankInfo
from vessa_trainer.config import AnnotatorConfig
from vessa_trainer.pseudo_labels.annotator_check import changed
from vessa_trainer.pseudo_labels.cache import LabelCache, label_key
from vessa_trainer.pseudo_labels.types import LabelService, PseudoLabel

_log = logging.getLogger(__name__)
_TRIES = 3  # of an item that the annotator itself fails on: it may have been a restart, or it is the image


@dataclass
class LabelQuery:
    """A label to fetch. prompts None asks for a prompt-free one; image is read when it is needed."""

    item: Slice
    prompts: Prompts | None = None
    image: np.ndarray | None = None


@dataclass
class FetchResult:
    """The outcome of fetching a batch.

    late: to be asked for again, because of `reason`; elsewhere: another process is asking for them; asked:
    somebody answered.
    """

    labels: list[tuple[LabelQuery, PseudoLabel]] = field(default_factory=list)
    late: list[LabelQuery] = field(default_factory=list)
    elsewhere: list[LabelQuery] = field(default_factory=list)
    reason: VessaError | None = None
    asked: bool = False


class LabelFetcher:
    """Labels of a data set's slices by one bank, without any thread or waiting of its own."""

    def __init__(
        self,
        client: LabelService,
        dataset: Dataset,
        bank: BankInfo,
        cache: LabelCache,
        config: AnnotatorConfig,
        seed: int,
    ) -> None:
        """Ask the annotator who it is. seed: of template_choice "sample". Raises VessaError."""
        info = client.info()
        self._client, self._dataset, self._bank = client, dataset, bank
        self._cache, self._config, self._seed = cache, config, seed
        self._model, self._labels_version = info.model, info.labels_version
        self._only_prompted = not info.parts  # it knows nothing of a class that it gets no prompt for
        self.class_ids = sorted(bank.classes)
        self._classes = [bank.classes[c] for c in self.class_ids]
        self._image_ids: dict[str, str] = {}
        self._sent: dict[str, tuple[int, ...]] = {}  # size of the images that the annotator has seen
        self._faults: Counter[str] = Counter()  # names to how often the annotator failed on that item alone
        self.requests = self.images = self.cache_hits = self.failed_items = 0
        self.annotator_changes: list[str] = []  # that `annotator.allow_change` allowed

    def fetch(self, batch: Sequence[LabelQuery]) -> FetchResult:
        """Fetch a batch. Raises what waiting does not cure: a wrong key, a deleted bank."""
        if self._only_prompted:
            silent = [w for w in batch if not self._prompted(w).any()]
            heard = self._fetch([w for w in batch if self._prompted(w).any()])
            heard.labels = [(w, self._of_prompted(w, label)) for w, label in heard.labels]
            heard.labels += [(w, self._nothing(w)) for w in silent]
            return heard
        return self._fetch(batch)

    def _fetch(self, batch: Sequence[LabelQuery]) -> FetchResult:
        result = FetchResult()
        missing = self._known(batch, result)
        if not missing:
            return result
        claimed = self._cache.claim([key for _, key in missing])
        try:
            # what came between the look and the claim need not be asked for
            to_ask = self._known([w for w, key in missing if key in claimed], result)
            result.elsewhere = [w for w, key in missing if key not in claimed]
            if to_ask:
                self._fetch_missing([w for w, _ in to_ask], result)
        finally:
            self._cache.release(claimed)
        return result

    def _known(self, batch: Sequence[LabelQuery], result: FetchResult) -> list[tuple[LabelQuery, str]]:
        """Take from the cache what is there; return the others with their keys."""
        keys = [self._key(w, self._bank.digest, self._model, self._labels_version) for w in batch]
        missing = []
        for wanted, key, label in zip(batch, keys, self._cache.get(keys), strict=True):
            if label is None:
                missing.append((wanted, key))
            else:
                result.labels.append((wanted, label))
                self.cache_hits += 1
        return missing

    def _fetch_missing(self, missing: list[LabelQuery], result: FetchResult) -> None:
        try:
            answers = self._ask(missing)
        except (Retryable, ServiceError) as error:
            result.late, result.reason = missing, error
            return
        result.asked = True
        fresh: dict[str, PseudoLabel] = {}
        for wanted, answer in zip(missing, answers, strict=True):
            if self._passes(wanted, answer.error):
                result.late.append(wanted)
                result.reason = answer.error
                continue
            if answer.error is None:
                self._hold_to_start(answer)
            label = self._label(wanted, answer)
            result.labels.append((wanted, label))
            if answer.error is None:
                # what answered may be newer than what was asked for: a changed bank, other weights
                key = self._key(wanted, answer.bank_digest, answer.model, answer.labels_version)
                fresh[key] = label
        self._cache.put(fresh)

    def _hold_to_start(self, answer: Annotation) -> None:
        """Raise AnnotatorChanged when another annotator answers than at the start, unless that is allowed."""
        pairs = (
            ("model", self._model, answer.model),
            ("labels_version", self._labels_version, answer.labels_version),
            ("bank digest", self._bank.digest, answer.bank_digest),
        )
        changes = [f"{key} was {old} and is {new}" for key, old, new in pairs if old != new]
        if not changes:
            return
        if not self._config.allow_change:
            raise changed(changes)
        _log.warning("the annotator changed (%s); the report says so", "; ".join(changes))
        self.annotator_changes += changes
        self._model, self._labels_version = answer.model, answer.labels_version
        self._bank = self._bank.model_copy(
            update={"version": answer.bank_version, "digest": answer.bank_digest}
        )

    def _passes(self, wanted: LabelQuery, error: VessaError | None) -> bool:
        """Tell whether to request an item again; limited, so that one bad image cannot stop a run."""
        if isinstance(error, ServiceError):
            self._faults[wanted.item.name] += 1
            return self._faults[wanted.item.name] < _TRIES
        return isinstance(error, Retryable)

    def _ask(self, batch: list[LabelQuery]) -> list[Annotation]:
        """Ask the annotator; images it has seen go by their id alone."""
        answers: dict[str, Annotation] = {}
        for size in {self._sent[w.item.name] for w in batch if w.item.name in self._sent}:
            # the ids of one request are of images of one size
            known = [w for w in batch if self._sent.get(w.item.name) == size]
            try:
                replies = self._request(known, image_ids=[self._image_id(w) for w in known])
            except UnknownImage:
                replies = []
            for wanted, reply in zip(known[: len(replies)], replies, strict=True):
                if not isinstance(reply.error, UnknownImage):
                    answers[wanted.item.name] = reply
        rest = [w for w in batch if w.item.name not in answers]
        if rest:
            replies = self._request(rest, images=[self._image(w) for w in rest])
            answers |= {w.item.name: reply for w, reply in zip(rest, replies, strict=True)}
            self._sent |= {w.item.name: self._image(w).shape[:2] for w in rest}
        return [answers[w.item.name] for w in batch]

    def _request(self, batch: list[LabelQuery], **what: Any) -> list[Annotation]:
        self.requests += 1
        self.images += len(batch)
        return self._client.segment(
            **what,
            bank=self._bank.name,
            classes=self._classes,
            groups=[w.item.group for w in batch],
            prompts=[w.prompts for w in batch],
            template_choice=self._config.template_choice,
            seed=self._seed,
        )

    def _label(self, wanted: LabelQuery, answer: Annotation) -> PseudoLabel:
        """Turn an answer into a label; a failed item teaches nothing, and is counted and said."""
        if answer.error is None and answer.labels is not None and answer.confidence is not None:
            return PseudoLabel(answer.labels, answer.confidence)
        self.failed_items += 1
        _log.warning("no label for %s: %s", wanted.item.name, answer.error)
        return self._nothing(wanted)

    def _nothing(self, wanted: LabelQuery) -> PseudoLabel:
        empty = np.zeros(self._image(wanted).shape[:2], np.uint8)
        return PseudoLabel(empty, empty)

    def _prompted(self, wanted: LabelQuery) -> np.ndarray:
        """Find the classes that have a prompt, bool (K,)."""
        found, prompts = np.zeros(len(self.class_ids), bool), wanted.prompts
        if prompts is None:
            return found
        if prompts.boxes is not None:
            found |= (prompts.boxes != -1).any(1)
        if prompts.point_labels is not None:
            found |= (prompts.point_labels != -1).any(1)
        if prompts.mask_logits is not None:
            found |= prompts.mask_present.astype(bool) if prompts.mask_present is not None else True
        return found

    def _of_prompted(self, wanted: LabelQuery, label: PseudoLabel) -> PseudoLabel:
        """Silence what was drawn of classes without a prompt."""
        others = [c for c, there in zip(self.class_ids, self._prompted(wanted), strict=True) if not there]
        unasked = np.isin(label.labels, others)
        return PseudoLabel(label.labels, np.where(unasked, 0, label.confidence).astype(np.uint8))

    def _image(self, wanted: LabelQuery) -> np.ndarray:
        if wanted.image is None:
            wanted.image = self._dataset.image(wanted.item)
        return wanted.image

    def _image_id(self, wanted: LabelQuery) -> str:
        name = wanted.item.name
        if name not in self._image_ids:
            self._image_ids[name] = image_digest(self._image(wanted))
        return self._image_ids[name]

    def _key(self, wanted: LabelQuery, bank_digest: str, model: str, labels_version: str) -> str:
        return label_key(
            self._image_id(wanted),
            bank=self._bank.name,
            bank_digest=bank_digest,
            classes=self._classes,
            group=wanted.item.group,
            prompts=wanted.prompts,
            model=model,
            labels_version=labels_version,
            template_choice=self._config.template_choice,
            seed=self._seed,
        )
