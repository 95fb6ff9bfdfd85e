"""`vessa seed|banks|adapt`: fill, list and adapt template banks."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vessa.bulk.adapt_bank import adapt_bank
from vessa.bulk.seed_bank import seed_bank
from vessa.bulk.unlabeled_pool import Candidate, Pixels, find_candidates
from vessa.cli.options import Bank, Json, Key, Url, complain, console, finish, progress_bar, say
from vessa.client import AnnotatorClient
from vessa.datasets import Dataset, open_dataset
from vessa.errors import InvalidDataset, VessaError


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
        task = bar.add_task(f"seeding {escape(bank)}")
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
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with unlabeled images, or a data folder; at most 400 of them are used."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Only the groups of this split file of a data folder.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Longest training time in minutes.")] = 20.0,
    forget: Annotated[bool, typer.Option("--forget", help="Delete the bank's adapted weights.")] = False,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Train the annotator on a bank's templates and unlabeled images; keep the weights only if they help."""
    skipped: list[str] = []
    with AnnotatorClient(url, api_key) as client:
        if forget:
            client.forget_adaptation(bank)
            info = client.adaptation(bank)
        else:
            found = [] if images is None else _unlabeled(images, split, skipped)
            with progress_bar() as bar:
                task = bar.add_task(f"adapting to {bank}", total=1.0)
                info = adapt_bank(
                    client, bank, 60 * minutes, Pixels(found), lambda done: bar.update(task, completed=done)
                )
    if info.figures is not None:
        figures = info.figures
        kept = "the adapted weights are in use" if figures.kept else "no gain, the common weights stay"
        say(f"{figures.images} unlabeled images, {figures.steps} steps in {figures.seconds:.0f} s")
        say(f"Dice of held-out templates {figures.before:.3f} -> {figures.after:.3f}: {kept}")
    finish({**info.model_dump(), "skipped": skipped}, as_json)


def _unlabeled(folder: Path, split: str | None, skipped: list[str]) -> list[Candidate]:
    """Return the unlabeled images of a folder. Raises InvalidDataset when there is none."""

    def skip(name: str, error: VessaError) -> None:
        skipped.append(name)
        complain(f"{name} is skipped: {error}")

    found = list(find_candidates(folder, split=split, skip=skip))
    if not found:
        raise InvalidDataset(f"{folder} contains no readable image without a mask: choose another folder")
    return found
