"""`vessa seed|segment|banks`: talk to an annotator from the command line."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vessa.client import AnnotatorClient
from vessa.datasets import open_dataset
from vessa.errors import InvalidDataset, VessaError
from vessa.images import overlay, read_image

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
_console = Console(stderr=True)
_SEED_BATCH = 16

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
Url = Annotated[
    str | None, typer.Option(help="Annotator's address; without it VESSA_URL, then port 8700 here.")
]
Key = Annotated[str | None, typer.Option(help="Key; without it VESSA_API_KEY, then the local key file.")]
Bank = Annotated[str, typer.Option(help="Template bank.")]


def _png(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() != ".png":
        raise typer.BadParameter(f"expected a name that ends in .png, got '{path.name}'")
    return path


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


@app.command()
def seed(
    folder: Annotated[Path, typer.Argument(help="Data folder whose annotated images become templates.")],
    bank: Bank = "default",
    groups: Annotated[str | None, typer.Option(help="Only these groups, separated by commas.")] = None,
    split: Annotated[str | None, typer.Option(help="Only the groups of this split file.")] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Seed a template bank; running it again adds nothing twice."""
    if groups is not None and split is not None:
        raise typer.BadParameter("give --groups or --split, not both")
    dataset = open_dataset(folder)
    wanted = set(dataset.groups())
    if groups is not None:
        wanted = {name.strip() for name in groups.split(",")}
    elif split is not None:
        wanted = set(dataset.split(split))
    unknown = wanted - set(dataset.groups())
    if unknown:
        raise InvalidDataset(f"'{dataset.name}' has no groups {sorted(unknown)[:5]}")
    shown = [
        (item, mask)
        for item in dataset.slices()
        if item.group in wanted and (mask := dataset.mask(item)) is not None and mask.any()
    ]
    if not shown:
        raise InvalidDataset(f"no annotated image among {len(wanted)} groups of '{dataset.name}'")
    created = 0
    with AnnotatorClient(url, api_key) as client, Progress(console=_console, transient=True) as bar:
        task = bar.add_task(f"seeding {bank}", total=len(shown))
        for start in range(0, len(shown), _SEED_BATCH):
            part = shown[start : start + _SEED_BATCH]
            added = client.add_templates(
                bank,
                [dataset.image(item) for item, _ in part],
                [mask for _, mask in part],
                dataset.classes,
                [item.group for item, _ in part],
            )
            created += sum(t.created for t in added)
            bar.advance(task, len(part))
        info = client.bank(bank)
    _console.print(f"bank {bank}: {created} templates added, {info.templates} in all, version {info.version}")
    _finish({"created": created, **info.model_dump()}, as_json)


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or TIFF image.")],
    bank: Bank = "default",
    out: Annotated[
        Path, typer.Option(callback=_png, help="Where to write the label map: 8-bit PNG with class ids.")
    ] = Path("mask.png"),
    picture: Annotated[
        Path | None,
        typer.Option("--overlay", callback=_png, help="Where to write an overlay to look at: PNG."),
    ] = None,
    classes: Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")] = None,
    group: Annotated[
        str | None, typer.Option(help="The image's own patient, never used as its template.")
    ] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Segment one image by the templates of a bank."""
    pixels = read_image(image)
    with AnnotatorClient(url, api_key) as client:
        answer = client.segment([pixels], bank=bank, classes=classes, groups=[group])[0]
    if answer.error is not None or answer.labels is None:
        raise answer.error or VessaError("the annotator answered without labels")
    Image.fromarray(answer.labels).save(out)
    if picture is not None:
        Image.fromarray(overlay(pixels, answer.labels)).save(picture)
    areas = {name: int((answer.labels == class_id).sum()) for class_id, name in answer.classes.items()}
    for name, area in areas.items():
        used = ", ".join(f"{t.group} ({t.similarity:.2f})" for t in answer.templates.get(name, []))
        _console.print(
            f"{name}: {area} px, score {answer.scores.get(name, 0):.2f}, template of {used}", highlight=False
        )
    _finish(
        {"mask": str(out), "areas": areas, "scores": answer.scores, "bank_version": answer.bank_version},
        as_json,
    )


@app.command()
def banks(url: Url = None, api_key: Key = None, as_json: Json = False) -> None:
    """List the template banks."""
    with AnnotatorClient(url, api_key) as client:
        found = client.banks()
    table = Table("bank", "templates", "groups", "classes", "version")
    for info in found:
        names = ", ".join(info.classes.values())
        table.add_row(info.name, str(info.templates), str(len(info.groups)), names, str(info.version))
    _console.print(table)
    _finish({"banks": [b.model_dump() for b in found]}, as_json)


def main() -> None:
    """Run the command line; a VessaError, or a file that cannot be written, becomes one line and code 1."""
    try:
        app()
    except VessaError as error:
        _complain(f"{error.code}: {error}")
        raise SystemExit(1) from error
    except OSError as error:
        _complain(f"{error.filename or 'input or output'}: {error.strerror or error}")
        raise SystemExit(1) from error


def _complain(text: str) -> None:
    _console.print(f"vessa: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
