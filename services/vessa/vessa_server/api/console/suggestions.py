"""Route that orders the open images of a worklist by how much annotating each would improve its bank."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from numpy.typing import NDArray

from vessa_server.api.authentication import CallerDep, require_key
from vessa_server.api.console.worklists import ListName, StoreDep
from vessa_server.api.dependencies import callers_banks, limits_of, service_of, unless_gone
from vessa_server.api.suggest import bank_or_empty, describe_candidates, rank_candidates
from vessa_server.serialization.suggest_request import Candidates
from vessa_server.types import scoped_id
from vessa_server.worklists.records import Item, Worklist
from vessa_server.worklists.schemas import OrderedItem, WorklistOrder
from vessa_server.worklists.store import WorklistStore

worklist_suggestions = APIRouter(dependencies=[Depends(require_key)])


@worklist_suggestions.post("/worklists/{name}/suggest")
async def suggest_items(
    name: ListName, request: Request, store: StoreDep, caller: CallerDep
) -> WorklistOrder:
    """Order the open images of a worklist, the one first that would improve its bank most.

    Images whose features are not cached are described first, so the first call takes about as long as
    segmenting them. The ranking is that of POST /banks/{bank}/suggest, one unit per image.
    """
    limits, cache = limits_of(request), request.app.state.candidates
    with limits.work(caller), service_of(request).permit() as engine:
        worklist = await run_in_threadpool(store.get, name, caller)
        items = [i for i in await run_in_threadpool(store.items, worklist) if i.decision == "open"]
        items = items[: engine.settings.limits.max_candidates]
        if not items:
            return WorklistOrder(items=[])
        bank = await run_in_threadpool(bank_or_empty, callers_banks(engine, caller), worklist.bank)

        def cached(item: Item) -> bool:
            identity = scoped_id(caller.name, item.image_id)
            sure = cache.confidence(identity, bank.name, bank.digest)
            return cache.feature(identity) is not None and (sure is not None or not bank.classes)

        missing = [item for item in items if not cached(item)]
        limits.take(caller, len(missing))
        for batch in _batches(missing, engine.settings.limits.max_items):
            wanted = await run_in_threadpool(_candidates, store, worklist, batch)
            await unless_gone(request, describe_candidates(engine, cache, bank, wanted, caller.name))
        ids = tuple(item.image_id for item in items)
        # Each image is its own unit: the queue orders images, also those of one patient.
        ranked = Candidates(ids, None, (None,) * len(ids), len(ids))
        found = await unless_gone(request, rank_candidates(engine, cache, bank, ranked, caller.name))
    gains = {pick.image_ids[0]: (place, pick.gain) for place, pick in enumerate(found.suggestions)}
    last = len(gains)
    order = sorted(items, key=lambda item: gains.get(item.image_id, (last, 0.0))[0])
    return WorklistOrder(
        items=[OrderedItem(id=item.id, gain=gains.get(item.image_id, (last, 0.0))[1]) for item in order]
    )


def _batches(items: list[Item], most: int) -> Iterator[list[Item]]:
    """Yield images of one size at a time: they are stacked into one array."""
    sizes = sorted({(item.height, item.width) for item in items})
    for size in sizes:
        same = iter([item for item in items if (item.height, item.width) == size])
        while batch := list(islice(same, most)):
            yield batch


def _candidates(store: WorklistStore, worklist: Worklist, items: list[Item]) -> Candidates:
    images: list[NDArray[Any]] = [store.image(worklist, item) for item in items]
    if len({image.ndim for image in images}) > 1:  # gray and color images of one size
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, -1) for image in images]
    ids = tuple(item.image_id for item in items)
    groups = tuple(item.group or None for item in items)
    return Candidates(ids, np.stack(images), groups, len(ids))
