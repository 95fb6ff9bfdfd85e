"""Commands that use trained runs: evaluate, predict, export."""

from pathlib import Path
from typing import Annotated

import typer

from vessa_trainer.cli.options import Data, Json, Url, app, console, finish, say


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    split: Annotated[
        str, typer.Option(help="Patients to score: a split file, or test or val of the run's own splits.")
    ] = "test",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Score the teacher that a run delivered on the patients of a split."""
    from vessa.report.tables import Row, table
    from vessa_trainer.prediction.evaluate_run import evaluate_run

    method, scores, delivered = evaluate_run(run, split, data)
    chosen = [] if delivered is None else [Row(f"{method}, as predict delivers", [delivered])]
    shown = table([Row(method, [scores]), *chosen])
    for line in [shown.header, *shown.lines]:
        say("  ".join(f"{c:<24}" for c in line))
    if scores.mean["dice"] is None:
        say(f"not scored: no patient of {split} has a mask that shows a class", style="yellow")
    finish(scores.to_dict() | ({} if delivered is None else {"delivered": delivered.to_dict()}), as_json)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="A data set, a folder of PNG, JPEG, TIFF or NIfTI files, one such file, or a DICOM series.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="Folder for the masks, each as large as its image: 8-bit PNG of class ids, HDF5 for HDF5, "
            "NIfTI with the same affine for NIfTI, DICOM SEG for DICOM.",
        ),
    ],
    flips: Annotated[
        bool | None,
        typer.Option(
            "--flips/--no-flips",
            help="Average over mirrored images, at four times the work; by default as the run chose on "
            "validation.",
        ),
    ] = None,
    with_vessa: Annotated[
        bool,
        typer.Option(
            "--with-vessa", help="Fuse the student's masks with the annotator's, as validation chose."
        ),
    ] = False,
    url: Url = None,
    axis: Annotated[
        str, typer.Option(help="How volumes are cut: auto (as in training), axial, coronal or sagittal.")
    ] = "auto",
    nifti: Annotated[bool, typer.Option("--nifti", help="NIfTI for DICOM, too.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Without the post-processing that the run chose on validation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Segment images and volumes with the teacher that a run delivered. Existing masks are skipped.

    The folder of a cross-validation (`fit --folds`) averages the teachers of its folds.
    """
    from contextlib import AbstractContextManager, nullcontext

    from vessa.client import AnnotatorClient
    from vessa_trainer.prediction.predict import predict as run_on

    annotator: AbstractContextManager[AnnotatorClient | None] = nullcontext()
    if with_vessa:
        annotator = AnnotatorClient(url)
    with annotator as vessa:
        result = run_on(
            run,
            source,
            out,
            console,
            flips=flips,
            axis=axis,
            nifti=nifti,
            postprocess=not raw,
            vessa=vessa,
        )
    mirrored = ", averaged over mirrored images" if result["flips"] else ""
    say(f"{result['masks']} masks in {out}, {result['skipped']} of them existed{mirrored}")
    for name, why in result["failed"].items():
        say(f"no mask {name}: {why}", style="red")
    if result["failed"]:
        say(f"{len(result['failed'])} files could not be segmented", style="red")
    finish(result, as_json)
    if result["failed"]:
        raise typer.Exit(1)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Argument(help="The .onnx file.")],
    as_json: Json = False,
) -> None:
    """Write the teacher that a run delivered as ONNX, and check that ONNX Runtime computes the same."""
    from vessa_trainer.prediction.onnx_export import export as write

    result = write(run, out)
    say(f"{out}: differs by at most {result['difference']:.1e}")
    finish(result, as_json)
