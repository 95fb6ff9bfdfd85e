"""Manage the template banks of a store."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from vessa.errors import DamagedBank, TooLarge, UnknownBank, UnknownTemplate, VessaError
from vessa.schemas import BankInfo, TemplateInfo
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.index import Entry, Index, Store, blob_digest
from vessa_server.template_bank.retrieval import Bank, check_name, merge_classes, union_classes
from vessa_server.template_bank.template import Template

log = logging.getLogger(__name__)

REENCODE_BATCH = 16
_LOADS = 20  # attempts to read a bank that other processes keep changing

TemplateInfos = list[TemplateInfo]
Encode = Callable[[list[Template]], Sequence[Template | VessaError]]
Access = Callable[[str | None, bool], bool]


@dataclass(frozen=True)
class Quota:
    """Bound what one key may own. banks, templates, nbytes: counts over all banks of the key; 0: no bound."""

    banks: int = 0
    templates: int = 0
    nbytes: int = 0


def _anyone(owner: str | None, shared: bool) -> bool:
    return True


@dataclass
class TemplateBanks:
    """Read and change all banks of a store, from several threads.

    Changes of other processes are seen at the next `get`. A bank whose index cannot be read is set aside: it
    raises DamagedBank, is listed in `damaged`, and leaves all other banks alone.
    max_templates: in one bank; model: digest of the weights whose templates are used, None for all
    """

    store: Store
    max_templates: int = 10_000
    model: str | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    _cache: dict[str, Bank] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def get(self, name: str) -> Bank:
        """Return the bank as it is now. Raises UnknownBank, DamagedBank, StoreUnavailable."""
        check_name(name)
        with self._lock:
            cached = self._cache.get(name)
            if cached and (cached.state, cached.model) == (self.store.state(name), self.model):
                return cached
            for _ in range(_LOADS):
                index = self._read(name)
                if not index.exists:
                    self._cache.pop(name, None)
                    raise UnknownBank(f"There is no template bank {name!r}. GET /banks lists them.")
                bank, whole = self._load(name, index, cached)
                if whole or self.store.state(name) == index.state:
                    break
            self._cache[name] = bank
            return bank

    def add(
        self,
        name: str,
        templates: Sequence[Template],
        *,
        owner: str | None = None,
        access: Access = _anyone,
        quota: Quota | None = None,
    ) -> TemplateInfos:
        """Add templates, all or none, and make the bank if needed; templates that exist stay unchanged.

        owner: of a bank that this makes; access: tells whether a bank of this owner, shared or not, may be
        changed; called in the transaction, because two keys may make a bank of one name at once; quota: of
        the owner. Raises ClassConflict when a class id or name would get a second meaning, TooLarge for a
        full bank or quota, UnknownBank.
        """
        check_name(name)
        blobs = {template.id: template.to_blob() for template in templates}
        entries = {template.id: template.entry(blobs[template.id]) for template in templates}
        created: set[str] = set()
        unreadable = self._unreadable(name)

        def edit(old: Index) -> Index | None:
            if old.exists and not access(old.owner, old.shared):
                raise UnknownBank(f"There is no template bank {name!r}. GET /banks lists them.")
            created.clear()
            created.update(entries.keys() - (old.entries.keys() - unreadable))
            known = union_classes(entry.classes for entry in old.entries.values())
            for key in created:
                known = merge_classes(known, entries[key].classes)
            count = len(old.entries.keys() | created)
            if count > self.max_templates:
                raise TooLarge(
                    f"Bank {name!r} would hold {count} templates, at most {self.max_templates}. Remove "
                    "templates or use another bank."
                )
            fresh = {key: entry for key, entry in entries.items() if key in created}
            whose = old.owner if old.exists else owner
            new = replace(old, exists=True, entries=old.entries | fresh, owner=whose)
            if quota is not None and fresh:
                self._check_quota(name, new, quota)
            return new if fresh else None

        self.store.change(name, edit, {entries[key].blob: blob for key, blob in blobs.items()})
        first = {t.id: i for i, t in reversed(list(enumerate(templates)))}
        return [t.info(name, created=t.id in created and first[t.id] == i) for i, t in enumerate(templates)]

    def remove(self, name: str, identity: str) -> None:
        """Remove one template. Raises UnknownBank, UnknownTemplate. An emptied bank stays."""

        def edit(old: Index) -> Index:
            _require(name, old)
            if identity not in old.entries:
                raise UnknownTemplate(f"Bank {name!r} has no template {identity[:80]!r}.")
            return replace(old, entries={k: v for k, v in old.entries.items() if k != identity})

        self.store.change(check_name(name), edit, {})

    def remove_group(self, name: str, group: str) -> int:
        """Remove all templates of a group (patient), and the bank's own weights learned from them.

        Returns how many templates were removed. Raises UnknownBank.
        """
        removed: list[str] = []

        def edit(old: Index) -> Index | None:
            _require(name, old)
            removed[:] = [key for key, entry in old.entries.items() if entry.group == group]
            kept = {key: entry for key, entry in old.entries.items() if key not in removed}
            return replace(old, entries=kept, adaptation=None) if removed else None

        self.store.change(check_name(name), edit, {})
        return len(removed)

    def adapt(self, name: str, adaptation: Adaptation | None, *, learned_from: Bank | None = None) -> None:
        """Serve the bank by weights of its own, or by the common ones again.

        learned_from: the bank they were learned from. Raises UnknownBank, also when another bank has the name
        by now or a template it was learned from has been removed.
        """
        blob = b"" if adaptation is None else adaptation.to_blob()
        digest = None if adaptation is None else adaptation.digest

        def edit(old: Index) -> Index | None:
            _require(name, old)
            if learned_from is not None and (
                old.owner != learned_from.owner
                or not old.entries.keys() >= {template.id for template in learned_from.templates}
            ):
                raise UnknownBank(
                    f"Bank {name!r} is another one by now, or lost templates that the adaptation learned "
                    "from. Adapt it again."
                )
            return None if old.adaptation == digest else replace(old, adaptation=digest)

        self.store.change(check_name(name), edit, {} if digest is None else {digest: blob})

    def share(self, name: str, shared: bool) -> None:
        """Let all keys use the bank, or its owner alone. Raises UnknownBank."""

        def edit(old: Index) -> Index | None:
            _require(name, old)
            return None if old.shared == shared else replace(old, shared=shared)

        self.store.change(check_name(name), edit, {})

    def delete(self, name: str) -> None:
        """Delete a bank and its templates, also a damaged one. Raises UnknownBank."""

        def edit(old: Index) -> Index:
            _require(name, old)
            return Index()

        try:
            self.store.change(check_name(name), edit, {})
        except DamagedBank:
            self.store.reset(name, Index())
        with self._lock:
            self._cache.pop(name, None)
            self.damaged.pop(name, None)

    def refresh(
        self, encode: Encode, model: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> int:
        """Encode every template again whose model digest is not `model`; then use only `model`.

        encode: templates -> the same with new feature and memories, or an error each; progress(done, total).
        Returns how many were encoded. A template that fails stays in the bank, out of retrieval, with a
        warning in the log. Damaged banks are set aside.
        """
        self.model = None
        stale = [(b.name, t) for b in self.all() for t in b.templates if t.model != model]
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

    def all(self) -> list[Bank]:
        """Return all readable banks by name; others are in `damaged` afterwards."""
        banks = []
        for name in self.store.names():
            try:
                banks.append(self.get(name))
            except UnknownBank:  # deleted
                continue
            except DamagedBank as error:
                log.debug("bank %s is set aside: %s", name, error)
        return banks

    def list(self) -> list[BankInfo]:
        """Return the descriptions of all readable banks by name."""
        return [bank.info() for bank in self.all()]

    def _replace(self, name: str, template: Template) -> None:
        blob = template.to_blob()

        def edit(old: Index) -> Index | None:
            # Deleted meanwhile, or already encoded by another process that starts with the same weights.
            if template.id not in old.entries or old.entries[template.id].model == template.model:
                return None
            return replace(old, entries=old.entries | {template.id: template.entry(blob)})

        self.store.change(name, edit, {blob_digest(blob): blob})

    def _check_quota(self, name: str, new: Index, quota: Quota) -> None:
        own = [new]
        for other in self.store.names():
            if other == name:
                continue
            try:
                index = self.store.read(other)
            except DamagedBank:  # its owner is not known
                continue
            if index.exists and index.owner == new.owner:
                own.append(index)
        for what, used, most in (
            ("banks", len(own), quota.banks),
            ("templates", sum(len(index.entries) for index in own), quota.templates),
            ("bytes of templates", sum(index.nbytes for index in own), quota.nbytes),
        ):
            if most and used > most:
                raise TooLarge(
                    f"Key {new.owner!r} would own {used} {what}, at most {most}. Delete templates or banks, "
                    "or ask an admin for a larger quota."
                )

    def _read(self, name: str) -> Index:
        try:
            index = self.store.read(name)
        except DamagedBank as error:
            if self.damaged.get(name) != str(error):
                log.error("%s", error)
            self.damaged[name] = str(error)
            self._cache.pop(name, None)
            raise
        self.damaged.pop(name, None)
        return index

    def _unreadable(self, name: str) -> set[str]:
        """Return the ids of templates whose blob cannot be read; adding them again repairs them."""
        while True:
            try:
                bank = self.get(name)
            except UnknownBank:
                return set()
            index = self.store.read(name)
            if index.state == bank.state:  # else what another process has just added would seem damaged
                return index.entries.keys() - bank.entries.keys()

    def _load(self, name: str, index: Index, cached: Bank | None) -> tuple[Bank, bool]:
        """Read the templates that `cached` does not hold. Returns the bank and whether it is complete."""
        held = {t.id: (cached.entries[t.id], t) for t in cached.templates} if cached else {}
        templates, entries = [], {}
        for identity, entry in index.entries.items():
            known, template = held.get(identity, (None, None))
            if known != entry:
                template = self._read_template(name, identity, entry)
            if template is not None:
                templates.append(template)
                entries[identity] = entry
        adaptation = self._read_adaptation(name, index, cached)
        whole = len(templates) == len(index.entries) and (index.adaptation is None or adaptation is not None)
        if adaptation is not None and self.model not in (None, adaptation.model):
            adaptation = None
        about = (self.model, adaptation, index.owner, index.shared, entries, index.state)
        return Bank(name, index.version, tuple(templates), *about), whole

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


def _require(name: str, index: Index) -> None:
    if not index.exists:
        raise UnknownBank(f"There is no template bank {name!r}. GET /banks lists them.")
