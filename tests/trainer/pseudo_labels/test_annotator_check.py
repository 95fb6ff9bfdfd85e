"""Test the check of the annotator that a config names."""

import pytest

from vessa.client import AnnotatorClient
from vessa.errors import InvalidConfig, Unreachable
from vessa.schemas import ServiceInfo
from vessa_trainer.config import load_config
from vessa_trainer.pseudo_labels.annotator_check import check_served, choose, refusal

NOBODY = "http://127.0.0.1:9"


def info_of(*parts, trained_on=None):
    return ServiceInfo(
        version="1", preset="nano", model="m", device="cpu", limits={}, banks=[], labels_version="1",
        parts=list(parts), trained_on=trained_on,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("serves", "parts"),
    [
        (None, ["memory"]),
        ("vessa", ["language", "memory"]),
        ("no_language", ["memory"]),
        ("no_memory", ["language"]),
        ("sam2", ["memory"]),
        ("prompts_only", []),
    ],
)
def test_an_annotator_is_what_a_config_names_by_its_parts(serves, parts):
    assert refusal(info_of(*parts), serves) is None
    if serves is not None:
        others = [["language", "memory"], ["memory"], ["language"], []]
        assert all(refusal(info_of(*p), serves) for p in others if p != parts)


def test_a_refusal_says_what_to_start():
    assert refusal(info_of("language", "memory"), "no_language") == (
        "it answers by language and memory, 'no_language' means memory: start one with VESSA_WITHOUT=language"
    )
    assert "by prompts alone, 'vessa' means language and memory" in refusal(info_of(), "vessa")


def test_sam2_is_official_weights_and_no_stage_1():
    said = refusal(info_of("memory", trained_on=["sunnybrook", "hc18"]), "sam2")
    assert said.startswith("its weights went through Stage 1 (sunnybrook, hc18)")
    assert refusal(info_of("memory", trained_on=["sunnybrook"]), "no_language") is None


def test_a_running_annotator_is_checked(annotator):
    right, wrong = (load_config(None, [f"annotator.serves={s}"]).annotator for s in ("vessa", "no_memory"))
    with AnnotatorClient(annotator.url, annotator.api_key) as client:
        assert check_served(client, right).parts == ["language", "memory"]
        with pytest.raises(InvalidConfig, match=f"the annotator at {annotator.url} is not the one"):
            check_served(client, wrong)


def test_the_first_address_that_serves_what_is_named_is_taken(annotator):
    key = f"annotator.api_key={annotator.api_key}"
    config = load_config(None, [key, "annotator.serves=vessa"]).annotator
    url, info = choose([NOBODY, annotator.url], config)
    assert (url, info.preset) == (annotator.url, "nano")
    with pytest.raises(InvalidConfig, match=r"no response from .*; .* means prompts alone: start one with"):
        choose([NOBODY, annotator.url], load_config(None, [key, "annotator.serves=prompts_only"]).annotator)
    with pytest.raises(Unreachable):
        choose([NOBODY], config)
