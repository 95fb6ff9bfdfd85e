"""List and show known data sets, and verify a folder."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vessa.cli.verify import verify_alias
from vessa.datasets import COLLECTIONS, collection
from vessa.datasets.registry import LAYOUTS
from vessa.errors import InvalidRequest

data = typer.Typer(no_args_is_help=True, help="Data sets: list and show the known ones, verify a folder.")
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def _known(name: str) -> str:
    try:
        return collection(name).name
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


@data.command("list")
def list_collections(as_json: Json = False) -> None:
    """List the collections of the paper's two stages and those of the shipped weights."""
    table = Table("name", "use", "modality", "images", "licence", "weights may ship")
    table.columns[0].no_wrap = True
    for entry in COLLECTIONS:
        ships = "yes" if entry.ships else "no"
        table.add_row(entry.name, entry.use, entry.modality, entry.images, entry.licence, ships)
    Console(stderr=as_json).print(table)
    if as_json:
        print(json.dumps({"collections": [asdict(entry) for entry in COLLECTIONS]}))


@data.command()
def show(name: Annotated[str, typer.Argument(help="Name of a collection.")], as_json: Json = False) -> None:
    """Show what a collection holds, where to get it, on which terms, and the layout of its folder."""
    entry = collection(_known(name))
    if as_json:
        print(json.dumps(asdict(entry)))
        return
    for key, value in asdict(entry).items():
        text = ", ".join(value) if isinstance(value, (list, tuple)) else value
        _say(f"{key}: {'yes' if value is True else 'no' if value is False else text}")
    _say(f"files: {LAYOUTS[entry.layout]}")


data.command("verify")(verify_alias("vessa-server data verify"))
