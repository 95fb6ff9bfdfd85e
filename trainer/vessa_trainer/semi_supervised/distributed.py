"""Split a run's batches over the processes that torchrun started.

Every process draws the whole batch's views and keeps its rows; logits, labels and confidences are then
gathered, so that each computes the loss of the whole batch, of which its own logits have a gradient. The sum
of the processes' gradients is the gradient of that loss: two processes are one with the same batch, rounding
apart. Statistics of BatchNorm are shared for the same reason.
"""

import atexit
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

from vessa.errors import InvalidConfig

_PATIENCE = timedelta(hours=6)  # the first process seeds banks, validates and writes while the others wait


class Processes:
    """This process's place among those of the run; a run without torchrun has one."""

    def __init__(self, count: int = 1, rank: int = 0, device: str = "cpu") -> None:
        """Take a place. device: where tensors are exchanged."""
        self.count, self.rank, self.device = count, rank, device

    @property
    def first(self) -> bool:
        """Tell whether this is the process that writes, validates and reports."""
        return self.rank == 0

    def places(self, batch: int) -> list[int]:
        """Places in a batch that are this process's: pairs of CutMix, which pastes in reverse order.

        Raises InvalidConfig when the batch cannot be divided so.
        """
        if self.count == 1:
            return list(range(batch))
        if batch % (2 * self.count):
            raise InvalidConfig(
                f"{self.count} processes divide a batch into pairs of images: batch_labeled and "
                f"batch_unlabeled must be multiples of {2 * self.count}, got {batch}"
            )
        half = batch // 2 // self.count
        front = list(range(self.rank * half, (self.rank + 1) * half))
        return front + [batch - 1 - place for place in reversed(front)]

    def gather(self, part: Tensor) -> Tensor:
        """Put the rows of all processes together, (B / count, ...) to (B, ...); gradients go to its own."""
        if self.count == 1:
            return part
        whole = part.detach().contiguous()
        sent = whole.byte() if whole.dtype == torch.bool else whole
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(parts, sent)
        received = [p.to(part.dtype) for p in parts]
        received[self.rank] = part
        return torch.cat(received)

    def add_gradients(self, module: nn.Module) -> None:
        """Sum the gradients of all processes, in one exchange."""
        if self.count == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def total(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Sum figures of one name over the processes."""
        if self.count == 1:
            return dict(counts)
        values = torch.tensor(list(counts.values()), dtype=torch.float64)
        values = values.to(self.device) if self.device != "cpu" else values
        dist.all_reduce(values)
        return dict(zip(counts, values.tolist(), strict=True))

    def any(self, here: bool) -> bool:
        """Tell whether a condition holds in any process."""
        return self.total({"": float(here)})[""] > 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def share_statistics(self, model: nn.Module) -> nn.Module:
        """Let BatchNorm normalize over the batches of all processes; names of the state stay."""
        if self.count > 1:
            for module in model.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = SharedBatchNorm
        return model


class SharedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes; torch's SyncBatchNorm knows GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W), by the statistics of all processes in training."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = values.numel() // values.shape[1]
        sums = torch.cat([values.sum((0, 2, 3)), values.new_tensor([float(count)])])
        sums = differentiable.all_reduce(sums)
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centered = values - mean[:, None, None]
        variance = differentiable.all_reduce(centered.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            momentum = self.momentum if self.momentum is not None else 0.1
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * total / (total - 1), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


ALONE = Processes()


def join(device: str) -> Processes:
    """Join the processes that torchrun started, or be alone.

    device: `cpu`, or `cuda` for a GPU of each process's own. Raises InvalidConfig.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return ALONE
    if device not in ("cpu", "cuda"):
        raise InvalidConfig(f"torchrun gives each process its device: expected cpu or cuda, got '{device}'")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Processes(count, dist.get_rank(), device)
