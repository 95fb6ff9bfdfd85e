"""The processes of one run: each takes its part of every batch, the gradients are averaged.

Started by `torchrun`, accelerate finds the processes and the device of each, and copies the model to all
of them (DDP). FSDP is torch's `fully_shard` itself, because accelerate's runs on GPUs alone and could not
be tested here; it divides the frozen weights, the trained ones and the optimizer among the processes.
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
class Scale:
    """How a step is spread over passes and memory; the loss stays that of the whole batch.

    accumulate: passes a step; shard: FSDP; checkpoint_activations: compute those of the language model
    again on the way back instead of keeping them
    """

    accumulate: int = 1
    shard: bool = False
    checkpoint_activations: bool = False


class Stage1(nn.Module):
    """The model and the head that only training has.

    Its forward runs any function of the two, so that DDP and FSDP, which act when a module is called, see
    all that a step does with them.
    """

    def __init__(self, model: Vessa, whereabouts: nn.Module) -> None:
        super().__init__()
        self.model, self.whereabouts = model, whereabouts

    def forward(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Return function(model, whereabouts, *args, **options)."""
        return function(self.model, self.whereabouts, *args, **options)


class Processes:
    """This process's place among those of the run; a run without `torchrun` has one."""

    def __init__(self, device: torch.device) -> None:
        # nano leaves out parts of itself in some steps, and says nothing of it to DDP
        handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[handler])
        self.count, self.rank = self._accelerator.num_processes, self._accelerator.process_index
        self.device = device if self.count == 1 else self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what all have in common."""
        return self.rank == 0

    def spread(self, stage: Stage1, *, shard: bool) -> nn.Module:
        """Place the model on this process's device and return what is to be called in its stead."""
        if not shard:
            stage.to(self.device)
            prepared: nn.Module = stage if self.count == 1 else self._accelerator.prepare_model(stage)
            return prepared
        if self.count == 1:
            raise InvalidRequest("FSDP divides a model among processes: start several with torchrun")
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in list(stage.modules()):
            if isinstance(module, GradientCheckpointingLayer):  # Qwen's layers, of text and of vision
                fully_shard(module, mesh=mesh)
        # Validation reads the weights between forward passes, so nothing may stay gathered after one.
        fully_shard(stage, mesh=mesh, reshard_after_forward=True)
        return stage

    def backward(self, loss: Tensor) -> None:
        """Add a part's gradients. DDP and FSDP average over processes; our losses are parts of a sum."""
        self._accelerator.backward(loss * self.count)

    @contextlib.contextmanager
    def exchanging(self, stage: nn.Module, now: bool) -> Iterator[None]:
        """Exchange gradients in this pass only when it is the step's last."""
        if isinstance(stage, FSDPModule):
            stage.set_requires_gradient_sync(now)
        with contextlib.nullcontext() if now else self._accelerator.no_sync(stage):
            yield

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes."""
        return self._accelerator.reduce(values.to(self.device), "sum").cpu()

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in all processes at once, or the tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided as `like` is, on its device."""
    if not isinstance(like, DTensor):
        return full.to(like.device)
    mesh = like.device_mesh
    return distribute_tensor(full.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
