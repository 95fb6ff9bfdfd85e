"""Route that erases a patient."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request

from vessa.schemas import Erasure
from vessa_server.api.authentication import require_admin, require_key
from vessa_server.api.dependencies import ChangeDep, EngineDep
from vessa_server.api.jobs import jobs_of
from vessa_server.viewers.sessions import ViewerSessions
from vessa_server.volume_jobs.slices import erase_patient
from vessa_server.worklists.store import WorklistStore

groups = APIRouter(dependencies=[Depends(require_key)])


@groups.delete("/groups/{group}", dependencies=[Depends(require_admin)])
def erase_group(
    group: Annotated[str, Path(description="patient, as it was given to templates and jobs", max_length=128)],
    request: Request,
    engine: EngineDep,
    change: ChangeDep,
) -> Erasure:
    """Remove a patient from banks, jobs, worklists and this service's memory, and say how much was removed.

    All cached features are dropped, and sessions of viewers without a patient's name end, because their
    images may show the patient. Other replicas need this request too; `vessa-server erase` lists what stays
    elsewhere.
    """
    jobs = jobs_of(request)
    worklists: WorklistStore = request.app.state.worklists
    viewers: ViewerSessions = request.app.state.viewer_sessions
    with change("erase") as more:
        removed = {b.name: engine.banks.remove_group(b.name, group) for b in engine.banks.all()}
        banks = sorted(name for name, count in removed.items() if count)
        result = Erasure(
            banks=banks,
            templates=sum(removed.values()),
            jobs=erase_patient(jobs.store, group),
            worklist_items=worklists.erase_group(group),
            annotations=engine.annotations.erase(group, banks),
            viewer_sessions=viewers.erase_group(group),
            unreadable_banks=sorted(engine.banks.damaged),
            unreadable_jobs=sorted(jobs.store.damaged),
            unreadable_worklist_items=sorted(worklists.damaged()),
        )
        request.app.state.candidates.clear()
        engine.queue.release_memory()
        more |= {
            "templates": result.templates,
            "jobs": result.jobs,
            "worklist_items": result.worklist_items,
            "viewer_sessions": result.viewer_sessions,
            "annotations": result.annotations,
        }
    return result
