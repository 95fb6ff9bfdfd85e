"""`vessa segment|annotation`: segment an image or volume, and read a cached annotation."""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vessa.cli.options import Bank, Json, Key, Url, console, finish, progress_bar, say
from vessa.client import Annotation, AnnotatorClient
from vessa.errors import BadResponse
from vessa.images import read_image
from vessa.overlay import overlay
from vessa.volumes import is_volume
from vessa.volumes.files import read_head
from vessa.volumes.nifti import is_nifti

Classes = Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")]
_RESULTS = {".nii.gz": "nifti", ".dcm": "dicom-seg"}


def segment(
    image: Annotated[
        Path,
        typer.Argument(help="PNG, JPEG or TIFF image, NIfTI or DICOM file, or a folder with a DICOM series."),
    ],
    bank: Bank = "default",
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the labels. Image: 8-bit PNG of class ids (default mask.png). Volume: .nii.gz, or "
            ".dcm for a DICOM SEG (default labels.nii.gz or labels.dcm, as the input)."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--overlay", help="PNG file for the image with the labels drawn over it.")
    ] = None,
    classes: Classes = None,
    group: Annotated[
        str | None, typer.Option(help="Patient of the image; templates of the same patient are not used.")
    ] = None,
    axis: Annotated[
        str, typer.Option(help="Slice direction of a volume: auto, axial, coronal, sagittal.")
    ] = "auto",
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Segment one image or volume with the templates of a bank."""
    if is_volume(image):
        if picture is not None:
            raise typer.BadParameter(
                "--overlay works for images only; open the labels of a volume in a viewer"
            )
        with AnnotatorClient(url, api_key) as client:
            _segment_volume(client, image, out, bank, classes, group, axis, as_json)
        return
    out, picture = _png(out or Path("mask.png")), picture and _png(picture)
    pixels = read_image(image)
    with AnnotatorClient(url, api_key) as client:
        found = client.segment([pixels], bank=bank, classes=classes, groups=[group])[0]
    if found.error is not None or found.labels is None:
        raise found.error or BadResponse("the annotator returned neither labels nor an error")
    Image.fromarray(found.labels).save(out)
    if picture is not None:
        Image.fromarray(overlay(pixels, found.labels)).save(picture)
    areas = {name: int((found.labels == class_id).sum()) for class_id, name in found.classes.items()}
    _print_classes(found, areas)
    about = {"bank_version": found.bank_version, "annotation_id": found.annotation_id}
    finish({"mask": str(out), "areas": areas, "scores": found.scores, **about}, as_json)


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"expected a file name that ends in .png, got '{path.name}'")
    return path


def _print_classes(found: Annotation, areas: dict[str, int]) -> None:
    for name, area in areas.items():
        used = ", ".join(f"{t.group} ({t.similarity:.2f})" for t in found.templates.get(name, []))
        say(f"{name}: {area} px, score {found.scores.get(name, 0):.2f}, template of {used}")
    say(f"annotation {found.annotation_id}")


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
    """Segment a volume as a job of the annotator, with a progress bar."""
    out = out or Path("labels.nii.gz" if is_nifti(read_head(path)) else "labels.dcm")
    kind = next((kind for suffix, kind in _RESULTS.items() if out.name.endswith(suffix)), None)
    if kind is None:
        raise typer.BadParameter(f"expected a file name that ends in .nii.gz or .dcm, got '{out.name}'")
    if not out.parent.is_dir():  # checked before minutes of work
        raise typer.BadParameter(f"the folder {out.parent} does not exist: create it or change --out")
    with progress_bar() as bar:
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
    say(f"labels on the grid of {path}: {out}")
    finish({"labels": str(out), "result": kind}, as_json)


def annotation(
    identity: Annotated[str, typer.Argument(help="Annotation id that `vessa segment` printed.")],
    out: Annotated[Path | None, typer.Option(help="PNG file for the labels.")] = None,
    url: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Print the provenance of a cached annotation; --out writes its labels."""
    out = out and _png(out)
    with AnnotatorClient(url, api_key) as client:
        found = client.annotation(identity)
    if found.labels is None or found.provenance is None:
        raise BadResponse("the annotator returned an annotation without labels")
    if out is not None:
        Image.fromarray(found.labels).save(out)
    console.print_json(found.provenance.model_dump_json())
    finish(found.provenance.model_dump(), as_json)
