"""Bank adaptation: it learns, drops what does not help, touches no other bank, and is kept with its own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vessa.codec import MEDIA_TYPE, encode, image_digest
from vessa.errors import InvalidRequest, InvalidWeights
from vessa.schemas import AdaptationFigures
from vessa_server.adaptation import finetune as module
from vessa_server.adaptation.episodes import episodes_of, held_out_pairs
from vessa_server.adaptation.finetune import adapt
from vessa_server.inference.annotator import Annotator
from vessa_server.template_bank.adapted_weights import Adaptation
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.redis_store import RedisStore
from vessa_server.types import SegmentItem, TemplateItem

FIGURES = AdaptationFigures(before=0.5, after=0.6, kept=True, steps=3, seconds=1.0, bank_version=1)
CLASSES = {1: "disk", 2: "ring"}


@pytest.fixture
def annotator(annotator_of: Any) -> Annotator:
    """Untrained weights and a bank of eight examples of eight patients."""
    return annotator_of([f"p{seed}" for seed in range(8)])  # type: ignore[no-any-return]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass at each reading of the time, so that a test fixes the number of steps."""
    monkeypatch.setattr(module, "HELD_PAIRS", 6)  # scored at each check, which takes most of the time
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            now[0] += 1
            return now[0]

    monkeypatch.setattr(module, "time", Clock)


def learn(annotator: Annotator, seconds: float = 30, **options: Any) -> Any:
    bank = annotator.banks.get("bank")
    images = options.pop("images", np.zeros((0, 1, 1), np.uint8))
    return adapt(annotator.model, bank, images, annotator.model_digest, seconds=seconds, **options)


