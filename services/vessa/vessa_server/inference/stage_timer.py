"""Add up the time of each stage of inference."""

import contextlib
import time
from collections.abc import Iterator

import torch

STAGES = ("encode", "retrieve", "language", "attend", "draw", "fuse")


class StageTimer:
    """Adds up the time spent in each stage of inference.

    seconds: by stage, since the start
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a stage; on CUDA it ends when its kernels have."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started
