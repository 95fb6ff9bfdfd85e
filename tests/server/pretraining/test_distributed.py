"""Stage 1 on official graphs and in several processes: what is trained, the same losses, export.

The weights have the official formats and names with random values: SAM 2.1 tiny whole, the others smaller.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration
from typer.testing import CliRunner

from vessa.errors import InvalidRequest, InvalidWeights
from vessa_server.cli.main import app
from vessa_server.model.language.vlm import LanguageModel, stored_state
from vessa_server.model.presets import LanguagePreset, RetrieverPreset, full
from vessa_server.model.retriever import Retriever
from vessa_server.model.segmenter import Segmenter
from vessa_server.model.weights import directory
from vessa_server.model.weights.convert_official import place_language
from vessa_server.pretraining.data.tasks import StudySource, Tasks
from vessa_server.pretraining.distributed import StepDivision
from vessa_server.pretraining.export_weights import export, trained
from vessa_server.pretraining.loop import PretrainConfig
from vessa_server.pretraining.lora import Adapter, Lora, changing, choose, training_mode
from vessa_server.pretraining.pretrain import pretrain
from vessa_server.pretraining.step import prepare, validation_scores

CONFIG = PretrainConfig(
    steps=4, batch=2, lr=0.2, seed=3, validate_every=2, log_every=1, lora=Lora(rank=4, dropout=0.0)
)
OPTIONS = ["--steps", "4", "--batch", "2", "--lr", "0.2", "--seed", "3", "--validate-every", "2"]
OPTIONS += ["--log-every", "1", "--lora-rank", "4", "--lora-dropout", "0"]
OPTIONS += ["--studies", "2", "--validation", "3"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]


def write_qwen(folder, *, tied):
    """A small Qwen3-VL directory with rows of the vocabulary that its tokenizer does not use."""
    torch.manual_seed(0)
    language = LanguageModel.nano(LanguagePreset())
    language.model.resize_token_embeddings(len(language.processor.tokenizer) + 16, mean_resizing=False)
    if tied:
        language.model.config.tie_word_embeddings = True
        language.model.tie_weights()
    language.write(folder, half=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("<SEG>", "<spare>"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights as `weights build` makes them of official files, before Stage 1, only smaller."""
    folder = tmp_path_factory.mktemp("official")
    write_qwen(folder / "qwen", tied=False)
    torch.manual_seed(0)
    retriever = RetrieverPreset(image_size=56)
    preset = full("base", "tiny", retriever.name, 128, language=True)
    preset = dataclasses.replace(preset, retriever=retriever)
    with directory.fresh_folder(folder / "start", preset, {"licence": "Apache-2.0"}) as fresh:
        save_file(stored_state(Segmenter(preset.segmenter), half=False), fresh / "segmenter.safetensors")
        save_file(stored_state(Retriever(retriever), half=False), fresh / "retriever.safetensors")
        place_language(folder / "qwen", fresh / "language", 128)
    return folder / "start"


def train(out, start, config=CONFIG, **options):
    """Run Stage 1 in this process."""
    return pretrain([], out, config, start=str(start), studies=2, validation=3, command="test", **options)


def launch(out, start, *options):
    """Start Stage 1 in two processes."""
    command = [sys.executable, *TORCHRUN, "vessa_server", "pretrain", "--out", str(out)]
    command += ["--start", str(start), *OPTIONS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(process, out, seconds=800):
    try:
        assert process.wait(seconds) == 0, out.with_suffix(".log").read_text()[-3000:]
    finally:
        kill(process)


def kill(process):
    """Kill processes that `launch` started, at once and without a chance to say anything."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for one in [launcher, *launcher.children(recursive=True)]:
            one.kill()
        process.wait()


def curve(out):
    """What a run logged, without the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "minutes"} for line in lines]


def assert_same(first, second):
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4)


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """A finished run of one process."""
    out = tmp_path_factory.mktemp("runs") / "one"
    train(out, start)
    losses = [line["loss"] for line in curve(out) if "loss" in line]
    assert len(losses) == 4
    assert abs(losses[-1] - losses[0]) > 0.05  # the weights moved
    return out


