"""`vessa watch`: segment the series that arrive in a DICOMweb archive."""

import re
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from vessa.bulk.watch import Journal, Rule, Watcher
from vessa.cli.options import Bank, Json, Key, Url, finish, say
from vessa.cli.volumes import open_archive
from vessa.client import AnnotatorClient
from vessa.errors import Retryable


def watch(
    url: Annotated[
        str, typer.Option(help="DICOMweb root of the archive, such as http://host:8042/dicom-web.")
    ],
    journal: Annotated[
        Path, typer.Option(help="File with a line for each series that was tried; a restart goes on with it.")
    ],
    bank: Bank = "default",
    classes: Annotated[list[str] | None, typer.Option(help="Only these classes; repeatable.")] = None,
    modality: Annotated[str, typer.Option(help="Only series of this modality, such as MR.")] = "",
    description: Annotated[
        str, typer.Option(help="Only series whose description matches this regular expression.")
    ] = "",
    since: Annotated[
        str | None, typer.Option(help="Date of the oldest study, YYYYMMDD; default: yesterday.")
    ] = None,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two rounds.")] = 60.0,
    once: Annotated[bool, typer.Option(help="One round, without waiting for series to be complete.")] = False,
    annotator: Url = None,
    api_key: Key = None,
    as_json: Json = False,
) -> None:
    """Segment new series of a DICOMweb archive and store each DICOM SEG there, until Ctrl-C.

    Credentials of the archive come from the environment, as for `vessa dicomweb`.
    """
    try:
        re.compile(description)
    except re.error as error:
        raise typer.BadParameter(f"--description is no regular expression: {error}") from error
    oldest = since or (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d")
    if not re.fullmatch(r"\d{8}", oldest):
        raise typer.BadParameter(f"--since is a date such as 20261127, got '{oldest}'")
    outcomes: Counter[str] = Counter()
    with open_archive(url) as archive, AnnotatorClient(annotator, api_key) as client:
        known = Journal(journal)
        if known.cut:
            say(f"the last line of {journal} was unfinished and is removed; its series is tried again")
        watcher = Watcher(
            archive, client, Rule(modality, description), known, bank, classes, oldest,
            settled=not once, say=say,
        )  # fmt: skip
        while True:
            try:
                for line in watcher.round():
                    outcomes[line["outcome"]] += 1
                    say(f"{line['outcome']}: series {line['series']}")
            except Retryable as error:
                if once:
                    raise
                say(f"waiting: {error}")
            if once:
                break
            time.sleep(every)
    finish({"journal": str(journal), **outcomes}, as_json)
