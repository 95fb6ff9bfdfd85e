"""`vessa segment|annotation`: segment an image or volume, and read a cached annotation."""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from vessa.cli.options import Bank, Json, Key, Url, console, finish, say
from vessa.cli.volumes import describe_cleaning, segment_volume
from vessa.client import Annotation, AnnotatorClient
from vessa.errors import BadResponse
from vessa.volumes import is_volume

Clean = Annotated[
    bool,
    typer.Option(
        "--clean",
        help="Keep the largest component of classes that form one in every template; smooth volumes along z.",
    ),
]
Classes = Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")]


def segment(
    image: Annotated[
        Path,
        typer.Argument(
            help="PNG, JPEG or TIFF image, NIfTI or DICOM file, or a folder with a DICOM series in "
            "it or below."
        ),
    ],
    bank: Bank = "default",
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the labels. Image: 8-bit PNG of class ids (default mask.png). Volume: .nii.gz, "
            ".seg.nrrd, or .dcm for a DICOM SEG (default labels.nii.gz or labels.dcm, as the input)."
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
    series: Annotated[
        int | None,
        typer.Option(help="Which of several DICOM series of a folder; without it they are listed."),
    ] = None,
    clean: Clean = False,
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
            result = segment_volume(
                client,
                image,
                out,
                bank=bank,
                classes=classes,
                group=group,
                axis=axis,
                series=series,
                clean=clean,
            )
        finish(result, as_json)
        return
    out, picture = _png(out or Path("mask.png")), picture and _png(picture)
    with AnnotatorClient(url, api_key) as client:
        found = client.segment_image(image, bank=bank, classes=classes, group=group, clean=clean)
    found.save(out)
    if picture is not None:
        Image.fromarray(found.overlay()).save(picture)
    areas = found.areas()
    _print_classes(found, areas)
    cleaning = None if found.cleaning is None else found.cleaning.model_dump()
    if cleaning is not None:
        say(f"cleaned: {describe_cleaning(cleaning)}")
    about = {"cleaning": cleaning, "bank_version": found.bank_version, "annotation_id": found.annotation_id}
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
    if found.provenance is None:
        raise BadResponse("the annotator returned an annotation without provenance")
    if out is not None:
        found.save(out)
    console.print_json(found.provenance.model_dump_json())
    finish(found.provenance.model_dump(), as_json)
