"""`vessa verify`: check a data folder before it is used."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vessa.cli.options import Json
from vessa.datasets import Finding, PngFolder, collection, open_dataset, recognize
from vessa.datasets import verify as find_faults
from vessa.datasets.registry import Collection
from vessa.errors import InvalidRequest

_MOST_PER_KIND = 20
_DEFAULT_SPLITS = ("train", "val", "test")


def verify(
    folder: Annotated[Path, typer.Argument(help="Data folder of any supported layout.")],
    known_as: Annotated[
        str | None,
        typer.Option("--as", help="Collection to compare with; default: the one with the folder's name."),
    ] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            help="Split that shares no patient with the others; repeatable. Default: train, val and test, "
            "those that exist.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find faults of a data folder and print what to do; exit code 1 if there are errors.

    Checks image and mask sizes, class ids, empty masks, duplicates, and patients that are in two splits.
    """
    entry = recognize(folder) if known_as is None else _collection(known_as)
    dataset = open_dataset(folder)
    names = splits or [name for name in _DEFAULT_SPLITS if dataset.has_split(f"splits/{name}.txt")]
    findings = find_faults(dataset, {name: dataset.split(name) for name in names}, entry)
    console = Console(stderr=as_json)
    _print_findings(console, findings)
    errors = sum(finding.severity == "error" for finding in findings)
    summary = {
        "name": dataset.name,
        "collection": None if entry is None else entry.name,
        "layout": type(dataset).__name__,
        "licence": dataset.licence,
        "classes": dataset.classes,
        "groups": len(dataset.groups()),
        "images": len(dataset.slices()),
        "pattern": dataset.listing.pattern if isinstance(dataset, PngFolder) else None,
        "splits": names,
        "errors": errors,
        "warnings": len(findings) - errors,
    }
    for key, value in summary.items():
        console.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps({**summary, "findings": [{**vars(f), "advice": f.advice} for f in findings]}))
    if errors:
        raise typer.Exit(1)


def verify_alias(old_name: str) -> Callable[..., None]:
    """Return `verify` for another program, with a hint that `vessa verify` is its name now."""

    @functools.wraps(verify)
    def run(*args: object, **options: object) -> None:
        Console(stderr=True).print(f"`{old_name}` is an alias of `vessa verify`.", highlight=False)
        verify(*args, **options)  # type: ignore[arg-type]

    run.__doc__ = f"Alias of `vessa verify`.\n\n{verify.__doc__}"
    return run


def _collection(name: str) -> Collection:
    try:
        return collection(name)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _print_findings(console: Console, findings: Sequence[Finding]) -> None:
    printed: Counter[str] = Counter()
    for finding in findings:
        printed[finding.kind] += 1
        if printed[finding.kind] > _MOST_PER_KIND:
            continue
        color = "red" if finding.severity == "error" else "yellow"
        line = (
            f"{finding.severity}: {finding.kind}: {finding.where}: {finding.message}. To do: {finding.advice}"
        )
        console.print(line, style=color, highlight=False, markup=False, soft_wrap=True)
    for kind, count in printed.items():
        if count > _MOST_PER_KIND:
            console.print(f"{count - _MOST_PER_KIND} more of {kind}", highlight=False)
