"""Run Stage 1: optimizer, schedule, validation, checkpoints, resume."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from vessa.errors import InvalidRequest
from vessa_server.model.geometry import resize
from vessa_server.model.vessa import Vessa
from vessa_server.model.weights import directory
from vessa_server.pretraining import checkpoints
from vessa_server.pretraining.data.pools import Episode, Pool
from vessa_server.pretraining.data.tasks import Tasks
from vessa_server.pretraining.distributed import Processes, Stage1, StepDivision, local, sharded_like, whole
from vessa_server.pretraining.lora import Lora, changing, choose, is_nano, training_mode
from vessa_server.pretraining.losses import LossWeights
from vessa_server.pretraining.step import (
    LayoutBatch,
    Shares,
    TaskBatch,
    counted,
    prepare,
    prepare_layouts,
    retrieval_vectors,
    training_loss,
    validation_scores,
)

EMA_DECAY = 0.998
WHEREABOUTS = 8  # cells per side of the coarse map that is read from the state at <SEG>
LAYOUTS, KINDS = 16, 2  # slices of each of two pools for the retriever, two views of each
NO_LANGUAGE_SHARE, NO_MEMORY_SHARE = 0.1, 0.15  # of the steps
VALIDATION_BATCH = 8
DESCRIBED = 32  # images that the retriever sees in one pass
DECAY_SHARE = 0.3  # of the run, at its end
NANO_LR, OFFICIAL_LR = 8e-4, 4e-5


@dataclass(frozen=True)
class PretrainConfig:
    """Length and speed of a run. It ends at `steps` or, if given, after `minutes` of training.

    batch: episodes per step over all processes; lr: peak, None for 8e-4 (nano) or 4e-5 (official graphs,
    as Sa2VA); lora: of an official language model
    """

    steps: int = 20000
    minutes: float | None = None
    batch: int = 8
    lr: float | None = None
    weight_decay: float = 0.02
    warmup: int = 200
    clip: float = 1.0
    seed: int = 0
    synthetic_share: float = 0.6
    region_share: float = 0.4
    bf16: bool = False
    validate_every: int = 400
    log_every: int = 20
    weights: LossWeights = field(default_factory=LossWeights)
    lora: Lora = field(default_factory=Lora)


class Pretraining:
    """One Stage-1 run; `run` trains from the last checkpoint to the end.

    model: with the weights to start from, changed in place. Raises InvalidRequest when the batch is not
    divisible by the number of processes and passes.
    """

    def __init__(
        self,
        model: Vessa,
        config: PretrainConfig,
        tasks: Tasks,
        validation: list[Episode],
        out: Path,
        provenance: dict[str, Any],
        processes: Processes,
        division: StepDivision | None = None,
    ) -> None:
        self.model, self.config, self.tasks, self.validation = model, config, tasks, validation
        self.out, self.provenance = Path(out), provenance
        self.processes, self.division = processes, division or StepDivision()
        parts = processes.count * self.division.accumulate
        if config.batch % parts:
            raise InvalidRequest(
                f"a batch of {config.batch} episodes cannot be divided among {processes.count} processes "
                f"with {self.division.accumulate} passes each: expected a multiple of {parts}"
            )
        if self.division.shard and is_nano(model):
            raise InvalidRequest("nano fits into every device and is not sharded: remove --fsdp")
        self.peak = config.lr or (NANO_LR if is_nano(model) else OFFICIAL_LR)
        torch.manual_seed(config.seed)  # the same random weights in all processes
        self.adapter = choose(model, config.lora)
        if self.division.checkpoint_activations:
            if model.language is None:
                raise InvalidRequest(
                    "--checkpoint-activations needs a language model, and these weights have none"
                )
            model.language.model.activation_checkpointing_enable()
        self.whereabouts = nn.Linear(model.preset.segmenter.dim, WHEREABOUTS**2)
        self.stage = processes.spread(Stage1(model, self.whereabouts), shard=self.division.shard)
        training_mode(model)
        self.average = {k: v.detach().clone() for k, v in changing(model).items()}
        self.optimizer = torch.optim.AdamW(
            [p for p in [*model.parameters(), *self.whereabouts.parameters()] if p.requires_grad],
            lr=self.peak,
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
        """Finished share of the run: the larger one of steps and minutes."""
        shares = [self.step / self.config.steps]
        if self.config.minutes is not None:
            shares.append(self.seconds / (60 * self.config.minutes))
        return min(1.0, max(shares))

    def learning_rate(self) -> float:
        """Linear warm-up, the peak, then a linear decay to 2 % of it.

        Weights of the constant part can be continued or decayed at any time, which a cosine does not allow.
        """
        warm = min(1.0, (self.step + 1) / self.config.warmup)
        left = min(1.0, (1 - self.progress) / DECAY_SHARE)
        return self.peak * warm * (0.02 + 0.98 * left)

    def run(self) -> dict[str, Any]:
        """Train to the end and return the run's figures.

        The best weights by validation Dice are in `out`: a weights directory of nano, or only the trained
        tensors of an official graph, for `vessa-server weights export`.
        """
        self._describe()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not self.processes.first) as bar:
            task = bar.add_task("Stage 1", total=1.0)
            while self.progress < 1:
                figures = self._step()
                line = f"step {self.step} loss {figures['loss']:.2f} Dice {figures['dice']:.2f}"
                line += f" val {max(self.best, 0):.3f}"
                bar.update(task, completed=self.progress, description=line)
                if self.step % self.config.log_every == 0:
                    self._log(figures)
                if self.step % self.config.validate_every == 0 or self.progress >= 1:
                    self._validate()
                    self.save()
                    self._describe()
        return {
            "val_dice": self.best,
            "steps": self.step,
            "minutes": self.seconds / 60,
            "weights": str(self.weights),
        }

    @property
    def weights(self) -> Path:
        """Path of the best weights by validation Dice."""
        return self.out / ("weights" if is_nano(self.model) else checkpoints.BEST)

    def _step(self) -> dict[str, float]:
        started = time.perf_counter()
        parts, layouts, dropped = self._draw()
        counts = torch.stack([counted(self.model, part) for part in parts])
        shares = (counts / self.processes.sum(counts.sum(0)).clamp(min=1)).tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with self.processes.exchanging(self.stage, last):
                tokens, masks, present = shares[index]
                loss, found = self.stage(
                    training_loss,
                    part.to(self.processes.device),
                    layouts if last else None,
                    self.config.weights,
                    Shares(tokens, masks, present, 1 / self.processes.count),
                    memory=not dropped[0],
                    language=not dropped[1],
                    bf16=self.config.bf16,
                )
                self.processes.backward(loss)
            figures = {k: v + figures[k] if figures else v for k, v in found.items()}
        summed = self.processes.sum(torch.stack(list(figures.values()))).tolist()
        means = dict(zip(figures, summed, strict=True))
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.step}; lower the learning rate"
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.step += 1
        self._update_average(min(EMA_DECAY, self.step / (self.step + 20)))
        # All processes must end at the same step, so they use the mean of their clocks.
        spent = self.processes.sum(torch.tensor([time.perf_counter() - started], dtype=torch.float64))
        self.seconds += spent.item() / self.processes.count
        return means

    def _draw(self) -> tuple[list[TaskBatch], LayoutBatch | None, tuple[bool, bool]]:
        """Draw the batch of a step. All processes draw the same batch; each augments its own parts.

        Returns this process's parts, the layouts, and whether the step runs without memory or language.
        """
        episodes = self.tasks.batch(self.rng, self.config.batch)
        seeds = torch.randint(2**62, (len(episodes),), generator=self.generator)
        no_memory, no_language = torch.rand(2, generator=self.generator).tolist()
        layouts = None
        if is_nano(self.model):
            size = self.model.preset.retriever.image_size
            drawn = self.tasks.layouts(self.rng, LAYOUTS, KINDS)
            layouts = prepare_layouts(*drawn, KINDS, self.generator, size).to(self.processes.device)
        size, side = self.model.preset.segmenter.image_size, 4 * self.model.segmenter.side
        count = len(episodes) // (self.processes.count * self.division.accumulate)
        first = self.processes.rank * self.division.accumulate * count
        starts = range(first, first + self.division.accumulate * count, count)
        parts = [prepare(episodes[i : i + count], seeds[i : i + count], size, side) for i in starts]
        # Dropout depends only on the step and the process, so a checkpoint need not store its generator.
        state = np.random.SeedSequence([self.config.seed, self.step, self.processes.rank])
        torch.manual_seed(int(state.generate_state(1)[0]))
        return parts, layouts, (no_memory < NO_MEMORY_SHARE, no_language < NO_LANGUAGE_SHARE)

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        own = {k: local(v) for k, v in changing(self.model).items()}
        average = {k: local(v) for k, v in self.average.items()}
        floats = [k for k, v in own.items() if v.is_floating_point()]
        torch._foreach_lerp_([average[k] for k in floats], [own[k] for k in floats], 1 - decay)
        for key in own.keys() - set(floats):
            average[key].copy_(own[key])

    def _log(self, figures: dict[str, Any]) -> None:
        if self.processes.first:
            line = {"step": self.step, "minutes": round(self.seconds / 60, 2), **figures}
            with (self.out / checkpoints.METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")

    @torch.no_grad()
    def _validate(self) -> None:
        """Score the averaged weights, which are the ones that are saved."""
        trained = {k: v.detach().clone() for k, v in changing(self.model).items()}
        self._put(self.average)
        dice = self._validation_dice()
        self._log({"val_dice": dice})
        if dice > self.best:
            self.best = dice
            self._keep({"val_dice": round(dice, 4), "steps": self.step, "config": asdict(self.config)})
        self._put(trained)

    def _put(self, tensors: dict[str, Tensor]) -> None:
        for key, value in changing(self.model).items():
            local(value).copy_(local(tensors[key]))

    def _keep(self, figures: dict[str, Any]) -> None:
        provenance = {**self.provenance, **figures}
        if is_nano(self.model):
            if self.processes.first:
                directory.write(self.model, self.weights, provenance)
            return
        tensors = {k: whole(v) for k, v in changing(self.model).items()}
        if self.processes.first:
            checkpoints.save_tensors(self.weights, tensors, {"provenance": json.dumps(provenance)})

    def _validation_dice(self) -> float:
        """Return the mean Dice over the validation episodes, which are augmented equally each time."""
        self.model.eval()
        size, side = self.model.preset.segmenter.image_size, 4 * self.model.segmenter.side
        starts = range(0, len(self.validation), VALIDATION_BATCH)
        total = torch.zeros(2, dtype=torch.float64)
        for first in range(0, len(starts), self.processes.count):
            # With FSDP all processes must run every pass: one without a batch repeats the last batch.
            mine = first + self.processes.rank
            start = starts[min(mine, len(starts) - 1)]
            some = self.validation[start : start + VALIDATION_BATCH]
            batch = prepare(some, torch.arange(start, start + len(some)), size, side)
            scores = self.stage(validation_scores, batch.to(self.processes.device))
            if mine < len(starts):
                total += torch.tensor([scores.sum().item(), len(scores)], dtype=torch.float64)
        dice, count = self.processes.sum(total).tolist()
        training_mode(self.model)
        return dice / count

    def save(self) -> None:
        """Write a checkpoint for `resume` atomically."""
        tensors = {f"model.{k}": v for k, v in changing(self.model).items()}
        tensors |= {f"whereabouts.{k}": v for k, v in self.whereabouts.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        tensors["generator"] = self.generator.get_state()
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "drawn": self.tasks.drawn,
            "rng": self.rng.bit_generator.state,
        }
        checkpoints.save_checkpoint(self.out, tensors, facts, self.processes)

    def resume(self) -> bool:
        """Load the checkpoint in `out`; return False when there is none."""
        found = checkpoints.load_checkpoint(self.out)
        self.processes.wait()
        if self.processes.first:
            checkpoints.cut_metrics(self.out, 0 if found is None else found[1]["metrics_bytes"])
        if found is None:
            return False
        tensors, facts = found
        for key, value in changing(self.model).items():
            local(value).copy_(local(sharded_like(tensors[f"model.{key}"], value)))
            local(self.average[key]).copy_(local(sharded_like(tensors[f"average.{key}"], value)))
        for key, value in self.whereabouts.state_dict().items():
            local(value).copy_(local(sharded_like(tensors[f"whereabouts.{key}"], value)))
        groups = self.optimizer.state_dict()["param_groups"]
        state: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            prefix = f"optimizer.{index}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if own:  # parameters without a gradient so far have no state
                state[index] = {k: v if k == "step" else sharded_like(v, parameter) for k, v in own.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds, self.best = facts["step"], facts["seconds"], facts["best"]
        self.tasks.restore(facts["drawn"])
        self.rng.bit_generator.state = facts["rng"]
        return True

    @torch.no_grad()
    def _describe(self) -> None:
        """Compute the vectors by which Eq. 1 chooses templates, with the retriever of this step."""
        self.model.eval()
        size, device = self.model.preset.retriever.image_size, self.processes.device

        def vectors(images: np.ndarray) -> np.ndarray:
            found = []
            for start in range(0, len(images), DESCRIBED):
                some = torch.from_numpy(images[start : start + DESCRIBED, None]).to(device).float() / 255
                squares = resize(some, (size, size)).expand(-1, 3, -1, -1)
                found.append(self.stage(retrieval_vectors, squares).cpu())
            return torch.cat(found).float().numpy()

        self.tasks.describe(vectors)
        training_mode(self.model)


def validation_episodes(pools: list[Pool], count: int, seed: int) -> list[Episode]:
    """Draw fixed episodes of one template, evenly over pools, whose target shows all of their classes."""
    rng = np.random.default_rng(seed)
    episodes: list[Episode] = []
    usable = [p for p in pools if p.classes]
    while len(episodes) < count:
        pool = usable[len(episodes) % len(usable)]
        pool.redraw_bank(rng)
        episode = pool.draw(rng)
        if episode is not None and all((episode.target_mask == c).any() for c in episode.classes):
            episodes.append(episode)
    return episodes
