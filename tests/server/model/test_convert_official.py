"""Full presets from files in the official formats at official sizes, with random weights."""

import dataclasses
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vessa.codec import image_digest
from vessa.errors import InvalidRequest, InvalidWeights
from vessa_server.cli.main import app
from vessa_server.inference.annotator import load_annotator
from vessa_server.model.language.vlm import LanguageModel
from vessa_server.model.presets import PRESETS, LanguagePreset, full
from vessa_server.model.segmenter import Segmenter
from vessa_server.model.weights import directory, download
from vessa_server.model.weights.convert_official import build, place_language
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.folder_store import FolderStore
from vessa_server.types import SegmentItem, TemplateItem


def write_sam(path, name):
    preset = dataclasses.replace(full("base", name, "vit_small_patch14_dinov2").segmenter, image_size=256)
    torch.save({"model": Segmenter(preset).sam.state_dict()}, path)


def write_dino(path, name):
    save_file(timm.create_model(name, pretrained=False, num_classes=0, img_size=518).state_dict(), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """SAM 2.1 tiny and DINOv2-S, whole."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    write_sam(folder / "sam.pt", "tiny")
    write_dino(folder / "dino.safetensors", "vit_small_patch14_dinov2")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A small Qwen3-VL directory whose tokenizer leaves rows of the vocabulary unused."""
    folder = tmp_path_factory.mktemp("hub") / "Qwen3-VL"
    torch.manual_seed(0)
    language = LanguageModel.nano(LanguagePreset())
    language.model.resize_token_embeddings(len(language.processor.tokenizer) + 16, mean_resizing=False)
    language.write(folder, half=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<SEG>", "<spare>"))
    return folder


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "base"
    sam, dino = files / "sam.pt", files / "dino.safetensors"
    build(out, "base", sam, dino, None, image_size=256, provenance={"licence": "Apache-2.0"})
    return out


def test_the_official_files_are_taken_as_they_are(built, files):
    model, _ = directory.read(built)
    official = torch.load(files / "sam.pt", weights_only=True)["model"]
    assert model.preset == full("base", "tiny", "vit_small_patch14_dinov2", 256)
    assert all(torch.equal(v, official[k]) for k, v in model.segmenter.sam.state_dict().items())
    dino = load_file(files / "dino.safetensors")
    assert torch.equal(model.retriever.backbone.blocks[3].attn.qkv.weight, dino["blocks.3.attn.qkv.weight"])
    assert model.retriever.backbone.pos_embed.shape == (1, 18 * 18 + 1, 384)  # 252 px


def test_an_annotator_without_language_works_at_once(built, tmp_path):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 255, (60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    mask[20:40, 30:50] = 1
    banks = TemplateBanks(FolderStore(str(tmp_path)))
    annotator = load_annotator(str(built), "cpu", banks, 1 << 28)
    banks.add("b", annotator.encode_templates([TemplateItem(image, mask, {1: "organ"}, "p1")]))
    (answer,) = annotator.segment([SegmentItem(image_digest(image), image, "b")])
    assert answer.labels.shape == (60, 80)


def test_a_partial_checkpoint_is_refused_with_its_keys(files, tmp_path):
    state = torch.load(files / "sam.pt", weights_only=True)["model"]
    del state["no_obj_ptr"]
    torch.save({"model": state | {"extra": torch.zeros(1)}}, tmp_path / "sam.pt")
    with pytest.raises(InvalidWeights, match=r"sam\.pt .*missing \['no_obj_ptr'\], unknown \['extra'\]"):
        build(tmp_path / "w", "base", tmp_path / "sam.pt", files / "dino.safetensors", None, provenance={})
    assert [p.name for p in tmp_path.iterdir()] == ["sam.pt"]


@pytest.mark.parametrize("content", [{"model": {"a": torch.zeros(1)}}, {"weights": 1}, None])
def test_another_file_is_refused(files, tmp_path, content):
    torch.save(content, tmp_path / "sam.pt")
    with pytest.raises(InvalidWeights, match=r"sam\.pt"):
        build(tmp_path / "w", "base", tmp_path / "sam.pt", files / "dino.safetensors", None, provenance={})
    with pytest.raises(InvalidWeights, match=r"sam\.pt is not a readable safetensors"):
        build(tmp_path / "w", "base", files / "sam.pt", tmp_path / "sam.pt", None, provenance={})


def test_a_pickle_with_code_is_refused(files, tmp_path):
    torch.save({"model": subprocess.Popen}, tmp_path / "sam.pt")
    with pytest.raises(InvalidWeights, match="not a SAM 2.1 checkpoint"):
        build(tmp_path / "w", "base", tmp_path / "sam.pt", files / "dino.safetensors", None, provenance={})


def test_files_of_another_preset_are_refused(files, tmp_path):
    with pytest.raises(InvalidRequest, match="preset large takes"):
        build(tmp_path, "large", files / "sam.pt", files / "dino.safetensors", None, provenance={})
    with pytest.raises(InvalidRequest, match="multiple of 32"):
        build(
            tmp_path,
            "base",
            files / "sam.pt",
            files / "dino.safetensors",
            None,
            image_size=300,
            provenance={},
        )


def test_seg_takes_a_spare_row_and_no_tensor_changes(qwen, tmp_path):
    place_language(qwen, tmp_path / "language", 128)
    language = LanguageModel.read(tmp_path / "language", 128)
    rows = language.model.config.text_config.vocab_size
    assert language.seg_id == rows - 16
    assert (tmp_path / "language" / "model.safetensors").samefile(qwen / "model.safetensors")
    tokens, _ = language.encode("Segment it.", "liver")
    assert tokens[-1] == language.seg_id
    size = language.processor.image_processor.size
    assert size["shortest_edge"] == size["longest_edge"] == 128**2


def test_a_partial_language_model_is_refused_with_its_keys(qwen, tmp_path):
    copy = tmp_path / "qwen"
    copy.mkdir()
    for path in qwen.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state = load_file(qwen / "model.safetensors")
    del state["model.visual.pos_embed.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidWeights, match=r"missing \['model\.visual\.pos_embed\.weight'\]"):
        place_language(copy, tmp_path / "language", 128)
    with pytest.raises(InvalidWeights, match=r"model\.visual\.pos_embed\.weight"):
        LanguageModel.read(copy, 128)
    (copy / "model.safetensors").unlink()
    with pytest.raises(InvalidWeights, match="incomplete or damaged"):
        place_language(copy, tmp_path / "language", 128)


def test_a_language_model_before_stage_1_is_not_used(files, qwen, tmp_path):
    sam, dino = files / "sam.pt", files / "dino.safetensors"
    build(tmp_path / "w", "base", sam, dino, qwen, image_size=256, provenance={})
    directory.verify(tmp_path / "w")
    with pytest.raises(InvalidWeights, match="has not been through Stage 1"):
        directory.read(tmp_path / "w")


@pytest.mark.slow
def test_sam_base_plus_and_dino_b_whole(tmp_path):
    write_sam(tmp_path / "sam.pt", "base_plus")
    write_dino(tmp_path / "dino.safetensors", "vit_base_patch14_dinov2")
    sam, dino = tmp_path / "sam.pt", tmp_path / "dino.safetensors"
    build(tmp_path / "w", "base", sam, dino, None, image_size=512, provenance={})
    model, _ = directory.read(tmp_path / "w")
    assert model.preset.segmenter.config == "configs/sam2.1/sam2.1_hiera_b+.yaml"
    assert model.preset.retriever.name == "vit_base_patch14_dinov2"


def test_weights_show_and_verify(built, tmp_path):
    shown = CliRunner().invoke(app, ["weights", "show", str(built)])
    assert shown.exit_code == 0, shown.output
    for part in ("preset: base, 256 px", "language: none", "licence: Apache-2.0", "segmenter.safetensors"):
        assert part in shown.output
    assert "2 files as vessa.json states" in CliRunner().invoke(app, ["weights", "verify", str(built)]).output


def test_a_hub_out_of_reach_says_what_to_do_by_hand(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "vessa_server", "weights", "fetch", "sam2.1-tiny", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "facebook/sam2.1-hiera-tiny/resolve/main/sam2.1_hiera_tiny.pt by hand" in said, said
    assert len(done.stderr.splitlines()) == 1


def test_a_file_fetched_by_hand_is_checked(tmp_path, monkeypatch):
    (tmp_path / "sam2.1_hiera_tiny.pt").write_bytes(b"weights")
    with pytest.raises(InvalidWeights, match="is not the official file"):
        download.fetch("sam2.1-tiny", tmp_path)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(
        download.OFFICIAL, "sam2.1-tiny", download.OFFICIAL["sam2.1-tiny"]._replace(sha256=sha256)
    )
    assert download.fetch("sam2.1-tiny", tmp_path) == tmp_path / "sam2.1_hiera_tiny.pt"
    with pytest.raises(InvalidRequest, match="by hand"):
        download.fetch("dinov2-base", tmp_path)
    with pytest.raises(InvalidRequest, match="unknown name"):
        download.fetch("sam", tmp_path)


def test_the_presets_of_the_design_can_be_built():
    assert PRESETS["base"] == full("base", "tiny", "vit_small_patch14_dinov2")
    assert PRESETS["large"] == full("large", "large", "vit_base_patch14_dinov2")
