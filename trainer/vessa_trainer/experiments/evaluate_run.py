"""Score the delivered teacher of a finished run on patients of one's choice."""

from dataclasses import replace
from pathlib import Path

from vessa.errors import InvalidDataset
from vessa.metrics import Scores
from vessa_trainer.config import load_config
from vessa_trainer.data.splits import PARTS, cases_of
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.experiments.identity import read_identity
from vessa_trainer.semi_supervised.trainer import evaluate
from vessa_trainer.students.inference import load_best


def evaluate_run(run: Path, split: str, data: Path | None) -> tuple[str, Scores]:
    """Return the method of a run and its scores.

    split: a split file of the data, or a part of the run's own splits (test, val); data: a data folder in
    place of the run's own. Raises InvalidDataset when the classes are not the run's, or none of the patients
    can be scored.
    """
    config = load_config(run / "config.yaml")
    if data is not None:
        config = replace(config, data=replace(config.data, root=str(data)))
    dataset = open_training_data(config.data)
    model, channels, classes = load_best(run, config)
    if classes != dataset.classes:
        raise InvalidDataset(
            f"the run knows the classes {classes}, the data set has {dataset.classes}: scores would mislead"
        )
    identity = read_identity(run)
    if split in PARTS and identity is not None and not dataset.has_split(split):
        groups = identity["splits"][split]
    else:
        groups = dataset.split(split)
    return config.semi.method, evaluate(model, dataset, cases_of(dataset, groups), config, channels)
