"""Diagnose a run from the rows of metrics.jsonl, by pure functions.

All use the last `WINDOW` validations, so that one bad validation gives no warning. Limits are in Dice. The
mean over ten validation patients that differ by 0.1 has a standard error of 0.03: a gap of 0.05 in three
validations in a row is unlikely to be chance, and so is a fall by 0.03 of one model on one set of patients.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 3  # validations
GAP = 0.05  # of VESSA's Dice below the teacher's
FALL = 0.03  # of validation Dice over the window
RISE = 0.05  # of the agreement of VESSA and the teacher over the window
WEIGHT = 0.2  # of VESSA's term, below which it hardly teaches
MANY = 10  # batches in which a class is looked for

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Advice:
    """A warning. kind, about: identify it; step: at which it first held."""

    kind: str
    about: str
    step: int
    text: str


def advise(rows: Sequence[Row], classes: Mapping[int, str]) -> list[Advice]:
    """Return the warnings that hold at the last validation."""
    at = [
        i
        for i, row in enumerate(rows)
        if "val_teacher" in row and row["val_teacher"]["mean"]["dice"] is not None
    ]
    if len(at) < WINDOW:
        return []
    step = int(rows[at[-1]]["step"])
    seen = [rows[index] for index in at[-WINDOW:]]
    before = at[-WINDOW - 1] if len(at) > WINDOW else -1
    steps = [
        [row for row in rows[start + 1 : end] if "loss" in row]
        for start, end in zip([before, *at[-WINDOW:-1]], at[-WINDOW:], strict=True)
    ]
    found = [*_hurts(seen), *_echo(seen, steps), *_absent([r for part in steps for r in part], classes)]
    return [Advice(kind, about, step, text) for kind, about, text in found]


def over_run(rows: Sequence[Row], classes: Mapping[int, str]) -> list[Advice]:
    """Return the warnings of a whole run, each once, with the step at which it first held."""
    first: dict[tuple[str, str], Advice] = {}
    for index, row in enumerate(rows):
        if "val_teacher" in row:
            for one in advise(rows[: index + 1], classes):
                first.setdefault((one.kind, one.about), one)
    return list(first.values())


def never_labeled(present: Iterable[int], classes: Mapping[int, str]) -> list[Advice]:
    """Return a warning for each class that no labeled mask shows. present: class ids in the masks."""
    there = set(present)
    return [
        Advice(
            "class missing from the labeled images",
            name,
            0,
            f"no labeled image shows '{name}', so the student cannot learn it. Label a patient that has it, "
            "or "
            "remove the class.",
        )
        for class_id, name in classes.items()
        if class_id not in there
    ]


def _dice(row: Row, who: str) -> float:
    return float(row[who]["mean"]["dice"])


def _hurts(seen: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Find VESSA below the teacher in each validation while its labels still have weight."""
    if not all("val_vessa" in row and row["alpha_v"] >= WEIGHT for row in seen):
        return []
    gaps = [_dice(row, "val_teacher") - _dice(row, "val_vessa") for row in seen]
    if min(gaps) < GAP:
        return []
    text = (
        f"on the validation patients VESSA's labels were worse than the teacher's by {min(gaps):.2f} Dice or "
        f"more in {WINDOW} validations in a row, and still have weight {seen[-1]['alpha_v']:.2f}: lower "
        "semi.alpha_v_floor, start feedback earlier, or give the bank more templates."
    )
    return [("VESSA hurts", "", text)]


def _echo(seen: Sequence[Row], steps: Sequence[Sequence[Row]]) -> list[tuple[str, str, str]]:
    """Find a rising agreement of VESSA and the teacher while one of them loses validation Dice."""
    agreement = [[row["agreement"] for row in part if "agreement" in row] for part in steps]
    if not agreement[0] or not agreement[-1]:
        return []
    rise = _mean(agreement[-1]) - _mean(agreement[0])
    falls = {
        name: _dice(seen[0], key) - _dice(seen[-1], key)
        for key, name in (("val_teacher", "the teacher"), ("val_vessa", "VESSA"))
        if all(key in row for row in seen)
    }
    worst = max(falls, key=lambda name: falls[name])
    if rise < RISE or falls[worst] < FALL:
        return []
    text = (
        f"VESSA's labels and the teacher's drift together: over {WINDOW} validations they agree more by "
        f"{rise:.2f} Dice, while {worst} lost {falls[worst]:.2f} on the validation patients. VESSA may "
        "repeat what it is prompted with: try feedback.prompts [boxes] alone, a higher "
        "feedback.min_confidence, or feedback.enabled=false."
    )
    return [("echo", "", text)]


def _absent(steps: Sequence[Row], classes: Mapping[int, str]) -> list[tuple[str, str, str]]:
    """Find classes without a confident pixel in any pseudo-label."""
    found = []
    for source, who in (("teacher", "the teacher"), ("vessa", "VESSA")):
        for class_id, name in classes.items():
            shares = [row[key] for row in steps if (key := f"share_{source}_{class_id}") in row]
            if len(shares) >= MANY and not any(shares):
                text = (
                    f"'{name}' had no confident pixel in the labels of {who} in {len(shares)} batches looked "
                    "at: unlabeled images do not teach it. Look at its templates and its masks, or lower "
                    + ("semi.conf_threshold." if source == "teacher" else "semi.vessa_threshold.")
                )
                found.append((f"class missing from the labels of {who}", name, text))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
