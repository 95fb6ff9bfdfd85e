"""Segment the series that arrive in a DICOMweb archive, and store their DICOM SEG there.

A journal has one line for each series that was tried: it says what was done, by when, and what to leave alone
after a restart. It names no patient; UIDs of studies may still lead to one.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vessa.client import AnnotatorClient
from vessa.errors import DeadlineExceeded, InvalidConfig, Retryable, VessaError
from vessa.volumes.dicom.segmentation import SERIES_DESCRIPTION
from vessa.volumes.dicomweb import NO_IMAGES, Archive, ArchiveSeries

ATTEMPTS = 3  # of a series that fails for a reason that does not pass by itself


@dataclass(frozen=True)
class Rule:
    """Say which series are segmented.

    modality: such as MR; empty: any image. description: regular expression that the series description holds
    """

    modality: str = ""
    description: str = ""

    def matches(self, series: ArchiveSeries) -> bool:
        """Return whether a series is to be segmented."""
        if self.modality and series.modality != self.modality:
            return False
        return series.modality not in NO_IMAGES and bool(
            re.search(self.description, series.description, re.I)
        )


class Journal:
    """Remember on disk what was done with each series. One process writes a journal at a time."""

    def __init__(self, path: Path) -> None:
        """Read a journal, or begin one. Raises InvalidConfig for a damaged one.

        A last line that a power cut left unfinished is removed: its series is tried again.
        """
        self.path = path
        self.cut = _cut_unfinished(path) if path.exists() else False
        self._failures: Counter[str] = Counter()
        self._done: set[str] = set()
        self.stored: set[str] = set()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                self._count(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise InvalidConfig(
                    f"Line {number} of the journal {path} is damaged. Remove it, or name another --journal."
                ) from None

    def open(self, series: ArchiveSeries) -> bool:
        """Return whether a series is still to be done."""
        return series.uid not in self._done and self._failures[series.uid] < ATTEMPTS

    def write(self, series: ArchiveSeries, outcome: str, **more: Any) -> dict[str, Any]:
        """Add a line, which is on the disk before this returns.

        outcome: stored, present or failed
        """
        time = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": time, "study": series.study, "series": series.uid, "outcome": outcome, **more}
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._count(line)
        return line

    def _count(self, line: dict[str, Any]) -> None:
        if line["outcome"] == "failed":
            self._failures[line["series"]] += 1
        else:
            self._done.add(line["series"])
        if line.get("stored"):
            self.stored.add(line["stored"])


@dataclass(eq=False)
class Watcher:
    """Look through an archive again and again.

    bank, classes: what is segmented; since: date of the oldest study, YYYYMMDD
    settled: whether a series must have as many files as a round before, because it may still arrive
    """

    archive: Archive
    client: AnnotatorClient
    rule: Rule
    journal: Journal
    bank: str
    classes: list[str] | None
    since: str
    settled: bool = True
    say: Callable[[str], None] = print
    _counts: dict[str, str] = field(default_factory=dict)

    def round(self) -> Iterator[dict[str, Any]]:
        """Segment what is new, and yield each line of the journal. Raises Retryable when it must wait."""
        found = self.archive.series_since(self.since)
        before, self._counts = self._counts, {series.uid: series.count for series in found}
        for series in found:
            if not self.rule.matches(series) or not self.journal.open(series):
                continue
            if self.settled and before.get(series.uid) != series.count:
                continue
            if self._segmented_by_others(series, found):
                yield self.journal.write(series, "present")
                continue
            try:
                stored = self._segment(series)
            except VessaError as error:
                # A series that takes too long once takes too long again, and would hold up all others.
                if isinstance(error, Retryable) and not isinstance(error, DeadlineExceeded):
                    raise
                self.say(f"series {series.uid} failed: {error}")
                yield self.journal.write(series, "failed", error=error.code)
                continue
            yield self.journal.write(series, "stored", stored=stored, bank=self.bank)

    def _segmented_by_others(self, series: ArchiveSeries, found: list[ArchiveSeries]) -> bool:
        """Return whether the study has a segmentation of ours that this journal does not know."""
        return any(
            one.study == series.study
            and one.modality == "SEG"
            and one.description == SERIES_DESCRIPTION
            and one.uid not in self.journal.stored
            for one in found
        )

    def _segment(self, series: ArchiveSeries) -> str:
        with TemporaryDirectory(prefix="vessa-watch-") as folder:
            files = Path(folder) / "series"
            self.archive.retrieve(series.study, series.uid, files)
            data = self.client.segment_volume(files, bank=self.bank, classes=self.classes, result="dicom-seg")
        return self.archive.store(data)


def _cut_unfinished(path: Path) -> bool:
    """Remove a last line without its end; returns whether there was one."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) == len(data):
        return False
    os.truncate(path, len(whole))
    return True
