"""Options that several commands share, and what they print to."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from vessa.redaction import redact

console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Url = Annotated[
    str | None, typer.Option(help="Address of the annotator; default: VESSA_URL, then port 8700 here.")
]
Key = Annotated[str | None, typer.Option(help="API key; default: VESSA_API_KEY, then the local key file.")]
Bank = Annotated[str, typer.Option(help="Template bank.")]


def say(text: str) -> None:
    """Print a line to stderr without colors, line breaks and secrets."""
    console.print(redact(text), highlight=False, markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print an error to stderr in red, without secrets."""
    console.print(f"vessa: {redact(text)}", style="red", highlight=False, markup=False, soft_wrap=True)


def progress_bar() -> Progress:
    """Make a progress bar on stderr; it stays silent where stderr is no terminal."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def finish(result: dict[str, Any], as_json: bool) -> None:
    """Print a command's result to stdout if --json is given."""
    if as_json:
        print(json.dumps(result))
