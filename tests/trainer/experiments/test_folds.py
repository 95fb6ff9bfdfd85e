"""Cross-validation: folds draw other patients, and their average is what is delivered."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from vessa.errors import InvalidConfig, InvalidDataset, InvalidWeights
from vessa_trainer.config import DataConfig, load_config
from vessa_trainer.data.splits import plan_splits
from vessa_trainer.data.training_data import open_training_data
from vessa_trainer.experiments.folds import fit_folds
from vessa_trainer.prediction.delivery import open_run
from vessa_trainer.prediction.evaluate_run import evaluate_run
from vessa_trainer.prediction.predict import predict
from vessa_trainer.semi_supervised.trainer import Interrupted
from vessa_trainer.students.inference import load_best, predict_volume

RESUME = "vessa-trainer fit --out here --folds 2 --resume"


def folds_of(folder, count, **settings):
    data = open_training_data(DataConfig(root=str(folder)))
    return [
        plan_splits(data, DataConfig(root=str(folder), folds=count, fold=number, **settings)).splits
        for number in range(count)
    ]


def test_each_annotated_patient_validates_once_and_test_patients_stay(hearts):
    shutil.rmtree(hearts / "splits")
    folds = folds_of(hearts, 5)  # six hearts: one for the test
    assert len({fold.test for fold in folds}) == 1
    validated = [group for fold in folds for group in fold.val]
    assert sorted(validated) == sorted({f"heart00{i}" for i in range(6)} - set(folds[0].test))
    assert len({fold.labeled for fold in folds}) == 5
    for fold in folds:
        assert len({*fold.labeled, *fold.unlabeled, *fold.val, *fold.test}) == 6


def test_folds_of_split_files_keep_the_number_of_labeled_patients(hearts):
    first, second = folds_of(hearts, 2)  # one labeled and one validation patient
    assert (first.labeled, second.labeled) == (second.val, first.val)
    assert first.test == second.test
    with pytest.raises(InvalidDataset, match="3 folds need as many annotated patients .* there are 2"):
        folds_of(hearts, 3)
    with pytest.raises(InvalidConfig, match="data.folds must be 0 or at least 2"):
        load_config(None, ["data.folds=1"])


@pytest.fixture
def folded(tiny):
    return tiny("semi.method=supervised", "steps=2", "eval_every=1", "data.folds=2")


def test_predict_and_evaluate_average_the_students_of_all_folds(folded, dataset, tmp_path):
    summary = fit_folds(folded, resume_line=RESUME, resume=False)
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text()) == summary
    assert len(summary["val_dice"]) == 2
    run = open_run(out)
    images = [dataset.image(s) for s in dataset.cases()[0].slices]
    each = []
    for number in range(2):
        config = load_config(out / f"fold-{number}" / "config.yaml")
        model, channels, _ = load_best(out / f"fold-{number}", config)
        each.append(predict_volume(model, images, config, channels))
    for averaged, first, second in zip(run.probabilities(images, flips=False), *each, strict=True):
        assert np.allclose(averaged, (first + second) / 2, atol=1e-6)
    _, scores, _ = evaluate_run(out, "test", None)
    assert scores.to_dict() == summary["test"]
    options = {"flips": None, "axis": "auto", "nifti": False}
    assert predict(out, dataset.root, tmp_path / "m", Console(quiet=True), **options)["students"] == 2


def test_a_stopped_cross_validation_is_resumed_and_not_used_before(folded, tmp_path, monkeypatch):
    from vessa_trainer.experiments import folds

    whole, calls = folds.fit, []

    def stopped(config, **options):
        calls.append(config.out)
        if len(calls) == 2:
            raise Interrupted("stopped")
        return whole(config, **options)

    monkeypatch.setattr(folds, "fit", stopped)
    with pytest.raises(Interrupted):
        fit_folds(folded, resume_line=RESUME, resume=False)
    with pytest.raises(InvalidWeights, match="not all folds are trained"):
        open_run(tmp_path / "run")
    with pytest.raises(InvalidConfig, match="Use --resume"):
        fit_folds(folded, resume_line=RESUME, resume=False)
    first = (tmp_path / "run" / "fold-0" / "best.safetensors").stat().st_mtime_ns
    assert len(fit_folds(folded, resume_line=RESUME, resume=True)["val_dice"]) == 2
    assert (tmp_path / "run" / "fold-0" / "best.safetensors").stat().st_mtime_ns == first
