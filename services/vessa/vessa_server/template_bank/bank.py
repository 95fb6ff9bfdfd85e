"""Template banks: annotated examples, found by the similarity of their features (Eq. 1 of the paper)."""

import contextlib
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vessa.errors import ClassConflict, InvalidRequest, TooLarge, UnknownBank, UnknownTemplate, VessaError
from vessa.schemas import BankInfo, TemplateInfo
from vessa_server.template_bank.decoder_weights import Adaptation
from vessa_server.template_bank.index import Entry, Index, Store, blob_digest
from vessa_server.template_bank.template import Template

log = logging.getLogger(__name__)

BANK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TEMPLATE_ID = re.compile(r"[0-9a-f]{64}")
REENCODE_BATCH = 16
LAYOUT_WEIGHT = 3.0  # of a class that fills a tenth more of the window's side, against cosines

Matches = list[tuple["Template", float]]
TemplateInfos = list[TemplateInfo]


@dataclass(frozen=True, eq=False)
class _Shelf:
    """Templates that show one class. whole, close: (N, D) features; layouts: (N, K) of the bank's classes.

    Where no closer look was taken, the whole image's feature stands for it.
    """

    templates: list[Template]
    whole: NDArray[np.float32]
    close: NDArray[np.float32]
    layouts: NDArray[np.float32]

    @classmethod
    def of(cls, templates: list[Template], class_ids: Sequence[int]) -> "_Shelf":
        return cls(
            templates,
            np.stack([t.whole.feature for t in templates]),
            np.stack([(t.close or t.whole).feature for t in templates]),
            np.array([[t.layout.get(key, 0.0) for key in class_ids] for t in templates], np.float32),
        )


@dataclass(frozen=True, eq=False)
class Bank:
    """One state of a template bank; a change makes a new one with a higher version.

    classes: {id: name} over all templates, by id; model: when set, retrieval leaves out templates that other
    weights encoded (a second server with other weights on the same store), for their features do not compare;
    adaptation: weights of its own, None without, or when they belong to another model; owner: name of the key
    that made it; shared: whether other keys may use it
    """

    name: str
    version: int
    templates: tuple[Template, ...]
    model: str | None = None
    adaptation: Adaptation | None = None
    owner: str | None = None
    shared: bool = False

    @cached_property
    def classes(self) -> dict[int, str]:
        """{id: name}, by id."""
        return _union(template.classes for template in self.templates)

    @cached_property
    def _by_id(self) -> dict[str, Template]:
        return {template.id: template for template in self.templates}

    @cached_property
    def _by_class(self) -> dict[int, "_Shelf"]:
        usable = [t for t in self.templates if self.model is None or t.model == self.model]
        chosen = {key: [t for t in usable if key in t.classes] for key in self.classes}
        return {key: _Shelf.of(found, list(self.classes)) for key, found in chosen.items() if found}

    def template(self, identity: str) -> Template:
        """Return one template; UnknownTemplate when there is none of this id."""
        try:
            return self._by_id[identity]
        except KeyError:
            raise UnknownTemplate(f"bank {self.name!r} has no template {identity!r}") from None

    def retrieve(
        self,
        feature: NDArray[np.float32],
        class_id: int,
        *,
        exclude_group: str | None,
        top: int = 3,
        close: NDArray[np.float32] | None = None,
        layout: Mapping[int, float] | None = None,
    ) -> Matches:
        """Return the `top` most similar templates that show the class, best first, with their cosine.

        feature: (D,) float32 of unit norm, of the whole image; close: that of a closer look at it, where
        one was taken: then the mean of both cosines counts. layout: what the first look has found, by class
        id, see `Template.layout`: templates that show otherwise are less similar by `LAYOUT_WEIGHT` times the
        distance, though the cosine is what is returned. exclude_group: the query's own patient, never
        retrieved (None: unknown). Equal similarities are ordered by id. An empty list means there is no
        template of another group.
        """
        if class_id not in self._by_class:
            return []
        shelf = self._by_class[class_id]
        cosines = shelf.whole @ feature
        if close is not None:
            cosines = (cosines + shelf.close @ close) / 2
        scores = cosines = np.clip(cosines, -1.0, 1.0)
        if layout is not None:
            asked = np.array([layout.get(key, 0.0) for key in self.classes], np.float32)
            scores = cosines - LAYOUT_WEIGHT * np.linalg.norm(shelf.layouts - asked, axis=1)
        found = shelf.templates
        allowed = [i for i, t in enumerate(found) if exclude_group is None or t.group != exclude_group]
        best = sorted(allowed, key=lambda i: (-scores[i], found[i].id))[:top]
        return [(found[i], float(cosines[i])) for i in best]

    def info(self) -> BankInfo:
        """Return the public description."""
        groups = sorted({template.group for template in self.templates})
        return BankInfo(
            name=self.name,
            version=self.version,
            templates=len(self.templates),
            groups=groups,
            classes=self.classes,
            adapted=self.adaptation is not None,
            owner=self.owner,
            shared=self.shared,
        )


