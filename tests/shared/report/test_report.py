"""Reports: tables over random seeds, best and worst cases, and the page."""

import json

import numpy as np
import pytest
from PIL import Image

from vessa.datasets import open_dataset
from vessa.datasets.base import IGNORE
from vessa.metrics import Scores
from vessa.report.cases import annotated, best_median_worst, score_labels
from vessa.report.page import Page
from vessa.report.tables import Row, cards, missed, scores_from, table


def scores(dice, hd95=2.0, missed_cases=0):
    metrics = {"dice": dice, "iou": None if dice is None else dice / 2, "iou_fgbg": dice, "hd95": hd95}
    counts = {"wall": {"scored": 2, "both_empty": 0, "pred_empty": missed_cases, "truth_empty": 0}}
    return Scores({"wall": metrics}, metrics, "voxel", counts)


@pytest.fixture
def dataset(tmp_path):
    """Four patients with two slices each; the last has no masks, and masks of first slices are empty."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "meta.json").write_text('{"classes": {"0": "background", "1": "wall"}}')
    for patient in range(4):
        for index in (1, 2):
            name = f"p{patient}_{index:02d}.png"
            Image.fromarray(np.full((8, 10), 40 * patient, np.uint8)).save(tmp_path / "images" / name)
            if patient < 3:
                mask = np.zeros((8, 10), np.uint8)
                mask[2:6, 2:6] = index - 1
                Image.fromarray(mask).save(tmp_path / "masks" / name)
    return open_dataset(tmp_path)


def labels_of(dataset, shifts):
    """Return labels whose square is shifted to the right. shifts: px, one per patient."""
    found = {}
    for case, shift in zip(dataset.cases(), shifts, strict=True):
        square = np.zeros((8, 10), np.uint8)
        square[2:6, 2 + shift : 6 + shift] = 1
        found[case.name] = [np.zeros((8, 10), np.uint8), square]
    return found


def test_a_table_shows_mean_and_deviation_and_marks_the_best():
    rows = [Row("ours", [scores(0.8, 1.0), scores(0.9, 3.0)]), Row("theirs", [scores(0.7, 1.5)])]
    made = table(rows, ("dice", "hd95"))
    assert made.header == ["class", "method", "Dice", "HD95 (voxel)"]
    assert made.lines[0] == ["wall", "ours", "0.850 ± 0.071", "2.0 ± 1.4"]
    assert made.lines[1] == ["wall", "theirs", "0.700", "1.5"]
    assert made.lines[2][0] == "mean"
    assert made.best == {(0, 2), (1, 3), (2, 2), (3, 3)}  # more Dice, less distance
    assert "| wall | ours | **0.850 ± 0.071** | 2.0 ± 1.4 |" in made.markdown()


def test_a_missing_score_is_a_dash_and_equal_scores_have_no_best():
    made = table([Row("a", [scores(None)]), Row("b", [scores(None)])], ("dice", "hd95"))
    assert made.lines[0][2] == "–"
    assert made.best == set()
    assert Row("a", [scores(None)]).mean("dice") is None


def test_missed_structures_are_counted_in_a_sentence():
    assert missed([Row("ours", [scores(0.5)])]) == ""
    assert "ours: 3 missed, 0 invented" in missed([Row("ours", [scores(0.5, missed_cases=3)])])


def test_scores_survive_json():
    assert scores_from(scores(0.5).to_dict()) == scores(0.5)


def test_only_annotated_slices_are_scored(dataset):
    cases = annotated(dataset, dataset.cases())
    assert [c.name for c in cases] == ["p0", "p1", "p2"]
    found = score_labels(dataset, dataset.cases(), labels_of(dataset, (0, 0, 2, 0)))
    assert found.counts["wall"]["scored"] == 3
    assert found.mean["dice"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_images_of_one_case_may_differ_in_size(dataset):
    mask = np.zeros((6, 9), np.uint8)
    mask[1:4, 1:4] = 1
    for part, pixels in (("images", mask * 100), ("masks", mask)):
        Image.fromarray(pixels).save(dataset.root / part / "p0_01.png")
    (case,) = [c for c in dataset.cases() if c.name == "p0"]
    found = score_labels(dataset, [case], {"p0": [mask, np.zeros((8, 10), np.uint8)]})
    assert found.counts["wall"]["scored"] == 2
    assert found.mean["dice"] == pytest.approx(0.5)


def test_ignored_pixels_count_neither_for_nor_against(dataset):
    mask = np.full((8, 10), IGNORE, np.uint8)
    mask[:, :5] = 0
    mask[2:6, 2:5] = 1
    for index in (1, 2):
        Image.fromarray(mask).save(dataset.root / "masks" / f"p0_{index:02d}.png")
    meta = {"classes": {"1": "wall"}, "values": {"1": "wall", "255": "ignore"}}
    (dataset.root / "meta.json").write_text(json.dumps(meta))
    dataset = open_dataset(dataset.root)
    (case,) = [c for c in dataset.cases() if c.name == "p0"]
    ours = np.where(mask == IGNORE, 1, mask).astype(np.uint8)
    assert score_labels(dataset, [case], {"p0": [ours, ours]}).mean["dice"] == 1.0


def test_best_median_and_worst_are_ranked_by_one_column(dataset):
    cases = annotated(dataset, dataset.cases())
    predicted = {"ours": labels_of(dataset, (1, 0, 3, 0)), "theirs": labels_of(dataset, (0, 3, 0, 0))}
    rows = best_median_worst(dataset, cases, predicted, "ours")
    assert [r.title for r in rows] == ["best: p1_02", "median: p0_02", "worst: p2_02"]
    assert list(rows[0].masks) == ["truth", "ours", "theirs"]
    assert rows[0].masks["truth"].any()  # the slice that shows most of the truth
    assert rows[0].captions == {"ours": "Dice of the case 1.000", "theirs": "Dice of the case 0.250"}
    assert len(best_median_worst(dataset, cases[:1], predicted, "ours")) == 1
    assert best_median_worst(dataset, [], predicted, "ours") == []


def test_a_page_is_one_file_that_loads_nothing_and_escapes_its_text(dataset, tmp_path):
    page = Page("a <b> & c")
    page.lead("<script>alert(1)</script>")
    page.note("")
    rows = [Row("ours <i>", [scores(0.8)])]
    page.cards(cards(rows))
    made = table(rows)
    page.table(made.header, made.lines, made.best)
    predicted = {"ours": labels_of(dataset, (1, 0, 3, 0))}
    page.overlays(
        best_median_worst(dataset, annotated(dataset, dataset.cases()), predicted, "ours"), {1: "wall"}
    )
    page.links({"run": "run/report.html"})
    page.details("Counts", {"x": "</pre>"})
    page.write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "Not a medical device." in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "&lt;/pre&gt;" in text
    assert "http" not in text
    assert text.count("data:image/png;base64,") == 9  # image, truth and labels of three cases
    assert [p.name for p in tmp_path.glob("*report*")] == ["report.html"]
