"""Score what a finished run delivers on patients of one's choice."""

from dataclasses import replace
from pathlib import Path

from vessa.errors import InvalidDataset
from vessa.metrics import Scores
from vessa.report.cases import annotated, score_labels
from vessa_trainer.data.splits import PARTS, cases_of
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.experiments.identity import read_identity
from vessa_trainer.prediction.delivery import member_folders, open_run


def evaluate_run(run: Path, split: str, data: Path | None) -> tuple[str, Scores, Scores | None]:
    """Return the method of a run, the scores of its students, and those with what validation chose.

    The latter, with the flips and post-processing that `predict` applies, are None where nothing was chosen.
    split: a split file of the data, or a part of the run's own splits (test, val); data: a data folder in
    place of the run's own. Raises InvalidDataset when the classes are not the run's, or none of the patients
    can be scored.
    """
    delivered = open_run(run)
    config = delivered.members[0].config
    if data is not None:
        config = replace(config, data=replace(config.data, root=str(data)))
    dataset = open_training_data(config.data)
    if delivered.classes != dataset.classes:
        raise InvalidDataset(
            f"the run knows the classes {delivered.classes}, the data set has {dataset.classes}: scores "
            "would mislead"
        )
    identity = read_identity(member_folders(run)[0])
    if split in PARTS and identity is not None and not dataset.has_split(split):
        groups = identity["splits"][split]
    else:
        groups = dataset.split(split)
    cases = annotated(dataset, cases_of(dataset, groups))
    images = {case.name: [dataset.image(s) for s in case.slices] for case in cases}
    plain = {name: delivered.labels(slices, flips=False) for name, slices in images.items()}
    scores = score_labels(dataset, cases, plain)
    if not delivered.flips.used and not delivered.postprocessing.rules:
        return config.semi.method, scores, None
    chosen = plain
    if delivered.flips.used:
        chosen = {name: delivered.labels(slices, flips=True) for name, slices in images.items()}
    cleaned = {name: delivered.postprocessing.apply(slices) for name, slices in chosen.items()}
    return config.semi.method, scores, score_labels(dataset, cases, cleaned)
