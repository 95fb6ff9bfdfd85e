"""The training loop: a few steps of each method, and what an interruption leaves."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vessa.errors import InvalidConfig, InvalidWeights, Retryable
from vessa_trainer.pseudo_labels.cache import open_cache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.pseudo_labels.template_bank import seed_labeled
from vessa_trainer.semi_supervised import trainer
from vessa_trainer.semi_supervised.trainer import Interrupted, Run, evaluate
from vessa_trainer.students import checkpoint
from vessa_trainer.students.inference import load_best, predict_slices
from vessa_trainer.students.networks import build_student

RESUME = "vessa-trainer fit --out here --resume"


@pytest.fixture
def run_of(client, dataset):
    """Make runs of a config, with a feed of labels where the method wants one."""
    feeds = []

    def make(config):
        feed = None
        if config.semi.method == "vessa":
            bank = seed_labeled(client, dataset, config)
            feed = AnnotationFeed(client, dataset, bank, open_cache(config.cache), config.annotator)
            feeds.append(feed)
        return Run(config, dataset, feed, RESUME)

    yield make
    for feed in feeds:
        feed.close()


def stop_at(step):
    def on_step(now):
        if now == step:
            raise KeyboardInterrupt

    return on_step


def metrics_of(run):
    return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]


def state_of(run):
    """All that the next step depends on, and all that a run has learned."""
    tensors = checkpoint.module_state(run.student, "student")
    tensors |= checkpoint.module_state(run.teacher, "teacher")
    tensors |= checkpoint.optimizer_state(run.optimizer)
    return tensors | {"generator": run.generator.get_state()}


def assert_equal(one, other):
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert (one.step, one.best, one.best_step) == (other.step, other.best, other.best_step)


@pytest.mark.parametrize("method", ["supervised", "unimatch_v2", "vessa"])
def test_a_run_of_each_method_learns_and_is_scored(run_of, tiny, dataset, method):
    run = run_of(tiny(f"semi.method={method}", steps=10))
    before = {k: v.clone() for k, v in run.student.state_dict().items()}
    result = run.train()
    assert result.steps == 10
    assert result.best_step in (2, 4, 6, 8, 10)
    assert any(not torch.equal(v, before[k]) for k, v in run.student.state_dict().items())
    assert set(result.scores["test"].by_class) == set(dataset.classes.values())
    rows = metrics_of(run)
    assert [r["step"] for r in rows if "val_teacher" in r] == [2, 4, 6, 8, 10]
    (last,) = [r for r in rows if "loss" in r]
    assert np.isfinite(last["loss"])
    assert ("loss_vessa" in last) == ("feed" in last) == (method == "vessa")
    assert ("loss_unsup" in last) == (method != "supervised")
    board = EventAccumulator(str(run.out / "tensorboard")).Reload()
    assert all(("val_vessa" in r) == (method == "vessa") for r in rows if "val_teacher" in r)
    assert {"train/loss", "val/teacher_dice", "val/student_dice"} <= set(board.Tags()["scalars"])


def test_the_teacher_only_predicts(run_of, tiny):
    run = run_of(tiny())
    modes = []
    run.teacher.register_forward_hook(lambda model, *_: modes.append(model.training))
    run.train()
    assert set(modes) == {False}
    assert not any(p.requires_grad for p in run.teacher.parameters())


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(run_of, tiny, tmp_path):
    one, other = (run_of(tiny(f"out={tmp_path / name}")) for name in "ab")
    third = run_of(tiny(f"out={tmp_path / 'c'}", seed=1))
    for run in (one, other, third):
        run.train()
    assert_equal(one, other)
    assert not torch.equal(one.student.head.weight, third.student.head.weight)


@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(run_of, tiny, tmp_path, at):
    whole = run_of(tiny(f"out={tmp_path / 'whole'}", steps=6, eval_every=3))
    whole.train()
    config = tiny(f"out={tmp_path / 'parts'}", steps=6, eval_every=3)
    with pytest.raises(Interrupted) as caught:
        run_of(config).train(stop_at(at))
    assert caught.value.message == f"stopped by Ctrl-C or SIGTERM; saved at step {at}. Resume with: {RESUME}"
    resumed = run_of(config)
    assert resumed.resume()
    assert resumed.step == at
    resumed.train()
    assert_equal(whole, resumed)
    assert [r["step"] for r in metrics_of(resumed)] == [r["step"] for r in metrics_of(whole)]
    ours, theirs = (load_file(r.out / checkpoint.BEST) for r in (whole, resumed))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_step_that_ctrl_c_falls_into_is_finished_first(run_of, tiny, tmp_path, monkeypatch):
    whole = run_of(tiny(f"out={tmp_path / 'whole'}", steps=4))
    whole.train()
    config = tiny(f"out={tmp_path / 'parts'}", steps=4)
    real = trainer.compute_loss

    def pressed(*given):
        if given[5] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    monkeypatch.setattr(trainer, "compute_loss", pressed)
    with pytest.raises(Interrupted, match="saved at step 3"):
        run_of(config).train()
    monkeypatch.setattr(trainer, "compute_loss", real)
    resumed = run_of(config)
    resumed.resume()
    resumed.train()
    assert_equal(whole, resumed)


def test_a_step_interrupted_while_it_draws_is_drawn_again(run_of, tiny, tmp_path, monkeypatch):
    whole = run_of(tiny(f"out={tmp_path / 'whole'}", steps=4))
    whole.train()
    config = tiny(f"out={tmp_path / 'parts'}", steps=4)
    run, real = run_of(config), trainer.labeled_batch

    def pressed(*given):
        if run.step == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(trainer, "labeled_batch", pressed)
    with pytest.raises(Interrupted, match="saved at step 2") as caught:
        run.train()
    assert not isinstance(caught.value, Retryable)  # Ctrl-C is not an outage
    monkeypatch.setattr(trainer, "labeled_batch", real)
    resumed = run_of(config)
    resumed.resume()
    resumed.train()
    assert_equal(whole, resumed)


@pytest.mark.parametrize("at", [2, 4])
def test_a_validation_that_was_interrupted_is_made_up_for(run_of, tiny, monkeypatch, at):
    config = tiny(steps=4)
    run, real = run_of(config), trainer.evaluate

    def pressed(*given):
        if run.step == at:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(trainer, "evaluate", pressed)
    with pytest.raises(Interrupted, match=f"saved at step {at}"):
        run.train()
    monkeypatch.setattr(trainer, "evaluate", real)
    resumed = run_of(config)
    resumed.resume()
    result = resumed.train()
    assert [r["step"] for r in metrics_of(resumed) if "val_teacher" in r] == [2, 4]
    assert result.best_step in (2, 4)


def test_without_a_checkpoint_a_run_starts_anew_and_drops_old_metrics(run_of, tiny):
    run = run_of(tiny())
    (run.out / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    assert not run.resume()
    run.train()
    assert [r["step"] for r in metrics_of(run)] == [2, 4, 4]


def test_a_line_of_metrics_that_a_kill_cut_does_not_stop_a_resume(run_of, tiny):
    with pytest.raises(Interrupted):
        run_of(tiny()).train(stop_at(3))
    resumed = run_of(tiny())
    with (resumed.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    resumed.resume()
    resumed.train()
    assert [r["step"] for r in metrics_of(resumed)] == [2, 4, 4]


def test_what_is_no_checkpoint_of_a_run_is_refused(run_of, tiny):
    run = run_of(tiny())
    run.train()
    (run.out / checkpoint.LAST).write_bytes((run.out / checkpoint.BEST).read_bytes())
    with pytest.raises(InvalidWeights, match="last.safetensors is not the checkpoint of a run: it holds no"):
        run_of(tiny()).resume()
    run.save()
    narrower = run_of(tiny("student.widths=[4,8,8]"))
    with pytest.raises(InvalidWeights, match="does not fit this config"):
        narrower.resume()


@pytest.fixture
def impatient(wired, dataset, tiny):
    """A run whose labels go over `wire`, with little patience."""
    config = tiny("semi.method=vessa", "annotator.patience_s=2", "annotator.lookahead_batches=0", steps=6)
    bank = seed_labeled(wired, dataset, config)
    feeds = []

    def make():
        feeds.append(AnnotationFeed(wired, dataset, bank, open_cache(config.cache), config.annotator))
        return Run(config, dataset, feeds[-1], RESUME)

    yield make
    for feed in feeds:
        feed.close()


def test_an_annotator_that_goes_away_leaves_a_run_that_can_be_resumed(impatient, wire, answer_of):
    run = impatient()

    def leave(step):
        if step == 2:
            wire.fault = lambda _: answer_of(503, "not_ready")

    with pytest.raises(Interrupted) as caught:
        run.train(leave)
    assert caught.value.code == "interrupted"
    assert "waited" in caught.value.message
    assert "not_ready, says the test; saved at step 2" in caught.value.message
    assert caught.value.message.endswith(f"Resume with: {RESUME}")
    wire.fault = None
    resumed = impatient()
    assert resumed.resume()
    assert resumed.step == 2
    assert resumed.train().steps == 6


def test_a_feed_belongs_to_the_method_vessa_alone(dataset, tiny):
    with pytest.raises(ValueError, match="a feed of labels belongs to the methods that learn from one"):
        Run(tiny("semi.method=vessa"), dataset, None, "")


def test_a_device_that_is_not_there_is_refused(dataset, tiny):
    for name in ("tpu", "cuda:77"):
        with pytest.raises(InvalidConfig, match=f"device '{name}' cannot be used here: .*expected cpu"):
            Run(tiny(device=name), dataset, None, "")


@pytest.mark.gpu
def test_a_run_on_a_gpu_learns(run_of, tiny):
    run = run_of(tiny(device="cuda"))
    assert run.train().steps == 4
    assert next(run.student.parameters()).is_cuda


def test_predictions_have_each_images_own_size(tiny):
    config = tiny()
    model = build_student(config.student, 1, 4)
    rng = np.random.default_rng(0)
    shapes = [(20, 31), (64, 10), (32, 32, 3), (1, 1)]
    images = [rng.integers(0, 255, shape, np.uint8) for shape in shapes]
    for image, probability in zip(images, predict_slices(model, images, config, 1), strict=True):
        assert probability.shape == (4, *image.shape[:2])
        assert torch.allclose(probability.sum(0), torch.ones(image.shape[:2]), atol=1e-5)


@pytest.mark.parametrize("widths", ["[4,8]", "[2,2,2,2,2,2,2]"])
def test_squares_are_padded_to_what_the_network_wants(tiny, widths):
    config = tiny(f"student.widths={widths}", "student.size=37", "student.crop=64")
    model = build_student(config.student, 1, 3)
    (probability,) = predict_slices(model, [np.zeros((37, 37), np.uint8)], config, 1)
    assert probability.shape == (3, 37, 37)


def test_the_best_teacher_comes_back_without_the_students_source(run_of, tiny, dataset, tmp_path):
    config = tiny("student.name=dpt", "student.backbone=tiny", "student.crop=28", "student.pretrained=false")
    run = run_of(config)
    result = run.train()
    gone = tiny(
        "student.name=dpt", "student.backbone=tiny", "student.crop=28", f"student.weights={tmp_path / 'gone'}"
    )
    model, channels, classes = load_best(run.out, gone)
    assert (channels, classes) == (1, dataset.classes)
    assert evaluate(model, dataset, run.val_cases, config, channels).mean == result.scores["val"].mean
    with pytest.raises(InvalidWeights, match="best.safetensors is missing"):
        load_best(tmp_path / "nowhere", config)
