"""The command line `vessa`: talk to an annotator, from seeding a bank to what to annotate next."""

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vessa.bulk.annotate import MANIFEST, AnnotateOptions, annotate_folder
from vessa.bulk.annotate import Progress as AnnotateProgress
from vessa.bulk.unlabeled_pool import Pixels, find_candidates
from vessa.client import AnnotatorClient
from vessa.datasets import open_dataset
from vessa.errors import InvalidDataset, VessaError
from vessa.images import read_image
from vessa.overlay import overlay
from vessa.schemas import AdaptationInfo
from vessa.volumes import is_volume
from vessa.volumes.files import read_head
from vessa.volumes.nifti import is_nifti

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


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
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
    image: Annotated[
        Path,
        typer.Argument(help="PNG, JPEG or TIFF image, NIfTI or DICOM file, or a folder with a DICOM series."),
    ],
    bank: Bank = "default",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the labels: 8-bit PNG with class ids (mask.png), for volumes .nii.gz or "
            ".dcm, a DICOM SEG (labels.nii.gz, labels.dcm)."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--overlay", help="Where to write an overlay to look at: PNG."),
    ] = None,
    classes: Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")] = None,
    group: Annotated[
        str | None, typer.Option(help="The image's own patient, never used as its template.")
    ] = None,
    axis: Annotated[str, typer.Option(help="How a volume is cut: auto, axial, coronal, sagittal.")] = "auto",
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Segment one image or volume by the templates of a bank."""
    if is_volume(image):
        if picture is not None:
            raise typer.BadParameter("--overlay is of one image; open the labels of a volume in a viewer")
        with AnnotatorClient(url, api_key) as client:
            _segment_volume(client, image, out, bank, classes, group, axis, as_json)
        return
    out, picture = _png(out or Path("mask.png")), picture and _png(picture)
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
    _console.print(f"annotation {answer.annotation_id}", highlight=False, soft_wrap=True)
    about = {"bank_version": answer.bank_version, "annotation_id": answer.annotation_id}
    _finish({"mask": str(out), "areas": areas, "scores": answer.scores, **about}, as_json)


def _segment_volume(
    client: AnnotatorClient,
    path: Path,
    out: Path | None,
    bank: str,
    classes: list[str] | None,
    group: str | None,
    axis: str,
    as_json: bool,
) -> None:
    """Let a job do it, and show how it goes."""
    out = out or Path("labels.nii.gz" if is_nifti(read_head(path)) else "labels.dcm")
    if not out.name.endswith((".nii.gz", ".dcm")):
        raise typer.BadParameter(f"expected a name that ends in .nii.gz or .dcm, got '{out.name}'")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}")  # before all the work
    kind = "nifti" if out.name.endswith(".nii.gz") else "dicom-seg"
    with Progress(console=_console, transient=True) as bar:
        task = bar.add_task("segmenting", total=None)
        data = client.segment_volume(
            path,
            bank=bank,
            classes=classes,
            group=group,
            axis=axis,
            result=kind,
            progress=lambda info: bar.update(task, total=info.slices, completed=info.done),
        )
    out.write_bytes(data)
    _console.print(f"labels on the grid of {path}: {out}", highlight=False)
    _finish({"labels": str(out), "result": kind}, as_json)


@app.command()
def annotation(
    identity: Annotated[str, typer.Argument(help="What `vessa segment` told.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the labels again: PNG.")] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Tell what made an annotation (templates, weights, prompts) while the annotator keeps it."""
    out = out and _png(out)
    with AnnotatorClient(url, api_key) as client:
        found = client.annotation(identity)
    assert found.labels is not None
    assert found.provenance is not None
    if out is not None:
        Image.fromarray(found.labels).save(out)
    _console.print_json(found.provenance.model_dump_json())
    _finish(found.provenance.model_dump(), as_json)