@pytest.mark.timeout(900)
def test_two_processes_have_the_losses_of_one(one, start, tmp_path):
    out = tmp_path / "two"
    finish(launch(out, start), out)
    assert_same(curve(one), curve(out))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_sharded_weights_have_the_same_losses_and_outlive_a_kill(one, start, tmp_path):
    out, copy = tmp_path / "sharded", tmp_path / "copy"
    process = launch(out, start, "--fsdp", "--checkpoint-activations")
    try:
        deadline = time.monotonic() + 800
        while not (out / "checkpoint.json").exists():
            assert process.poll() is None, out.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        kill(process)
    assert len(list(out.glob("state-00000002-*-of-2.safetensors"))) == 2
    shutil.copytree(out, copy)
    finish(launch(out, start, "--fsdp"), out)
    assert_same(curve(one), curve(out))
    train(copy, start)  # two processes' checkpoint serves one
    assert_same(curve(one), curve(copy))
    best = [load_file(run / "best.safetensors") for run in (one, out)]
    assert best[0].keys() == best[1].keys()
    assert all(best[0][k].shape == best[1][k].shape for k in best[0])


def test_passes_and_recomputed_activations_change_no_loss(one, start, tmp_path):
    train(tmp_path / "passes", start, division=StepDivision(accumulate=2, checkpoint_activations=True))
    assert_same(curve(one), curve(tmp_path / "passes"))


