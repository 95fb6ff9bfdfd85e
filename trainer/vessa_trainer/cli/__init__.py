"""Run the trainer from the command line."""

import logging
import signal
import sys
from typing import NoReturn

from rich.logging import RichHandler

from vessa.errors import VessaError
from vessa.redaction import argument_warning, redact
from vessa_trainer.cli import experiments, prediction
from vessa_trainer.cli.options import app, console, say

__all__ = ["app", "experiments", "main", "prediction"]


def main() -> None:
    """Run the command line; an error that the user can correct is one line and exit code 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `docker stop` saves the run, as Ctrl-C does
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, markup=False, show_time=False, show_path=False)],
    )
    logging.getLogger("stamina").setLevel(logging.ERROR)  # its lines announce retries without the reason
    if warning := argument_warning(sys.argv[1:]):
        say(f"vessa-trainer: warning: {warning}", style="red")
    try:
        app()
    except VessaError as error:
        _fail(error.code, redact(str(error)))
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        _fail("cannot_read_or_write", f"{error.strerror or error}:{where}. Correct this and start again")


def _fail(code: str, text: str) -> NoReturn:
    say(f"vessa-trainer: {code}: {text}", style="red")
    raise SystemExit(1)