@app.command()
def annotate(
    folder: Annotated[Path, typer.Argument(help="Folder of PNG, JPEG or TIFF images, with all below it.")],
    out: Annotated[Path, typer.Option(help="Folder for masks/ and manifest.jsonl; a job there goes on.")],
    bank: Bank = "default",
    classes: Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")] = None,
    by_folder: Annotated[
        bool,
        typer.Option("--by-folder", help="A file's folder is its patient, whose templates are not used."),
    ] = False,
    batch: Annotated[int, typer.Option(help="Images a request.", min=1, max=64)] = 8,
    threads: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 4,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try those again that failed before.")
    ] = False,
    patience: Annotated[float, typer.Option(help="Give up after so many s without any annotator.")] = 300.0,
    urls: Annotated[
        list[str] | None,
        typer.Option("--url", help="Annotator's address; repeatable: replicas share the work."),
    ] = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Annotate a folder of any number of images; what is done is not done again."""
    addresses: list[str | None] = [*urls] if urls else [None]
    job = AnnotateOptions(bank, None if classes is None else tuple(classes), by_folder, batch)
    with contextlib.ExitStack() as stack, Progress(console=_console, transient=True) as bar:
        clients = [
            stack.enter_context(AnnotatorClient(url, api_key, timeout=150, attempts=1)) for url in addresses
        ]
        task = bar.add_task("annotating", total=None)

        def report(p: AnnotateProgress) -> None:
            done = p.ok + p.failed
            text = (
                f"{p.skipped + done} of at least {p.files} files, {done / max(p.seconds, 1e-9):.1f} a second"
            )
            bar.update(task, description=text)

        found = annotate_folder(
            folder, out, job, clients, threads=threads, patience=patience, retry=retry_failed, report=report
        )
    _console.print(
        f"{found.ok} masks written, {found.failed} files failed, {found.skipped} were done before; "
        f"each has its line in {out / MANIFEST}",
        highlight=False,
    )
    _finish(
        {
            "files": found.files,
            "ok": found.ok,
            "failed": found.failed,
            "skipped": found.skipped,
            "seconds": round(found.seconds, 1),
        },
        as_json,
    )


@app.command()
def suggest(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Data folder, whose images without a mask are ranked by patient; or any folder of images, "
            "NIfTI volumes and DICOM series."
        ),
    ],
    bank: Bank = "default",
    count: Annotated[int, typer.Option(help="Suggestions, at most.", min=1)] = 10,
    by_folder: Annotated[bool, typer.Option("--by-folder", help="An image's folder is its patient.")] = False,
    split: Annotated[
        str | None, typer.Option(help="Only the groups of this split file of a data folder.")
    ] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Rank unlabeled images, or patients, by what annotating them would bring to a bank."""
    skipped: list[str] = []

    def skip(name: str, error: VessaError) -> None:
        skipped.append(name)
        _complain(f"{name} is left out: {error}")

    with AnnotatorClient(url, api_key) as client, Progress(console=_console, transient=True) as bar:
        reading, looking = bar.add_task("reading", total=None), bar.add_task("looking", total=None)
        found = []
        for one in find_candidates(folder, by_folder=by_folder, split=split, skip=skip):
            found.append(one)
            bar.update(reading, completed=len(found))
        if not found:
            raise InvalidDataset(f"{folder} holds no image without a mask that can be read")
        bar.update(reading, total=len(found))
        answer = client.suggest(
            bank,
            Pixels(found),
            groups=[one.group for one in found],
            count=count,
            progress=lambda done, total: bar.update(looking, total=total, completed=done),
        )
    names: dict[tuple[str, str], list[str]] = {}
    for identity, one in zip(answer.image_ids, found, strict=True):
        names.setdefault((one.group or identity, identity), []).append(one.name)
    ranked = []
    table = Table("", "annotate", "images", "gain")
    for place, best in enumerate(answer.suggestions, 1):
        images = [names[best.group, identity].pop(0) for identity in best.image_ids]
        group = None if best.group in best.image_ids else best.group
        ranked.append({"group": group, "images": images, "gain": best.gain})
        shown = ", ".join(images[:3]) + (f" and {len(images) - 3} more" if len(images) > 3 else "")
        table.add_row(str(place), escape(group or images[0]), escape(shown), f"{best.gain:.1%}")
    _console.print(table)
    _console.print(
        f"best first, of {len(found)} images; gain: share of what bank {bank} lacks for them",
        highlight=False,
    )
    _finish(
        {
            "bank": answer.bank,
            "bank_version": answer.bank_version,
            "images": len(found),
            "skipped": skipped,
            "suggestions": ranked,
        },
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
    logging.getLogger("stamina").setLevel(logging.ERROR)  # it says that it tries again, but not why
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
