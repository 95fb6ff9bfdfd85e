"""Write the reports of a finished run: progress.png, report.html, summary.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vessa import atomic_write
from vessa.datasets import Dataset
from vessa.report.cases import Overlay
from vessa.report.page import Page
from vessa.report.tables import Row, cards, missed, scores_from, table
from vessa_trainer.reporting.plots import progress_figure, read_metrics, write_progress

SUMMARY = "summary.json"  # the last file that a run writes
_MOST_LINES = 20


def write_run_report(
    run: Path, summary: Mapping[str, Any], pictures: Sequence[Overlay], dataset: Dataset
) -> None:
    """Write progress.png, report.html and, last of all, summary.json of one finished run.

    A run of 0 steps trained nothing: it has scores, but no curves.
    """
    name, trained = f"{summary['method']}, seed {summary['seed']}", summary["steps"] > 0
    rows = [Row(part, [scores_from(summary[key])]) for key, part in (("val", "validation"), ("test", "test"))]
    rows += [
        Row(f"{part}, {how}", [scores_from(summary[f"{key}_{suffix}"])])
        for suffix, how in (("delivered", "as predict delivers"), ("fused", "fused with VESSA"))
        for key, part in (("val", "validation"), ("test", "test"))
        if f"{key}_{suffix}" in summary
    ]
    groups = summary["groups"]
    page = Page(f"{dataset.name}: {name}")
    page.lead(
        f"{groups['labeled']} labeled, {groups['unlabeled']} unlabeled, {groups['val']} validation and "
        f"{groups['test']} test patients; "
        + (
            f"{summary['steps']} steps; {_selection(summary)}."
            if trained
            else "the annotator's own labels, nothing is trained."
        )
    )
    page.cards(cards([Row("test", rows[1].seeds)]))
    page.heading("Scores of the delivered teacher" if trained else "Scores")
    scores = table(rows)
    page.table(scores.header, scores.lines, set())
    page.note(missed(rows))
    if (flips := summary.get("flips")) and flips["before"] is not None:
        page.note(
            f"predict {'averages' if flips['used'] else 'does not average'} over mirrored images: validation "
            f"Dice {flips['before']:.3f} without them, {flips['after']:.3f} with them."
        )
    if rules := summary.get("postprocessing"):
        page.note(
            f"predict applies post-processing that was chosen on the validation patients: {_rules(rules)}."
        )
    if fusion := summary.get("fusion"):
        page.note(
            f"predict --with-vessa fuses the student with VESSA's labels at weight {fusion['weight']}: "
            f"validation Dice {fusion['before']:.3f} of the student alone, {fusion['after']:.3f} fused."
        )
    if curve := (summary["feed"] or {}).get("reliability"):
        page.heading("Confidence of VESSA's labels")
        shares = [[f"{b[k]:.3f}" for k in ("confidence", "right", "share")] for b in curve]
        page.table(["mean confidence", "share right", "share of pixels"], shares, set())
        page.note(
            "Pixels of unlabeled patients with existing masks, where label or mask shows a structure. "
            "The masks are never learned from. "
            f"Expected calibration error {summary['feed']['label_ece']:.3f}."
        )
    if summary["advice"]:
        page.heading("What to look at")
        lines = [[one["kind"], str(one["step"]), one["text"]] for one in summary["advice"]]
        page.table(["warning", "from step", "what it says"], lines, set())
    if changes := (summary["annotator"] or {}).get("changes"):
        page.heading("The annotator changed during the run")
        page.table(["change"], [[text] for text in changes], set())
    page.overlays(pictures, dataset.classes)
    if summary["interruptions"]:
        page.heading("Interruptions")
        header, lines = interruption_table(summary["interruptions"])
        page.table(header, lines, set())
        page.note(
            "No data was lost: steps were repeated from the last checkpoint and labels requested again."
        )
    if trained:
        write_progress(run, name)
        page.heading("Training")
        page.figures([progress_figure(read_metrics(run), name)])
    page.details("Configuration and counts", summary)
    page.write(run / "report.html")
    atomic_write.write_text(run / SUMMARY, json.dumps(summary, indent=1) + "\n")


def _rules(rules: Mapping[str, Any]) -> str:
    """Describe post-processing class by class."""
    texts = []
    for name, rule in rules.items():
        what = "the largest component" if rule["largest"] else f"components of {rule['smallest']} px or more"
        texts.append(f"{name}: {what} (validation Dice {rule['before']:.3f} to {rule['after']:.3f})")
    return "; ".join(texts)


def _selection(summary: Mapping[str, Any]) -> str:
    """Say which teacher the run delivers, and why."""
    if summary["selected_by"].startswith("none"):
        return f"the teacher of the last step is delivered, {summary['selected_by'].removeprefix('none: ')}"
    return f"the best teacher on the validation patients is that of step {summary['best_step']}"


def interruption_table(found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of what went away during a run, and for how long."""
    lines = []
    for one in found[:_MOST_LINES]:
        lasted = "its end was not seen" if one["seconds"] is None else f"{one['seconds']:.0f} s"
        began = one["began"].replace("T", " ")[:19] + " UTC"
        lines.append([one["what"], began, lasted, one["why"]])
    if len(found) > _MOST_LINES:
        lines.append([f"{len(found) - _MOST_LINES} more", "", "", "see summary.json"])
    return ["what was away", "since", "for", "why"], lines
