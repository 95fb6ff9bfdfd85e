"""`vessa-server data list|show|verify`: the collections that are known, and what is wrong with a folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vessa.datasets import COLLECTIONS, collection, open_dataset, recognize
from vessa.datasets import verify as find_faults
from vessa.datasets.registry import LAYOUTS
from vessa.errors import InvalidRequest

data = typer.Typer(no_args_is_help=True, help="Data sets: list and show the known ones, verify a folder.")
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
_SHOWN = 20  # findings of one kind


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
    """Say what a collection holds, where to ask for it, on which terms, and how its folder must look."""
    entry = collection(_known(name))
    if as_json:
        print(json.dumps(asdict(entry)))
        return
    for key, value in asdict(entry).items():
        text = ", ".join(value) if isinstance(value, (list, tuple)) else value
        _say(f"{key}: {'yes' if value is True else 'no' if value is False else text}")
    _say(f"files: {LAYOUTS[entry.layout]}")


@data.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Data folder, of any layout that is read.")],
    known_as: Annotated[
        str | None, typer.Option("--as", help="Collection that it is; unless given, by the folder's name.")
    ] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", help="Split that shares no patient with others; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what would spoil a training and say what to do; exit code 1 when something must be mended."""
    entry = recognize(folder) if known_as is None else collection(_known(known_as))
    dataset = open_dataset(folder)
    findings = find_faults(dataset, {name: dataset.split(name) for name in splits or []}, entry)
    console, seen = Console(stderr=as_json), dict.fromkeys((f.kind for f in findings), 0)
    for finding in findings:
        seen[finding.kind] += 1
        if seen[finding.kind] > _SHOWN:
            continue
        color = "red" if finding.severity == "error" else "yellow"
        line = (
            f"{finding.severity}: {finding.kind}: {finding.where}: {finding.message}. To do: {finding.advice}"
        )
        console.print(line, style=color, highlight=False, markup=False, soft_wrap=True)
    for kind, count in seen.items():
        if count > _SHOWN:
            console.print(f"{count - _SHOWN} more of {kind}", highlight=False)
    errors = sum(f.severity == "error" for f in findings)
    summary = {
        "name": dataset.name,
        "collection": None if entry is None else entry.name,
        "layout": type(dataset).__name__,
        "licence": dataset.licence,
        "classes": dataset.classes,
        "groups": len(dataset.groups()),
        "images": len(dataset.slices()),
        "errors": errors,
        "warnings": len(findings) - errors,
    }
    for key, value in summary.items():
        console.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({**summary, "findings": [{**vars(f), "advice": f.advice} for f in findings]}))
    if errors:
        raise typer.Exit(1)
