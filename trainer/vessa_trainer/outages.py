"""Record outages of services during a run in its folder, so that a kill loses no record."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = "incidents.jsonl"
TRAINER, ANNOTATOR, CACHE = "trainer", "annotator", "label cache"


class Incidents:
    """Notes when something goes away and when it is back, a line each, also from several threads."""

    def __init__(self, run: Path) -> None:
        """Use a run's folder, which is made with the first note."""
        self.path = run / FILE

    def away(self, what: str, why: str, at: datetime | None = None) -> None:
        """Note that something went away. at: when, with a zone; None is now."""
        self._note({"what": what, "away": True, "why": why}, at)

    def back(self, what: str) -> None:
        """Note that it is back."""
        self._note({"what": what, "away": False}, None)

    def _note(self, row: Mapping[str, Any], at: datetime | None) -> None:
        when = (at or datetime.now(UTC)).isoformat(timespec="milliseconds")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": when, **row}) + "\n")


def interruptions(run: Path) -> list[dict[str, Any]]:
    """What a run lived through: {"what", "began", "seconds", "why"} in the order of their beginning.

    seconds: None where nobody saw the end, because the run ended or was killed before.
    """
    path = run / FILE
    found: list[dict[str, Any]] = []
    open_: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        if row["away"]:
            open_[row["what"]] = {"what": row["what"], "began": row["at"], "seconds": None, "why": row["why"]}
            found.append(open_[row["what"]])
        elif (one := open_.pop(row["what"], None)) is not None:
            lasted = datetime.fromisoformat(row["at"]) - datetime.fromisoformat(one["began"])
            one["seconds"] = round(lasted.total_seconds(), 1)
    return sorted(found, key=lambda one: str(one["began"]))
