"""Find what would spoil a training, and describe how the data are read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vessa.datasets import Dataset, Finding, open_dataset
from vessa.datasets import verify as find_faults
from vessa.errors import InvalidDataset
from vessa_trainer.config import Config
from vessa_trainer.data.examination import Examination, examine
from vessa_trainer.data.overview import overview, require_trainable
from vessa_trainer.data.splits import PARTS, SplitPlan, plan_splits
from vessa_trainer.data.training_data import TrainingData

_SHOWN = 3  # findings of one kind


@dataclass(frozen=True)
class Verification:
    """What `vessa-trainer verify` prints. lines: facts about the data set; images: how many there are."""

    lines: list[str]
    findings: list[Finding]
    images: int

    @property
    def errors(self) -> int:
        """How many findings must be mended."""
        return sum(f.severity == "error" for f in self.findings)

    def findings_by_kind(self) -> list[tuple[str, str]]:
        """Return (severity, line): the first findings of each kind, and how many more there are."""
        shown: Counter[tuple[str, str]] = Counter()
        total = Counter((f.severity, f.kind) for f in self.findings)
        lines = []
        for finding in self.findings:
            kind = (finding.severity, finding.kind)
            shown[kind] += 1
            if shown[kind] <= _SHOWN:
                text = f"{finding.severity}: {finding.kind}: {finding.where}: {finding.message}"
                lines.append((finding.severity, text))
            elif shown[kind] == total[kind]:
                text = f"{finding.severity}: {finding.kind}: {total[kind] - _SHOWN} more; --json lists them"
                lines.append((finding.severity, text))
        return lines


def verify_data(root: Path, split_files: Sequence[str]) -> Verification:
    """Check a data folder. split_files: that must not overlap; none checks those that a run would read."""
    dataset = open_dataset(root)
    images = len(dataset.slices())
    try:
        data = TrainingData(dataset)
    except InvalidDataset as error:
        return Verification([], [Finding("classes", dataset.name, error.message)], images)
    examination = examine(data)
    plan, problem = _plan(data)
    splits = {name: dataset.split(name) for name in split_files}
    if plan is not None and not splits:
        splits = {plan_name(part, plan): getattr(plan.splits, part) for part in PARTS}
    findings = find_faults(dataset, splits)
    found = overview(data, plan, examination)
    findings += [Finding("data", dataset.name, warning, "warning") for warning in found.warnings]
    if problem is not None:
        findings.append(problem)
    elif plan is not None and not any(f.severity == "error" for f in findings):
        findings += _untrainable(plan, examination, dataset)
    return Verification(found.lines, findings, images)


def plan_name(part: str, plan: SplitPlan) -> str:
    """Return the file of a part where it was read from one, else the part's own name."""
    source = plan.sources[part]
    return source if source.endswith((".txt", ".list")) else part


def _plan(data: TrainingData) -> tuple[SplitPlan | None, Finding | None]:
    try:
        return plan_splits(data, Config().data), None
    except InvalidDataset as error:
        return None, Finding("splits", data.name, error.message)


def _untrainable(plan: SplitPlan, examination: Examination, dataset: Dataset) -> list[Finding]:
    try:
        require_trainable(Config(), plan, examination)
    except InvalidDataset as error:
        return [Finding("training", dataset.name, error.message, "warning")]
    return []
