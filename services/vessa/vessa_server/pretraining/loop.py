"""Stage 1 from start to weights: optimizer, schedule, validation, checkpoints, resume."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vessa_server.model import checkpoint
from vessa_server.model.presets import Preset
from vessa_server.model.vessa import Vessa
from vessa_server.pretraining.losses import LossWeights
from vessa_server.pretraining.step import prepare, prepare_layouts, training_loss, validation_dice
from vessa_server.pretraining.tasks import Pair, Pool, Tasks

EMA_DECAY = 0.998
WHEREABOUTS = 8  # cells a side of the coarse map that the state at <SEG> must hold
LAYOUTS, KINDS = 16, 2  # slices of each of two pools for the retriever, two views of each


@dataclass(frozen=True)
class PretrainConfig:
    """How long and how fast. The run ends at `steps` or, when given, after `minutes` of training."""

    steps: int = 20000
    minutes: float | None = None
    batch: int = 8
    lr: float = 8e-4
    weight_decay: float = 0.02
    warmup: int = 200
    clip: float = 1.0
    seed: int = 0
    synthetic_share: float = 0.6
    region_share: float = 0.4
    bf16: bool = False
    validate_every: int = 400
    weights: LossWeights = field(default_factory=LossWeights)


class Pretraining:
    """The state of one Stage-1 run; `run` trains to the end, wherever it was stopped."""

    def __init__(
        self,
        preset: Preset,
        config: PretrainConfig,
        tasks: Tasks,
        validation: list[Pair],
        out: Path,
        provenance: dict[str, Any],
        device: torch.device | None = None,
        start: Path | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.tasks, self.validation, self.out = config, tasks, validation, Path(out)
        self.device = device or torch.device("cpu")
        self.provenance = provenance
        self.model = (Vessa(preset) if start is None else checkpoint.read(start)[0]).to(self.device).train()
        self.whereabouts = nn.Linear(preset.segmenter.dim, WHEREABOUTS**2).to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.whereabouts.parameters()],
            lr=config.lr,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.rng = np.random.default_rng(config.seed)
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by minutes, whichever is further."""
        shares = [self.step / self.config.steps]
        if self.config.minutes is not None:
            shares.append(self.seconds / (60 * self.config.minutes))
        return min(1.0, max(shares))

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to 2 % of the peak."""
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        return self.config.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * self.progress)) / 2)

    def run(self) -> dict[str, Any]:
        """Train to the end, write weights to `out/weights` and return the run's figures."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("Stage 1", total=1.0)
            while self.progress < 1:
                started = time.perf_counter()
                figures = self._step()
                self.seconds += time.perf_counter() - started
                line = f"step {self.step} loss {figures['loss']:.2f} Dice {figures['dice']:.2f}"
                line += f" val {max(self.best, 0):.3f}"
                bar.update(task, completed=self.progress, description=line)
                if self.step % 20 == 0:
                    self._log(figures)
                if self.step % self.config.validate_every == 0 or self.progress >= 1:
                    self._validate()
                    self.save()
        return {
            "val_dice": self.best,
            "steps": self.step,
            "minutes": self.seconds / 60,
            "weights": str(self.weights),
        }

    @property
    def weights(self) -> Path:
        """Where the best weights by validation Dice are."""
        return self.out / "weights"

    def _step(self) -> dict[str, float]:
        size = self.model.preset.segmenter.image_size
        batch = prepare(self.tasks.batch(self.rng, self.config.batch), self.generator, self.device, size)
        layouts = prepare_layouts(
            *self.tasks.layouts(self.rng, LAYOUTS, KINDS),
            KINDS,
            self.generator,
            self.model.preset.retriever.image_size,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss, figures = training_loss(
            self.model,
            self.whereabouts,
            batch,
            layouts,
            self.config.weights,
            self.generator,
            bf16=self.config.bf16,
        )
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"the loss is {figures['loss']} at step {self.step}; lower the learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.step += 1
        self._update_average(min(EMA_DECAY, self.step / (self.step + 20)))
        return figures

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        own, average = self.model.state_dict(), self.average
        floats = [k for k, v in own.items() if v.is_floating_point()]
        torch._foreach_lerp_([average[k] for k in floats], [own[k] for k in floats], 1 - decay)
        for key in own.keys() - set(floats):
            average[key].copy_(own[key])

    def _log(self, figures: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(
                json.dumps({"step": self.step, "minutes": round(self.seconds / 60, 2), **figures}) + "\n"
            )

    def _validate(self) -> None:
        current = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        dice = validation_dice(self.model, self.validation, self.device)
        self._log({"val_dice": dice})
        if dice > self.best:
            self.best = dice
            figures = {"val_dice": round(dice, 4), "steps": self.step, "config": asdict(self.config)}
            checkpoint.write(self.model, self.weights, {**self.provenance, **figures})
        self.model.load_state_dict(current)

    def save(self) -> None:
        """Write all that `resume` needs, atomically."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"whereabouts.{k}": v for k, v in self.whereabouts.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["torch_rng"] = torch.get_rng_state()
        scalars = {"step": self.step, "seconds": self.seconds, "best": self.best, "drawn": self.tasks.drawn}
        banks = [p.bank.tolist() for p in [*self.tasks.real, *self.tasks.synthetic]]
        metadata = {
            "scalars": json.dumps(scalars),
            "rng": json.dumps(self.rng.bit_generator.state),
            "banks": json.dumps(banks),
        }
        fresh = self.out / ".checkpoint.safetensors"
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, fresh, metadata)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(self.out / "checkpoint.safetensors")

    def resume(self) -> bool:
        """Take up the checkpoint in `out`; False when there is none."""
        path = self.out / "checkpoint.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors: dict[str, Tensor] = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.whereabouts.load_state_dict(
            {k[12:]: v for k, v in tensors.items() if k.startswith("whereabouts.")}
        )
        self.average = {k[8:]: v.to(self.device) for k, v in tensors.items() if k.startswith("average.")}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["torch_rng"])
        scalars = json.loads(metadata["scalars"])
        self.step, self.seconds, self.best = scalars["step"], scalars["seconds"], scalars["best"]
        self.tasks.drawn = scalars["drawn"]
        self.rng.bit_generator.state = json.loads(metadata["rng"])
        for pool, bank in zip(
            [*self.tasks.real, *self.tasks.synthetic], json.loads(metadata["banks"]), strict=True
        ):
            pool.bank = np.array(bank, dtype=int)
        return True


def validation_pairs(pools: list[Pool], count: int, seed: int) -> list[Pair]:
    """Draw fixed pairs, evenly over pools, whose target shows the class."""
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    usable = [p for p in pools if p.classes]
    while len(pairs) < count:
        pool = usable[len(pairs) % len(usable)]
        pool.redraw_bank(rng)
        pair = pool.draw(rng)
        if pair is not None and all((pair.target_mask == c).any() for c in pair.classes):
            pairs.append(pair)
    return pairs
