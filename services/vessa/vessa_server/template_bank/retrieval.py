"""Find the most similar templates of a bank by their features (Eq. 1 of the VESSA paper)."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vessa.errors import ClassConflict, InvalidRequest, UnknownTemplate
from vessa.masks.cleaning import single_component_classes
from vessa.schemas import BankInfo
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.index import Entry
from vessa_server.template_bank.template import Template

BANK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LAYOUT_WEIGHT = 3.0  # of a class that fills a tenth more of the window's side, against cosines

Matches = list[tuple["Template", float]]


@dataclass(frozen=True, eq=False)
class _ClassTemplates:
    """Hold the templates that show one class, with their features stacked.

    whole, close: (N, D) float32 of unit norm; layouts: (N, K) over the bank's classes. A template without a
    close view has its whole image's feature in `close`.
    """

    templates: list[Template]
    whole: NDArray[np.float32]
    close: NDArray[np.float32]
    layouts: NDArray[np.float32]

    @classmethod
    def of(cls, templates: list[Template], class_ids: Sequence[int]) -> "_ClassTemplates":
        return cls(
            templates,
            np.stack([t.whole.feature for t in templates]),
            np.stack([(t.close or t.whole).feature for t in templates]),
            np.array([[t.layout.get(key, 0.0) for key in class_ids] for t in templates], np.float32),
        )


@dataclass(frozen=True, eq=False)
class Bank:
    """Hold one state of a template bank.

    version: number of changes, for people; `digest` names the contents. model: when set, retrieval skips
    templates that other weights encoded, because their features do not compare (a second server with other
    weights may share the store); adaptation: the bank's own weights, None without or when they belong to
    another model; owner: name of the key that made it; shared: whether other keys may use it; entries: of the
    templates that could be read, by id; state: digest of the index it was read from
    """

    name: str
    version: int
    templates: tuple[Template, ...]
    model: str | None = None
    adaptation: Adaptation | None = None
    owner: str | None = None
    shared: bool = False
    entries: Mapping[str, Entry] = field(default_factory=dict)
    state: str = ""

    @cached_property
    def single_classes(self) -> tuple[int, ...]:
        """Return the class ids that form one component in every template; cleaning keeps one of these."""
        return single_component_classes(template.mask[None] for template in self.templates)

    @cached_property
    def digest(self) -> str:
        """Return the digest of what labels depend on: the templates that were read, and the own weights.

        A missing or damaged template changes it, and so does an older state with the same version.
        """
        adaptation = None if self.adaptation is None else self.adaptation.digest
        templates = sorted((i, e.blob, e.group, sorted(e.classes.items())) for i, e in self.entries.items())
        return hashlib.sha256(json.dumps([templates, adaptation]).encode()).hexdigest()

    @cached_property
    def classes(self) -> dict[int, str]:
        """Return {id: name} over all templates, by id."""
        return union_classes(template.classes for template in self.templates)

    @cached_property
    def _by_id(self) -> dict[str, Template]:
        return {template.id: template for template in self.templates}

    @cached_property
    def _by_class(self) -> dict[int, "_ClassTemplates"]:
        usable = [t for t in self.templates if self.model is None or t.model == self.model]
        chosen = {key: [t for t in usable if key in t.classes] for key in self.classes}
        return {key: _ClassTemplates.of(found, list(self.classes)) for key, found in chosen.items() if found}

    def template(self, identity: str) -> Template:
        """Return one template. Raises UnknownTemplate when none has this id."""
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

        feature: (D,) float32 of unit norm, of the whole image; close: that of its region of interest, when
        there is one: the mean of both cosines counts. layout: area roots that the first pass found, by class
        id, see `Template.layout`: the score of a template drops by `LAYOUT_WEIGHT` times its distance, the
        returned cosine does not. exclude_group: the query's own patient, never retrieved (None: unknown).
        Equal similarities are ordered by id. An empty list means that no template of another group exists.
        """
        if class_id not in self._by_class:
            return []
        known = self._by_class[class_id]
        cosines = known.whole @ feature
        if close is not None:
            cosines = (cosines + known.close @ close) / 2
        scores = cosines = np.clip(cosines, -1.0, 1.0)
        if layout is not None:
            asked = np.array([layout.get(key, 0.0) for key in self.classes], np.float32)
            scores = cosines - LAYOUT_WEIGHT * np.linalg.norm(known.layouts - asked, axis=1)
        found = known.templates
        allowed = [i for i, t in enumerate(found) if exclude_group is None or t.group != exclude_group]
        best = sorted(allowed, key=lambda i: (-scores[i], found[i].id))[:top]
        return [(found[i], float(cosines[i])) for i in best]

    def info(self) -> BankInfo:
        """Return the public description."""
        groups = sorted({template.group for template in self.templates})
        return BankInfo(
            name=self.name,
            version=self.version,
            digest=self.digest,
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
    """Return both, by id. Raises ClassConflict when an id gets a second name or a name a second id."""
    ids = {name: key for key, name in known.items()}
    for key, name in added.items():
        if known.get(key, name) != name:
            raise ClassConflict(f"class id {key} is {known[key]!r} in this bank, not {name!r}")
        if ids.get(name, key) != key:
            raise ClassConflict(f"class {name!r} has id {ids[name]} in this bank, not {key}")
    return dict(sorted({**known, **added}.items()))


def union_classes(parts: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """Return the union of class maps that do not contradict each other, by id."""
    merged: dict[int, str] = {}
    for part in parts:
        merged |= part
    return dict(sorted(merged.items()))


def check_name(bank: str) -> str:
    """Return the bank's name. Raises InvalidRequest unless it is safe as a file name and a key."""
    if not BANK_NAME.fullmatch(bank):
        raise InvalidRequest(
            "A bank name is 1 to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit. "
            f"Got {bank[:80]!r}."
        )
    return bank
