"""Use an annotator: fill banks, segment images and volumes, annotate folders, check data."""

import logging
import sys

import typer

from vessa.cli.banks import adapt, banks, seed
from vessa.cli.folders import annotate, suggest
from vessa.cli.options import complain
from vessa.cli.segment import annotation, segment
from vessa.cli.verify import verify
from vessa.cli.volumes import dicomweb
from vessa.cli.watch import watch
from vessa.errors import VessaError
from vessa.redaction import argument_warning

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for _command in (seed, segment, annotation, annotate, suggest, banks, adapt, verify, dicomweb, watch):
    app.command()(_command)


def main() -> None:
    """Run the command line; a VessaError or an OSError becomes one line on stderr and exit code 1."""
    logging.getLogger("stamina").setLevel(logging.ERROR)  # its log lines do not name the cause of a retry
    if warning := argument_warning(sys.argv[1:]):
        complain(f"warning: {warning}")
    try:
        app()
    except VessaError as error:
        complain(f"{error.code}: {error}")
        raise SystemExit(1) from error
    except OSError as error:
        complain(f"{error.filename or 'input or output'}: {error.strerror or error}")
        raise SystemExit(1) from error
