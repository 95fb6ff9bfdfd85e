"""Send a run's figures to TensorBoard and to the trackers that a config names."""

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from vessa.errors import InvalidConfig
from vessa_trainer.config import Config, shareable

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """A destination for figures."""

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step by their names."""
        ...

    def close(self) -> None:
        """Write pending figures."""
        ...


class TensorBoard:
    """Write event files for TensorBoard into the run directory."""

    def __init__(self, run: Path, step: int) -> None:
        """Open the files. step: the run's step; events after it, of an earlier start, are dropped."""
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step by their names."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write pending figures."""
        self._writer.close()


class MlflowTracker:
    """Send figures to an MLflow run at MLFLOW_TRACKING_URI; a resumed run keeps its id."""

    def __init__(self, run: Path, name: str, parameters: Mapping[str, Any]) -> None:
        self._mlflow = _library("mlflow")
        known = run / "mlflow-run"
        run_id = known.read_text() if known.is_file() else None
        self._mlflow.start_run(run_id=run_id, run_name=name)
        if run_id is None:
            known.write_text(self._mlflow.active_run().info.run_id)
            self._mlflow.log_params(dict(parameters))

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step by their names."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WandbTracker:
    """Send figures to Weights & Biases, which reads WANDB_MODE, WANDB_PROJECT and its key itself."""

    def __init__(self, run: Path, name: str, parameters: Mapping[str, Any]) -> None:
        wandb = _library("wandb")
        known = run / "wandb-run"
        run_id = known.read_text() if known.is_file() else None
        resume = None if run_id is None else "allow"
        self._run = wandb.init(
            id=run_id, resume=resume, name=name, dir=str(run), config=dict(parameters), reinit=True
        )
        known.write_text(self._run.id)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures of a step by their names."""
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InvalidConfig(
            f"trackers names '{name}', which is not installed: pip install 'vessa-trainer[{name}]'"
        ) from None


class Tracking:
    """Send figures to all trackers of a config; only the first of several processes sends."""

    def __init__(self, config: Config, step: int, *, first: bool) -> None:
        """Open all trackers. step: the run's step. Raises InvalidConfig when a library is missing."""
        self._trackers: list[Tracker] = []
        if not first:
            return
        run = Path(config.out)
        name = f"{config.title or config.semi.method}, seed {config.seed}"
        parameters = _flat(config)
        self._trackers.append(TensorBoard(run, step))
        kinds: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
            "mlflow": MlflowTracker,
            "wandb": WandbTracker,
        }
        for tracker in config.trackers:
            self._trackers.append(kinds[tracker](run, name, parameters))

    def add(self, group: str, figures: Mapping[str, float], step: int) -> None:
        """Send figures as group/name. A tracker that fails is dropped with a warning."""
        named = {f"{group}/{name}": value for name, value in figures.items()}
        for tracker in list(self._trackers):
            try:
                tracker.add(named, step)
            except (
                Exception
            ) as error:  # Any error of a tracker: a run must not stop because of its dashboard.
                self._trackers.remove(tracker)
                _log.warning("%s failed and receives no more figures: %s", type(tracker).__name__, error)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:  # see `add`
                _log.warning("%s was not closed: %s", type(tracker).__name__, error)


def _flat(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in shareable(config).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": v for inner, v in value.items() if inner != "api_key"}
        else:
            flat[key] = value
    return flat
