"""Fusing a student with the annotator's labels, and cross-checks of the service that answers."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vessa.errors import InvalidConfig
from vessa_trainer.experiments.run import fit
from vessa_trainer.prediction.delivery import open_run
from vessa_trainer.prediction.flips import choose_flips
from vessa_trainer.prediction.fusion import FILE, fuse
from vessa_trainer.prediction.predict import predict
from vessa_trainer.pseudo_labels.types import PseudoLabel

RESUME = "vessa-trainer fit --out here --resume"
OPTIONS = {"flips": None, "axis": "auto", "nifti": False}


def test_the_annotators_class_gets_its_confidence_and_the_others_the_rest():
    student = torch.tensor([0.2, 0.5, 0.3]).view(3, 1, 1).expand(-1, 1, 2)
    label = PseudoLabel(np.array([[1, 0]], np.uint8), np.array([[204, 0]], np.uint8))
    found = fuse(student, label, 0.5)
    assert found[:, 0, 0].tolist() == pytest.approx([0.15, 0.65, 0.2])  # of 0.1, 0.8, 0.1
    assert found[:, 0, 1].tolist() == pytest.approx([0.2, 0.5, 0.3])  # confidence 0: nothing is known
    assert torch.allclose(fuse(student, label, 0.0), student)


@pytest.mark.parametrize(
    ("before", "after", "used"),
    [(0.8, 0.81, True), (0.8, 0.801, False), (0.8, 0.7, False), (None, 0.9, False), (0.8, None, False)],
)
def test_flips_are_used_where_they_add_enough(before, after, used, tmp_path):
    choice = choose_flips(before, after)
    assert choice.used == used
    choice.write(tmp_path)
    assert type(choice).read(tmp_path) == choice


@pytest.mark.parametrize("views", [False, True])
def test_predict_fuses_with_the_annotator_that_the_run_learned_from(
    tiny, annotator, client, dataset, tmp_path, caplog, views
):
    service = (f"annotator.url={annotator.url}", f"annotator.api_key={annotator.api_key}")
    service += (f"annotator.views={json.dumps(views)}",)
    config = tiny("semi.method=vessa", "feedback.enabled=false", *service, steps=2)
    fit(config, resume_line=RESUME)
    run, quiet = tmp_path / "run", Console(quiet=True)
    plain = predict(run, dataset.root, tmp_path / "plain", quiet, **OPTIONS)
    fused = predict(run, dataset.root, tmp_path / "fused", quiet, vessa=client, **OPTIONS)
    assert (plain["masks"], fused["masks"], fused["failed"]) == (18, 18, {})
    delivered = open_run(run).fused_with(client)
    (vessa,) = (member.vessa for member in delivered.members)
    assert vessa.fusion.views == views
    case = dataset.cases()[0]
    images = [dataset.image(s) for s in case.slices]
    probabilities = open_run(run).probabilities(images, flips=fused["flips"])
    labels = [fuse(p, v, vessa.fusion.weight) for p, v in zip(probabilities, vessa.of(images), strict=True)]
    expected = delivered.postprocessing.apply([one.argmax(0).byte().numpy() for one in labels])
    for item, one in zip(case.slices, expected, strict=True):
        with Image.open(tmp_path / "fused" / f"{item.name}.png") as mask:
            assert np.array_equal(np.array(mask), one)
    text = (run / FILE).read_text()
    (run / FILE).write_text(text.replace(vessa.fusion.model, "another"))
    with caplog.at_level(logging.WARNING):
        open_run(run).fused_with(client)
    assert "was chosen with another annotator (model was another" in caplog.text
    (run / FILE).write_text(text.replace(vessa.fusion.bank, "nowhere"))
    with pytest.raises(InvalidConfig, match="holds no bank 'nowhere' for this key"):
        open_run(run).fused_with(client)
    (run / FILE).unlink()
    with pytest.raises(InvalidConfig, match=r"has no fusion.json: .* Predict without --with-vessa"):
        open_run(run).fused_with(client)
