"""`vessa-trainer fit|evaluate|predict|export|compare|table1..4|verify`: the trainer's command line."""

import json
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from vessa.datasets import open_dataset
from vessa.datasets import verify as find_faults
from vessa.errors import InvalidDataset, VessaError
from vessa_trainer.config import DEFAULT_METHODS, Config, load_config, shipped

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of one experiment.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override, as section.key=value; repeatable.")]
Data = Annotated[Path | None, typer.Option(help="Data folder.")]
Labeled = Annotated[str | None, typer.Option(help="Split file of the labeled patients.")]
Student = Annotated[str | None, typer.Option(help="unet or dpt.")]
Steps = Annotated[int | None, typer.Option(help="Training iterations.")]
Out = Annotated[Path | None, typer.Option(help="Where to write.")]
Url = Annotated[str | None, typer.Option(help="Address of the annotator.")]
Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help="Address of the annotator; repeatable: a method takes the first that serves what its config "
        "names, the first of all where it names nothing.",
    ),
]
Seeds = Annotated[int, typer.Option(help="Seeds 0..N-1.", min=1)]


def _config(file: Path | None, overrides: list[str] | None, **given: object) -> Config:
    names = {
        "data": "data.root",
        "labeled": "data.labeled",
        "student": "student.name",
        "url": "annotator.url",
    }
    # quoted: a folder may be called 2024, or hold a character that YAML reads in its own way
    named = [
        f"{names.get(k, k)}={v if isinstance(v, int) else json.dumps(str(v), ensure_ascii=False)}"
        for k, v in given.items()
        if v is not None
    ]
    return load_config(file, [*named, *(overrides or [])])


