"""Write and read the checkpoint that a run resumes from: both models, optimizer, random states, counters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vessa.errors import InvalidWeights
from vessa_trainer.students import checkpoint


@dataclass(frozen=True)
class RunCheckpoint:
    """The checkpoint of one run, and the parts that it saves and restores in place.

    path: of the file; generator: the run's own, on the CPU
    """

    path: Path
    student: nn.Module
    teacher: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator

    def save(self, state: dict[str, Any]) -> None:
        """Write the parts and the run's counters atomically."""
        tensors = checkpoint.module_state(self.student, "student")
        tensors |= checkpoint.module_state(self.teacher, "teacher")
        tensors |= checkpoint.optimizer_state(self.optimizer)
        tensors |= {"generator": self.generator.get_state(), "torch_rng": torch.get_rng_state()}
        checkpoint.write(self.path, tensors, {"state": state})

    def restore(self) -> dict[str, Any]:
        """Restore the parts and return the run's counters. Raises InvalidWeights for another kind of file."""
        tensors, metadata = checkpoint.read(self.path)
        try:
            state: dict[str, Any] = metadata["state"]
            generator, torch_rng = tensors["generator"], tensors["torch_rng"]
        except KeyError as error:
            raise InvalidWeights(f"{self.path} is not the checkpoint of a run: it holds no {error}") from None
        checkpoint.load_module(self.student, tensors, "student")
        checkpoint.load_module(self.teacher, tensors, "teacher")
        checkpoint.load_optimizer(self.optimizer, tensors)
        self.generator.set_state(generator)
        torch.set_rng_state(torch_rng)
        return state

    def step(self) -> int | None:
        """Return the step at which the run was saved last, None before it was."""
        return int(checkpoint.read(self.path)[1]["state"]["step"]) if self.path.is_file() else None
