"""Distribute a run over processes: each computes its part of every batch, gradients are averaged.

Under `torchrun` accelerate finds the processes and their devices and copies the model to each (DDP). FSDP
calls torch's `fully_shard` directly, because accelerate's FSDP needs GPUs and could not be tested here. It
divides the frozen weights, the trained weights and the optimizer among the processes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from vessa.errors import InvalidRequest
from vessa_server.model.vessa import Vessa

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepDivision:
    """How a step is divided into passes and processes; the loss stays that of the whole batch.

    accumulate: passes per step; shard: FSDP; checkpoint_activations: recompute the activations of the
    language model in the backward pass instead of storing them
    """

    accumulate: int = 1
    shard: bool = False
    checkpoint_activations: bool = False


class Stage1(nn.Module):
    """The model and the head that only training uses.

    Its forward runs any function of the two, because DDP and FSDP act only when a module is called.
    """

    def __init__(self, model: Vessa, whereabouts: nn.Module) -> None:
        super().__init__()
        self.model, self.whereabouts = model, whereabouts

    def forward(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Return function(model, whereabouts, *args, **options)."""
        return function(self.model, self.whereabouts, *args, **options)


class Processes:
    """The processes of a run and this process's rank; a run without `torchrun` has one process."""

    def __init__(self, device: torch.device) -> None:
        # in some steps parts of nano are unused, which DDP must detect
        handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[handler])
        self.count, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        self.device = device if self.count == 1 else self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files that all processes share."""
        return self.rank == 0

    def spread(self, stage: Stage1, *, shard: bool) -> nn.Module:
        """Move the model to this process's device; return the module to call instead of it."""
        if not shard:
            stage.to(self.device)
            prepared: nn.Module = stage if self.count == 1 else self._accelerator.prepare_model(stage)
            return prepared
        if self.count == 1:
            raise InvalidRequest("FSDP divides a model among processes: start several with torchrun")
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in list(stage.modules()):
            if isinstance(module, GradientCheckpointingLayer):  # Qwen's layers, text and vision
                fully_shard(module, mesh=mesh)
        # Validation reads the weights between forward passes, so they must be sharded again after each.
        fully_shard(stage, mesh=mesh, reshard_after_forward=True)
        return stage

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part. DDP and FSDP average over processes, but losses here are sums."""
        self._accelerator.backward(loss * self.count)

    @contextlib.contextmanager
    def exchanging(self, stage: nn.Module, now: bool) -> Iterator[None]:
        """Exchange gradients only in the last pass of a step."""
        if isinstance(stage, FSDPModule):
            stage.set_requires_gradient_sync(now)
        with contextlib.nullcontext() if now else self._accelerator.no_sync(stage):
            yield

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        return self._accelerator.reduce(values.to(self.device), "sum").cpu()

    def wait(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full; all processes must call this. Other tensors are unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor in the way of `like`, on its device."""
    if not isinstance(like, DTensor):
        return full.to(like.device)
    mesh = like.device_mesh
    return distribute_tensor(full.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