def test_what_an_official_graph_trains(start):
    model, _ = directory.read(start, fresh_projector=True)
    before = sum(p.numel() for p in model.parameters())
    choose(model, Lora(rank=4))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for part in ("lora_", "embed_tokens.row", "lm_head.row", "projector.", "sam_mask_decoder."):
        assert any(part in n for n in names), part
        names = [n for n in names if part not in n]
    assert names == []
    assert set(changing(model)) < set(model.state_dict())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.2 * before
    training_mode(model)
    modules = dict(model.named_modules())
    for frozen in ("retriever", "segmenter.sam.image_encoder", "segmenter.sam.memory_attention"):
        assert not any(m.training for m in modules[frozen].modules())
    assert modules["segmenter"].training  # the decoder must not cut the gradient of what it calls absent
    assert any(m.training and isinstance(m, torch.nn.Dropout) for m in model.language.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_folding_gives_an_ordinary_language_model_with_the_same_states(tied, tmp_path):
    write_qwen(tmp_path / "qwen", tied=tied)
    place_language(tmp_path / "qwen", tmp_path / "language", 128)
    language = LanguageModel.read(tmp_path / "language", 128)
    plain = {k: v.clone() for k, v in language.model.state_dict().items()}
    adapter = Adapter(language, Lora(rank=4))
    images = torch.rand(2, 1, 3, 128, 128)
    language.eval()
    with torch.no_grad():
        for parameter in language.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    rows = {p.data_ptr() for n, p in language.named_parameters() if n.endswith(".row")}
    assert len(rows) == (1 if tied else 2)
    state, loss = language(*images, ["liver"], ["Segment it."])
    adapter.fold()
    folded, folded_loss = language(*images, ["liver"], ["Segment it."])
    torch.testing.assert_close(folded, state, rtol=1e-4, atol=1e-4)
    assert folded_loss.item() == pytest.approx(loss.item(), rel=1e-4)
    after = language.model.state_dict()
    assert after.keys() == plain.keys()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        differ = (after[name] != plain[name]).any(1).nonzero().flatten().tolist()
        assert differ == [language.seg_id]
    assert all(torch.equal(after[k], plain[k]) for k in plain if "visual" in k or "norm" in k)


def masks(model):
    """Logits of fixed episodes (N, 1, S, S)."""
    episodes = Tasks([], StudySource(5, 192, []), 2, 1.0).batch(np.random.default_rng(0), 2)
    batch = prepare(episodes, torch.tensor([1, 2]), 128, 4 * model.segmenter.side)
    seen = []
    model.segmenter.sam.sam_mask_decoder.register_forward_hook(lambda *call: seen.append(call[2][0]))
    with torch.no_grad():
        validation_scores(model, torch.nn.Identity(), batch)
    return seen[-1]


def test_an_exported_run_draws_the_same_masks(one, start, tmp_path):
    digest = export(one, tmp_path / "float", dtype="float32")
    model, found = directory.read(tmp_path / "float")  # strictly, as what serves does
    assert found == digest
    before = masks(trained(one)[0])
    assert before.std() > 0
    torch.testing.assert_close(masks(model), before)
    export(one, tmp_path / "half")
    again = masks(directory.read(tmp_path / "half")[0])
    assert ((again > 0) == (before > 0)).float().mean() > 0.98
    manifest = directory.manifest(tmp_path / "half")
    assert manifest["provenance"]["command"] == "test"
    assert manifest["provenance"]["start"]["digest"] == directory.digest(start)


def test_an_exported_language_model_is_an_ordinary_directory(one, start, tmp_path):
    export(one, tmp_path / "w")
    folder = tmp_path / "w" / "language"
    loaded, found = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert loaded.dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert not any(found[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    begun = LanguageModel.read(start / "language", 128)
    rows = loaded.get_input_embeddings().weight, begun.model.get_input_embeddings().weight.bfloat16()
    assert (rows[0] != rows[1]).any(1).nonzero().flatten().tolist() == [begun.seg_id]
    states = [
        language(*torch.ones(2, 1, 3, 128, 128), ["a"], ["b"])[0]
        for language in (LanguageModel.read(folder, 128), LanguageModel.read(folder, 128, "auto"))
    ]
    torch.testing.assert_close(states[1], states[0], rtol=0.1, atol=0.1)


def test_exports_of_exports(nano_weights, tmp_path):
    said = CliRunner().invoke(app, ["weights", "export", str(nano_weights), "--out", str(tmp_path / "w")])
    assert directory.digest(tmp_path / "w") in said.output
    files = [directory.manifest(folder)["files"] for folder in (nano_weights, tmp_path / "w")]
    assert all(files[1][name] == value for name, value in files[0].items() if name.endswith("safetensors"))
    assert json.loads((tmp_path / "w" / "language" / "config.json").read_text())["dtype"] == "float16"
    (tmp_path / "data").mkdir()
    with pytest.raises(InvalidRequest, match="left as it is"):
        export(nano_weights, tmp_path / "data")
    with pytest.raises(InvalidRequest, match="unknown dtype 'int8'"):
        export(nano_weights, tmp_path / "w", dtype="int8")
    with pytest.raises(InvalidWeights, match="no weights at"):
        export(tmp_path / "data", tmp_path / "v")


def test_a_run_belongs_to_its_start(one, nano_weights, tmp_path):
    with pytest.raises(InvalidWeights, match="started from weights"):
        export(one, tmp_path / "w", start=str(nano_weights))


def test_an_official_graph_never_starts_from_random_weights(tmp_path, start):
    with pytest.raises(InvalidRequest, match="weights build.*--start"):
        pretrain([], tmp_path / "r", CONFIG, preset="base", command="test")
    with pytest.raises(InvalidRequest, match="are of preset 'base', not 'large'"):
        train(tmp_path / "r", start, preset="large")
    with pytest.raises(InvalidWeights, match="has not been through Stage 1"):
        directory.read(start)
    assert not (tmp_path / "r").exists()


def test_a_run_is_resumed_with_its_own_settings(one, start):
    before = (one / "metrics.jsonl").read_bytes()
    with pytest.raises(InvalidRequest, match=r"config\.lr was 0\.2 and is now 0\.1; config\.seed was 3 and"):
        train(one, start, dataclasses.replace(CONFIG, lr=0.1, seed=4))
    with pytest.raises(InvalidRequest, match=r"preset\..* was .* and is now"):
        pretrain([], one, CONFIG, studies=2, validation=3, command="test")
    assert (one / "metrics.jsonl").read_bytes() == before
    assert train(one, start)["steps"] == 4  # finished: nothing is left to do


def test_a_batch_must_be_divisible(start, tmp_path):
    with pytest.raises(InvalidRequest, match="expected a multiple of 4"):
        train(tmp_path / "r", start, division=StepDivision(accumulate=4))
    with pytest.raises(InvalidRequest, match="torchrun"):
        train(tmp_path / "r", start, division=StepDivision(shard=True))
