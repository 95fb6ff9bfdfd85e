"""Figures of a run: in TensorBoard always, elsewhere when a config says so."""

import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vessa.errors import InvalidConfig
from vessa_trainer.reporting.trackers import Tracking


def add(config, step, value, **options):
    with Tracking(config, step, first=True, **options) as tracking:
        tracking.add("train", {"loss": value}, step + 1)


def test_tensorboard_forgets_what_a_run_that_is_taken_up_writes_again(tiny, tmp_path):
    config = tiny()
    for step, value in ((0, 3.0), (1, 2.0), (2, 1.5), (1, 2.5)):
        add(config, step, value)
        time.sleep(1.1)  # files of one second are read in the order of a counter without leading zeros
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 3.0), (2, 2.5)]


def test_of_several_processes_only_the_first_writes(tiny, tmp_path):
    with Tracking(tiny(), 0, first=False) as tracking:
        tracking.add("train", {"loss": 1.0}, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_said(tiny, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidConfig, match=rf"'{name}', which is not installed: pip install 'vessa-tra"):
        Tracking(tiny(f"trackers=[{name}]"), 0, first=True)


def test_an_unknown_tracker_is_refused(tiny):
    with pytest.raises(InvalidConfig, match="trackers must be one of 'mlflow', 'wandb', got 'comet'"):
        tiny("trackers=[comet]")


@pytest.mark.filterwarnings("default")
def test_mlflow_keeps_a_run_under_one_id(tiny, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not in the lock")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'store'}")
    (tmp_path / "run").mkdir()
    for step in (0, 2):
        add(tiny("trackers=[mlflow]"), step, 1.0)
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.data.params["semi.method"] == "unimatch_v2"
    assert [m.step for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")] == [1, 3]


@pytest.mark.filterwarnings("default")
def test_wandb_works_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not in the lock")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    for step in (0, 2):
        add(tiny("trackers=[wandb]"), step, 1.0)
    name = (tmp_path / "run" / "wandb-run").read_text()
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))) == 2
