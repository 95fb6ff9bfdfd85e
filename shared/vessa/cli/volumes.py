"""Commands of `vessa` about volumes: segment a file, a DICOM folder or a series of a DICOMweb archive."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vessa.cli.options import Bank, Json, Key, Url, finish, progress_bar, say
from vessa.client import AnnotatorClient
from vessa.errors import InvalidRequest
from vessa.schemas import JobInfo
from vessa.volumes.dicomweb import Archive
from vessa.volumes.files import format_of, is_nifti_file


def segment_volume(
    client: AnnotatorClient,
    path: Path,
    out: Path | None,
    *,
    bank: str,
    classes: Sequence[str] | None,
    group: str | None,
    axis: str,
    series: int | None = None,
    clean: bool = False,
) -> dict[str, Any]:
    """Have a job segment a volume, show its progress and write the labels.

    out: its suffix is the format; None for labels.nii.gz or labels.dcm, whichever fits. Returns what the
    command prints as JSON. Raises typer.BadParameter for a name of no label format, before any work.
    """
    out = out or Path("labels.nii.gz" if is_nifti_file(path) else "labels.dcm")
    try:
        kind = format_of(out.name)
    except InvalidRequest as error:
        raise typer.BadParameter(str(error)) from error
    if not out.parent.is_dir():  # checked before minutes of work
        raise typer.BadParameter(f"the folder {out.parent} does not exist: create it or change --out")
    said: list[str] = []
    cleaning: dict[str, Any] = {}
    with progress_bar() as bar:
        task = bar.add_task("segmenting", total=None)

        def show(info: JobInfo) -> None:
            bar.update(task, total=info.slices, completed=info.done)
            for note in info.notes:
                if note not in said:
                    said.append(note)
                    say(f"note: {note}")
            if info.cleaning is not None:
                cleaning.update(info.cleaning.model_dump())

        data = client.segment_volume(
            path,
            bank=bank,
            classes=classes,
            group=group,
            axis=axis,
            result=kind,
            series=series,
            clean=clean,
            progress=show,
        )
    out.write_bytes(data)
    say(f"labels on the grid of {path}: {out}")
    if cleaning:
        say(f"cleaned: {describe_cleaning(cleaning)}")
    return {"labels": str(out), "result": kind, "notes": said, "cleaning": cleaning or None}


def describe_cleaning(cleaning: Mapping[str, Any]) -> str:
    """Say what cleaning did. cleaning: `vessa.schemas.Cleaning` as a mapping."""
    removed = ", ".join(f"{count} px of {name}" for name, count in cleaning["removed"].items())
    kept = ", ".join(cleaning["single"]) or "no class"
    smoothed = " after smoothing along z" if cleaning["neighbor_weight"] else ""
    return f"largest component of {kept}{smoothed}; removed {removed or 'nothing'}"


def open_archive(url: str) -> Archive:
    """Return the archive with the credentials of the environment. Raises InvalidConfig for half a pair."""
    return Archive(
        url,
        token=os.environ.get("VESSA_DICOMWEB_TOKEN"),
        user=os.environ.get("VESSA_DICOMWEB_USER"),
        password=os.environ.get("VESSA_DICOMWEB_PASSWORD"),
    )


def dicomweb(
    url: Annotated[
        str, typer.Option(help="DICOMweb root of the archive, such as http://host:8042/dicom-web.")
    ],
    study: Annotated[str, typer.Option(help="StudyInstanceUID.")],
    series: Annotated[
        str | None, typer.Option(help="SeriesInstanceUID; without it the study's only series of images.")
    ] = None,
    bank: Bank = "default",
    classes: Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the DICOM SEG to this .dcm file.")] = None,
    store: Annotated[bool, typer.Option(help="Store the DICOM SEG in the archive.")] = True,
    annotator: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Segment a series of a DICOMweb archive (WADO-RS) and store the DICOM SEG there (STOW-RS).

    Credentials of the archive come from the environment: VESSA_DICOMWEB_TOKEN (bearer), or
    VESSA_DICOMWEB_USER and VESSA_DICOMWEB_PASSWORD.
    """
    with (
        open_archive(url) as archive,
        tempfile.TemporaryDirectory(prefix="vessa-dicomweb-") as folder,
        AnnotatorClient(annotator, api_key) as client,
    ):
        chosen = series or archive.only_series(study)
        files = archive.retrieve(study, chosen, Path(folder) / "series")
        say(f"{files} files retrieved")
        labels = Path(folder) / "labels.dcm"
        result = segment_volume(
            client,
            Path(folder) / "series",
            labels,
            bank=bank,
            classes=classes,
            group=None,
            axis="auto",
        )
        data = labels.read_bytes()
        if out is not None:
            out.write_bytes(data)
        stored = archive.store(data) if store else None
    if stored is not None:
        say(f"DICOM SEG stored as series {stored}")
    about = {"series": chosen, "files": files, "stored_series": stored, "notes": result["notes"]}
    finish(about, as_json)
