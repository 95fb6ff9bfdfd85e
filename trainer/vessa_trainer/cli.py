"""Run the trainer from the command line: plan, fit, compare, predict and the rest."""

import json
import logging
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from vessa.errors import VessaError
from vessa.redaction import redact
from vessa_trainer.config import DEFAULT_METHODS, Config, load_config, shipped

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of one experiment, or a shipped config: quick, standard, full."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting, as section.key=value; repeatable.")
]
Data = Annotated[Path | None, typer.Option(help="Data folder.")]
Labeled = Annotated[str | None, typer.Option(help="Split file of the labeled patients.")]
Student = Annotated[str | None, typer.Option(help="unet or dpt.")]
Steps = Annotated[int | None, typer.Option(help="Training iterations.")]
Out = Annotated[Path | None, typer.Option(help="Run directory.")]
Url = Annotated[str | None, typer.Option(help="Address of the annotator.")]
Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help="Address of the annotator; repeatable. A method uses the first that fits its config, "
        "or the first of all.",
    ),
]
Seeds = Annotated[int, typer.Option(help="Number of random seeds, 0 to N-1.", min=1)]


def _config(file: Path | None, overrides: list[str] | None, **given: object) -> Config:
    names = {
        "data": "data.root",
        "labeled": "data.labeled",
        "student": "student.name",
        "url": "annotator.url",
    }
    # Quoted, because YAML reads a folder called 2024 as a number.
    named = [
        f"{names.get(k, k)}={v if isinstance(v, int) else json.dumps(str(v), ensure_ascii=False)}"
        for k, v in given.items()
        if v is not None
    ]
    if file is not None and not file.suffix and not file.exists():
        file = shipped(str(file))
    return load_config(file, [*named, *(overrides or [])])


def _say(text: str, style: str | None = None) -> None:
    """Print a text as it is: nothing in it is markup, and a long line is not broken."""
    _console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


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
    seed: Annotated[int | None, typer.Option(help="Random seed of the run.")] = None,
    out: Out = None,
    url: Url = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train one student and write its checkpoints, curves and scores to the run directory."""
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
    summary = train(resolved, resume_line=_command("--resume"), resume=resume, console=_console)
    dice = summary["test"]["mean"]["dice"]
    shown = "not scored: no test mask shows a class" if dice is None else f"{dice:.3f}"
    _say(f"test Dice {shown}; run in {resolved.out}")
    _finish(
        {"dice": dice, "test": summary["test"], "out": resolved.out, "wait_share": summary["wait_share"]},
        as_json,
    )


@app.command()
def plan(
    data: Annotated[Path, typer.Argument(help="Data folder.")],
    out: Annotated[Path, typer.Option(help="YAML file to write, for `fit --config`.")] = Path("plan.yaml"),
    minutes: Annotated[float, typer.Option(help="Minutes that the run may take here.", min=1)] = 120,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Choose size, batch, steps and threads for a data folder and this machine, and write them with reasons.

    A few steps of the network are measured, so that the time of the run is known before it starts.
    """
    from vessa_trainer.experiments.plan import plan_file

    made = plan_file(str(data), overrides or [], minutes, out)
    for line in made.lines():
        _say(line)
    for warning in made.warnings:
        _say(f"warning: {warning}", style="yellow")
    _say(f"written: {out}. Train with: vessa-trainer fit --config {shlex.quote(str(out))} --out RUN")
    result = {"config": str(out), "step_seconds": made.step_s, "seconds": made.seconds}
    _finish(result | {"steps": made.config.steps, "warnings": made.warnings}, as_json)


