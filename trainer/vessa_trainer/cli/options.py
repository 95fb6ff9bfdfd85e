"""Options that the trainer's commands share, and how commands print."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vessa.redaction import redact
from vessa_trainer.config import Config, load_config, shipped

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Run the trainer from the command line: plan, fit, compare, predict and the rest.",
)
console = Console(stderr=True)

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


def read_config(file: Path | None, overrides: list[str] | None, **given: object) -> Config:
    """Read a config by file or shipped name, and apply the options of a command, then --set."""
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


def say(text: str, style: str | None = None) -> None:
    """Print a text as it is: nothing in it is markup, and a long line is not broken."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """End a command, with --json by its result on one line."""
    if as_json:
        print(json.dumps(result))


def command_line(*extra: str) -> str:
    """Return the line that runs this command again, with more arguments and without secrets."""
    arguments = [a for a in sys.argv[1:] if a not in extra]
    return redact("vessa-trainer " + shlex.join([*arguments, *extra]))
