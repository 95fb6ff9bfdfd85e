"""`vessa-server evaluate`: the annotator alone, on phantoms, with untrained weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vessa.codec import image_digest
from vessa.datasets import Dataset, open_dataset
from vessa.errors import InvalidDataset
from vessa.schemas import AdaptationFigures
from vessa_server import evaluation
from vessa_server.adaptation import finetune
from vessa_server.cli.main import app
from vessa_server.evaluation import VARIANTS, _item, evaluate, seed_bank
from vessa_server.inference.annotator import Annotator, load_annotator
from vessa_server.model.weights import directory
from vessa_server.observability.stage_timer import STAGES
from vessa_server.pretraining.data.phantoms import write_phantoms
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem

UNADAPTED = [name for name in VARIANTS if name != "adapted"]


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, patients=5, slices=2, size=64, seed=0)
    return open_dataset(folder / "heart")


def test_every_variant_is_scored_for_each_bank_and_seed(
    hearts: Dataset, nano_weights: Path, tmp_path: Path
) -> None:
    figures = evaluate(
        hearts,
        [["heart000"], ["heart001", "heart002"]],
        ["heart003"],
        weights=str(nano_weights),
        device="cpu",
        variants=UNADAPTED,
        seeds=2,
        out=tmp_path,
        console=Console(quiet=True),
    )
    assert list(figures["variants"]) == UNADAPTED
    assert figures["dice_mean"] == figures["variants"]["top1"]["dice_mean"]
    assert 0 <= figures["dice_mean"] <= 1
    assert set(figures["dice_by_class"]) == set(hearts.classes.values())
    assert figures["hd95_unit"] == "voxel"
    assert figures["test_patients"] == 1
    assert tuple(figures["ms_per_image"]) == STAGES
    assert all(v > 0 for v in figures["ms_per_image"].values())
    page = (tmp_path / "report.html").read_text()
    assert all(VARIANTS[name].name in page for name in UNADAPTED)
    assert "<img" in page


def test_a_bank_is_adapted_to_and_served_without_again(
    hearts: Dataset, nano_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[bool] = []

    def annotate(annotator: Annotator, *_: object) -> Iterator[tuple[str, list[np.ndarray]]]:
        served.append(annotator.banks.get("evaluation").info().adapted)
        (case,) = [c for c in hearts.cases() if c.group == "heart004"]
        yield case.name, [np.zeros((64, 64), np.uint8) for _ in case.slices]

    monkeypatch.setattr(evaluation, "_annotate", annotate)
    figures = AdaptationFigures(before=0.5, after=0.6, kept=True, steps=1, seconds=2.0, bank_version=1)
    learned = Adaptation({"a": np.zeros(1, np.float16)}, directory.digest(nano_weights), figures)
    asked: list[float] = []

    def adapt(*_: object, seconds: float, **__: object) -> tuple[Adaptation, AdaptationFigures]:
        asked.append(seconds)
        return learned, figures

    monkeypatch.setattr(finetune, "adapt", adapt)
    report = evaluate(
        hearts,
        [["heart000", "heart001", "heart002"]],
        ["heart004"],
        weights=str(nano_weights),
        device="cpu",
        variants=["top1", "adapted", "top3"],
        seeds=1,
        out=tmp_path,
        console=Console(quiet=True),
        adapt_seconds=6,
    )
    assert served == [False, True, False]
    assert asked == [6]
    assert report["adaptations"] == [figures.model_dump()]


def test_leaving_out_a_part_changes_the_answer(hearts: Dataset, nano_weights: Path, tmp_path: Path) -> None:
    annotator = load_annotator(str(nano_weights), "cpu", TemplateBanks(FolderStore(tmp_path)), 1 << 28)
    seed_bank(annotator, hearts, ["heart000"])
    image = hearts.image(hearts.slices()[-1])
    answers = []
    for without in (frozenset(), frozenset({"language"}), frozenset({"memory"})):
        annotator.leave_out(without)
        item = SegmentItem(image_digest(image), image, "evaluation", probabilities=True)
        answers.append(annotator.segment([item])[0].probabilities)
    assert not np.array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])
    with pytest.raises(ValueError, match="only language and memory"):
        load_annotator(str(nano_weights), "cpu", annotator.banks, 0, frozenset({"retriever"}))


def test_a_random_template_is_any_of_the_banks(hearts: Dataset, nano_weights: Path, tmp_path: Path) -> None:
    annotator = load_annotator(str(nano_weights), "cpu", TemplateBanks(FolderStore(tmp_path)), 1 << 28)
    seed_bank(annotator, hearts, ["heart000", "heart001", "heart002"])
    image = hearts.image(hearts.slices()[-1])
    used = set()
    for seed in range(24):
        item = SegmentItem(image_digest(image), image, "evaluation", template_choice="random", seed=seed)
        result = annotator.segment([item])[0]
        used |= {use.id for uses in result.templates.values() for use in uses}
    assert len(used) > 3  # more than the three most similar ones


def test_prompts_from_the_truth_lie_on_it(hearts: Dataset) -> None:
    item = max(hearts.slices(), key=lambda s: int((hearts.mask(s) == 3).sum()))
    label = hearts.mask(item)
    truth, there = label == 3, [c for c in (1, 2, 3) if (label == c).any()]
    box = _item(hearts, item, VARIANTS["box"], 0)
    assert box.classes == tuple(hearts.classes[c] for c in there)  # who marks asks for what is there
    x1, y1, x2, y2 = box.boxes[-1].astype(int)
    assert truth[y1:y2, x1:x2].sum() == truth.sum()
    assert truth[y1].any()
    assert truth[y2 - 1].any()
    point = _item(hearts, item, VARIANTS["point"], 0)
    x, y = point.points[-1, 0].astype(int)
    assert truth[y, x]
    assert point.point_labels[-1, 0] == 1
    mask = _item(hearts, item, VARIANTS["mask"], 0)
    assert np.array_equal(mask.mask_logits[2] > 0, truth)


def test_a_bank_under_test_is_refused(hearts: Dataset, nano_weights: Path, tmp_path: Path) -> None:
    options = {"weights": str(nano_weights), "device": "cpu", "variants": ["top1"], "seeds": 1}
    options |= {"out": tmp_path, "console": Console(quiet=True)}
    with pytest.raises(InvalidDataset, match="both in the bank and under test"):
        evaluate(hearts, [["heart000"]], ["heart000", "heart001"], **options)
    with pytest.raises(InvalidDataset, match="has no groups"):
        evaluate(hearts, [["nobody"]], ["heart001"], **options)


def test_the_command_ends_with_one_json_line(hearts: Dataset, nano_weights: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--data", str(hearts.root), "--weights", str(nano_weights), "--variants", "top1"]
    command += ["--bank-split", "splits/labeled_1.txt", "--test-split", "splits/val.txt"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert {"dice_mean", "dice_std", "dice_by_class", "hd95_mean"} <= figures.keys()
    assert CliRunner().invoke(app, ["evaluate", "--data", str(hearts.root)]).exit_code == 1
    assert CliRunner().invoke(app, [*command, "--variants", "best"]).exit_code == 1
