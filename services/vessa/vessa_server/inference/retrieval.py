"""Retrieve templates for each class of a query (Eq. 1 of the paper when they are sampled).

The paper ranks templates by the cosine of DINOv2 features, s_i = cos(f_img, f_i), and samples one of the top
three (Sec. 3.1). Beyond the paper, the ranking is made per class and also uses the zoomed view and the layout
that the first pass found; see `Bank.retrieve`.
"""

import numpy as np

from vessa.errors import NoTemplate, UnknownClass
from vessa_server.inference.query import ClassQuery, Query
from vessa_server.model.prompt_encoding import MaskPrompts
from vessa_server.template_bank.retrieval import sample_template
from vessa_server.template_bank.template import Template
from vessa_server.types import SegmentItem

TOP = 3  # of Eq. 1


def class_queries(query: Query) -> list[ClassQuery]:
    """Choose the templates of each class that the item requests, or of all classes of the bank.

    Raises UnknownClass, and NoTemplate when a class has no template of another patient.
    """
    bank, item = query.bank, query.item
    ids = {name: class_id for class_id, name in bank.classes.items()}
    names = item.classes or _class_names(query)
    rng = np.random.default_rng(item.seed)
    queries = []
    for index, name in enumerate(names):
        if name not in ids:
            raise UnknownClass(f"bank '{bank.name}' has no class '{name}'; it has {sorted(ids)}")
        matches = _matches(query, ids[name], rng)
        if not matches:
            raise NoTemplate(
                f"bank '{bank.name}' holds no template of '{name}' from a group other than the query's"
            )
        prompts = _class_prompts(item, index)
        queries.append(ClassQuery(query.view, ids[name], name, matches, prompts))
    return queries


def first_pass_queries(query: Query) -> list[ClassQuery]:
    """Choose templates for a first pass: all classes of the bank, without prompts.

    A class without a template of another patient is left out: the first pass can do without it.
    """
    bank = query.bank
    rng = np.random.default_rng(query.item.seed)
    queries = []
    for class_id in sorted(bank.classes):
        if matches := _matches(query, class_id, rng):
            name = bank.classes[class_id]
            queries.append(ClassQuery(query.view, class_id, name, matches, MaskPrompts()))
    return queries


def _class_names(query: Query) -> tuple[str, ...]:
    return tuple(query.bank.classes[c] for c in sorted(query.bank.classes))


def _matches(query: Query, class_id: int, rng: np.random.Generator) -> list[tuple[Template, float]]:
    """Return the templates of one class with their cosine, as `template_choice` says; may be empty."""
    bank, item, zoomed = query.bank, query.item, query.zoomed
    first_pass = query.first_pass
    layout = None if first_pass is None else first_pass.layout(query.view.square.shown)
    choose_any = item.template_choice == "random"
    matches = bank.retrieve(
        query.whole.vector,
        class_id,
        exclude_group=item.group,
        top=len(bank.templates) if choose_any else TOP,
        close=None if zoomed is None else zoomed.vector,
        layout=layout,
    )
    if not matches:
        return []
    if item.template_choice == "sample":
        return [sample_template(matches, rng=rng)]
    if choose_any:
        return [matches[int(rng.integers(len(matches)))]]
    return matches[:1] if item.template_choice == "top1" else matches


def _class_prompts(item: SegmentItem, index: int) -> MaskPrompts:
    """Return the prompts of one class of an item."""
    box = None if item.boxes is None or (item.boxes[index] == -1).all() else item.boxes[index]
    points = None if item.points is None else item.points[index]
    labels = None if item.point_labels is None else item.point_labels[index]
    present = item.mask_present is None or bool(item.mask_present[index])
    logits = item.mask_logits[index] if item.mask_logits is not None and present else None
    return MaskPrompts(box, points, labels, logits)