def sample_template(
    matches: Matches, tau: float = 0.1, rng: np.random.Generator | None = None
) -> tuple[Template, float]:
    """Draw one of the retrieved templates with probability softmax(similarity / tau) (Eq. 1).

    matches: what `Bank.retrieve` returned, not empty; tau: temperature > 0.
    """
    if not matches or tau <= 0:
        raise ValueError(f"expected at least one match and tau > 0, got {len(matches)} matches and tau {tau}")
    scores = np.array([score for _, score in matches]) / tau
    weights = np.exp(scores - scores.max())
    chosen = (rng or np.random.default_rng()).choice(len(matches), p=weights / weights.sum())
    return matches[int(chosen)]


def merge_classes(known: Mapping[int, str], added: Mapping[int, str]) -> dict[int, str]:
    """Return both, by id; ClassConflict when an id would get a second name or a name a second id."""
    ids = {name: key for key, name in known.items()}
    for key, name in added.items():
        if known.get(key, name) != name:
            raise ClassConflict(f"class id {key} is {known[key]!r} in this bank, not {name!r}")
        if ids.get(name, key) != key:
            raise ClassConflict(f"class {name!r} has id {ids[name]} in this bank, not {key}")
    return dict(sorted({**known, **added}.items()))


def _union(parts: Iterable[Mapping[int, str]]) -> dict[int, str]:
    merged: dict[int, str] = {}
    for part in parts:
        merged |= part
    return dict(sorted(merged.items()))


def check_name(bank: str) -> str:
    """Return the bank's name; InvalidRequest unless it is safe as a file name and a key."""
    if not BANK_NAME.fullmatch(bank):
        raise InvalidRequest(
            "a bank name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit; "
            f"got {bank[:80]!r}"
        )
    return bank


Encode = Callable[[list[Template]], Sequence[Template | VessaError]]
May = Callable[[str | None, bool], bool]


def _anyone(owner: str | None, shared: bool) -> bool:
    return True


