"""Check, repair and erase what an annotator stores."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import redis
import typer
from rich.console import Console

from vessa.errors import InvalidConfig, VessaError
from vessa_server.auth.audit_log import open_audit
from vessa_server.auth.keys import FileKeys, open_keys
from vessa_server.cli.actor import command_line_actor
from vessa_server.settings import Settings
from vessa_server.storage.redis_connection import connect, is_redis, reachable
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.repair import Fault, check_banks
from vessa_server.template_bank.store import check_store, open_store
from vessa_server.volume_jobs.slices import erase_patient
from vessa_server.volume_jobs.store import JobStore, folder_of
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.store import folder_of as worklists_folder

store = typer.Typer(no_args_is_help=True, help=__doc__)
Address = Annotated[str | None, typer.Option("--store", help="The annotator's store, as `serve` has it.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
LABELS = "vessa:label:*"
_LABEL_FILE = re.compile(r"[0-9a-f]{2}/(?:[0-9a-f]{64}|\.[0-9a-f]{64}\.(?:claim|[0-9a-f]{8}\.part))")


@store.command()
def check(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what can be mended.")] = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Check banks, key records, jobs and worklists for damage; exit code 1 when some is left.

    Stop the annotators before a repair.
    """
    settings = _settings(address)
    console = Console(stderr=as_json)
    faults = list(_faults(settings, repair=repair))
    for fault in faults:
        what = "repaired" if repair else "--repair would"
        line = f"{fault.where}: {fault.problem}; {what}: {fault.repair}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for warning in check_store(settings.storage.store):
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    left = [] if not faults else list(_faults(settings)) if repair else faults
    console.print(f"{len(faults)} faults, {len(left)} left", highlight=False)
    if as_json:
        print(json.dumps({"faults": [fault.to_dict() for fault in faults], "left": len(left)}))
    if left:
        raise typer.Exit(1)


def _settings(address: str | None) -> Settings:
    return Settings() if address is None else Settings(store=address)


def _faults(settings: Settings, *, repair: bool = False) -> Iterator[Fault]:
    yield from check_banks(open_store(settings.storage.store), repair=repair)
    keys = open_keys(settings)
    if isinstance(keys, FileKeys) and (lines := keys.damaged_lines()):
        numbers = ", ".join(map(str, lines))
        yield Fault(
            f"{keys.path}", f"lines {numbers} cannot be read", "remove the lines; create the keys again"
        )
        if repair:
            keys.drop_damaged_lines()
    jobs = JobStore(folder_of(settings))
    jobs.all()
    for name, problem in jobs.damaged.items():
        yield Fault(f"job {name}", problem, "delete the job; send the volume again")
        if repair:
            jobs.remove(name)
    worklists = WorklistStore(worklists_folder(settings), settings.console.worklist_bytes)
    for name, (problem, mending) in worklists.damaged(repair=repair).items():
        yield Fault(f"worklist {name}", problem, mending)


def erase(
    group: Annotated[str, typer.Option(help="Patient, as it was given to templates and jobs.")],
    address: Address = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Also delete all cached labels of trainers: redis://... or a folder of labels."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove a patient from template banks, jobs and worklists, and say what this command cannot reach.

    Running annotators hold answers in memory: DELETE /groups/{group} of each one removes them there.
    """
    settings = _settings(address)
    with open_audit(settings).change(command_line_actor(), "erase") as more:
        result = _erase(settings, group, labels)
        more |= {name: value for name, value in result.items() if isinstance(value, int)}
    console = Console(stderr=as_json)
    for key, value in result.items():
        console.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(result))
    if any(result[name] for name in result if name.startswith("unreadable_")):
        raise typer.Exit(1)


def _erase(settings: Settings, group: str, labels: str | None) -> dict[str, Any]:
    banks = TemplateBanks(open_store(settings.storage.store))
    names, templates = [], 0
    for bank in banks.all():
        if removed := banks.remove_group(bank.name, group):
            names.append(bank.name)
            templates += removed
    jobs = JobStore(folder_of(settings))
    erased_jobs = erase_patient(jobs, group)
    worklists = WorklistStore(worklists_folder(settings), settings.console.worklist_bytes)
    rewritten = is_redis(settings.storage.store) and _rewrite_log(settings.storage.store)
    return {
        "banks": names,
        "templates": templates,
        "jobs": erased_jobs,
        "worklist_items": worklists.erase_group(group),
        "labels": 0 if labels is None else _erase_labels(labels),
        "redis_log_rewritten": bool(rewritten),
        "unreadable_banks": sorted(banks.damaged),
        "unreadable_jobs": sorted(jobs.damaged),
        "unreadable_worklist_items": sorted(worklists.damaged()),
        "not_reached": _not_reached(settings, labels, rewritten=bool(rewritten)),
    }


def _erase_labels(place: str) -> int:
    """Delete all cached labels: their names are hashes, so that those of one patient cannot be told apart."""
    if is_redis(place):
        client = connect(place)
        with reachable():
            found = list(client.scan_iter(LABELS, count=1000))
            return sum(int(client.delete(*found[i : i + 500])) for i in range(0, len(found), 500))
    folder = Path(place.removeprefix("folder:")).expanduser()
    if not folder.is_dir():
        raise InvalidConfig(f"There is no folder of labels {folder}. Give the trainer's cache.url.")
    erased = 0
    for path in folder.glob("*/*"):
        # Only labels, their claims and unfinished ones: the folder may hold other files, or be a wrong one.
        if _LABEL_FILE.fullmatch(f"{path.parent.name}/{path.name}"):
            path.unlink(missing_ok=True)
            erased += not path.name.startswith(".")
    return erased


def _rewrite_log(address: str) -> bool:
    """Let Redis write its append-only file again without what was deleted; return whether it began to."""
    try:
        with reachable():
            connect(address).bgrewriteaof()
    except (VessaError, redis.RedisError):
        return False
    return True


def _not_reached(settings: Settings, labels: str | None, *, rewritten: bool) -> list[str]:
    missed = [
        "answers and features in the memory of running annotators: DELETE /groups/{group} of each one",
        "backups of the store, and runs, manifests and label maps that trainers and callers stored",
        "deleted blocks of the disk, until they are overwritten",
    ]
    if labels is None:
        missed.append("label caches of trainers: run again with --labels, or let them expire")
    if is_redis(settings.storage.store) and not rewritten:
        missed.append("the append-only file of Redis: run BGREWRITEAOF")
    return missed