def photographs(count: int) -> np.ndarray:
    """Unlabeled squares with regions of several intensities."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(40, 250, (count, 8, 8), dtype=np.uint8)
    return blocks.repeat(30, 1).repeat(30, 2)


def perturbed(annotator: Annotator) -> Adaptation:
    """An adaptation whose masks differ from those of the common weights."""
    draws = torch.Generator().manual_seed(0)
    tensors = {
        name: (p.detach() + 0.05 * torch.randn(p.shape, generator=draws)).half().numpy()
        for name, p in annotator.model.segmenter.named_parameters()
    }
    return Adaptation(tensors, annotator.model_digest, FIGURES)


def test_the_segmenter_learns_from_its_bank_and_from_unlabeled_images(
    annotator: Annotator, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LR", 3e-3)
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "AVERAGE", 0.5)
    before = {k: v.clone() for k, v in annotator.model.state_dict().items()}
    seen: list[float] = []
    found, figures = learn(
        annotator, 42, images=photographs(3), progress=lambda share, step, dice: seen.append(share)
    )
    assert figures.steps == 41
    assert figures.images == 3
    assert seen == sorted(seen)
    assert figures.kept, figures
    assert figures.after >= figures.before + module.LEAST_GAIN
    assert found is not None
    assert found.figures == figures
    assert found.tensors.keys() == dict(annotator.model.segmenter.named_parameters()).keys()
    after = annotator.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # the common weights are unchanged
    assert not any(p.grad is not None for p in annotator.model.parameters())
    assert not annotator.model.training


def test_what_does_not_help_is_dropped(
    annotator: Annotator, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LR", 0.0)
    monkeypatch.setattr(module, "CHECKS", 2)
    found, figures = learn(annotator, 5)
    assert found is None
    assert not figures.kept
    assert figures.after == figures.before


def test_a_progress_that_raises_ends_it(annotator: Annotator, clock: None) -> None:
    def cancel(share: float, step: int, dice: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(annotator, 30, progress=cancel)


def test_episodes_come_from_templates_and_from_regions(annotator: Annotator) -> None:
    rng = np.random.default_rng(0)
    drawn, whole = episodes_of(annotator.banks.get("bank"), photographs(4), 240, rng)
    assert len(drawn.unlabeled) == len(drawn.images) + 4
    names = [set(drawn.draw(rng).classes.values()) for _ in range(30)]
    assert any(one == {"structure"} for one in names)
    assert any(one & {"disk", "ring"} for one in names)


def test_a_bank_of_one_patient_learns_from_its_slices(
    annotator: Annotator, clock: None, example: Any
) -> None:
    items = [TemplateItem(*example(seed), CLASSES, "one") for seed in range(6)]
    annotator.banks.delete("bank")
    annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
    _, figures = learn(annotator, 2)
    assert figures.steps == 1


def test_held_out_patients_are_not_learned_from(annotator: Annotator) -> None:
    none = np.zeros((0, 96, 96), np.uint8)
    train, whole = episodes_of(annotator.banks.get("bank"), none, 96, np.random.default_rng(0))
    assert len(train.images) == len(whole.bank) == 6  # a third of eight is held out
    pairs = held_out_pairs(whole, 24, np.random.default_rng(0))
    held = {i.tobytes() for i in whole.images} - {i.tobytes() for i in train.images}
    assert not held & {i.tobytes() for i in train.unlabeled}
    assert pairs
    assert all(p.target.tobytes() in held and p.templates[0].tobytes() not in held for p in pairs)


def test_too_small_a_bank_is_refused(annotator: Annotator) -> None:
    for template in annotator.banks.get("bank").templates[:3]:
        annotator.banks.remove("bank", template.id)
    with pytest.raises(InvalidRequest, match="holds 5 templates.*at least 6"):
        learn(annotator)


def test_a_blob_is_read_back_and_a_damaged_one_is_refused() -> None:
    one = Adaptation({"a": np.arange(3, dtype=np.float16)}, "model", FIGURES)
    back = Adaptation.from_blob(one.to_blob())
    assert back.tensors["a"].tolist() == [0, 1, 2]
    assert (back.model, back.figures, back.digest) == ("model", FIGURES, one.digest)
    decoder = one.to_blob().replace(b"adapted_segmenter", b"adaptation_______")  # as an earlier state wrote
    for data in (b"", b"nonsense", one.to_blob()[:-5], decoder):
        with pytest.raises(ValueError, match="."):
            Adaptation.from_blob(data)


def test_an_adaptation_serves_only_its_own_bank(annotator: Annotator, example: Any) -> None:
    bank = annotator.banks.get("bank")
    annotator.banks.add("other", bank.templates)
    image = example(20)[0]
    items = [SegmentItem(image_digest(image), image, name) for name in ("bank", "other", "bank")]
    plain = annotator.segment(items)
    annotator.banks.adapt("bank", perturbed(annotator))
    assert annotator.banks.get("bank").version == bank.version + 1  # cached labels are of the old weights
    assert annotator.banks.get("bank").info().adapted
    mixed = annotator.segment(items)
    own = perturbed(annotator).digest
    assert [answer.adaptation for answer in mixed] == [own, None, own]
    assert np.abs(mixed[0].confidence.astype(int) - plain[0].confidence).max() > 2
    assert np.abs(mixed[1].confidence.astype(int) - plain[1].confidence).max() <= 2
    assert np.array_equal(mixed[0].labels, mixed[2].labels)
    annotator.banks.adapt("bank", None)
    again = annotator.segment(items)
    assert np.abs(again[0].confidence.astype(int) - plain[0].confidence).max() <= 2


def test_an_adapted_view_serves_requests_without_pixels(annotator: Annotator, example: Any) -> None:
    image = example(20)[0]
    item = SegmentItem(image_digest(image), image, "bank")
    annotator.banks.add("other", annotator.banks.get("bank").templates)
    annotator.banks.adapt("bank", perturbed(annotator))
    first = annotator.segment([item])[0]
    assert annotator.held_images() == {item.image_id}
    grown = annotator._cache.nbytes
    again, common = annotator.segment([replace(item, image=None), replace(item, image=None, bank="other")])
    assert np.array_equal(first.labels, again.labels)
    assert common.adaptation is None
    assert annotator._cache.nbytes > grown  # the view by the common segmenter came beside it
    assert annotator._cache.nbytes == sum(held.nbytes for _, held in annotator._cache)


def test_the_templates_are_encoded_again_by_the_banks_own_segmenter(
    annotator: Annotator, example: Any
) -> None:
    annotator.banks.adapt("bank", perturbed(annotator))
    image = example(20)[0]
    annotator.segment([SegmentItem(image_digest(image), image, "bank", classes=("disk",))])
    own = [key for key, _ in annotator._cache if key[0] == "memory"]
    digest = perturbed(annotator).digest
    assert {key[1] for key in own} == {digest}
    template = annotator.banks.get("bank").template(own[0][2])
    view = template.whole if own[0][3] is None else template.close
    fresh = annotator._cache.get(own[0]).numpy()
    assert fresh.shape == view.memories[own[0][4]].shape
    assert np.abs(fresh - view.memories[own[0][4]]).max() > 0.01


def test_weights_of_another_graph_are_refused_for_their_bank_alone(
    annotator: Annotator, example: Any
) -> None:
    annotator.banks.add("other", annotator.banks.get("bank").templates)
    annotator.banks.adapt("bank", Adaptation({"a": np.zeros(3, np.float16)}, annotator.model_digest, FIGURES))
    image = example(20)[0]
    refused, served = annotator.segment(
        [SegmentItem(image_digest(image), image, name) for name in ("bank", "other")]
    )
    assert isinstance(refused, InvalidWeights)
    assert served.adaptation is None


def test_other_weights_do_not_use_an_adaptation(annotator: Annotator) -> None:
    annotator.banks.model = annotator.model_digest
    annotator.banks.adapt("bank", replace(perturbed(annotator), model="others"))
    assert annotator.banks.get("bank").adaptation is None


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_an_adaptation_survives_changes_of_its_bank(
    kind: str, template_of: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Any = FolderStore(tmp_path)
    if kind == "redis":
        store = RedisStore(request.getfixturevalue("redis_url"))
    banks = TemplateBanks(store)
    one = Adaptation({"a": np.zeros(3, np.float16)}, "m", FIGURES)
    banks.add("adapted", [template_of(0, group="a")])
    banks.adapt("adapted", one)
    banks.add("adapted", [template_of(1, group="b")])
    banks.remove("adapted", template_of(0, group="a").id)
    fresh = TemplateBanks(store).get("adapted").adaptation
    assert fresh is not None
    assert fresh.digest == one.digest
    banks.adapt("adapted", None)
    assert store.blob("adapted", one.digest) is None
    banks.delete("adapted")


def wait_until_done(server: Any, bank: str) -> Any:
    deadline = time.monotonic() + 120
    while (info := server.http.get(f"/banks/{bank}/adapt").json())["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return info


def test_over_http(server: Any, bank: str) -> None:
    assert server.http.get(f"/banks/{bank}/adapt").status_code == 404
    server.seed(bank, 6)
    assert server.http.get(f"/banks/{bank}/adapt").json()["state"] == "none"
    body = encode({"images": photographs(3)}, {})
    headers = {"content-type": MEDIA_TYPE}
    started = server.http.post(f"/banks/{bank}/adapt", params={"seconds": 4}, content=body, headers=headers)
    assert started.status_code == 202, started.text
    assert started.json()["state"] == "running"
    busy = server.http.post(f"/banks/{bank}/adapt", params={"seconds": 4})
    assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
    assert server.http.delete(f"/banks/{bank}/adapt").status_code == 204  # cancels it
    assert server.http.get(f"/banks/{bank}/adapt").json()["state"] == "none"
    deadline = time.monotonic() + 60
    while server.http.post(f"/banks/{bank}/adapt", params={"seconds": 4}).status_code != 202:
        assert time.monotonic() < deadline  # until the cancelled one has ended its step
        time.sleep(0.1)
    info = wait_until_done(server, bank)
    assert info["state"] == "done", info
    assert server.http.get(f"/banks/{bank}").json()["adapted"] is info["figures"]["kept"]
    assert server.http.delete(f"/banks/{bank}/adapt").status_code == 204
    assert server.http.get(f"/banks/{bank}/adapt").json()["state"] == "none"
    assert server.http.get(f"/banks/{bank}").json()["adapted"] is False


@pytest.mark.parametrize(
    ("images", "code"),
    [
        (np.zeros((2, 100, 100), np.uint8), "invalid_image"),
        (np.zeros((401, 240, 240), np.uint8), "too_large"),
    ],
)
def test_wrong_images_are_refused(server: Any, bank: str, images: np.ndarray, code: str) -> None:
    server.seed(bank, 2)
    answer = server.http.post(
        f"/banks/{bank}/adapt", content=encode({"images": images}, {}), headers={"content-type": MEDIA_TYPE}
    )
    assert answer.json()["error"]["code"] == code
    assert server.http.get(f"/banks/{bank}/adapt").json()["state"] == "none"


def test_a_bank_too_small_to_adapt_fails_with_a_reason(server: Any, bank: str) -> None:
    server.seed(bank, 2)
    long = server.http.post(f"/banks/{bank}/adapt", params={"seconds": 10_000})
    assert (long.status_code, long.json()["error"]["code"]) == (422, "invalid_request")
    assert server.http.post(f"/banks/{bank}/adapt", params={"seconds": 5}).status_code == 202
    info = wait_until_done(server, bank)
    assert info["state"] == "failed"
    assert "at least 6" in info["error"]


def test_an_adaptation_ends_with_its_bank(server: Any, bank: str) -> None:
    server.seed(bank, 6)
    other = f"{bank}-2"
    server.seed(other, 6)
    assert server.http.post(f"/banks/{bank}/adapt", params={"seconds": 600}).status_code == 202
    assert server.http.delete(f"/banks/{bank}").status_code == 204
    assert server.http.get(f"/banks/{bank}/adapt").status_code == 404
    deadline = time.monotonic() + 120
    while server.http.post(f"/banks/{other}/adapt", params={"seconds": 4}).status_code != 202:
        assert time.monotonic() < deadline  # far less than the 600 s that the deleted bank was given
        time.sleep(0.1)
    assert server.http.delete(f"/banks/{other}").status_code == 204