@dataclass
class TemplateBanks:
    """All banks of a store, for several threads; other processes' changes are seen at the next `get`."""

    store: Store
    max_templates: int = 10_000
    model: str | None = None
    _cache: dict[str, Bank] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def get(self, name: str) -> Bank:
        """Return the bank as it is now; UnknownBank, StoreUnavailable."""
        check_name(name)
        with self._lock:
            cached = self._cache.get(name)
            if cached and (cached.version, cached.model) == (self.store.version(name), self.model):
                return cached
            bank = None
            while bank is None:
                index = self.store.read(name)
                if not index.exists:
                    self._cache.pop(name, None)
                    raise UnknownBank(f"there is no template bank {name!r}")
                bank = self._load(name, index, cached)
            self._cache[name] = bank
            return bank

    def add(
        self, name: str, templates: Sequence[Template], *, owner: str | None = None, may: May = _anyone
    ) -> TemplateInfos:
        """Add templates, all or none, making the bank if needed; those it has already are left as they are.

        owner: of a bank that this makes; may: whether a bank of this owner, shared or not, may be added to,
        asked in the transaction, for two keys may make a bank of one name at once. ClassConflict when a
        class id or name would get a second meaning, TooLarge when the bank would be too full, UnknownBank.
        """
        check_name(name)
        blobs = {template.id: template.to_blob() for template in templates}
        entries = {template.id: template.entry(blobs[template.id]) for template in templates}
        created: set[str] = set()
        damaged = self._damaged(name)

        def edit(old: Index) -> Index | None:
            if old.exists and not may(old.owner, old.shared):
                raise UnknownBank(f"there is no template bank {name!r}")
            created.clear()
            created.update(entries.keys() - (old.entries.keys() - damaged))
            known = _union(entry.classes for entry in old.entries.values())
            for key in created:
                known = merge_classes(known, entries[key].classes)
            if len(old.entries.keys() | created) > self.max_templates:
                raise TooLarge(f"a bank holds at most {self.max_templates} templates")
            fresh = {key: entry for key, entry in entries.items() if key in created}
            whose = old.owner if old.exists else owner
            return replace(old, exists=True, entries=old.entries | fresh, owner=whose) if fresh else None

        self.store.change(name, edit, {entries[key].blob: blob for key, blob in blobs.items()})
        first = {t.id: i for i, t in reversed(list(enumerate(templates)))}
        return [t.info(name, created=t.id in created and first[t.id] == i) for i, t in enumerate(templates)]

    def remove(self, name: str, identity: str) -> None:
        """Remove one template; UnknownBank, UnknownTemplate. An emptied bank stays, with no templates."""

        def edit(old: Index) -> Index:
            self._require(name, old)
            if identity not in old.entries:
                raise UnknownTemplate(f"bank {name!r} has no template {identity!r}")
            return replace(old, entries={k: v for k, v in old.entries.items() if k != identity})

        self.store.change(check_name(name), edit, {})

    def adapt(self, name: str, adaptation: Adaptation | None, *, learned_from: Bank | None = None) -> None:
        """Serve the bank by weights of its own, or by the common ones again.

        learned_from: what they were learned from. UnknownBank also where another bank has the name by now.
        """
        blob = b"" if adaptation is None else adaptation.to_blob()
        digest = None if adaptation is None else adaptation.digest

        def edit(old: Index) -> Index | None:
            self._require(name, old)
            if learned_from is not None and (
                old.owner != learned_from.owner
                or old.entries.keys().isdisjoint(template.id for template in learned_from.templates)
            ):
                raise UnknownBank(f"another template bank is called {name!r} by now")
            return None if old.adaptation == digest else replace(old, adaptation=digest)

        self.store.change(check_name(name), edit, {} if digest is None else {digest: blob})

    def share(self, name: str, shared: bool) -> None:
        """Let all keys use the bank, or its owner alone; UnknownBank."""

        def edit(old: Index) -> Index | None:
            self._require(name, old)
            return None if old.shared == shared else replace(old, shared=shared)

        self.store.change(check_name(name), edit, {})

    def delete(self, name: str) -> None:
        """Delete a bank and its templates; UnknownBank. Its version lives on, should it be made again."""

        def edit(old: Index) -> Index:
            self._require(name, old)
            return Index()

        self.store.change(check_name(name), edit, {})

    def refresh(
        self, encode: Encode, model: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Encode anew every template whose model digest is not `model`; from now on use only `model`.

        encode: templates -> the same with fresh feature and memories, or an error each; progress(done,
        total). Returns how many were encoded. One that fails is left in the bank, out of retrieval, with a
        warning in the log.
        """
        self.model = None
        stale = [(n, t) for n in self.store.names() for t in self.get(n).templates if t.model != model]
        for start in range(0, len(stale), REENCODE_BATCH):
            part = stale[start : start + REENCODE_BATCH]
            for (name, template), fresh in zip(part, encode([t for _, t in part]), strict=True):
                if isinstance(fresh, VessaError):
                    log.warning("bank %s: template %s was not encoded: %s", name, template.id, fresh)
                else:
                    self._replace(name, fresh)
            progress(min(start + REENCODE_BATCH, len(stale)), len(stale))
        self.model = model
        return len(stale)

    def _replace(self, name: str, template: Template) -> None:
        blob = template.to_blob()

        def edit(old: Index) -> Index | None:
            # Deleted meanwhile, or already encoded by another process that starts with the same weights.
            if template.id not in old.entries or old.entries[template.id].model == template.model:
                return None
            return replace(old, entries=old.entries | {template.id: template.entry(blob)})

        self.store.change(name, edit, {blob_digest(blob): blob})

    @staticmethod
    def _require(name: str, index: Index) -> None:
        if not index.exists:
            raise UnknownBank(f"there is no template bank {name!r}")

    def _damaged(self, name: str) -> set[str]:
        """Return the ids whose blob cannot be read; adding them again repairs them."""
        while True:
            try:
                bank = self.get(name)
            except UnknownBank:
                return set()
            index = self.store.read(name)
            if index.version == bank.version:  # else what another process has just added would seem damaged
                return index.entries.keys() - {template.id for template in bank.templates}

    def _load(self, name: str, index: Index, cached: Bank | None) -> Bank | None:
        """Read the templates that `cached` does not hold; None when the bank changed meanwhile."""
        held = {(t.id, t.model): t for t in cached.templates} if cached else {}
        templates = []
        for identity, entry in index.entries.items():
            template = held.get((identity, entry.model)) or self._read_template(name, identity, entry)
            if template is not None:
                templates.append(template)
            elif self.store.version(name) != index.version:
                return None
        adaptation = self._read_adaptation(name, index, cached)
        if adaptation is not None and self.model not in (None, adaptation.model):
            adaptation = None
        about = (self.model, adaptation, index.owner, index.shared)
        return Bank(name, index.version, tuple(templates), *about)

    def _read_adaptation(self, name: str, index: Index, cached: Bank | None) -> Adaptation | None:
        if index.adaptation is None:
            return None
        if cached and cached.adaptation and cached.adaptation.digest == index.adaptation:
            return cached.adaptation
        data = self.store.blob(name, index.adaptation)
        if data is None:
            return None
        try:
            return Adaptation.from_blob(data)
        except ValueError as error:
            log.warning("bank %s: %s; it is ignored", name, error)
            return None

    def _read_template(self, name: str, identity: str, entry: Entry) -> Template | None:
        data = self.store.blob(name, entry.blob)
        if data is None:
            return None
        try:
            return Template.from_blob(identity, entry, data)
        except ValueError as error:
            log.warning("bank %s: %s; it is ignored", name, error)
            return None

    def list(self) -> list[BankInfo]:
        """Return all banks by name."""
        found = []
        for name in self.store.names():
            with contextlib.suppress(UnknownBank):  # deleted meanwhile
                found.append(self.get(name).info())
        return found
