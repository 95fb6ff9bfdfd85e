"""Serve the annotator, manage its keys, stores and weights, pretrain and evaluate it."""

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vessa.errors import InvalidConfig, InvalidRequest, VessaError
from vessa.redaction import argument_warning, redact
from vessa_server.cli.audit import audit as audit_app
from vessa_server.cli.data import data as data_app
from vessa_server.cli.keys import keys as keys_app
from vessa_server.cli.store import erase
from vessa_server.cli.store import store as store_app
from vessa_server.cli.weights import weights as weights_app

# Local variables in a traceback would show keys and addresses with passwords.
app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_show_locals=False
)
app.add_typer(keys_app, name="keys")
app.add_typer(weights_app, name="weights")
app.add_typer(data_app, name="data")
app.add_typer(store_app, name="store")
app.add_typer(audit_app, name="audit")
app.command()(erase)
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line.")]


def _finish(result: dict[str, Any], as_json: bool) -> None:
    for key, value in result.items():
        Console(stderr=as_json).print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(result))


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback unless told.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights directory, or the name of shipped ones.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:N or auto.")] = None,
    store: Annotated[
        str | None, typer.Option(help="folder:PATH or redis://... for the template banks.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Serve without a key.")] = False,
) -> None:
    """Serve the annotator over HTTP. Every setting is also an environment variable VESSA_..."""
    from vessa_server.app import serve as run
    from vessa_server.settings import Settings

    given = {"host": host, "port": port, "weights": weights, "device": device, "store": store}
    given["insecure"] = insecure or None
    run(Settings(**{k: v for k, v in given.items() if v is not None}))


