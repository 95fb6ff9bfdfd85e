"""`vessa seed|banks|adapt`: fill, list and adapt template banks."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vessa.bulk.seed_bank import seed_bank
from vessa.cli.options import Bank, Json, Key, Url, console, finish, progress_bar, say
from vessa.client import AnnotatorClient
from vessa.datasets import Dataset, open_dataset
from vessa.errors import InvalidDataset, ServiceError
from vessa.schemas import AdaptationInfo

_POLL_S = 1.0


def seed(
    folder: Annotated[Path, typer.Argument(help="Data folder whose annotated images become templates.")],
    bank: Bank = "default",
    groups: Annotated[str | None, typer.Option(help="Only these groups, separated by commas.")] = None,
    split: Annotated[str | None, typer.Option(help="Only the groups of this split file.")] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Add the annotated images of a data folder to a template bank; a second run adds nothing."""
    dataset = open_dataset(folder)
    chosen = _chosen_groups(dataset, groups, split)
    with AnnotatorClient(url, api_key) as client, progress_bar() as bar:
        task = bar.add_task(f"seeding {bank}")
        result = seed_bank(
            client,
            dataset,
            chosen,
            bank,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    info = result.bank
    say(f"bank {bank}: {result.created} templates added, {info.templates} in total, version {info.version}")
    finish({"created": result.created, **info.model_dump()}, as_json)


def _chosen_groups(dataset: Dataset, groups: str | None, split: str | None) -> set[str]:
    if groups is not None and split is not None:
        raise typer.BadParameter("give --groups or --split, not both")
    if split is not None:
        return set(dataset.split(split))
    if groups is None:
        return set(dataset.groups())
    chosen = {name.strip() for name in groups.split(",")}
    unknown = chosen - set(dataset.groups())
    if unknown:
        raise InvalidDataset(f"'{dataset.name}' has no groups {sorted(unknown)[:5]}: correct --groups")
    return chosen


def banks(url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """List the template banks."""
    with AnnotatorClient(url, api_key) as client:
        found = client.banks()
    table = Table("bank", "templates", "groups", "classes", "version")
    for info in found:
        names = ", ".join(info.classes.values())
        row = (info.name, str(info.templates), str(len(info.groups)), names, str(info.version))
        table.add_row(*map(escape, row))  # names come from outside, and may look like markup
    console.print(table)
    finish({"banks": [info.model_dump() for info in found]}, as_json)


def adapt(
    bank: Annotated[str, typer.Argument(help="Template bank.")],
    seconds: Annotated[float, typer.Option(help="Longest training time in seconds.")] = 120.0,
    forget: Annotated[bool, typer.Option("--forget", help="Delete the bank's adapted weights.")] = False,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Train the annotator on a bank's templates; keep the weights only if held-out Dice improves."""
    with AnnotatorClient(url, api_key) as client:
        if forget:
            client.forget_adaptation(bank)
            info = client.adaptation(bank)
        else:
            info = _wait_for_adaptation(client, client.adapt(bank, seconds))
    if info.figures is not None:
        kept = "the adapted weights are in use" if info.figures.kept else "no gain, the common weights stay"
        say(f"Dice of held-out templates {info.figures.before:.3f} -> {info.figures.after:.3f}: {kept}")
    finish(info.model_dump(), as_json)


def _wait_for_adaptation(client: AnnotatorClient, info: AdaptationInfo) -> AdaptationInfo:
    with progress_bar() as bar:
        task = bar.add_task(f"adapting to {info.bank}", total=1.0)
        while info.state == "running":
            time.sleep(_POLL_S)
            info = client.adaptation(info.bank)
            bar.update(task, completed=info.progress)
    if info.state == "failed":
        raise ServiceError(f"the adaptation to bank {info.bank} failed: {info.error}")
    return info
