"""Labels in a folder: training without a service, with the same figures."""

import pytest

from vessa.errors import InvalidConfig
from vessa_trainer.experiments.run import fit, make_labels
from vessa_trainer.pseudo_labels.offline import OfflineAnnotator
from vessa_trainer.semi_supervised.trainer import Interrupted

RESUME = "vessa-trainer fit --out here --resume"
METHOD = ("semi.method=vessa", "feedback.enabled=false", "steps=3")


def test_a_folder_of_labels_trains_as_the_service_does(tiny, annotator, tmp_path):
    service = (f"annotator.url={annotator.url}", f"annotator.api_key={annotator.api_key}")
    folder = tmp_path / "offline"
    counts = make_labels(tiny(*METHOD, *service), folder)
    assert counts["images"] == counts["requested"] == 15  # all but the three labeled ones
    assert make_labels(tiny(*METHOD, *service), folder)["requested"] == 0
    online = fit(tiny(*METHOD, *service, f"out={tmp_path / 'online'}"), resume_line=RESUME)
    nowhere = ("annotator.url=http://127.0.0.1:9", f"annotator.labels={folder}")
    offline = fit(tiny(*METHOD, *nowhere), resume_line=RESUME)
    for key in ("val", "test", "best_step"):
        assert offline[key] == online[key]
    assert offline["feed"]["requests"] == 0
    assert offline["annotator"]["model"] == online["annotator"]["model"]
    with pytest.raises(Interrupted, match="holds no labels for .* `vessa-trainer labels` again"):
        fit(
            tiny(*METHOD, *nowhere, "annotator.template_choice=top3", f"out={tmp_path / 'x'}"),
            resume_line=RESUME,
        )


def test_a_folder_without_labels_is_refused(tiny, tmp_path):
    with pytest.raises(InvalidConfig, match="holds no labels.json. Write it with `vessa-trainer labels`"):
        OfflineAnnotator(tmp_path)
    with pytest.raises(InvalidConfig, match="set feedback.enabled=false"):
        tiny("semi.method=vessa", f"annotator.labels={tmp_path}")
