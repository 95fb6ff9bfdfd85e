"""Build, download, export, show and verify weights directories."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

weights = typer.Typer(no_args_is_help=True, help="Weights directories: build, export, verify and more.")
Weights = Annotated[str, typer.Argument(help="Weights directory, or the name of shipped ones.")]


def _say(line: str) -> None:
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


@weights.command()
def build(
    out: Annotated[Path, typer.Argument(help="Weights directory to write.")],
    preset: Annotated[str, typer.Option(help="base or large.")],
    sam: Annotated[Path, typer.Option(help="Official sam2.1_hiera_*.pt.")],
    dino: Annotated[Path, typer.Option(help="model.safetensors of timm's DINOv2 S or B.")],
    qwen: Annotated[Path | None, typer.Option(help="Qwen3-VL directory; needs Stage 1 to be used.")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the segmenter's input, px.")] = 1024,
    license: Annotated[str, typer.Option(help="Licence to note down.")] = "Apache-2.0",
) -> None:
    """Build a weights directory from official files. Without --qwen it works from templates alone."""
    from vessa_server.model.weights.convert_official import build as run

    command = "vessa-server " + shlex.join(Path(a).name if Path(a).exists() else a for a in sys.argv[1:])
    provenance = {"command": command, "licence": license}
    _say(f"{out}: {run(out, preset, sam, dino, qwen, image_size=image_size, provenance=provenance)}")


@weights.command()
def fetch(
    name: Annotated[str, typer.Argument(help="sam2.1-tiny, sam2.1-small, sam2.1-base-plus or sam2.1-large.")],
    folder: Annotated[Path, typer.Argument(help="Where to put the file.")],
) -> None:
    """Download an official file and verify it; an existing file is only verified."""
    from vessa_server.model.weights.download import fetch as run

    _say(f"{run(name, folder)}: checked")


@weights.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run of `vessa-server pretrain`, or a weights directory.")],
    out: Annotated[Path, typer.Option(help="Weights directory to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of language/: bfloat16 (official graphs unless given), float16 (nano) or float32."
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="The weights that the run started from, where they have moved.")
    ] = None,
) -> None:
    """Write a run's best weights as a weights directory; transformers and vLLM read its language/."""
    from vessa_server.pretraining.export_weights import export as run

    _say(f"{out}: {run(source, out, dtype=dtype, start=start)}")


@weights.command()
def show(folder: Weights) -> None:
    """Show what a weights directory holds, its checksums, origin and licence."""
    from vessa_server.model.weights import directory

    place = directory.find(folder)
    manifest = directory.manifest(place)
    preset = manifest["preset"]
    _say(f"preset: {preset['name']}, {preset['segmenter']['image_size']} px")
    _say(f"language: {'none' if preset['language'] is None else 'Qwen3-VL'}")
    _say(f"digest: {directory.digest(place)}")
    for key, value in manifest["provenance"].items():
        _say(f"{key}: {value}")
    for name, sha256 in manifest["files"].items():
        _say(f"{sha256}  {name}")


@weights.command()
def verify(folder: Weights) -> None:
    """Compare every file of a weights directory with its checksum."""
    from vessa_server.model.weights import directory

    place = directory.find(folder)
    directory.verify(place)
    _say(f"{place}: {len(directory.manifest(place)['files'])} files as vessa.json states")


@weights.command()
def vllm(
    folder: Weights,
    dtype: Annotated[str, typer.Option(help="float32 (nano) or bfloat16 (official graphs on a GPU).")],
) -> None:
    """Print the command that serves a weights directory in vLLM; see docs/how-to/vllm.md."""
    from vessa_server.model.language.remote import serve_command
    from vessa_server.model.weights import directory

    _say(shlex.join(serve_command(directory.find(folder) / "language", dtype)))