@app.command()
def ray(
    replicas: Annotated[int, typer.Option(help="How many there are, at the least.", min=1)] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="How many there may be under load; as many as --replicas unless told.")
    ] = None,
    requests: Annotated[
        float, typer.Option(help="Requests, waiting or in work, that one more replica is started for.", min=1)
    ] = 4.0,
    gpus: Annotated[float, typer.Option(help="GPUs of each replica: a part of one, or whole ones.")] = 0.0,
    cpus: Annotated[float, typer.Option(help="CPU cores of each replica.", min=0)] = 1.0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on; without, one is started on this machine.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback unless told.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weights directory, or the name of shipped ones.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="redis://... for the template banks.")] = None,
) -> None:
    """Serve replicas of the annotator by Ray Serve; settings are those of `serve`. Needs the extra `ray`."""
    if importlib.util.find_spec("ray") is None:
        raise InvalidConfig(
            "Ray is not installed: it comes with the extra, pip install './services/vessa[ray]'"
        )
    from vessa_server.replicas import ReplicaScaling, run
    from vessa_server.settings import Settings

    given = {"host": host, "port": port, "weights": weights, "store": store}
    settings = Settings(**{k: v for k, v in given.items() if v is not None})
    run(settings, ReplicaScaling(replicas, max_replicas or replicas, gpus, cpus, requests), address)


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(help="Run directory; a run found there is resumed.")],
    data: Annotated[list[Path] | None, typer.Option(help="Data folder; may be given several times.")] = None,
    start: Annotated[
        str | None, typer.Option(help="Weights to start from: a directory, or the name of shipped ones.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="nano, which needs no --start, or that of the weights in --start.")
    ] = None,
    trunk: Annotated[
        Path | None,
        typer.Option(help="ImageNet weights of EfficientNet-Lite0 for the trunk of a new nano."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after this much training.")] = None,
    steps: Annotated[int, typer.Option(help="Stop after this many steps.")] = 20000,
    batch: Annotated[int, typer.Option(help="Episodes per step.")] = 8,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; 8e-4 for nano, 4e-5 for official graphs.")
    ] = None,
    dice_weight: Annotated[float, typer.Option(help="Weight of the Dice term in Eq. 3.")] = 0.5,
    synthetic_share: Annotated[float, typer.Option(help="Share of episodes from synthetic studies.")] = 0.6,
    region_share: Annotated[
        float, typer.Option(help="Share of the real episodes that are region tasks.")
    ] = 0.4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where that is safe.")] = False,
    lora_rank: Annotated[int, typer.Option(help="LoRA of an official language model.", min=1)] = 128,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before LoRA.", min=0, max=0.9)] = 0.05,
    accumulate: Annotated[int, typer.Option(help="Passes a step, to save memory.", min=1)] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: divide the weights among processes.")
    ] = False,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Compute activations twice, to save memory.")
    ] = False,
    studies: Annotated[
        int, typer.Option(help="Synthetic studies held at a time; they are renewed while training.")
    ] = 100,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 400,
    validation: Annotated[int, typer.Option(help="Episodes of a validation.", min=1)] = 96,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; under torchrun cuda is one GPU a process.")
    ] = "cpu",
    as_json: Json = False,
) -> None:
    """Stage 1: pretrain the annotator on data folders and synthetic studies; under torchrun on many GPUs."""
    from vessa_server.pretraining.distributed import StepDivision
    from vessa_server.pretraining.loop import PretrainConfig
    from vessa_server.pretraining.lora import Lora
    from vessa_server.pretraining.losses import LossWeights
    from vessa_server.pretraining.pretrain import pretrain as run

    config = PretrainConfig(
        steps=steps,
        minutes=minutes,
        batch=batch,
        lr=lr,
        seed=seed,
        synthetic_share=synthetic_share,
        region_share=region_share,
        bf16=bf16,
        validate_every=validate_every,
        log_every=log_every,
        weights=LossWeights(dice=dice_weight),
        lora=Lora(lora_rank, lora_dropout),
    )
    folders = {
        str(p) for p in (out, *(data or []), *([start] if start else []), *([trunk] if trunk else []))
    }  # where they lay is nobody's business
    command = "vessa-server " + shlex.join(Path(a).name if a in folders else a for a in sys.argv[1:])
    figures = run(
        data or [],
        out,
        config,
        preset=preset,
        start=start,
        trunk=trunk,
        division=StepDivision(accumulate, fsdp, checkpoint_activations),
        studies=studies,
        validation=validation,
        command=command,
        device=device,
    )
    if int(os.environ.get("RANK", "0")) == 0:  # of the processes that torchrun started, one answers
        _finish(figures, as_json)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Data folder.")],
    weights: Annotated[str, typer.Option(help="Weights directory, or the name of shipped ones.")] = "nano",
    bank_split: Annotated[
        list[str] | None, typer.Option(help="Split file of a bank's patients; repeatable, a bank each.")
    ] = None,
    bank_groups: Annotated[
        list[str] | None, typer.Option(help="Patients of a bank, ID,ID; repeatable, a bank each.")
    ] = None,
    test_split: Annotated[
        str | None, typer.Option(help="Split file of the test patients; all others unless given.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Only these of: top1,top3,sample,random,no-language,no-memory,box,...")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of the variants that draw a template.", min=1)] = 3,
    adapt_minutes: Annotated[float, typer.Option(help="Training time of the variant 'adapted'.")] = 20.0,
    unlabeled_split: Annotated[
        str | None,
        typer.Option(help="Split file of the patients whose images the variant 'adapted' learns from."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:N or auto.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of report.html.")] = Path("runs/evaluate"),
    as_json: Json = False,
) -> None:
    """Score the annotator alone, with the templates of a few patients, and what each part of it is worth."""
    from vessa.datasets import open_dataset
    from vessa_server.evaluation import VARIANTS
    from vessa_server.evaluation import evaluate as run

    dataset = open_dataset(data)
    banks = [dataset.split(name) for name in bank_split or []]
    banks += [tuple(groups.split(",")) for groups in bank_groups or []]
    if not banks:
        raise InvalidRequest("name the bank's patients: --bank-split FILE or --bank-groups ID,ID")
    chosen = list(VARIANTS) if variants is None else variants.split(",")
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise InvalidRequest(f"unknown variant '{unknown[0]}'; known are {', '.join(VARIANTS)}")
    test = None if test_split is None else dataset.split(test_split)
    figures = run(
        dataset,
        banks,
        test,
        weights=weights,
        device=device,
        variants=chosen,
        seeds=seeds,
        adapt_seconds=60 * adapt_minutes,
        unlabeled=None if unlabeled_split is None else dataset.split(unlabeled_split),
        out=out,
        console=Console(stderr=True),
    )
    _finish(figures, as_json)


@app.command()
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write the data sets heart/ and abdomen/.")],
    patients: Annotated[int, typer.Option(help="Patients a data set.", min=5)] = 20,
    slices: Annotated[int, typer.Option(help="Slices a patient.", min=1)] = 8,
    size: Annotated[int, typer.Option(help="Side of the images, px.", min=64)] = 160,
    seed: Annotated[int, typer.Option(help="Seed; the same seed gives the same files.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a synthetic data set of hearts and abdomens, with masks and splits."""
    from vessa_server.pretraining.data.phantoms import write_phantoms

    _finish(write_phantoms(folder, patients=patients, slices=slices, size=size, seed=seed), as_json)


def main() -> None:
    """Run the command line; a VessaError becomes one clear line and exit code 1."""
    console = Console(stderr=True)
    if warning := argument_warning(sys.argv[1:]):
        console.print(f"vessa-server: warning: {warning}", style="red", markup=False, soft_wrap=True)
    try:
        app()
    except VessaError as error:
        line = redact(f"vessa-server: {error.code}: {error}")
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from error
