"""`vessa seed|segment|banks|adapt`: talk to an annotator from the command line."""

import json
import time
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
from vessa.schemas import AdaptationInfo

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
_console = Console(stderr=True)
_SEED_BATCH = 16
_POLL_S = 1.0

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


@app.command()
def adapt(
    bank: Annotated[str, typer.Argument(help="Template bank.")],
    seconds: Annotated[float, typer.Option(help="Longest time to learn, s.")] = 120.0,
    forget: Annotated[bool, typer.Option("--forget", help="Drop what was learned.")] = False,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Let the annotator learn from a bank's own templates; what does not help is dropped."""
    with AnnotatorClient(url, api_key) as client:
        if forget:
            client.forget_adaptation(bank)
            info = client.adaptation(bank)
        else:
            info = _wait_for_adaptation(client, client.adapt(bank, seconds))
    if info.figures is not None:
        kept = "in use" if info.figures.kept else "it did not help and was dropped"
        _console.print(
            f"Dice of held-out templates {info.figures.before:.3f} -> {info.figures.after:.3f}: {kept}",
            highlight=False,
        )
    _finish(info.model_dump(), as_json)


def _wait_for_adaptation(client: AnnotatorClient, info: AdaptationInfo) -> AdaptationInfo:
    with Progress(console=_console, transient=True) as bar:
        task = bar.add_task(f"adapting to {info.bank}", total=1.0)
        while info.state == "running":
            time.sleep(_POLL_S)
            info = client.adaptation(info.bank)
            bar.update(task, completed=info.progress)
    if info.state == "failed":
        raise VessaError(f"the adaptation failed: {info.error}")
    return info


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
