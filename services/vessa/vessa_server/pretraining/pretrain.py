"""Run `vessa-server pretrain`: Stage 1 on data folders and synthetic studies."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vessa.datasets import Dataset, open_dataset, require_sound
from vessa.errors import InvalidRequest
from vessa_server.model.presets import PRESETS
from vessa_server.model.timm_trunk import load_trunk
from vessa_server.model.vessa import Vessa
from vessa_server.model.weights import directory
from vessa_server.pretraining.checkpoints import hold_to_settings
from vessa_server.pretraining.data.pools import Pool, pool_of_dataset, pool_of_study, pool_size
from vessa_server.pretraining.data.synthetic import phantom_study
from vessa_server.pretraining.data.tasks import StudySource, Tasks
from vessa_server.pretraining.data.varied_studies import varied_study
from vessa_server.pretraining.distributed import Processes, StepDivision
from vessa_server.pretraining.loop import PretrainConfig, Pretraining, validation_episodes

VALIDATION_SHARE = 0.1
PRETRAINED_TRUNK = "tf_efficientnet_lite0"
MIN_GROUPS = 4  # two for validation, one for templates and one for targets


def pretrain(
    folders: Sequence[Path],
    out: Path,
    config: PretrainConfig,
    *,
    preset: str | None = None,
    start: str | None = None,
    trunk: Path | None = None,
    division: StepDivision | None = None,
    studies: int = 100,
    validation: int = 96,
    command: str,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train the annotator on data folders and synthetic studies; resume the run in `out`.

    preset: from scratch nano alone, else that of the weights to start from; trunk: see `starting_model`;
    studies: synthetic ones held at a time, renewed while training; validation: episodes
    A tenth of each data set's groups and separate synthetic studies are kept for validation.
    Raises InvalidDataset for a folder that is no data set or has errors, InvalidRequest for a preset
    without weights to start from and for a run that was started with other settings.
    """
    processes = Processes(torch.device(device))
    torch.manual_seed(config.seed)
    model, origin = starting_model(preset, start, config, trunk)
    size = pool_size(model.preset.segmenter.image_size)
    datasets = [open_dataset(folder) for folder in folders]
    for dataset in datasets:
        require_sound(dataset, min_groups=MIN_GROUPS)
    data = [{"name": d.name, "licence": d.licence, "groups": len(d.groups())} for d in datasets]
    settings = {
        "preset": model.preset.to_dict(),
        "start": origin.get("digest"),
        "config": asdict(config),
        "data": data,
        "studies": studies,
        "validation": validation,
        "where": {"start": None if start is None else str(directory.find(start).resolve())},
    }
    out.mkdir(parents=True, exist_ok=True)
    hold_to_settings(out, settings, write=processes.first)
    real, held_out = [], []
    for dataset in datasets:
        train, held = _split(dataset, config.seed)
        real.append(pool_of_dataset(dataset, train, size))
        held_out.append(pool_of_dataset(dataset, held, size))
    source = StudySource(config.seed + 1, size, real)
    tasks = Tasks(real, source, studies, config.synthetic_share, config.region_share)
    episodes = validation_episodes([*held_out, *_synthetic_validation(size)], validation, config.seed)
    synthetic_data = {"name": "vessa-server synthetic studies", "licence": "Apache-2.0", "groups": studies}
    provenance: dict[str, Any] = {"command": command, "data": [*data, synthetic_data]}
    if origin:
        provenance["start"] = origin
    run = Pretraining(model, config, tasks, episodes, out, provenance, processes, division)
    run.resume()
    return run.run()


def starting_model(
    preset: str | None, start: str | None, config: PretrainConfig, trunk: Path | None = None
) -> tuple[Vessa, dict[str, Any]]:
    """Return the model to train, on the CPU, and the provenance of its weights; empty for new ones.

    trunk: published weights of EfficientNet-Lite0 for a new nano, which then has that trunk
    Raises InvalidRequest when a graph other than nano's would start with random weights.
    """
    if start is None:
        if preset not in (None, "nano"):
            raise InvalidRequest(
                f"preset '{preset}' is trained from official weights alone: make them with "
                "`vessa-server weights build` and give them with --start"
            )
        if trunk is None:
            return Vessa(PRESETS["nano"]), {}
        nano = PRESETS["nano"]
        model = Vessa(replace(nano, segmenter=replace(nano.segmenter, trunk=PRETRAINED_TRUNK)))
        load_trunk(model.segmenter.sam.image_encoder.trunk, trunk)
        return model, {}
    if trunk is not None:
        raise InvalidRequest("--trunk fills a new nano; the weights in --start have a trunk already")
    folder = directory.find(start)
    manifest = directory.manifest(folder)
    name = manifest["preset"]["name"]
    if preset not in (None, name):
        raise InvalidRequest(f"the weights in '{folder.name}' are of preset '{name}', not '{preset}'")
    # Frozen weights of an official language model are stored in bfloat16 when it computes in bfloat16.
    half = torch.bfloat16 if config.bf16 and name != "nano" else None
    model, digest = directory.read(folder, fresh_projector=True, language_dtype=half)
    return model, {"digest": digest, **manifest["provenance"]}


def _split(dataset: Dataset, seed: int) -> tuple[list[str], list[str]]:
    groups = np.random.default_rng(seed).permutation(sorted(dataset.groups())).tolist()
    count = max(2, round(VALIDATION_SHARE * len(groups)))
    return groups[count:], groups[:count]


def _synthetic_validation(size: int) -> list[Pool]:
    pools = []
    for index, (kind, protocol) in enumerate(
        [("heart", "cine MR"), ("abdomen", "MR T2"), ("heart", "cine MR"), ("abdomen", "CT"), ("heart", None)]
    ):
        rng = np.random.default_rng([987_654, index])
        study = phantom_study(kind, rng, protocol=protocol, patients=5, slices=5, size=size)
        pools.append(pool_of_study(study, kind))
    for index in range(4):
        rng = np.random.default_rng([987_655, index])
        pools.append(pool_of_study(varied_study(rng, patients=5, slices=4, size=size), "varied"))
    return pools
