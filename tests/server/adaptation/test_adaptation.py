"""Bank adaptation: it learns, drops what does not help, touches no other bank, and is kept with its own."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vessa.codec import image_digest
from vessa.errors import InvalidRequest
from vessa.schemas import AdaptationFigures
from vessa_server.adaptation import finetune as module
from vessa_server.adaptation.finetune import adapt
from vessa_server.inference.annotator import Annotator
from vessa_server.model.weights import directory
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.decoder_weights import Adaptation
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.template_bank.redis_store import RedisStore
from vessa_server.types import SegmentItem, TemplateItem

FIGURES = AdaptationFigures(before=0.5, after=0.6, kept=True, steps=3, seconds=1.0, bank_version=1)
CLASSES = {1: "disk", 2: "ring"}


@pytest.fixture
def annotator(nano_weights: Path, tmp_path: Path, example: Any) -> Annotator:
    """Untrained weights and a bank of eight examples of eight patients."""
    model, digest = directory.read(nano_weights)
    annotator = Annotator(model, TemplateBanks(FolderStore(tmp_path)), 1 << 28, digest)
    items = [TemplateItem(*example(seed), CLASSES, f"p{seed}") for seed in range(8)]
    annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
    return annotator


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
    return adapt(
        annotator.model,
        bank,
        annotator.model_digest,
        seconds=seconds,
        lock=contextlib.nullcontext(),
        **options,
    )


def perturbed(annotator: Annotator) -> Adaptation:
    """An adaptation whose masks differ from those of the common weights."""
    decoder = annotator.model.segmenter.sam.sam_mask_decoder
    draws = torch.Generator().manual_seed(0)
    tensors = {
        k: (v + 0.3 * torch.randn(v.shape, generator=draws)).numpy() for k, v in decoder.state_dict().items()
    }
    return Adaptation(tensors, annotator.model_digest, FIGURES)


def test_the_decoder_learns_from_its_bank(
    annotator: Annotator, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LR", 5e-3)
    monkeypatch.setattr(module, "CHECK_EVERY", 20)
    monkeypatch.setattr(module, "BATCH", 2)
    before = {k: v.clone() for k, v in annotator.model.state_dict().items()}
    seen: list[float] = []
    found, figures = learn(annotator, 62, progress=lambda share, step, dice: seen.append(share))
    assert figures.steps == 61
    assert seen == sorted(seen)
    assert figures.kept
    assert figures.after > figures.before + module.LEAST_GAIN
    assert found is not None
    assert found.figures == figures
    after = annotator.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # the common weights are unchanged
    assert not any(p.grad is not None for p in annotator.model.parameters())
    assert not annotator.model.training


def test_what_does_not_help_is_dropped(
    annotator: Annotator, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LR", 0.0)
    monkeypatch.setattr(module, "CHECK_EVERY", 2)
    found, figures = learn(annotator, 5)
    assert found is None
    assert not figures.kept
    assert figures.after == figures.before


def test_a_bank_of_one_patient_learns_from_its_slices(
    annotator: Annotator, clock: None, example: Any
) -> None:
    items = [TemplateItem(*example(seed), CLASSES, "one") for seed in range(6)]
    annotator.banks.delete("bank")
    annotator.banks.add("bank", annotator.encode_templates(items))  # type: ignore[arg-type]
    _, figures = learn(annotator, 2)
    assert figures.steps == 1


def test_held_out_patients_are_not_learned_from(annotator: Annotator) -> None:
    train, whole = module._pools(annotator.model, annotator.banks.get("bank"), np.random.default_rng(0))
    templates = {whole.group_names[i] for i in whole.bank}
    assert templates == set(train.group_names)
    assert len(templates) == 6  # a third of eight is held out
    pairs = module._held_pairs(whole, np.random.default_rng(0))
    held = {i.tobytes() for i in whole.images} - {i.tobytes() for i in train.images}
    assert pairs
    assert all(p.target.tobytes() in held and p.templates[0].tobytes() not in held for p in pairs)


def test_too_small_a_bank_is_refused(annotator: Annotator) -> None:
    for template in annotator.banks.get("bank").templates[:3]:
        annotator.banks.remove("bank", template.id)
    with pytest.raises(InvalidRequest, match="holds 5 templates.*at least 6"):
        learn(annotator)


def test_a_blob_is_read_back_and_a_damaged_one_is_refused() -> None:
    one = Adaptation({"a": np.arange(3, dtype=np.float32)}, "model", FIGURES)
    back = Adaptation.from_blob(one.to_blob())
    assert back.tensors["a"].tolist() == [0, 1, 2]
    assert (back.model, back.figures, back.digest) == ("model", FIGURES, one.digest)
    for data in (b"", b"nonsense", one.to_blob()[:-5]):
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
    one = Adaptation({"a": np.zeros(3, np.float32)}, "m", FIGURES)
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
    started = server.http.post(f"/banks/{bank}/adapt", params={"seconds": 4})
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


def test_a_bank_too_small_to_adapt_fails_with_a_reason(server: Any, bank: str) -> None:
    server.seed(bank, 2)
    long = server.http.post(f"/banks/{bank}/adapt", params={"seconds": 10_000})
    assert (long.status_code, long.json()["error"]["code"]) == (422, "invalid_request")
    assert server.http.post(f"/banks/{bank}/adapt", params={"seconds": 5}).status_code == 202
    info = wait_until_done(server, bank)
    assert info["state"] == "failed"
    assert "at least 6" in info["error"]
