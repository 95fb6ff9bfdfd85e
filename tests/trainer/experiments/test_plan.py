"""Plans: settings from the data and the machine, a measured time, and warnings before it is spent."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vessa.errors import InvalidConfig
from vessa_trainer.config import load_config
from vessa_trainer.experiments.plan import make_plan, plan_file


def test_a_plan_fits_the_data_and_the_time(tiny):
    plan = make_plan(tiny(), minutes=1)
    assert plan.config.student.size == plan.config.student.crop == 32  # of images of 32 px
    assert plan.config.batch_labeled == 4  # of three labeled images
    assert 200 <= plan.config.steps <= 30_000
    assert plan.seconds == pytest.approx(plan.config.steps * plan.step_s)
    assert plan.config.steps // plan.config.eval_every == 20
    assert all(any(line.startswith(key) for line in plan.lines()) for key in plan.reasons)
    torch.set_num_threads(1)


def test_a_plan_is_a_config_that_can_be_edited_and_trained_with(phantoms, tmp_path):
    out = tmp_path / "plan.yaml"
    overrides = ["student.widths=[4,8]", "semi.method=supervised"]
    plan = plan_file(str(phantoms), overrides, 1, out)
    torch.set_num_threads(1)
    config = load_config(out)
    assert (config.student.size, config.steps) == (plan.config.student.size, plan.config.steps)
    assert config.data.root == str(phantoms)
    assert (config.student.widths, config.semi.method) == ((4, 8), "supervised")
    assert "# student.size: images are 32 px long" in out.read_text()
    with pytest.raises(InvalidConfig, match="exists. Choose another --out"):
        plan_file(str(phantoms), overrides, 1, out)


def test_structures_of_few_pixels_are_warned_of(phantoms, tiny, tmp_path):
    folder = shutil.copytree(phantoms, tmp_path / "hearts")
    for path in (folder / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.array(image)
        mask[mask == 2] = 0
        mask[3:5, 3:5] = 2
        Image.fromarray(mask).save(path)
    plan = make_plan(tiny(f"data.root={folder}"), minutes=1)
    torch.set_num_threads(1)
    assert any("'left ventricle myocardium' covers 4 px" in warning for warning in plan.warnings)
