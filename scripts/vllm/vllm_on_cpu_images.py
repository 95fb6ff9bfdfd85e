"""Lets torchvision's transforms run beside a torch without CUDA (see env.sh); read at each start of Python.

It only waits for torchvision: importing torch here would cost each start seconds.
"""

import sys
from importlib.machinery import ModuleSpec
from typing import Any

OPERATORS = ("nms", "qnms")  # those that torchvision states facts about when it is imported


class _BeforeTorchvision:
    kept: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.kept = torch.library.Library("torchvision", "DEF")
                for operator in OPERATORS:
                    self.kept.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


_FINDER = _BeforeTorchvision()
sys.meta_path.insert(0, _FINDER)
