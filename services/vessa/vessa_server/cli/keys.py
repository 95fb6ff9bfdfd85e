"""Create, list and revoke keys."""

import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from vessa.errors import InvalidRequest
from vessa_server.auth.audit_log import Actor, AuditLog, open_audit
from vessa_server.auth.keys import Keys, Role, create_key, open_keys
from vessa_server.cli.actor import command_line_actor
from vessa_server.settings import Settings

keys = typer.Typer(no_args_is_help=True, help=__doc__)
Name = Annotated[str, typer.Argument(help="Name of the person or the program that will hold the key.")]
Store = Annotated[str | None, typer.Option(help="The annotator's store, as `serve` was given it.")]
_console = Console(stderr=True)


def _open(store: str | None) -> tuple[Keys, AuditLog, Actor]:
    settings = Settings() if store is None else Settings(store=store)
    return open_keys(settings), open_audit(settings), command_line_actor()


@keys.command()
def create(
    name: Name,
    role: Annotated[
        Literal["monitor", "annotate", "curate", "admin"],
        typer.Option(
            help="monitor: read /metrics; annotate: segment; curate: template banks too; admin: everything."
        ),
    ] = "annotate",
    requests: Annotated[int | None, typer.Option(help="Requests in progress at once.", min=1)] = None,
    images_per_minute: Annotated[int | None, typer.Option(help="Images in a minute.", min=1)] = None,
    store: Store = None,
) -> None:
    """Create a key and print it once: only its hash is stored. Running annotators accept it at once."""
    known, audit, actor = _open(store)
    with audit.change(actor, "key.create", name=name[:40], role=role):
        key = create_key(known, name, Role[role], requests, images_per_minute)
    _console.print(
        f"key {name!r} with the role {role}; it cannot be shown again:", highlight=False, markup=False
    )
    print(key)


@keys.command("list")
def list_keys(
    store: Store = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one JSON object on the last line.")
    ] = False,
) -> None:
    """List the keys, without the admin key "local" that the service generates itself."""
    found = sorted(_open(store)[0].all().values(), key=lambda key: key.name)
    table = Table("name", "role", "created", "requests", "images a minute")
    for key in found:
        limits = ("" if n is None else str(n) for n in (key.requests, key.images_per_minute))
        table.add_row(key.name, key.role.name, key.created, *limits)
    _console.print(table)
    if as_json:
        rows = [{"name": key.name, "role": key.role.name, "created": key.created} for key in found]
        print(json.dumps({"keys": rows}))


@keys.command()
def revoke(name: Name, store: Store = None) -> None:
    """Revoke a key. Running annotators refuse it at once; its banks stay, for a new key of this name."""
    known, audit, actor = _open(store)
    with audit.change(actor, "key.revoke", name=name[:40]):
        if not known.remove(name):
            raise InvalidRequest(f"There is no key {name!r}. `vessa-server keys list` shows them.")
    _console.print(f"key {name!r} is revoked", highlight=False, markup=False)
