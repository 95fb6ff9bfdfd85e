"""Commands of experiments: verify, plan, labels, fit, compare and the paper's tables."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from vessa_trainer.cli.options import (
    ConfigFile,
    Data,
    Json,
    Labeled,
    Out,
    Seeds,
    Set,
    Steps,
    Student,
    Url,
    Urls,
    app,
    command_line,
    console,
    finish,
    read_config,
    say,
)
from vessa_trainer.config import DEFAULT_METHODS, shipped


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
    from vessa_trainer.data.verification import verify_data

    result = verify_data(data, splits or [])
    for line in result.lines:
        say(line)
    for severity, line in result.findings_by_kind():
        say(line, style="red" if severity == "error" else "yellow")
    say(f"{result.images} images, {result.errors} errors, {len(result.findings) - result.errors} warnings")
    findings = [vars(f) for f in result.findings]
    finish({"images": result.images, "errors": result.errors, "findings": findings}, as_json)
    if result.errors:
        raise typer.Exit(1)


@app.command()
def plan(
    data: Annotated[Path, typer.Argument(help="Data folder.")],
    out: Annotated[Path, typer.Option(help="YAML file to write, for `fit --config`.")] = Path("plan.yaml"),
    minutes: Annotated[float, typer.Option(help="Minutes that the run may take here.", min=1)] = 120,
    schedule: Annotated[
        str | None, typer.Option(help="quick, standard or full; by default the longest that fits.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Address of the annotator, to measure it too. This fills the run's bank."),
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Choose a schedule for a data folder and this machine, and write it with reasons.

    A few steps, a validation and, with --url, a few labels are measured, so that the time of the run is known
    before it starts.
    """
    from contextlib import AbstractContextManager, nullcontext

    from vessa.client import AnnotatorClient
    from vessa_trainer.experiments.plan import plan_file

    annotator: AbstractContextManager[AnnotatorClient | None] = nullcontext()
    if url is not None:
        annotator = AnnotatorClient(url)
    with annotator as client:
        made = plan_file(str(data), overrides or [], minutes, out, schedule=schedule, client=client)
    for line in made.lines():
        say(line)
    for warning in made.warnings:
        say(f"warning: {warning}", style="yellow")
    say(f"written: {out}. Train with: vessa-trainer fit --config {shlex.quote(str(out))} --out RUN")
    figures = {"schedule": made.schedule, "config": str(out), "seconds": made.estimate.seconds}
    figures |= {"step_seconds": made.estimate.step_s, "label_seconds": made.estimate.label_s}
    finish(figures | {"steps": made.config.steps, "warnings": made.warnings}, as_json)


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

    resolved = read_config(config, overrides, data=data, labeled=labeled, url=url, **{"semi.method": "vessa"})
    result = make_labels(resolved, out, console)
    say(
        f"labels of {result['images']} images in {out}: {result['requested']:.0f} requested, "
        f"{result['known']:.0f} were there, {result['failed']:.0f} failed"
    )
    finish(result, as_json)


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
    folds: Annotated[
        int | None,
        typer.Option(help="Train a student for each of N folds of the annotated patients.", min=2),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train one student and write its checkpoints, curves and scores to the run directory.

    With --folds, one for each fold of a cross-validation; `predict` averages them.
    """
    from vessa_trainer.experiments.folds import fit_folds
    from vessa_trainer.experiments.run import fit as train

    resolved = read_config(
        config,
        overrides,
        data=data,
        labeled=labeled,
        student=student,
        steps=steps,
        seed=seed,
        out=out,
        url=url,
        **{"semi.method": method, "data.folds": folds},
    )
    if resolved.data.folds:
        result = fit_folds(resolved, resume_line=command_line("--resume"), resume=resume, console=console)
        say(f"{result['report']}: {result['text']}")
        finish(result, as_json)
        return
    summary = train(resolved, resume_line=command_line("--resume"), resume=resume, console=console)
    dice = summary["test"]["mean"]["dice"]
    shown = "not scored: no test mask shows a class" if dice is None else f"{dice:.3f}"
    say(f"test Dice {shown}; run in {resolved.out}")
    finish(
        {"dice": dice, "test": summary["test"], "out": resolved.out, "wait_share": summary["wait_share"]},
        as_json,
    )


@app.command("second-round")
def second_round(
    run: Annotated[Path, typer.Argument(help="Finished run of method vessa.")],
    out: Annotated[Path, typer.Option(help="Folder of the second run.")],
    url: Url = None,
    candidates: Annotated[
        int, typer.Option(help="Unlabeled patients that are tried as templates, drawn at random.", min=1)
    ] = 24,
    templates: Annotated[int, typer.Option(help="Patients of them that join the bank.", min=1)] = 8,
    as_json: Json = False,
) -> None:
    """Train again with a bank that the first student's best volumes joined, if that improves the labels.

    A volume is the better a template, the better the annotated slices can be segmented back from it. The
    validation patients decide whether the new labels are used, and which of the two students is better.
    """
    from vessa_trainer.experiments.second_round import second_round as train

    result = train(
        run,
        out,
        url=url,
        candidates=candidates,
        templates=templates,
        resume_line=command_line(),
        console=console,
    )
    say(
        f"validation Dice of the labels {result['label_dice_before']:.3f} with the first bank, "
        f"{result['label_dice_after']:.3f} with {len(result['templates'])} predicted patients besides"
    )
    if result["second"] is None:
        say("no gain: no second student was trained")
    else:
        say(
            f"validation Dice of the student {result['first_val_dice']:.3f} in the first round, "
            f"{result['second_val_dice']:.3f} in the second; predict with {result['selected']}"
        )
    finish(result, as_json)


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

    resolved = read_config(config, overrides, data=data, student=student, steps=steps, out=out)
    result = run(
        resolved,
        seeds=seeds,
        resume_line=command_line(),
        console=console,
        methods=_names(methods),
        labeled=labeled or [],
        urls=urls or [],
    )
    for name, budget in result.get("budgets", {"report": result}).items():
        say(f"{name}: {budget['report']}")
    finish(result, as_json)


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
        resolved = read_config(
            shipped("dpt") if paper else config, overrides, data=data, student=student, steps=steps, out=out
        )
        result = run_table(
            name,
            resolved,
            seeds=seeds,
            urls=urls or [resolved.annotator.url],
            resume_line=command_line(),
            console=console,
            methods=_names(methods),
            percents=percent or [],
        )
        say(f"written: {result['table']}, .csv and .png beside it")
        finish(result, as_json)

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
