"""Route that fills an empty service with synthetic patients, to try the console without data."""

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool

from vessa_server.api.authentication import CallerDep, require_curator, require_key
from vessa_server.api.console.worklists import StoreDep
from vessa_server.api.dependencies import ChangeDep, callers_banks, limits_of, service_of, unless_gone
from vessa_server.auth.keys import Caller
from vessa_server.pretraining.data.synthetic import PROTOCOLS, Study, phantom_study
from vessa_server.serialization.request_parser import TemplateRequest
from vessa_server.types import TemplateItem
from vessa_server.worklists.records import Worklist
from vessa_server.worklists.schemas import WorklistInfo, worklist_info
from vessa_server.worklists.store import WorklistStore

phantoms_api = APIRouter(dependencies=[Depends(require_key), Depends(require_curator)])

NAME = "phantoms"  # of the bank and of the worklist
_PATIENTS, _SLICES, _SIZE, _SEED = 5, 3, 160, 0


@phantoms_api.post("/phantoms", status_code=201)
async def load_phantoms(
    request: Request, store: StoreDep, caller: CallerDep, change: ChangeDep
) -> WorklistInfo:
    """Make a bank and a worklist `phantoms` of five synthetic hearts of three slices.

    The first patient becomes the templates, the others the images to annotate. A second call changes nothing.
    """
    limits = limits_of(request)
    with limits.work(caller), service_of(request).permit() as engine:
        patients = await run_in_threadpool(_patients)
        first, others = patients[0], patients[1:]
        items = [
            TemplateItem(image, mask, dict(first.classes), "phantom1")
            for image, mask in zip(first.images, first.masks, strict=True)
        ]
        limits.take(caller, len(items))
        banks = callers_banks(engine, caller)
        async with contextmanager_in_threadpool(change("phantoms.load", bank=NAME, worklist=NAME)):
            wanted = TemplateRequest(NAME, items)
            templates = await unless_gone(request, engine.encode(wanted, banks))
            await run_in_threadpool(banks.add, NAME, templates)
            worklist = await run_in_threadpool(_fill, store, caller, others)
        return worklist_info(worklist, await run_in_threadpool(store.items, worklist))


def _patients() -> list[Study]:
    """Draw the patients; both protocols in turn, as `vessa-server phantoms` does."""
    found = []
    for index in range(_PATIENTS):
        rng = np.random.default_rng([_SEED, 0, index])
        protocol = PROTOCOLS["heart"][index % 2]
        found.append(phantom_study("heart", rng, protocol=protocol, patients=1, slices=_SLICES, size=_SIZE))
    return found


def _fill(store: WorklistStore, caller: Caller, patients: list[Study]) -> Worklist:
    worklist = store.create(NAME, NAME, caller)
    for number, study in enumerate(patients, 2):
        for index, image in enumerate(study.images, 1):
            store.add(worklist, image, f"phantom{number}_{index:02d}.png", f"phantom{number}")
    return worklist