def _finish(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


def _command(*extra: str) -> str:
    arguments = [a for a in sys.argv[1:] if a not in extra]
    return "vessa-trainer " + shlex.join([*arguments, *extra])


@app.command()
def fit(
    config: ConfigFile = None,
    data: Data = None,
    labeled: Labeled = None,
    student: Student = None,
    method: Annotated[str | None, typer.Option(help="supervised, unimatch_v2 or vessa.")] = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    out: Out = None,
    url: Url = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run found in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train one student; the run directory holds its checkpoints, curves and scores."""
    from vessa_trainer.experiments.run import fit as train

    resolved = _config(
        config,
        overrides,
        data=data,
        labeled=labeled,
        student=student,
        steps=steps,
        seed=seed,
        out=out,
        url=url,
        **{"semi.method": method},
    )
    summary = train(resolved, resume_line=_command("--resume"), resume=resume)
    dice = summary["test"]["mean"]["dice"]
    shown = "not scored: no test mask shows a class" if dice is None else f"{dice:.3f}"
    _console.print(f"test Dice {shown}; run in {resolved.out}", highlight=False)
    _finish(
        {"dice": dice, "test": summary["test"], "out": resolved.out, "wait_share": summary["wait_share"]},
        as_json,
    )


@app.command()
def compare(
    config: ConfigFile = None,
    data: Data = None,
    labeled: Annotated[
        list[str] | None,
        typer.Option(help="Split file of the labeled patients; repeatable: one comparison for each."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated: configs that ship, by name, or paths of your own.")
    ] = ",".join(DEFAULT_METHODS),
    student: Student = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    out: Out = None,
    urls: Urls = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train methods with the same steps and seeds; print one table. What is finished is not repeated."""
    from vessa_trainer.experiments.compare import compare as run

    resolved = _config(config, overrides, data=data, student=student, steps=steps, out=out)
    result = run(
        resolved,
        seeds=seeds,
        resume_line=_command(),
        console=_console,
        methods=_names(methods),
        labeled=labeled or [],
        urls=urls or [],
    )
    for name, budget in result.get("budgets", {"report": result}).items():
        _console.print(f"{name}: {budget['report']}", highlight=False)
    _finish(result, as_json)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _table_command(name: str, what: str) -> None:
    def command(
        config: ConfigFile = None,
        data: Data = None,
        methods: Annotated[
            str, typer.Option(help="Comma-separated configs in place of the table's own.")
        ] = "",
        percent: Annotated[
            list[float] | None,
            typer.Option(help="Labeled share of the training patients, repeatable; default the table's own."),
        ] = None,
        student: Student = None,
        steps: Steps = None,
        seeds: Seeds = 3,
        out: Out = None,
        urls: Urls = None,
        overrides: Set = None,
        as_json: Json = False,
    ) -> None:
        from vessa_trainer.experiments.paper_tables import run_table

        paper = config is None and student != "unet"  # the paper's student, unless another one is given
        resolved = _config(
            shipped("dpt") if paper else config, overrides, data=data, student=student, steps=steps, out=out
        )
        result = run_table(
            name,
            resolved,
            seeds=seeds,
            urls=urls or [resolved.annotator.url],
            resume_line=_command(),
            console=_console,
            methods=_names(methods),
            percents=percent or [],
        )
        _console.print(f"written: {result['table']}, .csv and .png beside it", highlight=False)
        _finish(result, as_json)

    app.command(name, help=f"{what} What is finished is not repeated; Markdown, CSV and a figure.")(command)


for _name, _what in {
    "table1": "The paper's Table 1: VESSA alone, SAM 2.1 in place of VESSA, VESSA-assisted at 1 %.",
    "table2": "The paper's Table 2 on ACDC, and its Fig. 1: methods at 1, 5 and 10 % and all labels.",
    "table3": "The paper's Table 3 on AbdomenCT-1K: methods at 1, 5 and 10 % and all labels.",
    "table4": "The paper's Table 4 (5 with AbdomenCT-1K): without VLM, memory, feedback at 1 %.",
}.items():
    _table_command(_name, _what)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    split: Annotated[str, typer.Option(help="Split file of the patients to score.")] = "splits/test.txt",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Score a run's best teacher on the patients of a split."""
    from vessa.report.tables import Row, table
    from vessa_trainer.data.splits import cases_of
    from vessa_trainer.semi_supervised.trainer import evaluate as score
    from vessa_trainer.students.inference import load_best

    config = _config(run / "config.yaml", None, data=data)
    dataset = open_dataset(config.data.root)
    model, channels, classes = load_best(run, config)
    if classes != dataset.classes:
        raise InvalidDataset(
            f"the run knows the classes {classes}, the data set has {dataset.classes}: scores would mislead"
        )
    scores = score(model, dataset, cases_of(dataset, dataset.split(split)), config, channels)
    shown = table([Row(config.semi.method, [scores])])
    for line in [shown.header, *shown.lines]:
        _console.print("  ".join(f"{c:<24}" for c in line), highlight=False)
    _finish(scores.to_dict(), as_json)


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
    flips: Annotated[bool, typer.Option("--flips", help="Average over mirror images: slower.")] = False,
    axis: Annotated[
        str, typer.Option(help="How volumes are cut: auto, axial, coronal or sagittal.")
    ] = "auto",
    nifti: Annotated[bool, typer.Option("--nifti", help="NIfTI for DICOM, too.")] = False,
    as_json: Json = False,
) -> None:
    """Segment images and volumes with a run's best teacher. What is there already is skipped."""
    from vessa_trainer.prediction.predict import predict as run_on

    result = run_on(run, source, out, _console, flips=flips, axis=axis, nifti=nifti)
    _console.print(f"{result['masks']} masks in {out}, {result['skipped']} were there", highlight=False)
    _finish(result, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    out: Annotated[Path, typer.Argument(help="The .onnx file.")],
    as_json: Json = False,
) -> None:
    """Write a run's best teacher as ONNX, and check that it computes the same."""
    from vessa_trainer.prediction.onnx_export import export as write

    result = write(run, out)
    _console.print(f"{out}: differs by at most {result['difference']:.1e}", highlight=False)
    _finish(result, as_json)


@app.command()
def verify(
    data: Annotated[Path, typer.Argument(help="Data folder.")],
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Split files that must not overlap.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find what would spoil training: sizes, class ids, empty masks, duplicates, patients in two splits."""
    dataset = open_dataset(data)
    names = splits or [
        n for n in ("splits/train.txt", "splits/val.txt", "splits/test.txt") if (data / n).is_file()
    ]
    findings = find_faults(dataset, {n: dataset.split(n) for n in names})
    for finding in findings:
        color = "red" if finding.severity == "error" else "yellow"
        _console.print(f"{finding.severity}: {finding.kind}: {finding.where}: {finding.message}", style=color)
    errors = sum(f.severity == "error" for f in findings)
    _console.print(f"{len(dataset.slices())} images, {errors} errors, {len(findings) - errors} warnings")
    _finish(
        {"images": len(dataset.slices()), "errors": errors, "findings": [vars(f) for f in findings]}, as_json
    )
    if errors:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; a VessaError becomes one clear line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop` saves the run as Ctrl-C does
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=_console)])
    logging.getLogger("stamina").setLevel(logging.ERROR)  # it says that it tries again, but not why
    try:
        app()
    except VessaError as error:
        _console.print(f"vessa-trainer: {error.code}: {error}", style="red", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
