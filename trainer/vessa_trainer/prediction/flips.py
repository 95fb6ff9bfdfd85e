"""Choose on validation patients whether predictions are averaged over mirrored images."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vessa import atomic_write

FILE = "flips.json"
_GAIN = 0.002  # mean Dice on validation that mirrored views must add: less is chance, at four times the work


@dataclass(frozen=True)
class FlipChoice:
    """Whether a run's predictions average over mirrored images.

    used: the choice; before, after: mean validation Dice without and with mirrored images, None while not
    scored
    """

    used: bool = False
    before: float | None = None
    after: float | None = None

    def write(self, run: Path) -> None:
        """Write the choice into a run's folder."""
        atomic_write.write_text(run / FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, run: Path) -> "FlipChoice":
        """Read a run's choice; a run without any does not mirror."""
        path = run / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()


def choose_flips(before: float | None, after: float | None) -> FlipChoice:
    """Choose mirrored images where they add Dice on validation: a mirrored heart is another organ."""
    gains = before is not None and after is not None and after >= before + _GAIN
    return FlipChoice(gains, before, after)
