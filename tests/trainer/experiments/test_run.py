"""One run from config to report, never trained twice or over another."""

import json
import logging
import shutil
import socket

import pytest
from PIL import Image

from vessa.datasets import open_dataset
from vessa.errors import InvalidConfig, InvalidDataset, Unreachable
from vessa_trainer.experiments.annotator_labels import labels_of
from vessa_trainer.experiments.run import fit
from vessa_trainer.pseudo_labels.cache import open_cache
from vessa_trainer.pseudo_labels.prefetcher import AnnotationFeed
from vessa_trainer.semi_supervised.trainer import Interrupted, Run
from vessa_trainer.students import checkpoint

RESUME = "vessa-trainer fit --out here --resume"


def service(annotator):
    return (f"annotator.url={annotator.url}", f"annotator.api_key={annotator.api_key}")


@pytest.fixture
def interrupted(dataset):
    """Interrupt a run of a config at a step, as Ctrl-C does."""

    def make(config, at):
        def stop(step):
            if step == at:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            Run(config, dataset, None, RESUME).train(stop)

    return make


def test_a_run_leaves_its_scores_curves_and_report(tiny, tmp_path):
    config = tiny()
    summary = fit(config, resume_line=RESUME)
    out = tmp_path / "run"
    expected = {"config.yaml", "metrics.jsonl", "progress.png", "summary.json", "report.html", "tensorboard"}
    expected |= {"data.json", "postprocessing.json", "flips.json"}
    assert expected | {checkpoint.LAST, checkpoint.BEST} == {p.name for p in out.iterdir()}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["groups"] == {"labeled": 1, "unlabeled": 3, "val": 1, "test": 1}
    assert (summary["method"], summary["steps"], summary["wait_share"]) == ("unimatch_v2", 4, 0.0)
    assert (summary["feed"], summary["annotator"]) == (None, {})
    assert 0 <= summary["test"]["mean"]["dice"] <= 1
    page = (out / "report.html").read_text()
    assert "unimatch_v2, seed 0" in page
    with Image.open(out / "progress.png") as picture:
        assert picture.width > 600


def test_a_vessa_run_says_who_labeled_and_never_keeps_the_key(tiny, annotator, client, tmp_path):
    config = tiny("semi.method=vessa", *service(annotator))
    summary = fit(config, resume_line=RESUME)
    assert summary["annotator"]["model"] == client.info().model
    assert summary["annotator"]["bank"]["templates"] == 3
    assert summary["feed"]["failed_items"] == 0
    assert summary["feed"]["images"] + summary["feed"]["cache_hits"] >= 4
    fusion = json.loads((tmp_path / "run" / "fusion.json").read_text())
    assert fusion == summary["fusion"]
    assert fusion["bank"] == summary["annotator"]["bank"]["name"]
    assert fusion["after"] == summary["val_fused"]["mean"]["dice"]
    assert "fused with VESSA" in (tmp_path / "run" / "report.html").read_text()
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or annotator.api_key.encode() not in path.read_bytes(), path


def test_a_finished_run_is_not_trained_again(tiny, tmp_path):
    summary = fit(tiny(), resume_line=RESUME)
    weights = (tmp_path / "run" / checkpoint.LAST).stat()
    assert fit(tiny(), resume_line=RESUME) == summary
    # nor when only its place or its speed differ
    assert fit(tiny("threads=1", "batch_eval=3", "cache.url=folder:elsewhere"), resume_line="") == summary
    assert (tmp_path / "run" / checkpoint.LAST).stat().st_mtime_ns == weights.st_mtime_ns


def test_an_interrupted_run_is_taken_up(tiny, interrupted, tmp_path):
    whole = fit(tiny(f"out={tmp_path / 'whole'}", steps=6), resume_line=RESUME)
    config = tiny(steps=6)
    interrupted(config, 3)
    summary = fit(config, resume_line=RESUME)
    assert summary["val"] == whole["val"]
    assert summary["test"] == whole["test"]
    assert summary["best_step"] == whole["best_step"]


def test_a_run_of_another_config_in_the_folder_is_refused(tiny, interrupted):
    interrupted(tiny(steps=6), 3)
    with pytest.raises(
        InvalidConfig, match=r"holds a run of another config \(optim.lr 0.001 there, 0.1 here"
    ):
        fit(tiny("optim.lr=0.1", steps=6), resume_line=RESUME)
    fit(tiny(steps=6), resume_line=RESUME)
    with pytest.raises(InvalidConfig, match="steps 6 there, 8 here"):
        fit(tiny(steps=8), resume_line=RESUME)
    with pytest.raises(InvalidConfig, match="semi.method 'unimatch_v2' there, 'vessa' here"):
        fit(tiny("semi.method=vessa", steps=6), resume_line=RESUME)


def test_what_vessa_would_do_does_not_tell_two_unimatch_runs_apart(tiny):
    summary = fit(tiny(), resume_line=RESUME)
    other = tiny("semi.vessa_gate=teacher", "feedback.enabled=false", "annotator.bank=other")
    assert fit(other, resume_line=RESUME) == summary


def test_without_resume_a_folder_with_a_run_is_refused(tiny, interrupted):
    interrupted(tiny(), 2)
    with pytest.raises(InvalidConfig, match="holds a run. Use --resume to continue it"):
        fit(tiny(), resume_line=RESUME, resume=False)


def test_an_annotator_that_is_not_there_is_said_before_training(tiny, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(Unreachable, match="no response from the annotator"):
        fit(tiny("semi.method=vessa", f"annotator.url={url}"), resume_line=RESUME)
    assert not (tmp_path / "run").exists()


def test_training_goes_on_when_redis_leaves(tiny, annotator, own_redis, caplog):
    own_redis.stop()
    config = tiny("semi.method=vessa", f"cache.url={own_redis.url}", *service(annotator))
    summary = fit(config, resume_line=RESUME)
    assert summary["steps"] == 4
    assert summary["feed"]["cache_failures"] >= 1
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "label cache in Redis is away" in said[0]


def test_labels_in_redis_serve_the_next_run(tiny, annotator, own_redis, tmp_path):
    for name in ("first", "second"):
        config = tiny(
            "semi.method=vessa",
            "feedback.enabled=false",
            f"cache.url={own_redis.url}",
            f"out={tmp_path / name}",
            *service(annotator),
        )
        summary = fit(config, resume_line=RESUME)
        assert (summary["feed"]["requests"] == 0) == (name == "second")


def test_gray_and_color_images_may_be_mixed(phantoms, tiny, tmp_path):
    shutil.copytree(phantoms, tmp_path / "mixed")
    dataset = open_dataset(tmp_path / "mixed")
    for item in dataset.slices()[::2]:
        path = tmp_path / "mixed" / "images" / f"{item.name}.png"
        with Image.open(path) as image:
            color = image.convert("RGB")
        color.save(path)
    assert fit(tiny(f"data.root={tmp_path / 'mixed'}"), resume_line=RESUME)["steps"] == 4


def test_a_folder_that_is_no_data_set_is_refused(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidDataset, match="none of the known layouts"):
        fit(tiny(f"data.root={tmp_path / 'empty'}"), resume_line=RESUME)


def test_labels_of_cases_are_one_list_a_slice(tiny, dataset, client, bank):
    config = tiny()
    feed = AnnotationFeed(client, dataset, bank, open_cache(config.cache), config.annotator)
    cases = dataset.cases()[:2]
    labels = labels_of(feed, cases)
    feed.close()
    assert list(labels) == [c.name for c in cases]
    assert all([one.shape for one in labels[c.name]] == [(32, 32)] * 3 for c in cases)
