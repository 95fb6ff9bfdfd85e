"""Open the data of a run: every file that it needs, its splits, and what identifies it."""

import logging
from dataclasses import dataclass

from rich.console import Console

from vessa_trainer.config import Config
from vessa_trainer.data.examination import Examination, examine
from vessa_trainer.data.overview import overview, require_trainable
from vessa_trainer.data.splits import SplitPlan, plan_splits
from vessa_trainer.data.training_data import TrainingData, open_training_data
from vessa_trainer.experiments.identity import Identity, data_identity

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """The data of a run: opened, split, examined and found fit for training."""

    data: TrainingData
    plan: SplitPlan
    examination: Examination
    identity: Identity

    def announce(self, console: Console | None) -> None:
        """Print images, patients and splits, and log warnings. console: None only logs the warnings."""
        found = overview(self.data, self.plan, self.examination)
        if console is not None:
            console.print("\n".join(found.lines), highlight=False, markup=False, soft_wrap=True)
        for warning in found.warnings:
            _log.warning("%s", warning)


def open_run_data(config: Config) -> RunData:
    """Open every file that a run needs. Raises InvalidDataset that names what would spoil the training."""
    data = open_training_data(config.data)
    plan, examination = plan_splits(data, config.data), examine(data)
    require_trainable(config, plan, examination)
    return RunData(data, plan, examination, data_identity(data, plan, examination))