@app.command()
def labels(
    data: Annotated[Path, typer.Argument(help="Data folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the labels.")],
    labeled: Labeled = None,
    config: ConfigFile = None,
    url: Url = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Write the annotator's labels of a data folder, so that `fit` needs no service.

    Nodes of clusters have no annotator. Train there with
    --set annotator.labels=FOLDER --set feedback.enabled=false.
    """
    from vessa_trainer.experiments.run import make_labels

    resolved = _config(config, overrides, data=data, labeled=labeled, url=url, **{"semi.method": "vessa"})
    result = make_labels(resolved, out, _console)
    _say(
        f"labels of {result['images']} images in {out}: {result['requested']:.0f} requested, "
        f"{result['known']:.0f} were there, {result['failed']:.0f} failed"
    )
    _finish(result, as_json)


@app.command()
def compare(
    config: ConfigFile = None,
    data: Data = None,
    labeled: Annotated[
        list[str] | None,
        typer.Option(help="Split file of the labeled patients; repeatable, one comparison each."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated names of shipped configs, or paths of your own.")
    ] = ",".join(DEFAULT_METHODS),
    student: Student = None,
    steps: Steps = None,
    seeds: Seeds = 3,
    out: Out = None,
    urls: Urls = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train methods with the same steps and seeds, and print one table. Finished runs are not repeated."""
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
        _say(f"{name}: {budget['report']}")
    _finish(result, as_json)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _table_command(name: str, what: str) -> None:
    def command(
        config: ConfigFile = None,
        data: Data = None,
        methods: Annotated[str, typer.Option(help="Comma-separated configs instead of the table's.")] = "",
        percent: Annotated[
            list[float] | None,
            typer.Option(help="Labeled percentage of the training patients; repeatable."),
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

        paper = config is None and student != "unet"  # by default the student of the VESSA paper
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
        _say(f"written: {result['table']}, .csv and .png beside it")
        _finish(result, as_json)

    app.command(name, help=f"{what} Writes Markdown, CSV and a figure; finished runs are not repeated.")(
        command
    )


for _name, _what in {
    "table1": "Table 1 of the VESSA paper: VESSA alone, SAM 2.1 instead of VESSA, VESSA-assisted at 1 %.",
    "table2": "Table 2 of the VESSA paper (ACDC) and its Fig. 1: methods at 1, 5, 10 % and all labels.",
    "table3": "Table 3 of the VESSA paper (AbdomenCT-1K): methods at 1, 5, 10 % and all labels.",
    "table4": "Table 4 of the VESSA paper (Table 5 on AbdomenCT-1K): no VLM, no memory, no feedback; 1 %.",
}.items():
    _table_command(_name, _what)


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
    from vessa_trainer.experiments.evaluate_run import evaluate_run

    method, scores = evaluate_run(run, split, data)
    shown = table([Row(method, [scores])])
    for line in [shown.header, *shown.lines]:
        _say("  ".join(f"{c:<24}" for c in line))
    if scores.mean["dice"] is None:
        _say(f"not scored: no patient of {split} has a mask that shows a class", style="yellow")
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
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over mirrored images; takes four times as long.")
    ] = False,
    axis: Annotated[
        str, typer.Option(help="How volumes are cut: auto (as in training), axial, coronal or sagittal.")
    ] = "auto",
    nifti: Annotated[bool, typer.Option("--nifti", help="NIfTI for DICOM, too.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Without the post-processing that the run chose on validation.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Segment images and volumes with the teacher that a run delivered. Existing masks are skipped."""
    from vessa_trainer.prediction.predict import predict as run_on

    result = run_on(run, source, out, _console, flips=flips, axis=axis, nifti=nifti, postprocess=not raw)
    _say(f"{result['masks']} masks in {out}, {result['skipped']} of them existed")
    for name, why in result["failed"].items():
        _say(f"no mask {name}: {why}", style="red")
    if result["failed"]:
        _say(f"{len(result['failed'])} files could not be segmented", style="red")
    _finish(result, as_json)
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
    _say(f"{out}: differs by at most {result['difference']:.1e}")
    _finish(result, as_json)


@app.command()
def verify(
    data: Annotated[Path, typer.Argument(help="Data folder.")],
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="Split files that must not overlap.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a data folder as `vessa verify` does, and show how a run reads and splits it.

    Prints how images are grouped into patients, which splits are read or drawn, and what each of them holds.
    """
    from vessa_trainer.experiments.verify_data import verify_data

    result = verify_data(data, splits or [])
    for line in result.lines:
        _say(line)
    for severity, line in result.findings_by_kind():
        _say(line, style="red" if severity == "error" else "yellow")
    _say(f"{result.images} images, {result.errors} errors, {len(result.findings) - result.errors} warnings")
    findings = [vars(f) for f in result.findings]
    _finish({"images": result.images, "errors": result.errors, "findings": findings}, as_json)
    if result.errors:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; an error that the user can correct is one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop` saves the run, as Ctrl-C does
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=_console, markup=False, show_time=False, show_path=False)],
    )
    logging.getLogger("stamina").setLevel(logging.ERROR)  # its lines announce retries without the reason
    try:
        app()
    except VessaError as error:
        _fail(error.code, redact(str(error)))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        _fail("cannot_read_or_write", f"{error.strerror or error}:{where}. Correct this and start again")


def _fail(code: str, text: str) -> NoReturn:
    _say(f"vessa-trainer: {code}: {text}", style="red")
    raise SystemExit(1)
