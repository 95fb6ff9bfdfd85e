"""`vessa-server pretrain`: from data folders and settings to a finished Stage-1 run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vessa.datasets import Dataset, open_dataset, require_sound
from vessa_server.model import checkpoint
from vessa_server.model.presets import PRESETS
from vessa_server.pretraining.loop import PretrainConfig, Pretraining, validation_pairs
from vessa_server.pretraining.synthetic import phantom_study
from vessa_server.pretraining.tasks import (
    Pool,
    Tasks,
    composite_pools,
    pool_of_dataset,
    pool_of_study,
    synthetic_pools,
)

VALIDATION_SHARE = 0.1
MIN_GROUPS = 4  # two for validation; one whose slices are templates and one whose slices are targets
POOL_SCALE = 1.5  # pools are finer than what the network sees, so that a second look finds more


def pretrain(
    folders: Sequence[Path],
    out: Path,
    config: PretrainConfig,
    *,
    preset: str = "nano",
    start: str | None = None,
    studies: int = 400,
    command: str,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train the annotator on data folders and `studies` synthetic studies; resumes what is in `out`.

    A tenth of each data set's groups and separate synthetic studies are kept for validation.
    Raises InvalidDataset for a folder that is none or that would spoil the training, ValueError for an
    unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset '{preset}'; expected one of {sorted(PRESETS)}")
    size = int(POOL_SCALE * PRESETS[preset].segmenter.image_size)
    datasets = [open_dataset(folder) for folder in folders]
    for dataset in datasets:
        require_sound(dataset, min_groups=MIN_GROUPS)
    real, held_out = [], []
    for dataset in datasets:
        train, validation = _split(dataset, config.seed)
        real.append(pool_of_dataset(dataset, train, size))
        held_out.append(pool_of_dataset(dataset, validation, size))
    synthetic = synthetic_pools(config.seed + 1, studies, size)
    synthetic += composite_pools(real, config.seed + 1, studies // 2)
    tasks = Tasks(real, synthetic, config.synthetic_share, config.region_share)
    pairs = validation_pairs([*held_out, *_synthetic_validation(size)], 96, config.seed)
    provenance = {
        "command": command,
        "data": [{"name": d.name, "licence": d.licence, "groups": len(d.groups())} for d in datasets]
        + [{"name": "vessa-server synthetic studies", "licence": "Apache-2.0", "groups": studies}],
    }
    begin = None if start is None else checkpoint.find(start)
    if begin is not None:
        provenance["start"] = checkpoint.manifest(begin)["provenance"]
    run = Pretraining(PRESETS[preset], config, tasks, pairs, out, provenance, torch.device(device), begin)
    run.resume()
    return run.run()


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
    return pools
