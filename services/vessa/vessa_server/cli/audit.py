"""Check the audit log."""

import json
from typing import Annotated

import typer
from rich.console import Console

from vessa_server.auth.audit_log import open_audit
from vessa_server.settings import Settings

audit = typer.Typer(no_args_is_help=True, help=__doc__)


@audit.command()
def verify(
    store: Annotated[str | None, typer.Option(help="The annotator's store, as `serve` has it.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on the last line.")
    ] = False,
) -> None:
    """Check that no line of the audit log was changed, removed or inserted; exit code 1 otherwise."""
    log = open_audit(Settings() if store is None else Settings(store=store))
    lines, faults = log.verify()
    console = Console(stderr=as_json)
    for fault in faults:
        console.print(fault, style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{log.path}: {lines} lines, {len(faults)} faults", highlight=False, markup=False)
    if as_json:
        print(json.dumps({"lines": lines, "faults": faults}))
    if faults:
        raise typer.Exit(1)


@audit.callback()
def _group() -> None:
    """Keep `verify` a command of its own: typer would merge a single one into the group."""
